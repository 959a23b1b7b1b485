"""What the measures say of a batch of images: plain maps, fixed cut-offs and TFT (§5.2).

Three views of a map: `original`, the map itself, which is tau = 0; `fixed`, the share of Table 1
muted; `tft`, the map with tau* found for this image. AFT and the control are other classifiers,
of which there is only the original view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.core.cam import class_score, map_of
from aftcli.core.classifier import Classifier, probabilities
from aftcli.core.methods import METHODS
from aftcli.data.objects import Regions
from aftcli.evaluation import metrics
from aftcli.evaluation.metrics import road
from aftcli.settings import Search
from aftcli.tft.search import masked_probabilities
from aftcli.tft.threshold import (
    cut_off,
    first_maximum,
    mask_of,
    masked_image,
    relative_probability_increase,
    threshold_map,
)

Columns = dict[str, Tensor]  # one value, or one curve, an image, by name


class Unit(NamedTuple):
    """What is measured, and kept, together: one method under one reading of the paper."""

    cam: str
    masking: str


class Wanted(NamedTuple):
    """What is measured of each map.

    Attributes:
        search: the settings of TFT, but for masking and fill; None for plain maps only.
        extras: of `aftcli.evaluation.measures.EXTRAS`, and "baselines".
        fill: what muted pixels show.
        cells: maps of pixels are averaged over the activation's cells.
    """

    search: Search | None
    extras: frozenset[str] = frozenset()
    fill: str = "mean"
    cells: bool = False


@dataclass(frozen=True)
class Images:
    """A batch.

    Attributes:
        x: inputs, shape (N, 3, H, W).
        label: shape (N,).
        index: place in the data set, shape (N,).
        regions: where the objects of a class are in the image of an index.
    """

    x: Tensor
    label: Tensor
    index: Tensor
    regions: Callable[[int, int], Regions]


class Muting(NamedTuple):
    """How a view mutes a map: tau of each image, shape (N,), and what it cuts (`cut_off`)."""

    tau: Tensor
    mode: str

    def of(self, maps: Tensor) -> Tensor:
        """I_tau of maps I, shape (N, H, W)."""
        return threshold_map(maps, cut_off(maps, self.tau[:, None], self.mode)[:, 0])

    def equals(self, other: Muting) -> Tensor:
        """Whether both mute the same of an image's maps, shape (N,), bool; tau = 0 mutes none."""
        either_zero = (self.tau == 0) | torch.tensor(self.mode == other.mode).to(self.tau.device)
        return (self.tau == other.tau) & either_zero


@dataclass(frozen=True)
class _Maps:
    """The maps of one method for a batch."""

    f: Classifier
    cam: str
    x: Tensor
    class_index: Tensor
    probability: Tensor
    index: Tensor
    attribution: Tensor
    regions: Sequence[Regions]

    def at(self, rows: Tensor) -> _Maps:
        """Those of some images."""
        tensors = (self.x, self.class_index, self.probability, self.index, self.attribution)
        x, class_index, probability, index, attribution = (t[rows.to(t.device)] for t in tensors)
        regions = [self.regions[int(i)] for i in rows]
        return _Maps(self.f, self.cam, x, class_index, probability, index, attribution, regions)

    def probability_of(self, x: Tensor) -> Tensor:
        return class_score(probabilities(self.f(x).float()), self.class_index)


def passes(wanted: Wanted, units: int) -> int:
    """How many images pass the network, at the most, to measure the maps of one."""
    curve = len(wanted.search.thresholds) + 1 if wanted.search else 1
    extras = {
        "adcc": 1,
        "insertion": 2 * (metrics.STEPS + 1),
        "road": len(metrics.ROAD_SHARES),
    }
    views = 2 if wanted.search else 1
    return 1 + units * (
        curve + views * sum(n for name, n in extras.items() if name in wanted.extras)
    )


