"""The numbers of the paper's Tables 1 to 5, as objects: one number, or one row, each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aftcli.core.methods import CAMS, METHODS
from aftcli.evaluation.batch import Unit, measure
from aftcli.evaluation.measures import VARIANTS
from aftcli.evaluation.metrics import estimate
from aftcli.evaluation.results import Values
from aftcli.evaluation.run import Measured
from aftcli.evaluation.study import Study
from aftcli.tft import rounding

Interval = tuple[float, float]

FEW = 10  # images: below, resampling says little

# Where a column of the tables comes from: whose maps, and how they are muted.
SOURCES = {
    "original": ("original", "original"),
    "fixed": ("original", "fixed"),
    "tft": ("original", "tft"),
    "aft": ("aft", "original"),
    "control": ("control", "original"),
}

COMPARED = (
    ("tft", "original"),
    ("tft", "fixed"),
    ("aft", "original"),
    ("aft", "tft"),
    ("aft", "control"),
    ("control", "original"),
)


@dataclass(frozen=True)
class Table1Row:
    """The share of the map that a method's published default mutes, in [0, 1]."""

    cam: str
    muted: float | None


@dataclass(frozen=True)
class Table2Row:
    """A data set: how many classes, images trained on and images evaluated on."""

    dataset: str
    classes: int
    split: str
    train: int | None
    test: int


@dataclass(frozen=True)
class Table3Row:
    """A measure of the maps of one variant: mean over n images, with its 95 % interval."""

    dataset: str
    model: str
    cam: str
    masking: str
    variant: str
    measure: str
    value: float
    ci: Interval | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The paired difference of a measure, variant - against, with its 95 % interval."""

    dataset: str
    model: str
    cam: str
    masking: str
    measure: str
    variant: str
    against: str
    difference: float
    ci: Interval | None
    n: int

    @property
    def is_clear(self) -> bool:
        """Tell if the interval excludes 0 and rounding; never claimed of fewer than ten images."""
        if self.n < FEW or self.ci is None:
            return False
        low, high = self.ci
        return low > rounding.MEASURE or high < -rounding.MEASURE


@dataclass(frozen=True)
class Table4Row:
    """The accuracy of a variant; `cam` is the method that it was tuned for, None for others."""

    dataset: str
    model: str
    cam: str | None
    variant: str
    accuracy: float
    ci: Interval | None
    n: int


@dataclass(frozen=True)
class SeenRow:
    """How many of the n images that a variant was evaluated on it has learned from."""

    dataset: str
    model: str
    cam: str | None
    variant: str
    seen: int
    n: int


def table1(cams: Iterable[str] = CAMS) -> list[Table1Row]:
    """Published muted shares."""
    return [Table1Row(cam, METHODS[cam].muted) for cam in cams]


def table2(studies: Sequence[Study]) -> list[Table2Row]:
    """The data sets of studies, each once."""
    rows = []
    for study in studies:
        labels = {sample.label for sample in study.data_set.samples}
        train = study.train[2] if study.train and study.train[0] == study.data_name else None
        rows.append(
            Table2Row(
                study.data_name,
                len(labels),
                study.data_set.split,
                train,
                len(study.data_set.samples),
            )
        )
    return list(dict.fromkeys(rows))


def _values(measured: Measured, variant: str, unit: Unit) -> tuple[Values, str] | None:
    """Find the values and the view of a variant; None where there are none."""
    source, view = SOURCES[variant]
    result = measured.results.get((source, unit))
    values = result.values if result else None
    return (values, view) if values and view in values.views else None


def _units(measured: Measured) -> Iterator[Unit]:
    """Masking by masking, methods in the registry's order."""
    units = dict.fromkeys(unit for _, unit in measured.results)
    order = list(METHODS)
    yield from sorted(units, key=lambda u: (u.masking, order.index(u.cam)))


def values_of(measured: Measured, variant: str, unit: Unit, name: str) -> Tensor | None:
    """Return one value an image of a measure, NaN where undefined; None where there are none."""
    found = _values(measured, variant, unit)
    return measure(*found, name) if found else None


def table3(measured: Measured, names: Sequence[str], variants: Sequence[str]) -> list[Table3Row]:
    """The measures of maps (§5.2).

    Args:
        measured: the results of a study.
        names: keys of MEASURES.
        variants: keys of VARIANTS; those that there are of them.
    """
    study = measured.study
    rows = []
    for unit in _units(measured):
        for name in names:
            for variant in variants:
                values = values_of(measured, variant, unit, name)
                found = estimate(values) if values is not None else None
                if found and found.n:
                    where = (study.data_name, study.f.name, unit.cam, unit.masking, variant)
                    rows.append(Table3Row(*where, name, found.value, found.interval, found.n))
    return rows


def differences(
    measured: Measured, names: Sequence[str], variants: Sequence[str]
) -> list[Difference]:
    """The paired differences between variants, image by image; arguments as of `table3`."""
    study = measured.study
    rows = []
    for unit in _units(measured):
        for name in names:
            for variant, against in COMPARED:
                if variant not in variants or against not in variants:
                    continue
                pair = _paired(measured, variant, against, unit, name)
                found = estimate(pair) if pair is not None else None
                if found and found.n:
                    where = (study.data_name, study.f.name, unit.cam, unit.masking)
                    what = (name, variant, against)
                    rows.append(Difference(*where, *what, found.value, found.interval, found.n))
    return rows


def _paired(measured: Measured, variant: str, against: str, unit: Unit, name: str) -> Tensor | None:
    one, two = (_values(measured, v, unit) for v in (variant, against))
    if one is None or two is None:
        return None
    # An image that one of them could not read stands in neither.
    index = [values.index for values, _ in (one, two)]
    both = [torch.isin(a, b) for a, b in (index, index[::-1])]
    pair = [measure(*own, name)[kept] for own, kept in zip((one, two), both, strict=True)]
    return pair[0] - pair[1]


def table4(measured: Measured) -> list[Table4Row]:
    """The accuracies of the variants."""
    study = measured.study
    rows: dict[tuple[str, str | None], Table4Row] = {}
    for (variant, unit), result in measured.results.items():
        cam = unit.cam if variant == "aft" else None
        values = result.values
        if (variant, cam) in rows or values is None:
            continue
        found = estimate((values.class_index == values.label).double())
        where = (study.data_name, study.f.name, cam, variant)
        rows[variant, cam] = Table4Row(*where, found.value, found.interval, found.n)
    order, cams = list(VARIANTS), [None, *METHODS]
    return sorted(rows.values(), key=lambda r: (order.index(r.variant), cams.index(r.cam)))


def seen(measured: Measured) -> list[SeenRow]:
    """What variants have learned from of what they are evaluated on, where that is known."""
    study = measured.study
    return [
        SeenRow(study.data_name, study.f.name, cam, variant, count, len(study.data_set.samples))
        for (variant, cam), count in measured.seen.items()
    ]
