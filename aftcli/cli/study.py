"""Evaluate what a run holds, and what people get of it: tables, and with figures a page."""

from __future__ import annotations

import platform
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aftcli.data.blocks import Processes
from aftcli.engine.accelerate import Accelerate, as_it_is
from aftcli.evaluation.measures import VARIANTS, extras_of
from aftcli.evaluation.run import Measured, Plan, evaluate_study
from aftcli.evaluation.study import Asked, Study, find_studies
from aftcli.evaluation.tables import Sources, Tables, rows_of
from aftcli.evaluation.timing import device_name
from aftcli.report import terminal
from aftcli.report.formats import watch
from aftcli.report.grids import Shown
from aftcli.report.terminal import progress
from aftcli.version import __version__


class Wanted(NamedTuple):
    """Parts of an evaluation that are wanted: tables by number, measures, readings, others."""

    tables: tuple[int, ...]
    metrics: tuple[str, ...]
    maskings: tuple[str, ...]
    baselines: bool = False
    sanity: bool = False
    figures: bool = False


class How(NamedTuple):
    """Settings of a run: decoding processes, images in a pass, again, without progress, engine.

    `note` is told what was assumed.
    """

    workers: int = 1
    batch: int = 16
    overwrite: bool = False
    quiet: bool = False
    accelerate: Accelerate = as_it_is
    note: Callable[[str], None] = warnings.warn


class Found(NamedTuple):
    """Results: the tables, and what they were made of."""

    tables: Tables
    measured: list[Measured]
    maskings: tuple[str, ...]


def evaluate(run: Path, asked: Asked, wanted: Wanted, how: How, processes: Processes) -> Found:
    """Evaluate the studies of a run, showing progress.

    Raises:
        AftError: see `find_studies` and `evaluate_study`.
    """
    studies = find_studies(run, asked)
    plan = Plan(
        wanted.maskings,
        extras_of(wanted.metrics, wanted.baselines),
        how.workers,
        how.batch,
        how.overwrite,
        accelerate=how.accelerate,
        note=how.note,
    )
    first = processes.index == 0
    if first and not how.quiet:
        for text in dict.fromkeys(note for study in studies for note in study.data_set.notes):
            terminal.complain(text)
    measured = []
    if wanted.figures or {3, 4} & set(wanted.tables):
        for study in studies:
            events = evaluate_study(study, run, plan, processes)
            measured.append(watch(events, how.quiet or not first))
    if not first:
        return Found(Tables(), measured, wanted.maskings)
    _say_broken(measured)
    variants = [v for v in VARIANTS if v != "fixed" or wanted.baselines]
    sources = Sources(
        run,
        studies,
        measured,
        wanted.metrics,
        variants,
        wanted.maskings[0],
        how.overwrite,
        how.accelerate,
        processes,
        partial(progress, quiet=how.quiet),
    )
    asked_for = [*map(str, wanted.tables), *["sanity"] * wanted.sanity]
    kinds = {study.data_name: study.data_set.kind for study in studies}
    tables = Tables(rows_of(asked_for, sources), _settings(run, studies, wanted), kinds)
    return Found(tables, measured, wanted.maskings)


def _say_broken(measured: list[Measured]) -> None:
    broken = {b.path: b for m in measured for r in m.results.values() for b in r.broken}
    for path, each in list(broken.items())[:20]:
        terminal.complain(f"left out {path}: {each.reason}")
    if len(broken) > 20:
        terminal.complain(f"left out {len(broken) - 20} more")


def _settings(run: Path, studies: list[Study], wanted: Wanted) -> dict[str, Any]:
    """All that is needed to do it again."""
    import timm
    import torchvision

    return {
        "command": shlex.join(["aft", *sys.argv[1:]]),
        "run": str(run),
        "studies": [
            {
                "model": study.f.name,
                "layer": study.f.layer_name,
                "weights": study.variants[0].weights,
                "dataset": study.data_name,
                "split": study.data_set.split,
                "images": len(study.data_set.samples),
                "cams": list(study.cams),
                "thresholds": list(study.search.thresholds),
                "fill": study.search.fill,
                "threshold_mode": study.search.mode,
                "cells": study.cells,
                "judges": [
                    {"name": judge.name, "weights": judge.weights} for judge in study.judges
                ],
                "tuned": [v.path.name for v in study.variants if v.path],
            }
            for study in studies
        ],
        "maskings": list(wanted.maskings),
        "metrics": list(wanted.metrics),
        "device": device_name(studies[0].f.device),
        "versions": {
            "aft": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    }


def write_figures(found: Found, run: Path, shown: Shown, images: list[str], say: bool) -> Path:
    """Draw the figures and write the page.

    Args:
        found: what was evaluated.
        run: where it lives; files go to `<run>/results`.
        shown: how tables are shown.
        images: of Figure 3, by a part of their names; empty for some, spread.
        say: print what was written on stdout; else on stderr, which leaves stdout to the tables.

    Returns:
        The page.

    Raises:
        AftError: there is no such image, or a file can't be written.
    """
    from aftcli.report.figures import draw_all
    from aftcli.report.formats import write_page

    pictures = draw_all(found.measured, run / "results" / "figures", images, found.maskings)
    page = write_page(run / "results" / "report.html", found.tables, shown, pictures)
    for path in (*(p.path for p in pictures), page):
        terminal.say(f"wrote {path}", aside=not say)
    return page
