"""The command line: `aft` with its commands, and how each of them ends.

Options that have no effect beside others are refused (aftcli.options.idle).

Torch is imported by the commands that need it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

import aftcli
from aftcli.cli.evaluate import evaluate
from aftcli.cli.explain import explain, tft
from aftcli.cli.finetune import finetune
from aftcli.cli.masks import gen_masks
from aftcli.cli.process import INTERRUPTED, Stopping, flush, open_streams, what_is_wrong
from aftcli.errors import AftError, AftWarning, UsageError
from aftcli.measures.registry import TABLES
from aftcli.options.groups import Run
from aftcli.options.help import epilog
from aftcli.options.idle import idle
from aftcli.options.make import grouped
from aftcli.report.terminal import complain, say_traceback


class Command(TyperCommand):
    """A command that refuses options without effect, and says which ask for what is so anyway."""

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
        """Run the command if each option has an effect; notes follow its end, and no error.

        Raises:
            click.UsageError: options have no effect, or exclude each other.
        """
        refusals, notes = idle(str(self.name), *self._given(ctx))
        if refusals:
            ctx.fail("; ".join(refusals))
        try:
            result = super().invoke(ctx)
        except typer.Exit:
            _say(ctx, notes)
            raise
        except UsageError as error:
            ctx.fail(str(error))
        _say(ctx, notes)
        return result

    def _given(self, ctx: typer.Context) -> tuple[dict[str, Any], set[str]]:
        """Return all options' values, and the spellings of those on the command line."""
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
        return values, given


def _say(ctx: typer.Context, notes: list[str]) -> None:
    """Print notes; one process speaks for all of a run."""
    if not ctx.params.get("quiet") and os.environ.get("RANK", "0") == "0":
        for sentence in notes:
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


for command in (explain, tft, gen_masks, finetune, evaluate):
    # Typer keeps the line breaks of all paragraphs but the first.
    text = "\n\n".join(" ".join(part.split()) for part in str(command.__doc__).split("\n\n"))
    below = epilog(command.__name__)
    app.command(cls=Command, help=text, epilog=below)(grouped(command))


def main() -> None:
    """Run the command line; every error ends here."""
    open_streams()
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
