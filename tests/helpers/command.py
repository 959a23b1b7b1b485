"""Run `aft` in the test's own process: a process of its own spends seconds on its imports."""

import contextlib
import gc
import io
import json
import logging
import sys
import warnings
from typing import NamedTuple
from unittest import mock

from aftcli.cli import app as cli


class Result(NamedTuple):
    """Result of a command: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def aft(*arguments, stdout=None, stderr=None):
    """Run `aft` with these arguments; output as it is without a terminal."""
    out, err = stdout or io.StringIO(), stderr or io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["aft", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        # For the rest of the test's process, it would keep what other tests have made.
        mock.patch.object(gc, "freeze"),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        finally:
            logging.disable(logging.NOTSET)
    return Result(code, "" if stdout else out.getvalue(), "" if stderr else err.getvalue())


def leftovers(folder):
    """Files in a folder that no command should have left there.

    A manifest is none of them: it lists all files beside it.
    """
    found = {path for path in folder.rglob("*") if path.is_file()}
    for manifest in [path for path in found if path.name == "manifest.json"]:
        beside = {path.name for path in manifest.parent.iterdir() if path.is_file()}
        assert {"manifest.json", *json.loads(manifest.read_text())["files"]} == beside
        found.remove(manifest)
    return sorted(str(path.relative_to(folder)) for path in found)


def usage_error(result):
    """Return what is wrong with a command line, without the frame around it; no other output."""
    assert (result.code, result.out) == (2, ""), result
    usage, _, *frame = result.err.splitlines()
    assert usage.startswith("Usage: aft")
    assert all(line.isprintable() for line in frame)
    return " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in frame).split())


def without_chance(err):
    """Leave out of stderr what is said of classes less likely than chance."""
    return "".join(line for line in err.splitlines(True) if "less than chance" not in line)


def objects(*arguments):
    """Return the results of a command that succeeds, as `--json` prints them."""
    result = aft(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def quiet_objects(*arguments):
    """Return them of a command that says nothing, but of classes less likely than chance."""
    result = aft(*arguments, "--json")
    assert (result.code, without_chance(result.err)) == (0, ""), result.err
    return json.loads(result.out)
