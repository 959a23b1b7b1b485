"""An evaluation for people: progress, tables as text, JSON, CSV, Markdown, LaTeX, HTML."""

from __future__ import annotations

import csv
import json
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table

from aftcli.evaluation.measures import MEASURES, QUANTUS, published_records
from aftcli.evaluation.run import Measured, Step
from aftcli.evaluation.tables import TABLES, Record, Sources, Tables
from aftcli.evaluation.trials import device_name
from aftcli.pages.grids import LOOKS, Grid, Shown, grids
from aftcli.report.terminal import (
    cell,
    csv_cell,
    latex,
    markdown,
    progress_bar,
    stdout_console,
)
from aftcli.settings import JUDGES
from aftcli.version import __version__


def watch(steps: Iterator[Step | Measured], quiet: bool) -> Measured:
    """Run to the end, showing progress on stderr."""
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with progress_bar(*columns, quiet=quiet) as bar:
        for step in steps:
            if isinstance(step, Measured):
                return step
            if step.what not in tasks:
                tasks[step.what] = bar.add_task(step.what, total=step.total)
            bar.advance(tasks[step.what], step.images)
    raise AssertionError("the evaluation ended without its results")


def settings_of(sources: Sources, maskings: Sequence[str]) -> dict[str, Any]:
    """Return all that is needed to make tables again, as plain values."""
    import timm
    import torchvision

    return {
        "command": shlex.join(["aft", *sys.argv[1:]]),
        "run": str(sources.run),
        "studies": [
            {
                "model": study.f.name,
                "layer": study.f.layer_name,
                "weights": study.variants[0].weights,
                "dataset": study.data_name,
                "split": study.data_set.part,
                "images": len(study.data_set.samples),
                "cams": list(study.cams),
                "thresholds": list(study.search.thresholds),
                "fill": study.search.fill,
                "threshold_mode": study.search.mode,
                **({JUDGES: [*study.asked]} if study.asked else {}),
                "cells": study.cells,
                "judges": [
                    {"name": judge.name, "weights": judge.weights} for judge in study.judges
                ],
                "tuned": [v.path.name for v in study.variants if v.path],
            }
            for study in sources.studies
        ],
        "maskings": list(maskings),
        "metrics": list(sources.metrics),
        "device": device_name(sources.studies[0].f.device),
        "versions": {
            "aft": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    }


def as_text(tables: Tables, shown: Shown) -> None:
    """Print the tables for the terminal."""
    console = stdout_console(400)
    for grid in grids(tables, shown):
        console.print(cell(grid.title, "bold"), soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(grid.header):
            table.add_column(
                cell(name), justify="left" if i < grid.left else "right", overflow="fold"
            )
        for row in grid.rows:
            table.add_row(*(cell(c.text, "bold" if c.bold else "") for c in row))
        console.print(table)
        if grid.note:
            console.print(cell(grid.note), soft_wrap=True)
        console.print()
    print(end="", flush=True)


def _grouped(record: dict[str, Any]) -> dict[str, Any]:
    """Add the group of a record's measure."""
    name = record.get("measure", "")
    if name in MEASURES or name.startswith(QUANTUS):
        return {**record, "group": MEASURES[name].group}
    return record


def as_dict(tables: Tables, shown: Shown) -> dict[str, Any]:
    """Return the tables in long form, one object a number (docs/reference/files.md)."""
    found: dict[str, Any] = {
        name: [_grouped(table.record(row)) for row in tables.rows[name]]
        for name, table in TABLES.items()
        if name in tables.rows
    }
    if shown.paper:
        found["paper"] = {
            name: [*map(_grouped, rows)] for name, rows in published_records().items()
        }
    return {**found, "settings": tables.settings}


def as_json(tables: Tables, shown: Shown) -> None:
    """Print the tables as JSON."""
    print(json.dumps(as_dict(tables, shown), indent=2, allow_nan=False), flush=True)


# Entries of a record that each of its lines has.
SAME = ("dataset", "model", "masking", "variant", "judge")


def _lines_of(name: str, records: Iterable[Record]) -> Iterator[Record]:
    """Yield one line of CSV for each number of a table's records."""
    for record in records:
        low, high = record.get("ci") or ("", "")
        same = {k: v for k, v in record.items() if k in SAME}
        count = record.get("n", record.get("runs", ""))
        same |= {"cam": record.get("cam") or "", "ci_low": low, "ci_high": high, "n": count}
        for number in TABLES[name].numbers(record):
            yield {**same, **number}


def as_csv(tables: Tables, shown: Shown) -> None:
    """Print the tables as CSV, long form: one line a number, the same columns for all tables."""
    columns = ("table", "dataset", "model", "cam", "masking", "variant", "against", "measure")
    writer = csv.DictWriter(
        sys.stdout, [*columns, "value", "ci_low", "ci_high", "n", "judge"], restval=""
    )
    writer.writeheader()
    document = as_dict(tables, shown)
    found = [(name, name, document.get(name, [])) for name in dict.fromkeys([*LOOKS, *TABLES])]
    found += [(f"paper {name}", name, each) for name, each in document.get("paper", {}).items()]
    for title, name, records in found:
        for line in _lines_of(name, records):
            writer.writerow({"table": title, **{k: csv_cell(v) for k, v in line.items()}})
    sys.stdout.flush()


def as_markdown(tables: Tables, shown: Shown) -> None:
    """Print the tables as Markdown."""
    print("\n".join(markdown_lines(grids(tables, shown))), flush=True)


def markdown_lines(made: Sequence[Grid]) -> Iterator[str]:
    """Yield tables as lines of Markdown."""
    for grid in made:
        yield f"**{markdown(grid.title)}**"
        yield ""
        yield f"| {' | '.join(map(markdown, grid.header))} |"
        yield f"|{'|'.join('---' if i < grid.left else '--:' for i in range(len(grid.header)))}|"
        for row in grid.rows:
            cells = (f"**{markdown(c.text)}**" if c.bold else markdown(c.text) for c in row)
            yield f"| {' | '.join(cells)} |"
        if grid.note:
            yield ""
            yield markdown(grid.note)
        yield ""


TIMES = re.compile(r"\(x(?=\d|\\textgreater)")  # before a factor


def _latex(text: str) -> str:
    return TIMES.sub(r"($\\times$", latex(text))


def as_latex(tables: Tables, shown: Shown) -> None:
    """Print the tables as LaTeX, for the package booktabs."""
    print("\n".join(latex_lines(grids(tables, shown))), flush=True)


def latex_lines(made: Sequence[Grid]) -> Iterator[str]:
    """Yield tables as lines of LaTeX."""
    yield r"% \usepackage{booktabs}"
    for grid in made:
        columns = "l" * grid.left + "r" * (len(grid.header) - grid.left)
        yield r"\begin{table}"
        yield rf"\caption{{{_latex(grid.title)}. {_latex(grid.note)}}}"
        yield rf"\begin{{tabular}}{{{columns}}}"
        yield r"\toprule"
        yield " & ".join(map(_latex, grid.header)) + r" \\"
        yield r"\midrule"
        for row in grid.rows:
            cells = (rf"\textbf{{{_latex(c.text)}}}" if c.bold else _latex(c.text) for c in row)
            yield " & ".join(cells) + r" \\"
        yield r"\bottomrule"
        yield r"\end{tabular}"
        yield r"\end{table}"


FORMATS: dict[str, Callable[[Tables, Shown], None]] = {
    "table": as_text,
    "json": as_json,
    "csv": as_csv,
    "markdown": as_markdown,
    "latex": as_latex,
}
