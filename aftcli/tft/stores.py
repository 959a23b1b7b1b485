"""The mask stores of a run, and the classifiers that they were made with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aftcli.core.classifier import Classes, Classifier
from aftcli.core.methods import METHODS
from aftcli.core.models import load_classifier
from aftcli.errors import AftError
from aftcli.tft.hdf5 import Rows
from aftcli.tft.masks import MaskStore, differences


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
    note: Callable[[str], None] = warnings.warn

    def load(self) -> Classifier:
        """Load the classifier."""
        name, checkpoint, layer, classes, device, _, known, note = self
        f = load_classifier(name, checkpoint, layer, classes=classes, device=device, note=note)
        if classes is None and len(known) == len(f.classes):
            f.classes = Classes(known)
        return f

    def of_masks(self, made: dict[str, Any]) -> Source:
        """Fill in the classifier that masks were made with where nothing else was asked for."""
        recorded = made.get("checkpoint")  # "" for published weights
        return self._replace(
            model=self.model or made["model"],
            checkpoint=self.checkpoint or (Path(recorded) if recorded else None),
            layer=self.layer or made["layer"],
            known=tuple(made.get("class_names", ())),
        )


def open_stores(run: Path, model: str | None, cams: Sequence[str]) -> list[MaskStore]:
    """Open the mask stores that a run has, perhaps none; arguments as of `find_stores`."""
    paths = sorted((run / "masks").glob("*.h5"))
    stores = [MaskStore(path) for path in paths if not path.name.startswith(".")]
    for store in stores:
        if store.settings["cam"] not in METHODS:
            raise AftError(
                f"{store.path}: its masks are of a method that this aft does not know "
                f"({store.settings['cam']}); take the file out of the folder"
            )
    return [
        s
        for s in stores
        if model in (None, s.settings["model"]) and (not cams or s.settings["cam"] in cams)
    ]


def find_stores(run: Path, model: str | None, cams: Sequence[str]) -> list[MaskStore]:
    """Open the mask stores of a run.

    Args:
        run: where the study lives.
        model: only those of this model; None for all.
        cams: only those of these methods; empty for all.
    """
    found = open_stores(run, model, cams)
    missing = set(cams) - {s.settings["cam"] for s in found}
    if not found or missing:
        whose = f" of {model}" if model else ""
        which = f" by {', '.join(sorted(missing))}" if missing else ""
        paths = sorted((run / "masks").glob("*.h5"))
        there = ", ".join(path.name for path in paths) or "nothing"
        raise AftError(
            f"{run / 'masks'}: there are no masks{whose}{which} (there is {there}); make them with "
            "aft gen-masks DATASET, or pass the --run that has them"
        )
    return found


def check_made_for(store: MaskStore, f: Classifier) -> None:
    """Check that masks were made for a classifier."""
    made = store.settings
    asked = {
        "model": f.name,
        "layer": f.layer_name,
        "weights": f.weights_hash(),
        "activation_shape": list(f.activation_shape),
        "preprocessing": f.preprocessing.as_dict(),
    }
    other = differences({key: made[key] for key in asked}, asked)
    if other:
        raise AftError(
            f"{store.path}: the masks were made for another classifier: {'; '.join(other)}; pass "
            "the --model, --checkpoint and --layer that they were made with, or make them again "
            "with aft gen-masks"
        )


def stored_contents(store: MaskStore) -> list[int]:
    """Read the content of each image of a store (`content_of`)."""
    found: list[int] = np.concatenate([c.content for c in chunks_of(store)]).tolist()
    return found


def chunks_of(store: MaskStore) -> list[Rows]:
    """Read a store, some thousand rows at a time."""
    return [store.rows(i, min(i + 4096, len(store))) for i in range(0, len(store), 4096)]


def advice(f: Classifier) -> str:
    """Say what to do if a data set's labels are not among a classifier's classes.

    A network that its user has trained is never to be replaced.
    """
    if f.classes == Classes.numbered(len(f.classes)):
        return (
            f"; its {len(f.classes)} classes have no names: name them by --classes FILE, one a "
            "line, in the order of its outputs"
        )
    if f.checkpoint:
        return (
            "; name a data set of its classes, call the folders as its classes are called, or name "
            "the classes by --classes FILE, one a line, in the order of its outputs"
        )
    return (
        "; name a data set of its classes, or give it an output for each of these: aft finetune "
        "DATASET --no-masks, then run aft gen-masks and aft finetune with the --checkpoint that "
        "this writes"
    )
