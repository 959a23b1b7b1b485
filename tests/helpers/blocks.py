"""Code blocks of the documentation: read from pages, run, and compared with what they show.

A ```console block has commands after "$ " and what they print, on a terminal or elsewhere. A line
"..." stands for any lines that are left out. What is not shown at all is not compared. A ```python
block is run; a ```text block that follows it is what it prints. One whose first line is a comment
with a file's name, "# net.py", is written to that file instead. A block after the comment
<!-- not run: needs ... --> is skipped.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.helpers.command import aft

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?```(?P<kind>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
DECIMAL = re.compile(r"(?<![\w.])[-+x]?\d*\.\d+")
LARGE = re.compile(r"(?<![\w.(])\d{4,}(?![\w.)])")
LEFT_OUT = "..."
# By what shells do more than call one command.
SHELL = re.compile(r"[|&;<>$`(]")
# Said once on a machine, whatever the command.
ONCE = re.compile(r"^aft: exporting .* once: .*\n", re.M)
INSTALL = re.compile(r"python3 -m venv|source |(\.venv/bin/)?(pip |pytest|ruff|mypy)|git clone|apt")


class Block(NamedTuple):
    """A code block of a page: its kind, its lines, and why it is not run, or None."""

    kind: str
    lines: list[str]
    reason: str | None


class Command(NamedTuple):
    """A command of a console block, and the lines that it is shown to print."""

    line: str
    shown: list[str]


def blocks(text):
    """Return the code blocks of a page, in order."""
    return [
        Block(found["kind"], found["code"].splitlines(), found["reason"])
        for found in BLOCK.finditer(text)
    ]


def commands(block):
    """Return the commands of a console block; a backslash continues one on the next line."""
    found = []
    for line in block.lines:
        if line.startswith("$ "):
            found.append(Command(line[2:], []))
        elif found and not found[-1].shown and found[-1].line.endswith("\\"):
            found[-1] = Command(found[-1].line[:-1] + line.strip(), [])
        else:
            assert found, f"output before any command: {line}"
            found[-1].shown.append(line)
    return found


def difference(shown, printed):
    """Say how a page's lines differ from what was printed; None where they agree.

    Words are compared exactly, spaces are not. Decimal fractions may differ by .002 or 2 %, and
    integers of four digits or more by 2 %: they depend on the CPU's rounding. Other integers are
    counts and indices of classes, and compared exactly.
    """
    shown, printed = ([line for line in lines if line.strip()] for lines in (shown, printed))
    rows = {0}  # lines printed that the lines shown so far may stand for
    for line in shown:
        if line.strip() == LEFT_OUT:
            following = set(range(min(rows), len(printed) + 1))
        else:
            following = {n + 1 for n in rows if n < len(printed) and alike(line, printed[n])}
        if not following:
            now = printed[max(rows)] if max(rows) < len(printed) else "nothing more"
            return f"shown: {line}\nprinted: {now}\nall:\n" + "\n".join(printed)
        rows = following
    if len(printed) not in rows:
        return f"not shown: {printed[max(rows)]}\nall:\n" + "\n".join(printed)
    return None


def alike(shown, printed):
    """Tell if two lines are equal up to spaces and what CPUs round."""
    words = [DECIMAL.sub("~", LARGE.sub("~", line)).split() for line in (shown, printed)]
    if words[0] != words[1]:
        return False
    for number in (DECIMAL, LARGE):
        pairs = zip(number.findall(shown), number.findall(printed), strict=True)
        for a, b in pairs:
            exact = float(a.strip("x"))
            if float(b.strip("x")) != pytest.approx(exact, rel=2e-2, abs=2e-3):
                return False
    return True


class Reader:
    """Somebody who types a page's blocks into a terminal, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.names = {}  # of the page's Python

    def read(self, text):
        """Run the blocks of a page; an assertion fails where one does not do what it shows."""
        self.names = {"__name__": "__main__"}
        before, printed = None, ""
        for block in blocks(text):
            if block.reason is None and block.kind == "console":
                self.type(block)
            elif block.reason is None and block.kind == "python":
                printed = self.run(block)
            elif block.kind == "text" and before and before.kind == "python" and not before.reason:
                found = difference(block.lines, printed.splitlines())
                assert not found, found
            before = block

    def type(self, block):
        """Run the commands of a console block and compare what they print."""
        for line, shown in commands(block):
            *first, last = line.split(" && ")
            if INSTALL.match(last):
                continue
            for part in (*(p for p in first if not INSTALL.match(p)), last):
                code, printed = self.call(part)
            fails = any(text.startswith(("aft: ", "Usage: ")) for text in shown)
            assert fails or code in (0, None), f"$ {line}\n{printed}"
            found = difference(shown, printed.splitlines()) if shown else None
            assert not found, f"$ {line}\n{found}"

    def call(self, line):
        """Run one command; `aft` in this process, where no shell is needed."""
        words = shlex.split(line)
        if words[0].removeprefix(".venv/bin/") == "aft" and not SHELL.search(line):
            out = io.StringIO()
            code = aft(*words[1:], stdout=out, stderr=out).code
            return code, ONCE.sub("", out.getvalue())
        shim = self.folder / "bin" / "aft"
        if not shim.exists():
            shim.parent.mkdir()
            shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m aftcli "$@"\n')
            shim.chmod(0o755)
        path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", line],
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, ONCE.sub("", done.stdout)

    def run(self, block):
        """Run a Python block and return what it prints; one that names a file is written to it."""
        code = "\n".join(block.lines) + "\n"
        named = re.fullmatch(r"# (\w+\.py)", block.lines[0])
        if named:
            (self.folder / named[1]).write_text(code)
            return ""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "page", "exec"), self.names)
        return out.getvalue()
