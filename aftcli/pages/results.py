"""Results of `aft explain` and `aft tft` on stdout: a table, a summary, JSON, CSV, JSON lines."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len, chop_cells
from rich.table import Table

from aftcli.errors import AftError
from aftcli.files import replacing
from aftcli.report.manifest import Manifest, unwritable
from aftcli.report.summary import (
    Summary,
    increases_of,
    label_of,
    network_labels,
    network_of,
    numbers_of,
)
from aftcli.report.terminal import cell, csv_cell, plain, say, stdout_console

Result = dict[str, Any]  # what `aftcli.report.explain.as_dict` gives

Add = Callable[[Sequence[Result]], None]

MOST = 20  # images whose results a table lists; more are summed up

SHORTEST = 8  # columns that an image's name keeps

# Of CSV, in every call the same.
COLUMNS = (
    *(
        "image",
        "model",
        "checkpoint",
        "layer",
        "layers",
        "fuse",
        "cam",
        "class_index",
        "class_name",
    ),
    *("probability", "tau", "threshold", "rpi", "masked_probability", "area", "masking", "fill"),
    *("threshold_mode", "search", "smooth", "zero_level", "cells", "target", "contrast"),
    "judges",
    *("overlay", "figure", "map", "mask", "grid"),
)


@contextmanager
def printing() -> Iterator[None]:
    """Print; an error of stdout is AftError, but for a reader that leaves."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AftError(f"the result can't be printed ({error.strerror})") from error


def line_of(result: Result) -> dict[str, Any]:
    """Return a result as a line of CSV, by COLUMNS; text is safe in spreadsheets."""
    numbers, cut = numbers_of(result), result.get("tft") or result.get("fixed") or {}
    line = {name: value for name, value in {**cut, **result}.items() if name in COLUMNS}
    line |= {"tau": numbers.tau if "tft" in result else None, "rpi": numbers.rpi}
    line |= {"masked_probability": numbers.masked, "layers": ";".join(result.get("layers", ()))}
    increases = {each["name"]: each["log_odds_increase"] for each in cut.get("judges", ())}
    line["judges"] = json.dumps(increases) if increases else None
    line["contrast"] = result.get("contrast", {}).get("class_name")
    line |= {kind: path for kind, path in result["outputs"].items() if kind in COLUMNS}
    return {name: csv_cell("" if value is None else value) for name, value in line.items()}


@contextmanager
def as_table(out: Path, images: int, manifest: Manifest | None) -> Iterator[Add]:
    """Print a table at the end and the files written; of many images a summary."""
    if images > MOST:
        with _summed_up(out, manifest) as add:
            yield add
        return
    results: list[Result] = []
    yield results.extend
    if results:
        with printing():
            print_table(results)


@contextmanager
def _summed_up(out: Path, manifest: Manifest | None) -> Iterator[Add]:
    """Write a CSV file of results as they come; print a summary at the end."""
    summary, path = Summary(), out / "results.csv"
    with ExitStack() as stack:
        lines: list[Lines] = []

        def add(results: Sequence[Result]) -> None:
            with unwritable(path):
                if results and not lines:
                    if manifest:
                        manifest.add(path, {}, {"kind": "results"})
                    temporary = stack.enter_context(replacing(path))
                    # As on stdout, a name that is no text is written with escapes.
                    file = temporary.open("w", -1, "utf-8", "backslashreplace", "")
                    lines.append(Lines(stack.enter_context(file)))
                for each in lines:
                    each.add(results)
            summary.add(results)

        yield add
        with unwritable(path):
            stack.close()
    if summary.results:
        with printing():
            print_summary(summary)
            say(f"wrote {path}")
            if summary.files:
                say(f"wrote {summary.files} other files in {out}")
            print(end="", flush=True)


