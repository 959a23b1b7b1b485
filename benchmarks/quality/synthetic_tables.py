"""Tables of docs/results/synthetic.md: maps against the truth, and measures against the same."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from aftcli.measures.intervals import estimate

Floats = NDArray[np.float64]

VIEWS = ("plain", "tft", "shift")

# Measures that need no truth; -1 where a lower value is meant to be better.
MEASURES = {
    "increase, binary": 1,
    "drop, binary": -1,
    "gain, binary": 1,
    "increase, soft": 1,
    "drop, soft": -1,
    "gain, soft": 1,
    "insertion": 1,
    "deletion": -1,
    "ROAD": -1,
    "coherency": 1,
    "ADCC": 1,
    "complexity": -1,
    "kept area": -1,
}

OF_METHODS = ("coherency", "ADCC")  # ask for a second map, which the truth has no method for

RESAMPLES = 300

PACKAGES = ("torch", "numpy", "scipy", "captum", "zennit")


@dataclass(frozen=True)
class Table:
    """All values.

    Attributes:
        values: of each method, view and measure, one an image, shape (N,).
        references: of maps that no method made, by name and measure.
        control: 1 for each image whose class was found, by what was shown.
        seconds: that training and everything took.
    """

    values: dict[str, dict[str, dict[str, Tensor]]]
    references: dict[str, dict[str, Tensor]]
    control: dict[str, Tensor]
    seconds: dict[str, float]

    def matrix(self, measure: str) -> Floats:
        """Return a measure of every method and view, shape (rows, N); NaN where it was left out."""
        rows = [
            by_view[view][measure].numpy() for by_view in self.values.values() for view in VIEWS
        ]
        return np.stack(rows)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return _each(asdict(self), Tensor.tolist)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Table:
        """Build it from what `as_json` gave."""
        return cls(**_each(stored, lambda values: torch.tensor(values, dtype=torch.double)))


def _each(found: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - JSON
    """Change the lists and tensors of nested dictionaries."""
    if isinstance(found, dict):
        return {key: _each(value, change) for key, value in found.items()}
    return change(found) if isinstance(found, list | Tensor) else found


def spearman(one: Floats, two: Floats) -> Floats:
    """Return Spearman's correlation along the last axis; NaN where either is constant."""
    a, b = (rankdata(each, axis=-1) for each in (one, two))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.where(scale > 0, (a * b).sum(-1) / scale, np.nan)  # type: ignore[no-any-return]


def over_rows(measure: Floats, truth: Floats) -> float:
    """Correlate the means of all methods and views; both of shape (rows, N)."""
    return float(spearman(measure.mean(1), truth.mean(1)))


def over_images(measure: Floats, truth: Floats) -> float:
    """Correlate the images of each method and view; the mean of these."""
    return float(np.nanmean(spearman(measure, truth)))


def within_images(measure: Floats, truth: Floats) -> float:
    """Correlate the methods and views of each image; the mean of these."""
    return float(np.nanmean(spearman(measure.T, truth.T)))


CORRELATIONS = {"means": over_rows, "images": over_images, "one image": within_images}


def correlation(kind: str, measure: Floats, truth: Floats) -> str:
    """Return a correlation and its 95 % interval by bootstrap over images.

    Rows that lack the measure are left out, and then images that do.
    """
    there = ~np.isnan(measure).all(1)
    measure, truth = measure[there], truth[there]
    known = ~np.isnan(measure).any(0)
    measure, truth = measure[:, known], truth[:, known]
    function, rng = CORRELATIONS[kind], np.random.default_rng(0)
    draws = rng.integers(measure.shape[1], size=(RESAMPLES, measure.shape[1]))
    found = [function(measure[:, drawn], truth[:, drawn]) for drawn in draws]
    low, high = np.nanquantile(found, (0.025, 0.975))
    return f"{function(measure, truth):.2f} [{low:.2f}, {high:.2f}]"


def interval(values: Tensor, digits: int = 2) -> str:
    """Return a mean and its interval."""
    found = estimate(values)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def against(values: Tensor, plain: Tensor) -> str:
    """Return a mean and its interval; starred where the paired difference is beyond its own."""
    change = estimate(values - plain)
    return interval(values) + (" \\*" if change.low > 0 or change.high < 0 else "")


