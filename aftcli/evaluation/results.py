"""Wishes of an evaluation and its results: on disk, named after their inputs, resumable.

A result file holds one value an image of each measure (docs/reference/files.md). Its name has a
hash of all that decides the values: weights, images, annotations, settings. So a changed input is
another file, and a second call finds the first one's.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.data.blocks import Broken
from aftcli.data.objects import Regions
from aftcli.files import read_sealed, values_hash, write_sealed
from aftcli.measures.registry import BASELINES, MEASURES, completed
from aftcli.settings import Search
from aftcli.tft.judges import JUDGED, Judge
from aftcli.tft.masking import cut_off
from aftcli.tft.threshold import threshold_map

FORMAT_VERSION = 1

HEAD = "aft_result"


class Unit(NamedTuple):
    """One method under one reading of the paper, measured and kept together."""

    cam: str
    masking: str


class Wanted(NamedTuple):
    """The views and the measures of each map.

    Attributes:
        search: the settings of TFT, but for masking and fill; None for plain maps only.
        extras: of `aftcli.measures.registry.EXTRAS`, and "baselines".
        fill: what muted pixels show.
        cells: maps of pixels are averaged over the activation's cells.
        judges: others than the network that say what a mask keeps, by `Judge.key`.
    """

    search: Search | None
    extras: frozenset[str] = frozenset()
    fill: str = "mean"
    cells: bool = False
    judges: Mapping[str, Judge] = MappingProxyType({})

    def asked(self, units: int) -> int:
        """Count the images that a judge is asked about, at the most: a whole one, masked ones."""
        views = 1 + (self.search is not None) + (BASELINES in self.extras)
        return 1 + units * views


@dataclass(frozen=True)
class Images:
    """A batch.

    Attributes:
        x: inputs, shape (N, 3, H, W).
        label: shape (N,).
        index: place in the data set, shape (N,).
        regions: where the objects of a class are in the image of an index.
        every: maps explain the labels, of which an image has several; not the predicted class.
    """

    x: Tensor
    label: Tensor
    index: Tensor
    regions: Callable[[int, int], Regions]
    every: bool = False


class Muting(NamedTuple):
    """The thresholds of a view: tau of each image, shape (N,), and what it cuts (`cut_off`)."""

    tau: Tensor
    mode: str

    def of(self, maps: Tensor) -> Tensor:
        """Return I_tau of maps I, shape (N, H, W)."""
        return threshold_map(maps, cut_off(maps, self.tau[:, None], self.mode)[:, 0])

    def equals(self, other: Muting) -> Tensor:
        """Tell which images both mute alike, shape (N,), bool; tau = 0 mutes nothing."""
        either_zero = (self.tau == 0) | torch.tensor(self.mode == other.mode).to(self.tau.device)
        return (self.tau == other.tau) & either_zero


class View(NamedTuple):
    """The measures of maps that are muted in one way, one value an image.

    Attributes:
        y_hat: y^c of the masked image, shape (N,).
        measures: by a key of MEASURES, shape (N,) each; NaN where undefined. Those of
            probabilities alone are not among them (`aftcli.evaluation.batch.measure`).
    """

    y_hat: Tensor
    measures: dict[str, Tensor]


class Verdict(NamedTuple):
    """A judge's p(c | x), one value an image; NaN where it does not know the class c.

    Attributes:
        y: of the whole image, shape (N,).
        y_hat: of the masked image, by the name of the view, shape (N,) each.
    """

    y: Tensor
    y_hat: dict[str, Tensor]


@dataclass(frozen=True)
class Values:
    """The measured values of some images, of one method under one reading of the paper.

    Attributes:
        index: place in the data set, shape (N,).
        label: shape (N,).
        class_index: c, the class that is explained, shape (N,).
        probability: y^c, shape (N,).
        views: by name: original, fixed, tft; or those of `CONTROLLED` of measures.
        tau: tau*, shape (N,); None without a search.
        curve: y_hat^c over T, shape (N, |T|); None without a search.
        amounts: what controls of the plain map keep, by their setting: the area of each shift
            with binary masks, the mean of each gamma with soft ones; None without controls.
        judges: what others than the network say, by their keys (`Judge.key`).
        scores: probabilities of all classes, shape (N, classes), where an image has several
            labels; otherwise None.
    """

    index: Tensor
    label: Tensor
    class_index: Tensor
    probability: Tensor
    views: dict[str, View]
    tau: Tensor | None = None
    curve: Tensor | None = None
    amounts: Tensor | None = None
    judges: dict[str, Verdict] = field(default_factory=dict)
    scores: Tensor | None = None

    def columns(self) -> dict[str, Tensor]:
        """Name the values as files do (docs/reference/files.md)."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name, view in self.views.items():
            of_view = {"y_hat": view.y_hat, **view.measures}
            own |= {f"{name}/{measure}": values for measure, values in of_view.items()}
        for key, verdict in self.judges.items():
            of_judge = {"y": verdict.y, **verdict.y_hat}
            own |= {f"{key}/{view}": values for view, values in of_judge.items()}
        return own

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> Values:
        """Read the columns of a file."""
        views: dict[str, dict[str, Tensor]] = {}
        judges: dict[str, dict[str, Tensor]] = {}
        for name in columns:
            whose, slash, what = name.partition("/")
            if slash:
                group = judges if whose.startswith(JUDGED) else views
                group.setdefault(whose, {})[what] = columns[name]
        own = {name: value for name, value in columns.items() if "/" not in name}
        return cls(
            **own,
            views={name: View(m.pop("y_hat"), m) for name, m in views.items()},
            judges={key: Verdict(m.pop("y"), m) for key, m in judges.items()},
        )