@torch.no_grad()
def measure_batch(
    f: Classifier, images: Images, units: Sequence[Unit], wanted: Wanted
) -> dict[Unit, Columns]:
    """Measure the maps of the predicted classes, with one pass of the stem for all units.

    Args:
        f: the classifier.
        images: the batch.
        units: methods and maskings.
        wanted: what is measured.

    Returns:
        For each unit columns `index, label, class_index, probability`, with a search `tau` and
        `curve`, y_hat^c over T, and for each view `VIEW/MEASURE`, where the measure `y_hat` is
        the probability of the masked image. NaN where a measure is undefined.
    """
    x = images.x
    activation = f.activation(x)
    probability, class_index = probabilities(f.head(activation).float()).max(1)
    regions = [
        images.regions(int(i), int(c)) for i, c in zip(images.index, class_index, strict=True)
    ]
    maps = {}
    for cam in dict.fromkeys(unit.cam for unit in units):
        attribution = map_of(f, activation, class_index, x, cam, wanted.cells)
        maps[cam] = _Maps(f, cam, x, class_index, probability, images.index, attribution, regions)
    common = {
        "index": images.index,
        "label": images.label,
        "class_index": class_index.cpu(),
        "probability": probability.cpu(),
    }
    measured: dict[str, list[tuple[Muting, Columns]]] = {cam: [] for cam in maps}
    found: dict[Unit, Columns] = {}
    for masking in dict.fromkeys(unit.masking for unit in units):
        own = [unit.cam for unit in units if unit.masking == masking]
        for cam, (columns, views) in _scores(maps, own, masking, wanted).items():
            for view, muting in views.items():
                of_map = _of_maps(maps[cam], muting, wanted, measured[cam])
                columns |= {f"{view}/{name}": v for name, v in of_map.items()}
            found[Unit(cam, masking)] = common | {k: v.cpu() for k, v in columns.items()}
    return found


def _scores(
    maps: dict[str, _Maps], cams: Sequence[str], masking: str, wanted: Wanted
) -> dict[str, tuple[Columns, dict[str, Muting]]]:
    """Probabilities of the masked images, and the views: one search for all methods."""
    some = maps[cams[0]]
    count = len(some.x)
    attribution = torch.cat([maps[cam].attribution for cam in cams])
    thresholds = wanted.search.thresholds if wanted.search else ()
    mode = wanted.search.mode if wanted.search else "value"
    nothing = attribution.new_zeros(count)
    fixed = {cam: Muting(nothing + (METHODS[cam].muted or 0), "percentile") for cam in cams}
    cut = torch.cat(
        [
            cut_off(attribution, attribution.new_tensor(thresholds), mode),
            nothing.repeat(len(cams))[:, None],
            torch.cat(
                [cut_off(maps[c].attribution, m.tau[:, None], m.mode) for c, m in fixed.items()]
            ),
        ],
        1,
    )
    baselines = "baselines" in wanted.extras
    y_hat = masked_probabilities(
        some.f,
        some.x,
        attribution,
        cut if baselines else cut[:, :-1],
        some.class_index.repeat(len(cams)),
        some.probability.repeat(len(cams)),
        torch.arange(count, device=cut.device).repeat(len(cams)),
        masking,
        wanted.fill,
    )
    found: dict[str, tuple[Columns, dict[str, Muting]]] = {}
    for i, cam in enumerate(cams):
        own = y_hat[i * count : (i + 1) * count]
        columns = {"original/y_hat": own[:, len(thresholds)]}
        views = {"original": Muting(nothing, "value")}
        if baselines and METHODS[cam].muted is not None:
            columns["fixed/y_hat"] = own[:, -1]
            views["fixed"] = fixed[cam]
        if wanted.search:
            curve = own[:, : len(thresholds)]
            rpi = relative_probability_increase(curve, some.probability[:, None])
            best = first_maximum(rpi, some.probability)
            tau = attribution.new_tensor(thresholds)[best]
            y_best = curve.gather(1, best[:, None])[:, 0]
            columns |= {"tau": tau, "curve": curve, "tft/y_hat": y_best}
            views["tft"] = Muting(tau, mode)
        found[cam] = columns, views
    return found


