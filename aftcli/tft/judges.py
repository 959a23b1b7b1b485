"""Judges: other networks, or the same one on the mirrored image, asked what a mask keeps.

A search that asks a network finds what raises this network's probability. A judge took no part in
it, so what a judge gains is of the image.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from aftcli.core.cam import class_score
from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.errors import AftError
from aftcli.models.checkpoint import read_card
from aftcli.models.load import load_classifier
from aftcli.settings import JUDGES, MIRROR, SELF, SOFTMAX
from aftcli.tft.threshold import first_for_all, first_maximum, relative_probability_increase

JUDGED = "judge"  # begins a judge's name in columns and extras of results; no measure's does

FILES = (".safetensors", ".pth", ".pt")  # of checkpoints


@dataclass(frozen=True, eq=False)
class Judge:
    """A network that is asked about the images that another one, f, has seen.

    Attributes:
        name: in tables.
        classifier: the network; None for f itself, which then sees its input flipped left-right.
    """

    name: str
    classifier: Classifier | None = None

    def probabilities(self, f: Classifier, x: Tensor) -> Tensor:
        """Compute the judge's probabilities, shape (N, C).

        Args:
            f: the classifier that x is an input of.
            x: inputs, whole or masked, shape (N, 3, H, W). They become colours by f's
                normalisation, have the judge's size (bilinear, antialiased), channels (grey is
                luma) and normalisation.
        """
        g = self.classifier
        if g is None:
            return f.probabilities(f(x.flip(3)).float())
        mean, std = f.preprocessing.channels(x)
        colours = x * std + mean
        if colours.shape[2:] != g.preprocessing.size:
            colours = interpolate(colours, g.preprocessing.size, mode="bilinear", antialias=True)
        colours = _recoloured(colours, len(g.preprocessing.mean))
        mean, std = g.preprocessing.channels(colours)
        return g.probabilities(g(((colours - mean) / std).to(next(g.parameters()))).float())

    def named_by(
        self, f: Classifier, note: Callable[[str], None], option: str = "--judge"
    ) -> Judge:
        """Return the judge with f's class names, if it has as many classes and none have names.

        Args:
            f: the classifier of the masks.
            note: is told of this guess.
            option: in messages, what names the judge.
        """
        g = self.classifier
        if g is None or g.classes == f.classes or g.classes != Classes.numbered(len(f.classes)):
            return self
        note(
            f"{option} {self.name}: its {len(g.classes)} classes have no names; taken to be those "
            f"of {f.name} in the same order"
        )
        named = copy.copy(g)
        named.classes = f.classes
        return replace(self, classifier=named)

    def matching(self, f: Classifier) -> Tensor:
        """Return the judge's class for each of f's, shape (classes of f,); -1 where it has none."""
        return _matching(f.classes, (self.classifier or f).classes)

    def key(self, f: Classifier) -> str:
        """Name the judge's columns in results: by weights, input, output and f's classes in its."""
        if self.classifier is None:
            return f"{JUDGED}{MIRROR}"  # its weights are f's, which name the whole file
        made = f"{self.weights} {self.classifier.preprocessing} {self.matching(f).tolist()}"
        made += f" {self.classifier.output}" * (self.classifier.output != SOFTMAX)
        return JUDGED + hashlib.sha256(made.encode()).hexdigest()[:10]

    def recorded(self, f: Classifier) -> dict[str, str]:
        """Return the judge as settings of masks of f record it, plain values."""
        return {"name": self.name, "weights": self.weights, "key": self.key(f)}

    @cached_property
    def weights(self) -> str:
        """A hash of the weights; "" for the network itself."""
        return self.classifier.weights_hash() if self.classifier else ""

    def check(self, f: Classifier, option: str = "--judge") -> None:
        """Check that the judge knows some of f's classes.

        Args:
            f: the classifier that inputs are of.
            option: in messages, what names the judge.

        Raises:
            AftError: it knows none, or takes other channels.
        """
        depths = [len(g.preprocessing.mean) for g in (self.classifier or f, f)]
        if len(set(depths)) == 2 and set(depths) != {1, 3}:
            raise AftError(
                f"{option} {self.name}: takes {depths[0]} channels, {f.name} takes {depths[1]}; "
                f"name a network of the same input, or take {option} {MIRROR}"
            )
        if (self.matching(f) < 0).all():
            theirs = (self.classifier or f).classes
            if theirs == Classes.numbered(len(theirs)):
                raise AftError(
                    f"{option} {self.name}: its {len(theirs)} classes have no names, so it can't "
                    f"judge those of {f.name}; take a checkpoint of aft finetune, which has "
                    f"them, or {option} {MIRROR}"
                )
            raise AftError(
                f"{option} {self.name}: has none of the {len(f.classes)} classes of {f.name} by "
                "name or wnid, so it can't judge; name a network with the same classes, or take "
                f"{option} {MIRROR}"
            )


def judges_named(recorded: Sequence[Mapping[str, str]]) -> str:
    """Name the judges of a search, networks with the start of their key.

    >>> judges_named([{"name": "mirror", "weights": "", "key": "judgemirror"}]), judges_named([])
    ('mirror', 'none')
    """
    named = (
        f"{each['name']} ({each['key'].removeprefix(JUDGED)})" if each["weights"] else each["name"]
        for each in recorded
    )
    return ", ".join(named) or "none"


def judges_of(run: Path, made: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the judges of masks, as stores record them.

    Args:
        run: where the masks are.
        made: settings of each store.

    Raises:
        AftError: they differ.
    """
    found = {judges_named(each.get(JUDGES, [])): each.get(JUDGES, []) for each in made}
    if len(found) > 1:
        raise AftError(
            f"{run}: the masks were made with different --tft-judges ({'; '.join(sorted(found))}); "
            "choose some by --cam, or make masks and tune again with the same ones"
        )
    return next(iter(found.values()), [])


LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as a grey input is made of a picture


def _recoloured(colours: Tensor, depth: int) -> Tensor:
    """Give colours, shape (N, C, H, W) of one or three channels, the number that is wanted."""
    if colours.shape[1] == depth:
        return colours
    if depth == 3:
        return colours.expand(-1, 3, -1, -1)
    return (colours * colours.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


@lru_cache(maxsize=64)
def _matching(own: Classes, theirs: Classes) -> Tensor:
    found: list[int | None] | range
    if own == theirs:
        found = range(len(own))
    elif own.wnids and not theirs.wnids:
        # The judge's names mean classes of ImageNet's list, as a data set's do.
        place = {c: i for i, c in enumerate(own.match(theirs.names)) if c is not None}
        found = [place.get(c) for c in range(len(own))]
    elif Classes.numbered(len(own)) == own or Classes.numbered(len(theirs)) == theirs:
        found = [None] * len(own)
    else:
        found = theirs.match(own.wnids or own.names)
    return torch.tensor([-1 if c is None else c for c in found])


@torch.no_grad()
def judged(
    judge: Judge, f: Classifier, x: Tensor, class_index: Tensor, owner: Tensor | None = None
) -> Tensor:
    """Return the judge's p(c | x), shape (N,); NaN where it does not know class c.

    Args:
        judge: who is asked.
        f: the classifier that x is an input of.
        x: inputs, whole or masked, shape (M, 3, H, W).
        class_index: c, a class of f, shape (N,).
        owner: which input each class is of, shape (N,). Default one each.
    """
    theirs = judge.matching(f).to(class_index.device)[class_index]
    p = judge.probabilities(f, x)
    p = p if owner is None else p[owner]
    return torch.where(theirs < 0, torch.nan, class_score(p, theirs.clamp(min=0)))


def best_step(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return the index of tau* in T, shape (N,): by RPI, or by what all judges gain.

    Args:
        y_hat: of the network and each judge, shape (N, 1 + J, |T|); NaN where not tried.
        y: the same for the whole image, shape (N, 1 + J).
    """
    if y.shape[1] > 1:
        return first_for_all(y_hat, y)
    return first_maximum(relative_probability_increase(y_hat[:, 0], y), y[:, 0])


def load_judges(
    names: Sequence[str],
    device: torch.device | str = "cpu",
    note: Callable[[str], None] = warnings.warn,
    option: str = "--judge",
) -> tuple[Judge, ...]:
    """Load judges by name.

    Args:
        names: "mirror", a model's name, a checkpoint file, or MODEL=FILE for a state dict of a
            model; see `load_classifier`.
        device: where they run.
        note: see `load_classifier`.
        option: what names them, in messages.

    Raises:
        AftError: a network can't be had.
    """
    found: dict[str, Judge] = {}
    for text in dict.fromkeys(names):
        if text == MIRROR:
            found[text] = Judge(MIRROR)
            continue
        model, path = _place(text)
        name = path.stem if path else text
        name = text if name in (*found, SELF, MIRROR) else name
        try:
            found[name] = Judge(name, load_classifier(model, path, device=device, note=note))
        except AftError as error:
            unsaid = path and model is None and path.is_file() and read_card(path) is None
            how = f"; for a state dict write {option} MODEL={path}" if unsaid else ""
            raise AftError(f"{option} {text}: {error}{how}") from error
    return tuple(found.values())


def _place(text: str) -> tuple[str | None, Path | None]:
    """Tell a model's name and a checkpoint apart."""
    model, equals, path = text.partition("=")
    if Path(text).is_file() or (not equals and text.endswith(FILES)):
        return None, Path(text)
    return (model, Path(path)) if equals else (text, None)