def measure(values: Values, view: str, name: str, judge: str | None = None) -> Tensor:
    """Return one value an image of a measure, shape (N,), NaN where undefined.

    Args:
        values: of one method.
        view: of its maps.
        name: a key of MEASURES; of controls those that cost passes are undefined.
        judge: the key of who gives y and y_hat; None for the network itself.
    """
    own = values.views[view]
    if not MEASURES[name].of_probabilities:
        return own.measures.get(name, torch.full_like(own.y_hat, torch.nan))
    y, y_hat = values.probability, own.y_hat
    if judge is not None:
        y, y_hat = values.judges[judge].y, values.judges[judge].y_hat[view]
    return torch.where(y.isnan() | y_hat.isnan(), torch.nan, MEASURES[name].load()(y_hat, y))


def classified(values: Values, names: Sequence[str]) -> tuple[Tensor, float | None]:
    """Compare predicted classes with labels.

    Args:
        values: of one method.
        names: of the samples of the data set; of an image with several labels several times.

    Returns:
        1 for each image whose class is one of its labels, otherwise 0, shape (images,). And the
        mean average precision over the classes that occur, where images have several labels.
    """
    if values.scores is None:
        return (values.class_index == values.label).double(), None
    from torchmetrics.functional.classification import binary_average_precision

    rows: dict[str, list[int]] = {}
    for row, index in enumerate(values.index.tolist()):
        rows.setdefault(names[index], []).append(row)
    scores = values.scores[[own[0] for own in rows.values()]]
    shown = torch.zeros(scores.shape, dtype=torch.long)
    for image, own in enumerate(rows.values()):
        shown[image, values.label[own].long()] = 1
    right = shown.gather(1, scores.argmax(1, keepdim=True))[:, 0].double()
    occurring = shown.any(0).nonzero()[:, 0].tolist()
    each = [binary_average_precision(scores[:, c], shown[:, c]) for c in occurring]
    return right, float(torch.stack(each).mean())


class Result(NamedTuple):
    """A stored result.

    Attributes:
        columns: tensors by their names in the file; none where no image could be read.
        broken: images that could not be read.
        identity: what it was computed from.
        extras: of the measures among them that cost much.
    """

    columns: dict[str, Tensor]
    broken: list[Broken]
    identity: dict[str, Any]
    extras: frozenset[str]

    @property
    def values(self) -> Values | None:
        """The columns of an evaluation; None where no image could be read."""
        return Values.of(self.columns) if self.columns else None