class Lines:
    """Lines of CSV, each written at once.

    Args:
        stream: that they go to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.writer = csv.DictWriter(stream, COLUMNS, restval="")
        self.writer.writeheader()
        stream.flush()

    def add(self, results: Iterable[Result]) -> None:
        """Write results."""
        for result in results:
            self.writer.writerow(line_of(result))
            self.stream.flush()


@contextmanager
def as_json(out: Path, images: int, manifest: Manifest | None) -> Iterator[Add]:
    """Print a list at the end, one object per image, method and class."""
    results: list[Result] = []
    yield results.extend
    with printing():
        print(json.dumps(results, indent=2), flush=True)


@contextmanager
def as_csv(out: Path, images: int, manifest: Manifest | None) -> Iterator[Add]:
    """Print the head of a CSV table, and each result as it comes."""
    with printing():
        lines = Lines(sys.stdout)

    def add(results: Sequence[Result]) -> None:
        with printing():
            lines.add(results)

    yield add


@contextmanager
def as_json_lines(out: Path, images: int, manifest: Manifest | None) -> Iterator[Add]:
    """Print each result as it comes, a line of JSON."""
    # A progress bar takes stdout while it is shown.
    stream = sys.stdout

    def add(results: Sequence[Result]) -> None:
        with printing():
            for result in results:
                print(json.dumps(result), file=stream, flush=True)

    yield add


FORMATS: dict[str, Callable[[Path, int, Manifest | None], AbstractContextManager[Add]]] = {
    "table": as_table,
    "json": as_json,
    "csv": as_csv,
    "jsonl": as_json_lines,
}

STREAMED = ("csv", "jsonl")  # formats that print results as they come


def print_table(results: Sequence[Result]) -> None:
    """Print results as a table, then the files written."""
    console = stdout_console(1000)
    columns = _columns(results)
    rows = [list(map(plain, row)) for row in _rows(results)]
    texts = sum(is_text for _, is_text in columns)
    widths = _widths(rows, [title for title, _ in columns], texts, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for (title, is_text), width in zip(columns, widths, strict=True):
        table.add_column(title, justify="left" if is_text else "right", width=width)
    for row in rows:
        row[0] = elided(row[0], widths[0])
        for i in range(1, texts):
            row[i] = " ".join(elided(word, widths[i]) for word in row[i].split(" "))
        table.add_row(*map(cell, row))
    console.print(table)
    for row, result in zip(rows, results, strict=True):
        if said := increases_of(result):
            named = f"{row[0]}, {result['cam']}, {label_of(result)}"
            console.print(cell(f"{named}: {said}"), soft_wrap=True)
    for result in results:
        for path in result["outputs"].values():
            say(f"wrote {path}")
    print(end="", flush=True)


def _columns(results: Sequence[Result]) -> list[tuple[str, bool]]:
    """List the titles of columns, and if they are of text."""
    tft = any("tft" in result for result in results)
    fixed = any("fixed" in result for result in results)
    several = len(set(map(network_of, results))) > 1
    zero = ("zero",) if any("zero_level" in result for result in results) else ()
    searched, cut = ("tau*", "RPI") if tft else (), ("masked", "kept") if tft or fixed else ()
    texts = ("image", *["network"] * several, "cam", "class")
    score = "score" if all("target" in result for result in results) else "prob."
    return [(t, True) for t in texts] + [(t, False) for t in (score, *zero, *searched, *cut)]


def _rows(results: Sequence[Result]) -> Iterator[list[str]]:
    sharing = Counter(Path(image).name for image in {result["image"] for result in results})
    networks = network_labels(list(map(network_of, results)))
    several = len(set(networks)) > 1
    for network, result in zip(networks, results, strict=True):
        name, numbers = Path(result["image"]).name, numbers_of(result)
        image = name if sharing[name] == 1 else result["image"]
        cells = [image, *[network] * several, result["cam"], label_of(result)]
        cells.append(f"{numbers.probability:.4f}")
        if "zero_level" in result:
            cells.append(f"{result['zero_level']:g}")
        if numbers.rpi is not None:
            cells += [f"{numbers.tau:g}", f"{numbers.rpi:.3f}"]
        if numbers.masked is not None:
            cells += [f"{numbers.masked:.4f}", f"{numbers.kept:.1%}"]
        yield cells


def _widths(
    rows: Sequence[Sequence[str]], titles: Sequence[str], texts: int, total: int
) -> list[int]:
    """Share the console's columns: names that are too long for theirs are elided or wrapped."""
    found = [
        max(cell_len(row[i]) for row in [*rows, titles] if i < len(row)) for i in range(len(titles))
    ]
    shared = sorted((i for i in range(texts) if titles[i] != "cam"), key=found.__getitem__)
    free = total - sum(found) + sum(found[i] for i in shared) - 2 * (len(titles) - 1)
    free = max(free, SHORTEST * len(shared))
    # What the shorter ones leave goes to the longer ones.
    for left, i in zip(range(len(shared), 0, -1), shared, strict=True):
        found[i] = min(found[i], free // left)
        free -= found[i]
    return found


def elided(text: str, width: int) -> str:
    """Leave out the middle of a text that is longer than so many columns.

    >>> elided("n02123159/ILSVRC2012_val_00000293.JPEG", 20)
    'n02123159/…0293.JPEG'
    """
    if cell_len(text) <= width:
        return text
    half = (width - 1) // 2
    # A wide character has two columns, and is taken whole.
    start = chop_cells(text, max(width - 1 - half, 1))[0]
    end = chop_cells(text[::-1], max(half, 1))[0][::-1]
    return f"{start}…{end}"


def print_summary(summary: Summary) -> None:
    """Print the means of each method, the distribution of tau* and the most common classes."""
    console = stdout_console(1000)
    results = "1 result" if summary.results == 1 else f"{summary.results:,} results"
    console.print(cell(f"{results} of {summary.images:,} images"))
    console.print(_means_table(summary))
    if rows := summary.thresholds():
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("tau* from" if summary.in_tenths else "tau*")
        for tau, _ in rows:
            table.add_column(f"{tau:g}", justify="right")
        for place, name in summary.named():
            table.add_row(*map(cell, [name, *(str(found.get(place, 0)) for _, found in rows)]))
        console.print(table)
    common = ", ".join(f"{name} {count}" for name, count in summary.common())
    console.print(cell(f"most common classes: {common}"))


def _means_table(summary: Summary) -> Table:
    wanted = {"probability": "prob.", "rpi": "RPI", "masked": "masked", "kept": "kept"}
    known = [
        name
        for name in wanted
        if any(means.of(name) is not None for means in summary.means.values())
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("mean of")
    for name in ("results", *(wanted[name] for name in known)):
        table.add_column(name, justify="right")
    for place, named in summary.named():
        means = summary.means[place]
        values = [_number(name, means.of(name)) for name in known]
        table.add_row(*map(cell, [named, str(means.results), *values]))
    return table


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name == "kept" else f"{value:.3f}" if name == "rpi" else f"{value:.4f}"