def _of_maps(
    maps: _Maps, muting: Muting, wanted: Wanted, known: list[tuple[Muting, Columns]]
) -> Columns:
    """The measures that do not depend on the masking; images muted as before are not run again."""
    left = torch.ones_like(muting.tau, dtype=torch.bool)
    found: Columns = {}
    for other, columns in known:
        same = muting.equals(other) & left
        for name, values in columns.items():
            found[name] = torch.where(same.to(values.device), values, found.get(name, values))
        left &= ~same
    rows = left.nonzero()[:, 0].cpu()
    if len(rows):
        measured = _of_map(maps.at(rows), Muting(muting.tau[left], muting.mode), wanted)
        for name, values in measured.items():
            found[name] = found.get(name, values.new_zeros(len(left))).clone()
            found[name][rows.to(values.device)] = values
    known.append((muting, found))
    return found


def _of_map(maps: _Maps, muting: Muting, wanted: Wanted) -> Columns:
    f, x, c = maps.f, maps.x, maps.class_index
    shown = muting.of(maps.attribution)
    mask = mask_of(shown)
    found = {
        "area": mask.float().flatten(1).mean(1),
        "complexity": metrics.complexity(shown),
        **_on_objects(shown, mask, maps.regions),
    }
    if "adcc" in wanted.extras:
        x_hat = masked_image(x, shown, torch.zeros_like(x))
        activation = f.activation(x_hat)
        y_hat = class_score(probabilities(f.head(activation).float()), c)
        of_masked = muting.of(map_of(f, activation, c, x_hat, maps.cam, wanted.cells))
        drop = metrics.drop(y_hat, maps.probability)
        found["coherency"] = metrics.coherency(shown, of_masked)
        found["adcc"] = metrics.adcc(found["coherency"], found["complexity"], drop)
    if "insertion" in wanted.extras:
        found["insertion"] = metrics.insertion(x, shown, maps.probability_of)
        found["deletion"] = metrics.deletion(x, shown, maps.probability_of)
    if "road" in wanted.extras:
        found["road"] = road(x, shown, maps.probability_of, maps.index.tolist())
    return found


def _on_objects(shown: Tensor, mask: Tensor, regions: Sequence[Regions]) -> Columns:
    """Measures against boxes and segmentations; NaN where the class has none in the image."""
    nothing = torch.full((len(shown),), torch.nan)
    names = ("energy", "pointing", "iou", "energy_segmentation", "iou_segmentation")
    found = {name: nothing.clone() for name in names}
    for n, region in enumerate(regions):
        one = slice(n, n + 1)
        if region.boxes is not None:
            boxes = region.boxes[None].to(shown.device)
            found["energy"][n] = metrics.energy(shown[one], boxes)[0]
            found["pointing"][n] = metrics.pointing(shown[one], boxes)[0]
            found["iou"][n] = metrics.iou(mask[one], boxes)[0]
        if region.segmentation is not None and region.counted is not None:
            seen = region.segmentation[None].to(shown.device)
            counted = region.counted[None].to(shown.device)
            found["energy_segmentation"][n] = metrics.energy(shown[one] * counted, seen)[0]
            found["iou_segmentation"][n] = metrics.iou(mask[one], seen, counted)[0]
    return found


def measure(columns: Columns, view: str, name: str) -> Tensor:
    """One value an image of a measure, shape (N,), from the columns of a unit.

    Args:
        columns: of `measure_batch`.
        view: original, fixed or tft.
        name: a key of MEASURES.
    """
    of_probabilities = {
        "average_increase": metrics.increase,
        "average_drop": metrics.drop,
        "average_gain": metrics.gain,
    }
    if name in of_probabilities:
        return of_probabilities[name](columns[f"{view}/y_hat"], columns["probability"])
    return columns[f"{view}/{name}"]
