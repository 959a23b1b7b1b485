"""`aft evaluate`: the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from aftcli.cli import setup
from aftcli.cli.options import Data, EvaluateRun, Maps, Network, Printed, option, usage, words
from aftcli.cli.process import keep_freed_memory
from aftcli.core.methods import named
from aftcli.errors import AftError
from aftcli.evaluation.measures import MEASURES, judges, measures
from aftcli.settings import Fill, Masking, Mode, read_thresholds

Format = Literal["table", "json", "csv", "markdown", "latex"]  # as in aftcli.report.formats
Readings = Literal["both", "binary", "soft"]
TABLES = ("1", "2", "3", "4", "5", "all")

METRICS_HELP = f"--metrics takes {', '.join(MEASURES)}; or all."


def tables(text: str | None) -> tuple[int, ...]:
    """Read which tables to print.

    Raises:
        AftError: there is no such table.

    >>> tables("all")
    (3, 4, 5)
    """
    if text is None:
        return (3, 4)
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in TABLES:
            raise AftError(f"there is no table {name!r}; --table takes {', '.join(TABLES)}")
    return (3, 4, 5) if "all" in names else tuple(sorted({int(name) for name in names}))


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
class StoredThresholds:
    """The search of thresholds, as masks hold it."""

    PANEL: ClassVar[str] = "Threshold search"

    thresholds: Annotated[
        str | None, option("--thresholds", "LIST", "0:1:0.1 or 0,0.2,0.5. Default: the masks'.")
    ] = None
    masking: Annotated[
        Readings,
        words("--masking", Readings, "multiply by mask, by map, or a table each."),
    ] = "both"
    fill: Annotated[Fill | None, words("--fill", Fill, "of muted pixels.", default=False)] = None
    mode: Annotated[
        Mode | None,
        words("--threshold-mode", Mode, "of the scores.", default=False),
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
            "Of 1 cut-offs, 2 data sets, 3 measures of maps, 4 accuracies, 5 seconds a map; all, "
            "or alone: 3,4,5. Default: 3,4.",
            callback=usage(tables),
        ),
    ] = None
    format_: Annotated[Format, words("--format", Format, "how to print.")] = "table"
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
        bool, option("--baselines", "", "Add a column of the fixed cut-offs of Table 1.")
    ] = False
    ci: Annotated[
        bool, option("--ci", "", "Show 95 % intervals (bootstrap) and the columns' differences.")
    ] = False
    sanity: Annotated[
        bool, option("--sanity", "", "Also compare with maps of networks with random weights.")
    ] = False
    figures: Annotated[
        bool, option("--figures", "", "Draw figures and write a page of all, in RUN/results.")
    ] = False
    image: Annotated[
        list[str] | None,
        option("--image", "NAME", "Image of Figure 3, by a part of its name; repeatable."),
    ] = None


def evaluate(
    data: Data,
    network: Networks,
    maps: Maps,
    thresholds: StoredThresholds,
    output: TableOutput,
    run: EvaluateRun,
) -> None:
    """Measure maps without and with TFT, and those of tuned networks: the paper's tables.

    Takes all masks and tuned networks of RUN and the val split of their data set. Results are
    kept in RUN/results: a second call finds them, an interrupted one resumes. Settings of TFT are
    those of the masks by default. Runs on several processes under torchrun or accelerate launch.
    """
    cams = named(maps.cam or [])
    setup.check(network, data.dataset)
    values = read_thresholds(thresholds.thresholds) if thresholds.thresholds else None

    from aftcli.cli import study
    from aftcli.evaluation.study import Asked
    from aftcli.report.formats import FORMATS
    from aftcli.report.grids import Shown

    processes, device = setup.processes(run.device)
    note = setup.noting(run.quiet or processes.index > 0)
    source = setup.source(network, network.layer, setup.device(device), note)
    searched = (values, thresholds.fill, thresholds.mode)
    asked = Asked(source, cams, data.dataset, data.split, data.limit, *searched, maps.cells)
    columns = (tables(output.table), measures(output.metrics), thresholds.maskings)
    if 3 in columns[0] and any(MEASURES[name].of_probabilities for name in columns[1]):
        asked = asked._replace(judges=judges(network.judge))
    keep_freed_memory()
    accelerate = setup.engine(run.engine, "no", run.quiet or processes.index > 0)
    work = (setup.workers(run.workers), run.batch, run.overwrite, run.quiet, accelerate)
    how = study.How(*work, setup.noting(run.quiet))
    parts = (output.baselines, output.sanity, output.figures)
    found = study.evaluate(run.run, asked, study.Wanted(*columns, *parts), how, processes)
    if processes.index == 0:
        words, shown = "json" if output.json else output.format_, Shown(output.ci, output.paper)
        FORMATS[words](found.tables, shown)
        if output.figures:
            study.write_figures(found, run.run, shown, output.image or [], words == "table")
