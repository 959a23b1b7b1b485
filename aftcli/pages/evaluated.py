"""An evaluation as a page of HTML that needs no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.core.methods import METHODS
from aftcli.data.images import read_image
from aftcli.errors import AftError
from aftcli.evaluation.run import Measured
from aftcli.evaluation.study import Study
from aftcli.evaluation.tables import Tables
from aftcli.files import durable
from aftcli.measures.registry import MEASURES
from aftcli.measures.values import Unit, Values
from aftcli.pages.figures import Picture, draw_all
from aftcli.pages.grids import Cell, Grid, Shown, grids
from aftcli.pages.html import head, jpeg, settings_table, table, thumb
from aftcli.report.terminal import html, say

EXTREME = 10  # images that are listed as the best, and as the worst

MEANINGS = {
    "average_increase": "Share of images whose class becomes more probable where only what the map "
    "keeps is shown.",
    "average_drop": "Mean share of the probability that is lost where only what the map keeps is "
    "shown; a rise counts as 0.",
    "average_gain": "Mean rise of the probability where only what the map keeps is shown, as a "
    "share of what is missing to 1; a loss counts as 0.",
    "area": "Share of the pixels that the map keeps.",
    "complexity": "Mean score of the map.",
    "coherency": "Correlation of the map with the map of the masked image, scaled to [0, 1].",
    "adcc": "Harmonic mean of coherency, 1 - complexity and 1 - drop.",
    "insertion": "Mean probability while a blurred image becomes sharp, highest scores first.",
    "deletion": "Mean probability while the image becomes the mean colour, highest scores first.",
    "road": "Mean probability after 20, 40, 60 and 80 % of the pixels were removed and filled "
    "from their neighbours, highest scores first.",
    "road_last": "The same, lowest scores first.",
    "arcc": "Harmonic mean of coherency, 1 - complexity and the gap between the two ROADs.",
    "energy": "Share of the map's sum that lies in the boxes of the class.",
    "pointing": "Share of images whose highest score lies in a box of the class.",
    "iou": "Intersection over union of what the map keeps and the boxes of the class.",
    "energy_segmentation": "Share of the map's sum that lies on the segmented objects.",
    "iou_segmentation": "Intersection over union of what the map keeps and the segmented objects.",
}

DIRECTIONS = {1: "higher", -1: "lower", 0: "neither"}

WORDS = {
    "Original": "the plain map, nothing muted",
    "Fixed": "the map muted at its method's published cut-off",
    "TFT": "the map muted below tau*, the threshold of the image's largest RPI",
    "AFT": "the plain map of the network tuned for the method",
    "Control": "the plain map of the network tuned without masks",
    "RPI": "relative probability increase: the rise of the class's probability where only what is "
    "kept is shown, as a share of it; 0 where it falls",
    "kept": "share of the pixels that are not muted",
}


def write_figures(tables: Tables, run: Path, shown: Shown, images: list[str], aside: bool) -> None:
    """Draw the figures and write the page of all, in `<run>/results`.

    Args:
        tables: of the evaluation, with its measures.
        run: where it lives.
        shown: how tables are shown.
        images: of Figure 3, by a part of their names; empty for some, spread.
        aside: say what was written on stderr: stdout is the tables'.
    """
    results = run / "results"
    pictures = draw_all(tables.measured, results / "figures", images, tables.settings["maskings"])
    page = write_page(results / "report.html", tables, shown, pictures)
    for path in (*(p.path for p in pictures), page):
        say(f"wrote {path}", aside=aside)


def write_page(path: Path, tables: Tables, shown: Shown, pictures: Sequence[Picture]) -> Path:
    """Write the page; it needs no other file and no network."""
    with durable(path) as temporary:
        temporary.write_text("\n".join(_page(tables, shown, pictures)), encoding="utf-8")
    return path


def _page(tables: Tables, shown: Shown, pictures: Sequence[Picture]) -> Iterator[str]:
    studies = tables.settings.get("studies", [])
    title = "aft: " + ", ".join(f"{s['model']} on {s['dataset']}" for s in studies)
    yield from head(title)
    yield f"<p>Made by <code>{html(tables.settings.get('command', 'aft evaluate'))}</code></p>"
    for grid in grids(tables, shown):
        yield from _table(grid)
    yield from _glossary(tables)
    if pictures:
        yield "<h2>Figures</h2>"
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode()
        caption = html(picture.caption)
        yield f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        yield f"<figcaption>{caption}</figcaption></figure>"
    for measured in tables.measured:
        for i, masking in enumerate(tables.settings.get("maskings", ())):
            yield from _by_class(measured, masking)
            yield from _extremes(measured, masking, is_open=i == 0)
    yield "<h2>Settings</h2>"
    yield from settings_table(tables.settings)
    yield "</body></html>"


def _table(grid: Grid) -> Iterator[str]:
    yield f"<h2>{html(grid.title)}</h2>"
    rows = ([_cell(each, i < grid.left) for i, each in enumerate(row)] for row in grid.rows)
    yield from table(grid.header, rows, grid.left)
    if grid.note:
        yield f'<p class="note">{html(grid.note)}</p>'


INTERVAL = re.compile(r"\[[^\]]*\](?: \*)?")


def _cell(given: Cell, is_text: bool) -> str:
    text = html(given.text)
    if not is_text:
        # On one line, so that a table of many columns breaks between numbers only.
        text = INTERVAL.sub(r'<span class="interval">\g<0></span>', text)
    return f"<b>{text}</b>" if given.bold else text


def _glossary(tables: Tables) -> Iterator[str]:
    """Say what the measures of the tables are."""
    names = dict.fromkeys(row.measure for row in tables.rows.get("table3", ()))
    if not names:
        return
    yield "<h2>Measures</h2>"
    rows = []
    for name in names:
        one = MEASURES[name]
        meaning = MEANINGS.get(name, "See the documentation of Quantus.")
        parts = (one.title, meaning, DIRECTIONS[one.better], one.group, one.source)
        rows.append([html(part) for part in parts])
    yield from table(["measure", "meaning", "better", "group", "source"], rows, 5)
    words = "; ".join(f"{word}: {meaning}" for word, meaning in WORDS.items())
    yield f'<p class="note">{html(words)}.</p>'


class Cut(NamedTuple):
    """One value an image of a method's maps at tau*, shape (N,) each.

    Attributes:
        place: in the data set.
        label: what it is labelled.
        class_index: the class predicted.
        probability: y^c of the whole image.
        masked: y_hat^c where only what is kept is shown.
        change: (y_hat^c - y^c) / y^c: RPI where it is above 0, minus the drop where below.
        tau: tau*.
        kept: the share of pixels kept.
    """

    place: Tensor
    label: Tensor
    class_index: Tensor
    probability: Tensor
    masked: Tensor
    change: Tensor
    tau: Tensor
    kept: Tensor

    def at(self, places: Tensor) -> Cut:
        """Return those of some images."""
        return Cut(*(values[places] for values in self))


def cut_of(measured: Measured, cam: str, masking: str) -> Cut | None:
    """Return the values of a method at tau*; None where nothing was searched."""
    values = _values(measured, "original", cam, masking)
    if values is None or values.tau is None or "tft" not in values.views:
        return None
    y, view = values.probability.double(), values.views["tft"]
    masked = view.y_hat.double()
    # y = 0 happens only where a probability underflows.
    change = torch.where(masked == y, 0.0, (masked - y) / y)
    kept = view.measures.get("area", torch.full_like(y, torch.nan))
    own = (values.index, values.label, values.class_index)
    return Cut(*own, y, masked, change, values.tau.double(), kept.double())


def _values(measured: Measured, variant: str, cam: str, masking: str) -> Values | None:
    result = measured.results.get((variant, Unit(cam, masking)))
    return result.values if result else None


def _title(measured: Measured, what: str, masking: str) -> str:
    study = measured.study
    return f"<h2>{html(f'{what}, {masking} masks ({study.f.name}, {study.data_name})')}</h2>"


def _by_class(measured: Measured, masking: str) -> Iterator[str]:
    """Yield a table of means over the images of each label."""
    study = measured.study
    cams = [cam for cam in study.cams if _values(measured, "original", cam, masking)]
    if not cams:
        return
    plain = _values(measured, "original", cams[0], masking)
    assert plain
    columns: list[tuple[str, Tensor, Tensor, str]] = [
        ("accuracy", plain.label, (plain.class_index == plain.label).double(), ".3f"),
        ("probability", plain.label, plain.probability.double(), ".3f"),
    ]
    for cam in cams:
        title = METHODS[cam].title
        if own := _values(measured, "aft", cam, masking):
            right = (own.class_index == own.label).double()
            columns.append((f"{title} AFT accuracy", own.label, right, ".3f"))
        if cut := cut_of(measured, cam, masking):
            rpi = cut.change.clamp(min=0)
            finite = torch.where(rpi.isinf(), torch.nan, rpi)
            columns.append((f"{title} RPI", cut.label, finite, ".3f"))
            columns.append((f"{title} tau*", cut.label, cut.tau, ".2f"))
            columns.append((f"{title} kept", cut.label, cut.kept, ".1%"))
    rows = []
    for label in plain.label.unique().tolist():
        means = [float(values[labels == label].nanmean()) for _, labels, values, _ in columns]
        texts = ["-" if m != m else f"{m:{c[3]}}" for m, c in zip(means, columns, strict=True)]
        count = int((plain.label == label).sum())
        rows.append([html(study.f.classes.name(label)), str(count), *texts])
    yield _title(measured, "Classes", masking)
    yield from table(["class", "images", *(c[0] for c in columns)], rows, long=True)
    yield '<p class="note">Means over the images that are labelled so.</p>'


def extremes(cut: Cut) -> tuple[Tensor, Tensor]:
    """Return the places of the images of the largest change, and of the least, ten at the most.

    No image is in both; the first of each is its extreme one.
    """
    order = cut.change.argsort(descending=True, stable=True)
    order = order[cut.change[order].isfinite()]
    best = order[: min(EXTREME, (len(order) + 1) // 2)]
    return best, order[len(best) :].flip(0)[:EXTREME]


def _extremes(measured: Measured, masking: str, is_open: bool) -> Iterator[str]:
    """Yield tables of the images whose class gains, and loses, most by what TFT mutes.

    Those of the first method are shown, if `is_open`; the others open where they are wanted.
    """
    study = measured.study
    pictured = cache(partial(_pictured, study))

    def row(cut: Cut) -> list[str]:
        i, names = int(cut.place), study.f.classes.name
        texts = [study.data_set.samples[i].name, names(int(cut.label)), names(int(cut.class_index))]
        numbers = [f"{float(cut.probability):.4f}", f"{float(cut.masked):.4f}"]
        change = float(cut.change)
        numbers.append(f"{change:+.3f}" if change < 1e6 else f"{change:+.1e}")
        numbers += [f"{float(cut.tau):g}", f"{float(cut.kept):.1%}"]
        return [pictured(i), *(html(text) for text in (*texts, *numbers))]

    header = ["", "image", "label", "predicted", "probability", "masked", "change", "tau*", "kept"]
    for cam in study.cams:
        cut = cut_of(measured, cam, masking)
        if cut is None:
            continue
        for word, places in zip(("Best", "Worst"), extremes(cut), strict=True):
            if len(places):
                yield f"<details{' open' * is_open}><summary>"
                yield _title(measured, f"{word} images, {METHODS[cam].title}", masking)
                yield "</summary>"
                yield from table(header, (row(cut.at(place)) for place in places), 4)
                yield '<p class="note">masked: the probability where only what TFT keeps is shown; '
                yield "change: its relative change: RPI above 0, the drop below.</p></details>"
        is_open = False


def _pictured(study: Study, index: int) -> str:
    """Return a small picture; nothing where the file can't be read any more."""
    try:
        picture = thumb(read_image(study.data_set.picture(index)))
    except AftError:
        return ""
    return f'<img class="thumb" alt="" src="{jpeg(picture)}">'
