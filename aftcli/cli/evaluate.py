"""`aft evaluate`: the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from aftcli.cli import setup
from aftcli.cli.process import keep_freed_memory
from aftcli.core.methods import named
from aftcli.measures.registry import (
    EVALUATED,
    MEASURED,
    MEASURES,
    TABLES,
    TITLES,
    VARIANTS,
    extras_of,
    judges,
    measures,
)
from aftcli.options.data import Data, LabelsOption
from aftcli.options.groups import EvaluateRun, Maps, Network, Printed
from aftcli.options.make import option, usage, words
from aftcli.options.read import tables
from aftcli.settings import Fill, Masking, Mode, read_thresholds

if TYPE_CHECKING:
    from aftcli.data.blocks import Processes
    from aftcli.engine.accelerate import Accelerate
    from aftcli.evaluation.run import Plan
    from aftcli.evaluation.study import Study
    from aftcli.evaluation.tables import Tables

Format = Literal["table", "json", "csv", "markdown", "latex"]  # as in aftcli.pages.printed
Readings = Literal["both", "binary", "soft"]


@dataclass(frozen=True)
class Networks(Network):
    """The network, and others that judge its maps."""

    judge: Annotated[
        list[str] | None,
        option(
            "--judge",
            "NAME",
            "Who else judges maps: mirror (default), a model, a checkpoint, MODEL=FILE, none; "
            "repeatable.",
            callback=usage(judges),
        ),
    ] = None


@dataclass(frozen=True)
class EvaluatedData(Data):
    """The data set to evaluate on."""

    labels: LabelsOption = None


@dataclass(frozen=True)
class StoredThresholds:
    """The search of thresholds, as masks hold it."""

    PANEL: ClassVar[str] = "Threshold search"

    thresholds: Annotated[
        str | None,
        option(
            "--thresholds",
            "LIST",
            "0:1:0.1 or 0,0.2,0.5. Default: the masks'.",
            callback=usage(read_thresholds),
        ),
    ] = None
    masking: Annotated[
        Readings,
        words("--masking", Readings, "Masks", more_help="Each has a table."),
    ] = "both"
    fill: Annotated[Fill | None, words("--fill", Fill, "Muted pixels", default=False)] = None
    mode: Annotated[
        Mode | None,
        words("--threshold-mode", Mode, "Cut scores by", default=False),
    ] = None

    @property
    def maskings(self) -> tuple[str, ...]:
        """Return the readings of the paper to evaluate."""
        return get_args(Masking) if self.masking == "both" else (self.masking,)


@dataclass(frozen=True)
class TableOutput(Printed):
    """Options of what an evaluation prints and draws."""

    table: Annotated[
        str | None,
        option(
            "--table",
            "LIST",
            f"{', '.join(f'{n} {shows}' for n, shows in TABLES.items())}; all or no LIST: "
            f"{','.join(map(str, EVALUATED))}. Default: {','.join(map(str, MEASURED))}.",
            callback=usage(tables),
        ),
    ] = None
    format_: Annotated[Format, words("--format", Format, "Print as")] = "table"
    metrics: Annotated[
        str | None,
        option(
            "--metrics",
            "LIST",
            "Measures of Table 3, see below. Default: the paper's two.",
            callback=usage(measures),
        ),
    ] = None
    paper: Annotated[bool, option("--paper", "", "Show the published figures beside ours.")] = False
    baselines: Annotated[
        bool,
        option(
            "--baselines",
            "",
            "Add Table 1's cut-offs, and controls that keep as much as TFT and AFT.",
        ),
    ] = False
    ci: Annotated[
        bool, option("--ci", "", "Show 95 % intervals (bootstrap) and the columns' differences.")
    ] = False
    sanity: Annotated[
        bool, option("--sanity", "", "Compare with maps of the network with random weights.")
    ] = False
    figures: Annotated[
        bool, option("--figures", "", "Draw figures and write one page, in RUN/results.")
    ] = False
    image: Annotated[
        list[str] | None,
        option("--image", "NAME", "Image of Figure 3, by a part of its name; repeatable."),
    ] = None


def evaluate(
    data: EvaluatedData,
    network: Networks,
    maps: Maps,
    thresholds: StoredThresholds,
    output: TableOutput,
    run: EvaluateRun,
) -> None:
    """Measure maps without and with TFT, and those of tuned networks: the paper's tables.

    Uses all masks and tuned networks of RUN, the settings of the masks, and the val split of their
    data set. A second call reuses the results in RUN/results, an interrupted one resumes. torchrun
    and accelerate launch run it in several processes.
    """
    cams = named(maps.cam or [])
    setup.check(network, data)
    values = read_thresholds(thresholds.thresholds) if thresholds.thresholds else None

    from aftcli.data.parts import Reading
    from aftcli.evaluation.study import Asked, find_studies
    from aftcli.pages import evaluated as page
    from aftcli.pages import printed
    from aftcli.pages.grids import Shown

    processes, device = setup.processes(run.device)
    quiet = run.quiet or processes.index > 0
    source = setup.source(network, network.layer, setup.device(device), setup.noting(quiet))
    searched = (values, thresholds.fill, thresholds.mode)
    asked = Asked(source, cams, data.dataset, data.split, data.limit, *searched, maps.cells)
    asked = asked._replace(reading=Reading(data.data_format, data.labels and data.labels == "all"))
    columns = (tables(output.table), measures(output.metrics), thresholds.maskings)
    if 3 in columns[0] and any(MEASURES[name].of_probabilities for name in columns[1]):
        asked = asked._replace(judges=judges(network.judge))
    data.fetch(quiet, processes.index == 0, processes.wait)
    keep_freed_memory()
    plan = _plan(thresholds, output, run, setup.engine(run.engine, "no", quiet))
    studies = find_studies(run.run, asked)
    if output.figures:
        from aftcli.pages.figures import check_images

        check_images(studies, output.image or [])
    found = evaluated(studies, plan, output, run, processes)
    if processes.index == 0:
        words, shown = "json" if output.json else output.format_, Shown(output.ci, output.paper)
        printed.FORMATS[words](found, shown)
        if output.figures:
            page.write_figures(found, run.run, shown, output.image or [], words != "table")


def _plan(
    thresholds: StoredThresholds, output: TableOutput, run: EvaluateRun, accelerate: Accelerate
) -> Plan:
    from aftcli.evaluation.run import Plan

    return Plan(
        thresholds.maskings,
        extras_of(measures(output.metrics), output.baselines),
        setup.workers(run.workers),
        run.batch,
        run.overwrite,
        accelerate=accelerate,
        note=setup.noting(run.quiet),
        controls=output.baselines,
    )


def evaluated(
    studies: list[Study], plan: Plan, output: TableOutput, run: EvaluateRun, processes: Processes
) -> Tables:
    """Evaluate studies, showing progress, and make the tables in the first process."""
    from aftcli.evaluation.run import evaluate_study
    from aftcli.evaluation.tables import Sources, Tables, rows_of
    from aftcli.pages import printed
    from aftcli.report.terminal import progress, say_left_out

    first, numbers, metrics = processes.index == 0, tables(output.table), measures(output.metrics)
    if first:
        for text in dict.fromkeys(note for each in studies for note in each.data_set.notes):
            setup.noting(run.quiet)(text)
    measured = []
    if output.figures or set(MEASURED) & set(numbers):
        for study in studies:
            events = evaluate_study(study, run.run, plan, processes)
            measured.append(printed.watch(events, run.quiet or not first))
    if not first:
        return Tables()
    say_left_out(b for m in measured for result in m.results.values() for b in result.broken)
    sources = Sources(
        run.run,
        studies,
        measured,
        metrics,
        [v for v in (TITLES if output.baselines else VARIANTS) if v != "fixed" or output.baselines],
        plan.maskings[0],
        plan.overwrite,
        plan.accelerate,
        processes,
        partial(progress, quiet=run.quiet),
    )
    rows = rows_of([*map(str, numbers), *["sanity"] * output.sanity], sources)
    kinds = {study.data_name: study.data_set.kind for study in studies}
    return Tables(rows, printed.settings_of(sources, plan.maskings), kinds, measured)
