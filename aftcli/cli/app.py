"""The command line: `aft` with its commands, and how each of them ends.

A note on stderr says which options have no effect beside others (IDLE).

Torch is imported by the commands that need it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TextIO

import typer
from typer.core import TyperCommand

import aftcli
from aftcli.cli.evaluate import METRICS_HELP, evaluate, tables
from aftcli.cli.explain import explain, tft, undrawn
from aftcli.cli.finetune import finetune
from aftcli.cli.masks import gen_masks
from aftcli.cli.options import METHODS_HELP, Run, grouped
from aftcli.cli.process import INTERRUPTED, Stopping, flush, what_is_wrong
from aftcli.core.methods import METHODS, named
from aftcli.errors import AftError, AftWarning
from aftcli.evaluation.measures import EVALUATED, MEASURED, MEASURES, TABLES, measures
from aftcli.report.terminal import complain, say_traceback

Values = Mapping[str, Any]  # of a command's options, by their first spelling


# Options of finetune that only a training of the network takes.
ONLY_TRAINED = ("--lam", "--consistency", "--classification", "--blend", "--patience", "--augment")


class When(NamedTuple):
    """A condition: in words, as they follow "has no effect", and of the values given."""

    words: str
    holds: Callable[[Values], bool]


class Idle(NamedTuple):
    """Options that have no effect under a condition."""

    options: tuple[str, ...]
    when: When


def _without(*others: str) -> When:
    *most, last = others
    words = f"without {', '.join(most)} or {last}" if most else f"without {last}"
    return When(words, lambda given: not any(_is_set(given[other]) for other in others))


def _with(other: str) -> When:
    return When(f"with {other}", lambda given: _is_set(given[other]))


def _zero_level(words: str, holds: Callable[[Values], bool]) -> When:
    """Return a condition of a training that only learns a zero level."""
    return When(words, lambda given: given["--objective"] == "zero-level" and holds(given))


def _trained(given: Values) -> bool:
    """Check that the network is trained, whatever the masks' methods are."""
    if given["--objective"] is not None:
        return bool(given["--objective"] != "zero-level")
    several = len(given["--layer"] or ()) > 1
    return several or any(_is_set(given[option]) for option in ONLY_TRAINED)


def _is_set(value: object) -> bool:
    """Check that an option says something: 0 is a value, a flag that is off is none."""
    return value is not None and value is not False and value != []


def _cells(only_named: bool = False) -> Idle:
    """Tell of --cells on CAMs; without --cam the methods are CAMs, or not known yet."""

    def of_cams(given: Values) -> bool:
        methods = named(given["--cam"] or [])
        known = bool(methods) or not only_named
        return known and all(METHODS[name].family == "cam" for name in methods)

    return Idle(("--cells",), When("on CAMs, which are of cells anyway", of_cams))


def _without_tables(*numbers: int, parts: tuple[str, ...] = ()) -> When:
    """Return the condition that no table of these numbers is asked for, and no further part."""
    *most, last = map(str, numbers)
    words = f"without table {', '.join(most)} or {last}" if most else f"without table {last}"

    def holds(given: Values) -> bool:
        wanted = set(numbers) & set(tables(given["--table"]))
        return not wanted and not any(_is_set(given[part]) for part in parts)

    return When(f"{words}, or {', '.join(parts)}" if parts else words, holds)


def _in_long_form(given: Values) -> bool:
    """Check that JSON or CSV is printed, which hold all there is, and no page is written."""
    return (given["--json"] or given["--format"] in ("json", "csv")) and not given["--figures"]


def _without_published(given: Values) -> bool:
    """Check that no table has published numbers; JSON and CSV list them in any case."""
    return not set(EVALUATED) & set(tables(given["--table"])) and not (
        given["--json"] or given["--format"] in ("json", "csv")
    )


def _without_probabilities(given: Values) -> bool:
    """Check that no measure of Table 3 is one that judges differ in."""
    return not any(MEASURES[name].of_probabilities for name in measures(given["--metrics"]))