class ResultFile:
    """A result and, until it is complete, its parts.

    Args:
        folder: of the results.
        stem: of the file's name.
        identity: plain values; all that decides what the columns hold.
        extras: of measures that cost much (`extras_of` of measures); a file with more is reused.
        names: of the classes, where only their user knows them; they change no value.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        identity: Mapping[str, Any],
        extras: frozenset[str],
        names: Sequence[str] = (),
    ) -> None:
        whole = {"format_version": FORMAT_VERSION, **identity}
        self.identity: dict[str, Any] = json.loads(json.dumps(whole, sort_keys=True))
        self.key = values_hash(whole)[:12]
        self.folder, self.stem, self.extras, self.names = folder, stem, extras, names
        self.path = folder / f"{stem}-{self.key}.safetensors"
        self.parts = folder / f".{'-'.join([stem, self.key, *sorted(extras)])}.parts"

    def read(self, span: range | None = None) -> Result | None:
        """Read the result, or a block of it; None if missing, damaged or without its extras."""
        stored = self._stored(self.path if span is None else self._part(span))
        return stored if stored and self.extras <= stored.extras else None

    def lacking(self) -> ResultFile | None:
        """Return the file of what is still to be measured, joined later; None if all is there."""
        there = self._stored(self.path)
        if there is None:
            return self
        if self.extras <= there.extras:
            return None
        new = completed(self.extras - there.extras)
        # Fixed cut-offs are another view, which has all measures that the others have.
        if BASELINES in there.extras:
            new |= {BASELINES}
        elif BASELINES in new:
            # Only those judges can be asked about the new view that are at hand.
            new |= self.extras | _measures(there.extras)
        return ResultFile(self.folder, self.stem, self.identity, new, self.names)

    def has(self, span: range) -> bool:
        """Tell if a block of images is done."""
        return self.read(span) is not None

    def write(self, columns: Mapping[str, Tensor]) -> None:
        """Store a result that has no parts."""
        self._write(self.path, columns, [], self.extras)

    def write_part(
        self, span: range, columns: Mapping[str, Tensor], broken: Sequence[Broken]
    ) -> None:
        """Store a block of images."""
        self.parts.mkdir(parents=True, exist_ok=True)
        self._write(self._part(span), columns, broken, self.extras)

    def join(self, spans: Iterable[range]) -> bool:
        """Make one file of all blocks and of the measures there; False if a block is damaged."""
        read = [self.read(span) for span in spans]
        whole = [part for part in read if part is not None]
        if len(whole) < len(read):
            return False
        # A block of broken images has no columns.
        names = next((part.columns for part in whole if part.columns), {})
        columns = {n: torch.cat([p.columns[n] for p in whole if p.columns]) for n in names}
        broken, extras = [b for part in whole for b in part.broken], self.extras
        there = self._stored(self.path)
        # Only images that did not fit into memory can be readable once and not again.
        if there and [b.path for b in there.broken] == [b.path for b in broken]:
            kept = there.extras
            if BASELINES in extras - kept:
                # A judge that was not asked about the new view is to be asked again.
                kept = _measures(kept)
            columns, extras = columns | there.columns, extras | kept
        self._write(self.path, columns, broken, extras)
        self._clear_parts(extras)
        return True

    def clear(self) -> None:
        """Delete what is there."""
        self.path.unlink(missing_ok=True)
        self._clear_parts(None)

    def clear_parts(self) -> None:
        """Delete the blocks of this file."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _clear_parts(self, extras: frozenset[str] | None) -> None:
        """Delete the blocks of this result that have no more than these extras; None is any."""
        start = f".{self.stem}-{self.key}"
        for parts in self.folder.glob(f"{glob.escape(start)}*.parts"):
            own = parts.name.removeprefix(start).removesuffix(".parts").split("-")[1:]
            if extras is None or extras >= set(own):
                shutil.rmtree(parts, ignore_errors=True)

    def _part(self, span: range) -> Path:
        return self.parts / f"{span.start:09d}-{span.stop:09d}"

    def _write(
        self,
        path: Path,
        columns: Mapping[str, Tensor],
        broken: Sequence[Broken],
        extras: frozenset[str],
    ) -> None:
        head = {"identity": self.identity, "broken": broken, "extras": sorted(extras)}
        head |= {"class_names": list(self.names)} if self.names else {}
        write_sealed(path, columns, HEAD, head)

    def _stored(self, path: Path) -> Result | None:
        """Read a file, whatever is wanted; None if it is missing, damaged or of other inputs."""
        columns, head = read_sealed(path, HEAD) or ({}, {})
        if head.get("identity") != self.identity:
            return None
        broken = [Broken(*b) for b in head["broken"]]
        return Result(columns, broken, self.identity, frozenset(head["extras"]))


def with_kept_names(f: Classifier, run: Path) -> Classifier:
    """Name a network's classes as earlier results of its weights do, where nobody else has."""
    if f.classes == Classes.numbered(len(f.classes)):
        weights = f.weights_hash()
        for path in sorted((run / "results").glob("*.safetensors")):
            _, head = read_sealed(path, HEAD) or ({}, {})
            names, identity = head.get("class_names", []), head.get("identity", {})
            if identity.get("weights") == weights and len(names) == len(f.classes):
                f.classes = Classes(tuple(map(str, names)))
    return f


def _measures(extras: frozenset[str]) -> frozenset[str]:
    """Return the extras that are no judges."""
    return frozenset(extra for extra in extras if not extra.startswith(JUDGED))
