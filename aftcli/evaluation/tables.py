"""Tables as rows: the paper's Tables 1 to 5, and what stands beside them.

TABLES names each with its rows and its long form; `aftcli.pages.grids.LOOKS` has the looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftcli.core.methods import CAMS, METHODS
from aftcli.data.blocks import Processes
from aftcli.engine.accelerate import Accelerate, as_it_is
from aftcli.errors import check_name
from aftcli.evaluation.run import Measured
from aftcli.evaluation.sanity import sanity_rows
from aftcli.evaluation.seconds import Table5Row, table5
from aftcli.evaluation.study import Study
from aftcli.measures.intervals import estimate
from aftcli.measures.registry import COMPARED, MEASURES, PAPER, SOURCES, VARIANTS
from aftcli.measures.values import Unit, Values, classified, measure
from aftcli.settings import SELF
from aftcli.tft.threshold import MEASURE_ROUNDING

Interval = tuple[float, float]
FEW = 10  # images: below, resampling says little


@dataclass(frozen=True)
class Table1Row:
    """The share of the map that a method's published default mutes, in [0, 1]."""

    cam: str
    muted: float | None


@dataclass(frozen=True)
class Table2Row:
    """A data set with its numbers of classes, training images and images evaluated on."""

    dataset: str
    classes: int
    split: str
    train: int | None
    test: int


@dataclass(frozen=True)
class Table3Row:
    """A measure of the maps of one variant: mean over n images, with its 95 % interval.

    `judge` is who gives the probabilities, "self" the variant's network; other measures need none.
    """

    dataset: str
    model: str
    cam: str
    masking: str
    variant: str
    measure: str
    value: float
    ci: Interval | None
    n: int
    judge: str = SELF


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
    judge: str = SELF

    @property
    def is_clear(self) -> bool:
        """Tell if the interval excludes 0 and rounding; never claimed of fewer than ten images."""
        if self.n < FEW or self.ci is None:
            return False
        low, high = self.ci
        return low > MEASURE_ROUNDING or high < -MEASURE_ROUNDING


@dataclass(frozen=True)
class Table4Row:
    """The accuracy of a variant; `cam` is the method that it was tuned for, None for others.

    `precision` is the mean average precision, where images have several labels.
    """

    dataset: str
    model: str
    cam: str | None
    variant: str
    accuracy: float
    ci: Interval | None
    n: int
    precision: float | None = None


@dataclass(frozen=True)
class SeenRow:
    """The number of images, of the n evaluated on, that a variant has learned from."""

    dataset: str
    model: str
    cam: str | None
    variant: str
    seen: int
    n: int


def table1(cams: Iterable[str] = CAMS) -> list[Table1Row]:
    """List the published muted shares."""
    return [Table1Row(cam, METHODS[cam].muted) for cam in cams]


def table2(studies: Sequence[Study]) -> list[Table2Row]:
    """List the data sets of studies, each once."""
    rows = []
    for study in studies:
        data = study.data_set
        classes = len({sample.label for sample in data.samples})
        train = study.train[2] if study.train and study.train[0] == study.data_name else None
        count = len({sample.name for sample in data.samples})
        rows.append(Table2Row(study.data_name, classes, data.part, train, count))
    return list(dict.fromkeys(rows))


def _values(measured: Measured, variant: str, unit: Unit) -> tuple[Values, str] | None:
    """Find the values and the view of a variant; None where there are none."""
    source, view = SOURCES[variant]
    result = measured.results.get((source, unit))
    values = result.values if result else None
    return (values, view) if values and view in values.views else None


def values_of(
    measured: Measured, variant: str, unit: Unit, name: str, judge: str = SELF
) -> Tensor | None:
    """Return one value an image of a measure, NaN where undefined; None where there are none."""
    found = _values(measured, variant, unit)
    return measure(*found, name, measured.study.judge_keys.get(judge)) if found else None


