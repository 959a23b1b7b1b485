"""`aft gen-masks`: the best masks of a whole data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from aftcli.cli import setup
from aftcli.cli.process import keep_freed_memory
from aftcli.core.methods import named
from aftcli.errors import UsageError
from aftcli.options.data import Data, LabelsOption, ValShare
from aftcli.options.groups import (
    EvaluateRun,
    JudgedThresholds,
    LowerPrecision,
    Methods,
    Network,
    Printed,
)
from aftcli.options.make import number, option, words

if TYPE_CHECKING:
    from aftcli.core.classifier import Classifier
    from aftcli.tft.judges import Judge

Exported = Literal["table", "json", "csv", "parquet"]  # as in aftcli.report.masks


@dataclass(frozen=True)
class MaskedData(Data):
    """The data set to make masks of."""

    strict: Annotated[bool, option("--strict", "", "Stop at an image that can't be read.")] = False
    labels: LabelsOption = None
    val_share: ValShare = None
    seed: Annotated[
        int | None, number("--seed", "N", "seed", "Seed that draws this share. Default: 0.")
    ] = None


@dataclass(frozen=True)
class MaskOutput(Printed):
    """Options of what is printed of masks."""

    show: Annotated[
        Path | None, option("--show", "FILE", "Print what a mask file holds, and check it.")
    ] = None
    format_: Annotated[
        Exported, words("--format", Exported, "With --show, a summary or all images")
    ] = "table"


@dataclass(frozen=True)
class MaskRun(EvaluateRun):
    """Options of how masks are made."""

    precision: LowerPrecision = "no"


def gen_masks(
    data: MaskedData,
    network: Network,
    maps: Methods,
    thresholds: JudgedThresholds,
    output: MaskOutput,
    run: MaskRun,
) -> None:
    """Find the best masks of a whole data set, from which AFT learns.

    Writes RUN/masks/MODEL-CAM.h5. If it is stopped, the same command resumes. torchrun and
    accelerate launch run it in several processes, also on several machines.
    """
    if output.show or data.dataset is None:
        return _show(output)
    named(maps.cam or [])
    setup.check(network, data)
    settings = thresholds.settings()
    processes, device = setup.processes(run.device)
    quiet = run.quiet or processes.index > 0
    accelerate = setup.engine(run.engine, run.precision, quiet)
    data.fetch(quiet, processes.index == 0, processes.wait)
    f = setup.classifier(network, device, quiet)

    from aftcli.data.parts import Reading
    from aftcli.data.sets import open_data_set
    from aftcli.report.masks import print_stores, watch
    from aftcli.tft.explain import passes
    from aftcli.tft.generate import generate_masks, store_path
    from aftcli.tft.stores import choose_held, with_names_of_run

    keep_freed_memory()
    f = with_names_of_run(f, run.run, setup.noting(quiet))
    held = choose_held(run.run, f, data.dataset, data.val_share, data.seed)
    reading = Reading(data.data_format, data.labels == "all", held)
    images = open_data_set(data.dataset, data.split, f.classes, reading=reading).limited(data.limit)
    for text in images.notes:
        setup.noting(quiet)(text)
    methods = setup.methods(f, maps.cam, "gradcam", quiet=quiet)
    judges = setup.judges(thresholds.asked, [f], device, quiet)
    _say_unknown(judges, f, quiet)
    count = len(images.samples)
    # Of all processes, so that their number changes no result.
    mirrors = setup.mirrors(judges)
    f = accelerate(f, count * passes(f, methods, 1, settings, mirrors=mirrors))
    judges = setup.fast_judges(judges, accelerate, count * passes(f, methods, 1, settings))
    found = generate_masks(
        f,
        images,
        methods,
        run.run,
        settings,
        workers=setup.workers(run.workers),
        batch=run.batch,
        strict=data.strict,
        overwrite=run.overwrite,
        processes=processes,
        judges=judges,
    )
    watched = watch(found, count, processes, run.quiet)
    if processes.index == 0:
        print_stores([store_path(run.run, f.name, m) for m in methods], watched, output.json)


def _say_unknown(judges: Sequence[Judge], f: Classifier, quiet: bool) -> None:
    """Say which judges do not know all classes, so that not all images are asked about."""
    for judge in judges:
        unknown = (judge.matching(f) < 0).nonzero()[:, 0].tolist()
        if unknown:
            setup.noting(quiet)(
                f"{judge.name} does not know {len(unknown)} of {len(f.classes)} classes (first: "
                f"{f.classes.name(unknown[0])}), so the search of their images does not ask it"
            )


def _show(output: MaskOutput) -> None:
    if output.show is None:
        raise UsageError("name a DATASET to make masks of, or --show FILE to see what a file holds")

    from aftcli.report.masks import export_store, show_store

    if output.json or output.format_ == "table":
        show_store(output.show, output.json)
    else:
        export_store(output.show, output.format_)
