"""Sources of classifiers: what was asked for, filled in by what files say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.core.inputs import check_images
from aftcli.models.checkpoint import card_classes
from aftcli.models.load import load_classifier
from aftcli.networks.sources import is_model, refuse_unnamed
from aftcli.settings import AUTO, SOFTMAX


class Source(NamedTuple):
    """Source of classifiers: arguments of `load_classifier`; None takes what the masks say.

    `earlier` are layers before `layer` that are tuned with it; `known` are class names from
    earlier commands, such as a mask store's.
    """

    model: str | None = None
    checkpoint: Path | None = None
    layer: str | None = None
    classes: tuple[str, ...] | None = None
    device: torch.device | str = "cpu"
    earlier: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    output_key: str | None = None
    note: Callable[[str], None] = warnings.warn
    output: str = AUTO

    def load(self) -> Classifier:
        """Load the classifier.

        Raises:
            AftError: it takes volumes, which no file that is read here holds, or see
                `load_classifier`.
        """
        f = load_classifier(
            self.model,
            self.checkpoint,
            self.layer,
            classes=self.classes,
            device=self.device,
            output=self.output,
            output_key=self.output_key,
            note=self.note,
        )
        check_images(f)
        if self.classes is None and len(self.known) == len(f.classes):
            f.classes = Classes(self.known)
        return f

    def takes(self, name: str) -> bool:
        """Tell if a model that a file names is one that is asked for."""
        return is_model(self.model, name)

    def of_model(self, name: str, of: str | Path) -> Source:
        """Fill in the model that a file names, where none was asked for.

        Raises:
            AftError: that is somebody's own code, or on a hub.
        """
        if self.model is None:
            refuse_unnamed(name, of)
        return self._replace(model=self.model or name)

    def of_masks(self, made: dict[str, Any]) -> Source:
        """Fill in the classifier that masks were made with where nothing else was asked for.

        Raises:
            AftError: that is somebody's own code, or on a hub.
        """
        recorded = made.get("checkpoint")  # "" for published weights
        return self.of_model(made["model"], "the masks")._replace(
            checkpoint=self.checkpoint or (Path(recorded) if recorded else None),
            layer=self.layer or made["layer"],
            output=made.get("output", SOFTMAX) if self.output == AUTO else self.output,
            known=tuple(made.get("class_names", ())) or self.known,
            output_key=self.output_key or made.get("output_key"),
        )

    def named_by(
        self, stores: Sequence[Mapping[str, Any]], cards: Sequence[Mapping[str, Any]]
    ) -> Source:
        """Take the first class names that settings of stores or cards of checkpoints hold."""
        found = [tuple(made.get("class_names", ())) for made in stores]
        names = next(filter(None, [*found, *(card_classes(card).own for card in cards)]), ())
        return self._replace(known=names)
