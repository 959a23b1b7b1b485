"""The rows of an evaluation as tables in the paper's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from aftcli.core.methods import METHODS
from aftcli.data.sets import format_of
from aftcli.evaluation.tables import Difference, Table3Row, Table4Row, Tables
from aftcli.measures.published import MODELS, PAPER_VARIANTS, TABLE3, TABLE4, TABLE5
from aftcli.measures.registry import CONTROLLED, GROUPS, MEASURES, TITLES, VARIANTS
from aftcli.settings import SELF

READINGS = {
    "binary": "binary masks, the paper's text",
    "soft": "soft masks, the authors' code",
}


class Shown(NamedTuple):
    """The look of tables: with intervals, with the published numbers beside ours."""

    ci: bool = False
    paper: bool = False


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    bold: bool = False


class Grid(NamedTuple):
    """A table for the eye; the first `left` columns are text."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    left: int
    note: str = ""


def grids(tables: Tables, shown: Shown) -> list[Grid]:
    """Lay tables out in the paper's shape."""
    wanted = [look for name, look in LOOKS.items() if name in tables.rows]
    return [grid for look in wanted for grid in look(tables, shown)]


def _look1(tables: Tables, shown: Shown) -> Iterable[Grid]:
    cells = [
        [Cell(METHODS[r.cam].title), Cell("-" if r.muted is None else f"{r.muted:.0%}")]
        for r in tables.rows["table1"]
    ]
    title = "Table 1: share of the map that published defaults mute"
    yield Grid(title, ["CAM", "muted"], cells, 1)


def _look2(tables: Tables, shown: Shown) -> Iterable[Grid]:
    cells = [
        [
            Cell(r.dataset),
            Cell(str(r.classes)),
            Cell("-" if r.train is None else str(r.train)),
            Cell(f"{r.test} ({r.split or 'all'})"),
        ]
        for r in tables.rows["table2"]
    ]
    header = ["data set", "classes", "training images", "evaluated on"]
    yield Grid("Table 2: data sets", header, cells, 1)


def _interval(ci: tuple[float, float] | None, digits: int = 3) -> str:
    return f" [{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]" if ci else ""


def _look3(tables: Tables, shown: Shown) -> Iterable[Grid]:
    for masking in dict.fromkeys(row.masking for row in tables.rows["table3"]):
        yield _grid3(tables, masking, shown)


def _in_groups(places: Iterable[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], bool]:
    """Order places, which end in a measure and a judge, by groups; tell if there are several."""
    known = list(dict.fromkeys(places))
    above = list(dict.fromkeys(place[:-2] for place in known))
    groups = {place: GROUPS.index(MEASURES[place[-2]].group) for place in known}
    known.sort(key=lambda place: (above.index(place[:-2]), groups[place]))
    return known, len(set(groups.values())) > 1


def _named(measure: str, grouped: bool) -> list[Cell]:
    """Name a measure, after its group where a table has several."""
    one = MEASURES[measure]
    return [*[Cell(one.group)] * grouped, Cell(one.title)]


def _grid3(tables: Tables, masking: str, shown: Shown) -> Grid:
    own = [row for row in tables.rows["table3"] if row.masking == masking]
    models = list(dict.fromkeys(row.model for row in own))
    variants = [v for v in TITLES if any(row.variant == v for row in own)]
    by_place = {(r.dataset, r.cam, r.measure, r.judge, r.model, r.variant): r for r in own}
    several, judged = len(models) > 1, _is_judged(own)
    places, grouped = _in_groups((r.dataset, r.cam, r.measure, r.judge) for r in own)
    header = ["data set", "CAM", *["group"] * grouped, "measure", *["judge"] * judged]
    left = len(header)
    header += [f"{m} {TITLES[v]}" if several else TITLES[v] for m in models for v in variants]
    if shown.paper:
        header += [f"paper {m} {VARIANTS[v]}" for m in MODELS for v in PAPER_VARIANTS]
    lines = []
    for dataset, cam, measure, judge in places:
        line = [Cell(dataset), Cell(METHODS[cam].title), *_named(measure, grouped)]
        line += [Cell(judge)] * judged
        for model in models:
            place = dataset, cam, measure, judge, model
            original = by_place.get((*place, "original"))
            for variant in variants:
                line.append(_cell3(by_place.get((*place, variant)), original, shown))
        if shown.paper:
            paper = format_of(tables.kinds.get(dataset, "folders")).paper
            found = TABLE3.get((paper, cam, measure)) if judge == SELF else None
            line += _published(found, MEASURES[measure].better)
        lines.append(line)
    counts = sorted({row.n for row in own})
    images = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    name = f" ({models[0]})" if len(models) == 1 else ""
    note = "In brackets: factor against Original; bold: better than Original"
    note += f"; {images} images." + JUDGES * judged + _seen(tables)
    return Grid(f"Table 3{name}: {READINGS[masking]}", header, lines, left, note)