def control_lines(table: Table) -> Iterator[str]:
    """Return the table of accuracies."""
    yield f"| shown ({len(next(iter(table.control.values())))} test images) | accuracy |"
    yield "|---|--:|"
    for name, found in table.control.items():
        yield f"| {name} | {interval(found, 3)} |"


def map_lines(table: Table) -> Iterator[str]:
    """Return the table of maps against the truth."""
    heads = [f"{of}, {view}" for of in ("IoU", "energy") for view in VIEWS]
    yield f"| map | {' | '.join(heads)} | AUROC | pointing |"
    yield f"|---|{'--:|' * 8}"
    plain_auroc = {name: float(own["plain"]["auroc"].mean()) for name, own in table.values.items()}
    for name in sorted(plain_auroc, key=lambda name: -plain_auroc[name]):
        yield _map_line(name, table.values[name])
    yield _map_line(
        "mean of these",
        {
            view: {
                name: torch.stack([own[view][name] for own in table.values.values()]).mean(0)
                for name in ("iou", "energy", "auroc", "pointing")
            }
            for view in VIEWS
        },
    )
    for name, values in table.references.items():
        found = {of: interval(values[of]) for of in ("iou", "energy", "auroc", "pointing")}
        yield (
            f"| {name} | {found['iou']} | | | {found['energy']} | | | {found['auroc']} | "
            f"{found['pointing']} |"
        )


def _map_line(name: str, by_view: dict[str, dict[str, Tensor]]) -> str:
    """Return a row: all views of IoU and energy, AUROC and pointing of the plain map."""
    plain, cells = by_view["plain"], []
    for of in ("iou", "energy"):
        cells.append(interval(plain[of]))
        cells += [against(by_view[view][of], plain[of]) for view in VIEWS[1:]]
    cells += [interval(plain[of]) for of in ("auroc", "pointing")]
    return f"| {name} | {' | '.join(cells)} |"


def measure_lines(table: Table) -> Iterator[str]:
    """Return the table of measures: correlations, verdicts on views, the place of the truth."""
    truth = {name: table.matrix(name) for name in ("iou", "auroc")}
    columns = [("means", "iou"), ("means", "auroc"), ("images", "iou"), ("images", "auroc")]
    columns.append(("one image", "iou"))
    titles = {"iou": "IoU", "auroc": "AUROC"}
    heads = [f"{kind}, {titles[name]}" for kind, name in columns]
    yield f"| measure | {' | '.join(heads)} | tft | shift | the truth's place |"
    yield f"|---|{'--:|' * 8}"
    for name, better in MEASURES.items():
        found = better * table.matrix(name)
        cells = [correlation(kind, found, truth[of]) for kind, of in columns]
        cells += [verdicts(table, name, better, view) for view in VIEWS[1:]]
        cells.append("-" if name in OF_METHODS else truth_place(table, name, better))
        yield f"| {name} | {' | '.join(cells)} |"


def verdicts(table: Table, measure: str, better: int, view: str) -> str:
    """Count the methods whose view is better, and worse, than the plain map beyond its interval."""
    changes = [
        estimate(better * (own[view][measure] - own["plain"][measure]))
        for own in table.values.values()
    ]
    return f"+{sum(c.low > 0 for c in changes)} -{sum(c.high < 0 for c in changes)}"


def truth_place(table: Table, measure: str, better: int) -> str:
    """Return the place that the truth as a map takes among the means of methods and views."""
    values = table.matrix(measure)
    known = ~np.isnan(values).any(0)
    own = better * float(table.references["the truth"][measure][torch.from_numpy(known)].mean())
    means = better * values[:, known].mean(1)
    return f"{int((means > own).sum()) + 1} of {len(means) + 1}"


def machine(seconds: dict[str, float]) -> str:
    """Return where and how fast the figures were made."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, shared with other jobs. Versions: "
        f"python {platform.python_version()}, {versions}. Drawing and training took "
        f"{seconds['training']:.0f} s, everything {seconds['all']:.0f} s."
    )
