"""The command line: `aft` with its commands, and how each of them ends.

Torch is imported by the commands that need it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from typing import Annotated, TextIO

import typer

import aftcli
from aftcli.cli.evaluate import METRICS_HELP, TABLES, evaluate
from aftcli.cli.explain import explain, tft
from aftcli.cli.finetune import finetune
from aftcli.cli.idle import Command
from aftcli.cli.masks import gen_masks
from aftcli.cli.options import METHODS_HELP, grouped
from aftcli.cli.process import INTERRUPTED, Stopping, flush, what_is_wrong
from aftcli.errors import AftError, AftWarning
from aftcli.report.terminal import complain, say_traceback

app = typer.Typer(
    name="aft",
    help="See what a convolutional image classifier looked at: CAMs with fine-tuned thresholds.",
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
    """See what a convolutional image classifier looked at: CAMs with fine-tuned thresholds."""


DEFAULT = f"{METHODS_HELP} Default: a tuned --checkpoint's, otherwise"

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
    return following[0] in TABLES or not os.path.lexists(following[0])


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
