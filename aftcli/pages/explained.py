"""The results of `aft explain` as a page of HTML beside their files."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import quote

from aftcli.files import replacing
from aftcli.pages.html import (
    Bar,
    head,
    histogram,
    jpeg,
    of_values,
    settings_table,
    table,
    text_of,
    thumb,
)
from aftcli.pages.results import elided
from aftcli.pages.sorting import SCRIPT, STYLE
from aftcli.pictures.colours import Look
from aftcli.pictures.figure import Shown
from aftcli.pictures.overlay import Subject, shaded
from aftcli.report.explain import Report
from aftcli.report.manifest import Manifest, unwritable
from aftcli.report.summary import Summary, label_of, network_of, numbers_of
from aftcli.report.terminal import html, say
from aftcli.version import __version__

Result = dict[str, Any]

NAME = "index.html"

COMMAND = 400  # characters of a command line: a shell may have written out thousands of names

# Of a result, what differs from result to result.
OWN = {"image", "class_index", "class_name", "probability", "outputs", "tft", "fixed", "contrast"}
OWN_CUT = {"probabilities", "rpi", "tau", "probability", "area"}

MOST_VALUES = 12  # of one setting


class Column(NamedTuple):
    """A column of the page's table.

    Attributes:
        name: by which filters and the order are kept in the page's address.
        title: in its head.
        kind: "text", "number", or "share", a number in percent.
        value: of a result; None where it has none.
        text: the value for the eye.
    """

    name: str
    title: str
    kind: str
    value: Callable[[Result], Any]
    text: Callable[[Any], str]


class Page:
    """A page in the making: results wait in a file without a name until all are there.

    Args:
        path: of the page.
        spool: holds what `add` gets.
        look: colours of the maps.
    """

    def __init__(self, path: Path, spool: TextIO, look: Look) -> None:
        self.path, self.spool, self.look = path, spool, look
        self.summary = Summary()
        self.overview = ""  # the path of the grid of all images
        self.probabilities = array("d")
        self.settings: dict[str, dict[str, None]] = {}

    def add(self, made: Sequence[tuple[Subject, Report]], results: Sequence[Result]) -> None:
        """Add the results of one picture, as each network sees it."""
        small = thumb(made[0][0].picture)
        for (subject, report), result in zip(made, results, strict=True):
            painted = _painted(subject._replace(picture=small), report, self.look)
            line = json.dumps([result, painted])
            with unwritable(self.path):
                self.spool.write(f"{line}\n")
            self.probabilities.append(result["probability"])
            for name, value in _settings(result):
                self.settings.setdefault(name, {})[value] = None
        self.summary.add(results)

    def entries(self) -> Iterator[tuple[Result, str]]:
        """Yield results and the addresses of their small pictures, in the order added."""
        self.spool.seek(0)
        for line in self.spool:
            result, picture = json.loads(line)
            yield result, picture


def _painted(small: Subject, report: Report, look: Look) -> str:
    shown = Shown(small, report.explanation, "", look=look)
    values, look = shown.painted if shown.kept is None else (shown.plain, look)
    return jpeg(shaded(small.picture, small.view, values, shown.kept, look))


def _settings(result: Result) -> Iterator[tuple[str, str]]:
    cut = result.get("tft") or result.get("fixed") or {}
    own = {name: value for name, value in cut.items() if name not in OWN_CUT}
    for name, value in {**result, **own}.items():
        if name not in OWN:
            yield name, text_of(value)


@contextmanager
def page(
    out: Path,
    look: Look,
    problems: Sequence[str],
    manifest: Manifest | None = None,
    aside: bool = False,
) -> Iterator[Page]:
    """Write a page of what is added to it meanwhile; without a result there is none.

    Args:
        out: the folder of the results' files; the page names them from there.
        look: colours of the maps.
        problems: said below the table, as they are at the end.
        manifest: lists it.
        aside: say what was written on stderr: stdout is the results'.

    Raises:
        AftError: it can't be written.
    """
    path = out / NAME
    spool = tempfile.TemporaryFile("w+", encoding="utf-8", dir=out)  # noqa: SIM115
    try:
        made = Page(path, spool, look)
        yield made
        if made.summary.results:
            if manifest:
                manifest.add(path, {}, {"kind": "page"})
            with unwritable(path), replacing(path) as temporary:
                with temporary.open("w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in _lines(made, out, problems))
            say(f"wrote {path}", aside)
    finally:
        with suppress(OSError):  # of a full disk, which is said already
            spool.close()


def _lines(made: Page, out: Path, problems: Sequence[str]) -> Iterator[str]:
    summary = made.summary
    images = f"{summary.images:,} image" + "s" * (summary.images != 1)
    yield from head(f"aft: {images} explained", STYLE, SCRIPT)
    command = elided(shlex.join(["aft", *sys.argv[1:]]), COMMAND)
    yield f"<p>Made by <code>{html(command)}</code></p>"
    yield '<section class="overview">'
    yield from _means(summary)
    yield from _histograms(made)
    yield "</section>"
    if made.overview:
        yield f'<p><a href="{_link(made.overview, out)}">All images in one picture</a></p>'
    yield "<h2>Results</h2>"
    columns = _columns(summary, "target" in made.settings)
    yield '<p id="count" class="note"></p>'
    yield '<table class="results"><thead><tr><th class="text">map</th>'
    yield from (_headed(column) for column in columns)
    yield '</tr><tr id="filters" hidden><th></th>'
    yield from (_filter(column) for column in columns)
    yield "</tr></thead><tbody>"
    for result, picture in made.entries():
        yield _row(result, picture, columns, out)
    yield "</tbody></table>"
    yield f'<p class="note">{html(" ".join(_glossary(columns)))}</p>'
    if problems:
        yield f"<details><summary>{len(problems):,} not explained</summary><ul>"
        yield from (f"<li>{html(problem)}</li>" for problem in problems)
        yield "</ul></details>"
    yield "<h2>Settings</h2>"
    settings = {name: _listed(list(values)) for name, values in made.settings.items()}
    yield from settings_table({**settings, "aft": __version__})
    yield f"<script>{SCRIPT}</script></body></html>"


def _listed(values: list[str]) -> str:
    more = f"; {len(values) - MOST_VALUES} more" if len(values) > MOST_VALUES else ""
    return "; ".join(values[:MOST_VALUES]) + more


def _columns(summary: Summary, is_score: bool) -> list[Column]:
    """List the columns that some result has."""

    def plain(value: object) -> str:
        return str(value)

    def precise(value: float) -> str:
        return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.1e}"

    def known(name: str) -> bool:
        return any(means.of(name) is not None for means in summary.means.values())

    found = [
        Column("image", "image", "text", lambda r: r["image"], plain),
        Column("class", "class", "text", label_of, plain),
    ]
    networks = summary.networks()
    if len(networks) > 1:
        named = Column("network", "network", "text", lambda r: networks[network_of(r)], plain)
        found.append(named)
    found.append(Column("method", "method", "text", lambda r: r["cam"], plain))
    titles = {
        "probability": "score" if is_score else "probability",
        "tau": "tau*" if summary.taus else "tau",
        "rpi": "RPI",
        "masked": "masked",
        "kept": "kept",
    }
    looks: dict[str, Callable[[float], str]] = {
        "tau": "{:g}".format,
        "rpi": lambda v: f"{v:.3f}" if v < 1e6 else f"{v:.1e}",
        "kept": "{:.1%}".format,
    }
    for name, title in titles.items():
        if name == "probability" or known(name):
            kind = "share" if name == "kept" else "number"
            found.append(Column(name, title, kind, _field(name), looks.get(name, precise)))
    return found


GLOSSARY = {
    "probability": "probability: of the class, for the whole image.",
    "tau*": "tau*: the threshold below which the map is muted, the one of the largest RPI.",
    "tau": "tau: the threshold below which the map is muted.",
    "RPI": "RPI: relative increase of the probability where only what is kept is shown.",
    "masked": "masked: the probability where only what is kept is shown.",
    "kept": "kept: share of the pixels that are not muted.",
}


def _glossary(columns: Sequence[Column]) -> list[str]:
    return [GLOSSARY[column.title] for column in columns if column.title in GLOSSARY]


def _field(name: str) -> Callable[[Result], Any]:
    return lambda result: getattr(numbers_of(result), name)


def _headed(column: Column) -> str:
    kind = ' class="text"' if column.kind == "text" else ""
    return (
        f'<th{kind} data-name="{column.name}" data-kind="{column.kind}">'
        f'<button type="button">{html(column.title)}</button></th>'
    )


HINTS = {"text": "contains", "number": "> 0.5", "share": "< 50%"}


def _filter(column: Column) -> str:
    label = f"{column.title}: {HINTS[column.kind]}"
    kind = ' class="text"' if column.kind == "text" else ""
    return (
        f'<th{kind}><input name="{column.name}" placeholder="{html(HINTS[column.kind])}" '
        f'aria-label="{html(label)}"></th>'
    )


def _row(result: Result, picture: str, columns: Sequence[Column], out: Path) -> str:
    links = {kind: _link(path, out) for kind, path in result["outputs"].items()}
    opened = next((links[k] for k in ("figure", "overlay", "grid", "mask") if k in links), None)
    alt = html(f"map of {os.path.basename(result['image'])}")
    image = f'<img class="thumb" loading="lazy" alt="{alt}" src="{picture}">'
    cells = [
        f'<td class="text"><a href="{opened}">{image}</a></td>'
        if opened
        else f'<td class="text">{image}</td>'
    ]
    for column in columns:
        value = column.value(result)
        kind = ' class="text"' if column.kind == "text" else ""
        shown = "" if value is None else html(column.text(value))
        if column.name == "image":
            # So that long paths break between folders.
            listed = " · ".join(f'<a href="{link}">{html(k)}</a>' for k, link in links.items())
            shown = f'{shown.replace("/", "/<wbr>")}<div class="note">{listed}</div>'
        raw = "" if value is None else html(repr(value) if isinstance(value, float) else str(value))
        cells.append(f'<td{kind} data-value="{raw}">{shown}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _link(path: str, out: Path) -> str:
    """Name a file from the page's folder, so that both can be moved."""
    return html(quote(os.fsencode(os.path.relpath(path, out))))