def _is_judged(rows: Sequence[Table3Row | Difference]) -> bool:
    """Tell if others than the networks themselves judge."""
    return any(row.judge != SELF for row in rows)


# Not a word of it where there are none.
JUDGES = (
    " judge: who gives the probabilities; self is the network that is explained, mirror the same"
    " on images flipped left-right."
)


def _seen(tables: Tables) -> str:
    """Say which columns are of images that their network has learned from; "" if none is."""
    known = tables.rows.get("seen", ())
    several = len({(row.dataset, row.model) for row in known}) > 1
    named = [
        (f"{row.dataset}, {row.model}, " if several else "")
        + VARIANTS[row.variant]
        + (f" ({METHODS[row.cam].title})" if row.cam else "")
        + f" {row.seen} of {row.n}"
        for row in known
        if row.seen
    ]
    if not named:
        return ""
    return f" Trained on images that it is evaluated on: {'; '.join(named)}."


def _cell3(row: Table3Row | None, original: Table3Row | None, shown: Shown) -> Cell:
    if row is None:
        return Cell("-")
    text = f"{row.value:.3f}" + (_interval(row.ci) if shown.ci else "")
    if original is None or row.variant == "original":
        return Cell(text)
    text += _factor(row.value, original.value)
    return Cell(text, (row.value - original.value) * MEASURES[row.measure].better > 0)


def _factor(value: float, original: float) -> str:
    if not original:
        return ""
    factor = value / original
    return f" (x{factor:.2f})" if factor < 100 else " (x>100)"


def _published(found: tuple[tuple[float, ...], ...] | None, better: int) -> list[Cell]:
    if found is None:
        return [Cell("-")] * (len(MODELS) * len(PAPER_VARIANTS))
    return [
        Cell(f"{value:.3f}" + (_factor(value, own[0]) if i else ""), (value - own[0]) * better > 0)
        for own in found
        for i, value in enumerate(own)
    ]


def _look_at_differences(tables: Tables, shown: Shown) -> Iterable[Grid]:
    rows = tables.rows["differences"] if shown.ci else ()
    for masking in dict.fromkeys(row.masking for row in rows):
        yield _grid_of_differences(tables, masking)


def _grid_of_differences(tables: Tables, masking: str) -> Grid:
    own = [row for row in tables.rows["differences"] if row.masking == masking]
    pairs = list(dict.fromkeys((r.variant, r.against) for r in own))
    judged = _is_judged(own)
    by_place = {(*_place_of(r), r.variant, r.against): r for r in own}
    lines = []
    places, grouped = _in_groups(_place_of(r) for r in own)
    for place in places:
        dataset, model, cam, measure, judge = place
        line = [Cell(dataset), Cell(model), Cell(METHODS[cam].title), *_named(measure, grouped)]
        line += [Cell(judge)] * judged
        for pair in pairs:
            row = by_place.get((*place, *pair))
            if row is None:
                line.append(Cell("-"))
            else:
                better = row.difference * MEASURES[measure].better > 0
                text = f"{row.difference:+.3f}{_interval(row.ci)}"
                is_clear = row.is_clear and (not better or _is_beyond_area(row, by_place, pairs))
                line.append(Cell(text + (" *" if is_clear else ""), better and is_clear))
        lines.append(line)
    header = ["data set", "model", "CAM", *["group"] * grouped, "measure", *["judge"] * judged]
    left = len(header)
    header += [f"{TITLES[a]} - {TITLES[b]}" for a, b in pairs]
    note = "95 % intervals; *: the interval excludes 0; bold: and the first is the better one."
    note += _about_area(pairs) + JUDGES * judged + _seen(tables)
    return Grid(f"Paired differences: {READINGS[masking]}", header, lines, left, note)


EQUAL = ("shift", "gamma")  # controls that keep as much over the data set


def _is_beyond_area(
    row: Difference, by_place: Mapping[Any, Difference], pairs: Sequence[tuple[str, str]]
) -> bool:
    """Tell if a gain over Original is a clear one over the control of equal amount, too.

    Where controls were measured, a measure that they lack has no such gain.
    """
    names = [name for c in EQUAL if (row.variant, name := f"{row.variant} {c}") in pairs]
    if row.against != "original" or row.variant not in CONTROLLED or not names:
        return True
    found = [by_place.get((*_place_of(row), row.variant, name)) for name in names]
    better = MEASURES[row.measure].better
    return all(each and each.is_clear and each.difference * better > 0 for each in found)


def _about_area(pairs: Sequence[tuple[str, str]]) -> str:
    """Say if gains over Original were compared at equal amount."""
    if not any(a in CONTROLLED and b == "original" for a, b in pairs):
        return ""
    equal = [c for c in EQUAL if any(b == f"{a} {c}" for a, b in pairs)]
    if not equal:
        return " Kept area was not controlled (--baselines)."
    return f" A gain over Original has * only if one over its equal {equal[0]} has, too."