OF_IMAGES = (
    Idle(("--engine",), _with("--target-fn")),
    Idle(("--colormap", "--alpha"), When("without pictures in --save", undrawn)),
    _cells(),
)

# By command. What is refused together with another option is not here.
IDLE: dict[str, tuple[Idle, ...]] = {
    "explain": (
        Idle(("--thresholds", "--threshold-mode", "--search"), _without("--tft")),
        Idle(("--masking", "--fill"), _without("--tft", "--threshold", "--mute")),
        *OF_IMAGES,
    ),
    "tft": (
        Idle(("--absolute",), _without("--map")),
        Idle(("--layer", "--cam", "--cells", "--smooth"), _with("--map")),
        *OF_IMAGES,
    ),
    "gen-masks": (
        Idle(
            (
                *("DATASET", "--split", "--model", "--checkpoint", "--classes", "--layer"),
                *("--cam", "--limit", "--thresholds", "--masking", "--fill", "--threshold-mode"),
                *("--search", "--run", "--overwrite", "--strict", "--device", "--engine"),
                *("--precision", "--batch-size", "--workers", "--output", "--output-key"),
            ),
            _with("--show"),
        ),
    ),
    "finetune": (
        Idle(("--objective", "--gauge"), _with("--no-masks")),
        Idle(
            ("--lam", "--consistency", "--classification", "--blend", "--patience"),
            _zero_level("with --objective zero-level", lambda given: True),
        ),
        Idle(
            ("--lr", "--epochs"),
            _zero_level("with --gauge t", lambda given: given["--gauge"] == "t"),
        ),
        Idle(
            ("--gauge",),
            When("without --objective zero-level", _trained),
        ),
        Idle(
            ("--patience",),
            When("with --held-out 0", lambda given: given["--held-out"] == 0),
        ),
    ),
    "evaluate": (
        Idle(("--image",), _without("--figures")),
        Idle(("--format",), _with("--json")),
        Idle(("--metrics", "--baselines", "--judge"), _without_tables(3)),
        Idle(("--judge",), When("on --metrics without probabilities", _without_probabilities)),
        Idle(("--masking",), _without_tables(3, 5, parts=("--sanity", "--figures"))),
        Idle(("--overwrite",), _without_tables(*EVALUATED, parts=("--sanity", "--figures"))),
        Idle(("--ci",), _without_tables(*MEASURED, parts=("--sanity",))),
        Idle(
            ("--ci",),
            When("on JSON and CSV, which always hold the intervals", _in_long_form),
        ),
        Idle(("--paper",), When("without table 3, 4 or 5", _without_published)),
        _cells(only_named=True),
    ),
}


def idle(command: str, values: Values, given: set[str]) -> list[str]:
    """Say which of the options given have no effect.

    Args:
        command: its name.
        values: of all its options.
        given: the spellings of those on the command line.

    Returns:
        Sentences, each option in one at the most.
    """
    said: list[str] = []
    left = set(given)
    for options, when in IDLE.get(command, ()):
        named = [option for option in options if option in left]
        if named and _holds(when, values):
            left -= set(named)
            verb = "has" if len(named) == 1 else "have"
            said.append(f"{', '.join(named)} {verb} no effect {when.words}")
    return said


def _holds(when: When, values: Values) -> bool:
    try:
        return when.holds(values)
    except AftError:  # of a value that the command refuses itself
        return False


