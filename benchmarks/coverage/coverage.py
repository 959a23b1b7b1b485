"""Sweep published networks and users' own: cut at the default layer, explained, compared.

    python -m benchmarks coverage                       all, a quarter of an hour on two cores
    python -m benchmarks coverage --only 'vit*' swin_t  a few, by name or pattern
    python -m benchmarks coverage --page                keeps what docs/results/coverage.md shows

Published networks have random weights: 80 of torchvision's, as `load_classifier` names them, and
142 of timm's. Each is cut by `cut_classifier` with its default layer and judged (judging.py).
Users' networks are in the folder users. It fails where a network that was right in the figures
kept is not right any more.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from fnmatch import fnmatch
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks import pages
from benchmarks.coverage import catalogue
from benchmarks.coverage.judging import Verdict, first_line, judged
from benchmarks.coverage.users import NETWORKS, checked

PAGE = "results/coverage"
SECONDS = 120  # of a processor, for one network
CORES = 2


class Row(NamedTuple):
    """One network in a table."""

    name: str
    cells: tuple[str, ...]
    result: str
    why: str
    seconds: float


def main() -> int:
    """Sweep, print what is not right, keep the figures; return 1 where something has fallen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, CORES))
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    arguments = parser.parse_args()
    tables: dict[str, Callable[[str], Row]] = {"networks": published, "users": own}
    known = {"networks": catalogue.names(), "users": list(NETWORKS)}
    wanted = {
        table: [n for n in names if any(fnmatch(n, pattern) for pattern in arguments.only)]
        for table, names in known.items()
    }
    if not any(wanted.values()):
        parser.error(f"no network is named {' or '.join(arguments.only)}")
    before = {table: results(table) for table in tables}
    found: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(
        arguments.processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for table, work in tables.items():
            found[table] = list(swept(pool, work, wanted[table]))
            print(f"{table}: {summary(found[table])}\n")
    if arguments.page:
        keep(found)
    lines = [line for table in tables for line in fallen(before[table], found[table])]
    print(*lines, sep="\n", file=sys.stderr, end="\n" if lines else "")
    return 1 if lines else 0


def swept(
    pool: ProcessPoolExecutor, work: Callable[[str], Row], names: Sequence[str]
) -> Iterator[Row]:
    """Yield the rows of networks in their order; print what is not right as it comes."""
    rows: dict[str, Row] = {}
    for done in as_completed([pool.submit(work, name) for name in names]):
        row = done.result()
        rows[row.name] = row
        note = "" if row.result == "right" else f"{row.result}: {row.why}"
        print(f"{len(rows):4} {row.name:40} {row.seconds:5.1f} s  {note}", flush=True)
    yield from (rows[name] for name in names)


def fallen(before: Mapping[str, str], rows: Sequence[Row]) -> list[str]:
    """List the networks that were right and are not any more."""
    return [
        f"{row.name}: was right, is now {row.result}: {row.why}"
        for row in rows
        if before.get(row.name) == "right" and row.result != "right"
    ]


def published(name: str) -> Row:
    """Judge a published network."""
    started = time.process_time()
    try:
        with _at_most(SECONDS):
            model, size = catalogue.build(name)
            verdict = judged(name, model, size)
            if verdict.layer and name in catalogue.LOADED:
                other = catalogue.loaded_layer(name)
                verdict = replace(verdict, other="" if other == verdict.layer else other)
    except Exception as error:  # noqa: BLE001 - a crash is a finding
        verdict = Verdict(name, crashed=first_line(error))
    gc.collect()
    cells = (verdict.layer, "x".join(map(str, verdict.shape)), _difference(verdict.difference))
    return Row(name, cells, verdict.result, verdict.why, time.process_time() - started)


def own(name: str) -> Row:
    """Check a user's network."""
    started = time.process_time()
    outcome = checked(NETWORKS[name])
    seconds = time.process_time() - started
    return Row(name, (NETWORKS[name].about.rstrip("."),), outcome.result, outcome.why, seconds)


class _at_most:
    """A limit to the time of one network."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def late(*_: object) -> None:
            raise TimeoutError(f"it takes more than {self.seconds} s")

        signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _difference(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def results(table: str) -> dict[str, str]:
    """Return the results in the figures kept, by the networks' names."""
    blocks = pages.figures(PAGE).get(table, [])
    rows = [row for block in blocks if isinstance(block, dict) for row in block["rows"]]
    return {_plain(row[0]): row[-2] for row in rows}


def _plain(cell: str) -> str:
    return cell.strip("`")


def summary(rows: Sequence[Row]) -> str:
    """Count the results in a sentence."""
    counts = Counter(row.result for row in rows)
    return f"{len(rows)} networks: " + ", ".join(f"{n} {what}" for what, n in counts.most_common())


HEADS = {
    "networks": ("network", "layer", "A", "difference", "result", "why"),
    "users": ("network", "what it does", "result", "why"),
}


def keep(found: dict[str, list[Row]]) -> None:
    """Store the tables; of a sweep of a few, their rows only, in place of the old ones."""
    for table, rows in found.items():
        old = {
            _plain(row[0]): tuple(cell or "" for cell in row)
            for block in pages.figures(PAGE).get(table, [])
            if isinstance(block, dict)
            for row in block["rows"]
        }
        new = {
            row.name: tuple(map(_cell, (f"`{row.name}`", *row.cells, row.result, row.why)))
            for row in rows
        }
        names = catalogue.names() if table == "networks" else list(NETWORKS)
        merged = {name: new.get(name) or old[name] for name in names if name in new or name in old}
        counts = Counter(row[-2] for row in merged.values())
        pages.keep(PAGE, f"{table}_counts", _table(("result", "networks"), counts.most_common()))
        pages.keep(PAGE, table, _table(HEADS[table], merged.values()))
    (pages.DOCS / f"{PAGE}.md").write_text(pages.made(PAGE), "utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Any) -> str:  # noqa: ANN401 - rows of anything printed
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "|" + "|".join(f" {cell} " if str(cell) else " " for cell in line) + "|" for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