def _place_of(row: Difference) -> tuple[str, str, str, str, str]:
    return row.dataset, row.model, row.cam, row.measure, row.judge


def _look4(tables: Tables, shown: Shown) -> Iterable[Grid]:
    rows: Sequence[Table4Row] = tables.rows["table4"]
    with_control = any(row.variant == "control" for row in rows)
    places = dict.fromkeys((row.dataset, row.model) for row in rows)
    lines = []
    for dataset, model in places:
        own = [row for row in rows if (row.dataset, row.model) == (dataset, model)]
        first = {row.variant: row for row in own if row.cam is None}
        tuned: list[Table4Row | None] = [row for row in own if row.cam] or [None]
        for row in tuned:
            cam = row.cam if row else None
            line = [Cell(dataset), Cell(model), Cell(METHODS[cam].title if cam else "-")]
            line.append(_accuracy(first.get("original"), shown))
            line.append(_accuracy(row, shown))
            if with_control:
                line.append(_accuracy(first.get("control"), shown))
            if shown.paper:
                found = TABLE4.get(
                    (format_of(tables.kinds.get(dataset, "folders")).paper, cam or "")
                )
                pairs = found or ((None, None), (None, None))
                line += [Cell("-" if v is None else f"{v:.3f}") for pair in pairs for v in pair]
            lines.append(line)
    header = ["data set", "model", "CAM", "Original", "AFT"] + ["Control"] * with_control
    if shown.paper:
        header += [f"paper {m} {v}" for m in MODELS for v in ("Original", "AFT")]
    several = any(row.precision is not None for row in rows)
    title = "Table 4: accuracy" + ", mean average precision" * several
    yield Grid(title, header, lines, 3, _seen(tables).strip())


def _accuracy(row: Table4Row | None, shown: Shown) -> Cell:
    if row is None:
        return Cell("-")
    precision = "" if row.precision is None else f", {row.precision:.3f}"
    return Cell(f"{row.accuracy:.3f}{_interval(row.ci) if shown.ci else ''}{precision}")


def _look5(tables: Tables, shown: Shown) -> Iterable[Grid]:
    rows = tables.rows["table5"]
    header = ["model", "CAM", "without TFT", "with TFT", "difference", "runs"]
    if shown.paper:
        header += ["paper VGG-16 without", "with", "difference"]
    lines = []
    for r in rows:
        line = [Cell(r.model), Cell(METHODS[r.cam].title)]
        line += [Cell(f"{s:.3f}") for s in (r.without, r.with_tft, r.delta)] + [Cell(str(r.runs))]
        if shown.paper:
            found = TABLE5.get(r.cam)
            values = (*found, found[1] - found[0]) if found else (None,) * 3
            line += [Cell("-" if v is None else f"{v:.3f}") for v in values]
        lines.append(line)
    where = ", ".join(dict.fromkeys(r.device for r in rows))
    how = ", ".join(dict.fromkeys(r.masking for r in rows))
    note = f"Medians for one image, the network's pass included, {how} masks; {where}."
    if shown.paper:
        note += " The paper's: RTX 2080 Ti."
    yield Grid("Table 5: seconds a map", header, lines, 2, note)


def _look_at_sanity(tables: Tables, shown: Shown) -> Iterable[Grid]:
    rows = tables.rows["sanity"]
    stages = list(dict.fromkeys(row.stage for row in rows))
    by_place = {(r.model, r.cam, r.variant, r.measure, r.stage): r for r in rows}
    titles = {"spearman": "rank correlation", "ssim": "SSIM"}
    lines = []
    for place in dict.fromkeys((r.model, r.cam, r.variant, r.measure) for r in rows):
        model, cam, variant, measure = place
        line = [Cell(model), Cell(METHODS[cam].title), Cell(VARIANTS[variant])]
        line.append(Cell(titles[measure]))
        for stage in stages:
            row = by_place.get((*place, stage))
            ci = _interval(row.ci, 2) if row and shown.ci else ""
            line.append(Cell(f"{row.value:.2f}{ci}" if row else "-"))
        lines.append(line)
    header = ["model", "CAM", "maps", "similarity", *(f"random: {stage}" for stage in stages)]
    note = (
        f"Maps of the trained network against those of one whose weights are random down to the "
        f"layer named; 1 is equal. {rows[0].n if rows else 0} images."
    )
    title = "Sanity: are maps of a random network like those of the trained one?"
    yield Grid(title, header, lines, 4, note)


# In the order of the tables.
LOOKS: dict[str, Callable[[Tables, Shown], Iterable[Grid]]] = {
    "table1": _look1,
    "table2": _look2,
    "table3": _look3,
    "differences": _look_at_differences,
    "table4": _look4,
    "table5": _look5,
    "sanity": _look_at_sanity,
}