def _means(summary: Summary) -> Iterator[str]:
    titles = {"probability": "probability", "rpi": "RPI", "masked": "masked", "kept": "kept"}
    known = [n for n in titles if any(m.of(n) is not None for m in summary.means.values())]
    rows = []
    for place, name in summary.named():
        means = summary.means[place]
        values = [means.of(each) for each in known]
        texts = [
            "-" if v is None else f"{v:.1%}" if n == "kept" else f"{v:.3f}"
            for n, v in zip(known, values, strict=True)
        ]
        rows.append([html(name), str(means.results), *texts])
    yield "<div>"
    yield from table(["mean of", "results", *(titles[name] for name in known)], rows)
    common = "; ".join(f"{name} {count:,}" for name, count in summary.common())
    yield f'<p class="note">Most common classes: {html(common)}.</p></div>'


def _histograms(made: Page) -> Iterator[str]:
    what = "score" if "target" in made.settings else "probability"
    bars = of_values(made.probabilities, None if what == "score" else (0.0, 1.0))
    yield histogram(f"Results by the {what} of their class", bars)
    if taus := made.summary.thresholds():
        bars = [Bar(f"{tau:g}", sum(found.values())) for tau, found in taus]
        tenths = ", in tenths" * made.summary.in_tenths
        yield histogram(f"Results by tau*{tenths}", bars)