def _places(
    measured: Measured, names: Sequence[str], judges: Sequence[str] | None
) -> Iterator[tuple[Unit, str, str]]:
    """Yield units, masking by masking, methods in the registry's order, measures, judges."""
    known = [SELF, *measured.study.judge_keys]
    for judge in judges or ():
        check_name("judge", judge, known)
    order, units = list(METHODS), {unit for _, unit in measured.results}
    in_order = sorted(units, key=lambda unit: (unit.masking, order.index(unit.cam)))
    for unit, name, judge in product(in_order, names, known if judges is None else judges):
        if judge == SELF or MEASURES[name].of_probabilities:
            yield unit, name, judge


def _averaged(values: Tensor | None) -> tuple[float, Interval | None, int] | None:
    """Return mean, interval and number of images; None of none."""
    found = estimate(values) if values is not None else None
    return (found.value, found.interval, found.n) if found and found.n else None


def table3(
    measured: Measured,
    names: Sequence[str],
    variants: Sequence[str],
    judges: Sequence[str] | None = None,
) -> list[Table3Row]:
    """Average the measures of maps (§5.2).

    Args:
        measured: the results of a study.
        names: keys of MEASURES.
        variants: keys of VARIANTS; those that there are of them.
        judges: names of the study's judges, and "self"; None for all.
    """
    study, rows = measured.study, []
    for unit, name, judge in _places(measured, names, judges):
        where = (study.data_name, study.f.name, unit.cam, unit.masking)
        for variant in variants:
            if numbers := _averaged(values_of(measured, variant, unit, name, judge)):
                rows.append(Table3Row(*where, variant, name, *numbers, judge))
    return rows


def differences(
    measured: Measured,
    names: Sequence[str],
    variants: Sequence[str],
    judges: Sequence[str] | None = None,
) -> list[Difference]:
    """Pair variants image by image, by the same judge; arguments as of `table3`."""
    study, rows = measured.study, []
    pairs = [pair for pair in COMPARED if set(pair) <= set(variants)]
    for unit, name, judge in _places(measured, names, judges):
        where = (study.data_name, study.f.name, unit.cam, unit.masking)
        for one, two in pairs:
            if numbers := _averaged(_paired(measured, (one, two), unit, name, judge)):
                rows.append(Difference(*where, name, one, two, *numbers, judge))
    return rows


def _paired(
    measured: Measured, pair: tuple[str, str], unit: Unit, name: str, judge: str
) -> Tensor | None:
    one, two = (_values(measured, variant, unit) for variant in pair)
    if one is None or two is None:
        return None
    key = measured.study.judge_keys.get(judge)
    # An image that one of them could not read stands in neither.
    index = [values.index for values, _ in (one, two)]
    both = [torch.isin(a, b) for a, b in (index, index[::-1])]
    of_both = [measure(*own, name, key)[kept] for own, kept in zip((one, two), both, strict=True)]
    return of_both[0] - of_both[1]


def table4(measured: Measured) -> list[Table4Row]:
    """List the accuracies of the variants."""
    study, names = measured.study, [s.name for s in measured.study.data_set.samples]
    rows: dict[tuple[str, str | None], Table4Row] = {}
    for (variant, unit), result in measured.results.items():
        cam = unit.cam if variant == "aft" else None
        values = result.values
        if variant not in VARIANTS or (variant, cam) in rows or values is None:
            continue
        right, precision = classified(values, names)
        found = estimate(right)
        where = (study.data_name, study.f.name, cam, variant)
        rows[variant, cam] = Table4Row(*where, found.value, found.interval, found.n, precision)
    order, cams = list(VARIANTS), [None, *METHODS]
    return sorted(rows.values(), key=lambda r: (order.index(r.variant), cams.index(r.cam)))


def seen(measured: Measured) -> list[SeenRow]:
    """Count the images evaluated on that variants have learned from, where that is known."""
    study = measured.study
    return [
        SeenRow(study.data_name, study.f.name, cam, variant, count, len(study.data_set.samples))
        for (variant, cam), count in measured.seen.items()
    ]