class Command(TyperCommand):
    """A command that says on stderr, at its end, which of the options given had no effect."""

    def get_help_option(self, ctx: typer.Context) -> Any:  # type: ignore[override] # noqa: ANN401
        """Return --help, shown among the options of how the command runs."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.rich_help_panel, found.metavar = Run.PANEL, ""
        return found

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's own
        """Read the command line; usage errors begin with what is wrong, not with pydantic's words.

        Raises:
            typer.BadParameter: a value is wrong.
        """
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override] # noqa: ANN401
        """Run the command, then say it; an error is told alone."""
        try:
            result = super().invoke(ctx)
        except typer.Exit:
            self._say(ctx)
            raise
        self._say(ctx)
        return result

    def _say(self, ctx: typer.Context) -> None:
        values, given = {}, set()
        for parameter in self.params:
            name = str(parameter.name)
            spelling = parameter.opts[0]
            if parameter.param_type_name == "argument":
                spelling = str(getattr(parameter, "metavar", None) or name).strip("[]")
            values[spelling] = ctx.params.get(name)
            source = ctx.get_parameter_source(name)
            # Not of the environment: what is set there is meant for all commands.
            if source is not None and source.name == "COMMANDLINE":
                given.add(spelling)
        # One process speaks for all of a run.
        if not ctx.params.get("quiet") and os.environ.get("RANK", "0") == "0":
            for sentence in idle(str(self.name), values, given):
                complain(sentence)


app = typer.Typer(
    name="aft",
    help="See what an image classifier looked at: CAMs with fine-tuned thresholds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"aft {aftcli.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """See what an image classifier looked at: CAMs with fine-tuned thresholds."""


DEFAULT = f"{METHODS_HELP} Default: a checkpoint's, or"

EPILOGS = {
    "explain": f"{DEFAULT} layercam.",
    "tft": f"{DEFAULT} gradcam.",
    "gen_masks": f"{DEFAULT} gradcam.",
    "finetune": "--cam takes the methods of aft gen-masks. Default: those of all masks.",
    "evaluate": f"{METHODS_HELP} Default: those of all masks.\n\n{METRICS_HELP}",
}

for command in (explain, tft, gen_masks, finetune, evaluate):
    # Typer keeps the line breaks of all paragraphs but the first.
    text = "\n\n".join(" ".join(part.split()) for part in str(command.__doc__).split("\n\n"))
    epilog = EPILOGS[command.__name__]
    app.command(cls=Command, help=text, epilog=epilog)(grouped(command))


def main() -> None:
    """Run the command line; every error ends here."""
    if "--debug" not in sys.argv:
        _silence_libraries()
    else:
        sys.excepthook = say_traceback
    _say_warnings()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with Stopping() as stopping:
        try:
            code = _run(stopping)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if stopping.signal or code == INTERRUPTED:
            code = stopping.tell(sys.argv[1:])
    sys.exit(code)


def with_table(arguments: list[str]) -> list[str]:
    """Give a bare `--table` its value: typer's options have one always.

    >>> with_table(["evaluate", "--table", "--ci"])
    ['evaluate', '--table', 'all', '--ci']
    """
    found = []
    for i, argument in enumerate(arguments):
        found.append(argument)
        if argument == "--table" and not _is_value(arguments[i + 1 : i + 2]):
            found.append("all")
    return found


def _is_value(following: list[str]) -> bool:
    """Tell if what follows `--table` is its value: not the end, an option, or the data set."""
    if not following or following[0].startswith("-"):
        return False
    known = following[0] == "all" or following[0] in map(str, TABLES)
    return known or not os.path.lexists(following[0])


def _run(stopping: Stopping) -> str | int | None:
    """Run the command; its exit code."""
    debug = "--debug" in sys.argv
    try:
        try:
            app(with_table(sys.argv[1:]), prog_name="aft")
        except SystemExit as end:
            flush()
            return end.code
    except BrokenPipeError:
        sys.stderr.close()
    except Exception as error:
        # A signal amid a library's work may come out as an error of its own.
        if stopping.signal:
            return INTERRUPTED
        if debug:
            raise
        complain(what_is_wrong(error))
        with contextlib.suppress(OSError, AftError):
            flush()
    return 1


def _say_warnings() -> None:
    """Say our own warnings as everything else is said, once each."""
    usual, said = warnings.showwarning, set[str]()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, AftWarning):
            if str(message) not in said:
                complain(str(message))
            said.add(str(message))
        else:
            usual(message, category, filename, lineno, file, line)

    # Not "default": libraries that change filters let it forget what was said.
    warnings.simplefilter("always", AftWarning)
    warnings.showwarning = show


def _silence_libraries() -> None:
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # Pillow tells of damaged files in its own words
