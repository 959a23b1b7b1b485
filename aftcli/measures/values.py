"""Values of measures, one an image: what is asked for, of which images, in which views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.data.objects import Regions
from aftcli.measures.registry import BASELINES, MEASURES
from aftcli.settings import Search
from aftcli.tft.judges import JUDGED, Judge
from aftcli.tft.masking import cut_off
from aftcli.tft.threshold import threshold_map


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
            probabilities alone are not among them (`aftcli.measures.values.measure`).
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