@dataclass(frozen=True)
class Sources:
    """The sources of tables.

    Attributes:
        run: where the studies live.
        studies: of the run.
        measured: the results of each, where a table needs them.
        metrics: keys of MEASURES.
        variants: keys of VARIANTS.
        masking: of the searches that tables make themselves.
        overwrite: measure again what is on disk.
        accelerate: makes classifiers fast.
        processes: that share the work.
        watch: shows progress: gets items, what they are and how many; returns the items.
    """

    run: Path
    studies: Sequence[Study]
    measured: Sequence[Measured] = ()
    metrics: Sequence[str] = PAPER
    variants: Sequence[str] = tuple(VARIANTS)
    masking: str = "binary"
    overwrite: bool = False
    accelerate: Accelerate = as_it_is
    processes: Processes = Processes()
    watch: Callable[[Iterable[Any], str, int], Iterable[Any]] = lambda items, what, total: items


@dataclass(frozen=True)
class Tables:
    """The tables that were asked for.

    Attributes:
        rows: of each table, by a key of TABLES.
        settings: of the evaluation, plain values.
        kinds: of data sets, by name.
        measured: the results that the rows were made of.
    """

    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    measured: Sequence[Measured] = ()


Record = dict[str, Any]


def _value(record: Record) -> Iterator[Record]:
    yield {"measure": record["measure"], "value": record["value"]}


class Table(NamedTuple):
    """A table: its rows, and their long form in JSON and CSV.

    Attributes:
        asked: numbers of `--table` that ask for it, or "sanity".
        rows: makes the rows, dataclasses.
        record: a row as plain values, an object of JSON.
        numbers: of a record each number with what tells it apart, a line of CSV each; place,
            interval and number of images are added.
    """

    asked: frozenset[str]
    rows: Callable[[Sources], Iterable[Any]]
    record: Callable[[Any], Record] = asdict
    numbers: Callable[[Record], Iterable[Record]] = _value


def _rows5(s: Sources) -> Iterator[Table5Row]:
    for study in s.studies:
        rows = table5(study, s.run, s.masking, s.overwrite, s.accelerate)
        yield from s.watch(rows, f"timing {study.f.name}", len(study.cams))


# In the order of JSON's keys.
TABLES: dict[str, Table] = {
    "table1": Table(
        frozenset({"1"}),
        lambda s: table1(),
        numbers=lambda r: [{"measure": "muted", "value": r["muted"]}],
    ),
    "table2": Table(
        frozenset({"2"}),
        lambda s: table2(s.studies),
        numbers=lambda r: [{"measure": n, "value": r[n]} for n in ("classes", "train", "test")],
    ),
    "table3": Table(
        frozenset({"3"}),
        lambda s: (row for m in s.measured for row in table3(m, s.metrics, s.variants)),
    ),
    "table4": Table(
        frozenset({"4"}),
        lambda s: (row for m in s.measured for row in table4(m)),
        lambda row: {k: v for k, v in asdict(row).items() if k != "precision" or v is not None},
        lambda r: [{"measure": k, "value": r[k]} for k in ("accuracy", "precision") if k in r],
    ),
    "differences": Table(
        frozenset({"3"}),
        lambda s: (row for m in s.measured for row in differences(m, s.metrics, s.variants)),
        numbers=lambda r: [
            {"against": r["against"], "measure": r["measure"], "value": r["difference"]}
        ],
    ),
    "sanity": Table(
        frozenset({"sanity"}),
        lambda s: (
            row
            for study in s.studies
            for row in sanity_rows(study, s.run, s.masking, s.overwrite, s.processes)
        ),
        numbers=lambda r: [{"measure": f"{r['measure']} {r['stage']}", "value": r["value"]}],
    ),
    "seen": Table(
        frozenset({"3", "4"}),
        lambda s: (row for m in s.measured for row in seen(m)),
        # CSV has no notes: only what a table would note has a line.
        numbers=lambda r: [{"measure": "images trained on", "value": r["seen"]}] * (r["seen"] > 0),
    ),
    "table5": Table(
        frozenset({"5"}),
        _rows5,
        Table5Row.as_dict,
        lambda r: [
            {"variant": n, "measure": "seconds", "value": r[n]}
            for n in ("without", "with", "delta")
        ],
    ),
}


def rows_of(asked: Iterable[str], sources: Sources) -> dict[str, list[Any]]:
    """Make the rows of the tables that are asked for."""
    wanted = set(asked)
    return {name: list(t.rows(sources)) for name, t in TABLES.items() if t.asked & wanted}
