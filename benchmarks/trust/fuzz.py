"""Give damaged files by the thousand to the real commands, each in a process of its own.

    python -m benchmarks fuzz [--mutants 5000] [--seed 0] [--kinds explain,store] [--json FILE]
    python -m benchmarks fuzz --large    # pictures of 100 megapixels, decompression bombs

Right outcomes are a result, or one line on stderr and exit code 1. A finding is anything else: a
traceback, a crash, more than 10 s, more than 2 GB, NaN in a result, a file half-written or left
over, another result than the undamaged file's where checksums tell. Mutants with findings are
kept in --keep with the command that shows them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.trust import fuzz_kinds
from benchmarks.trust.fuzz_kinds import Case, Kind, plain

SECONDS = 10.0
MEGABYTES = 2048
OWN_ADDRESSES = 6 * 2**30  # bytes that a process may reserve beyond what it starts with


@dataclass
class Outcome:
    """Outcome of a command on a mutant."""

    kind: str
    what: str  # "right", "error", or a finding
    detail: str
    change: str
    seconds: float
    megabytes: float


@dataclass
class Running:
    """A child at work."""

    kind: Kind
    case: Case
    work: Path
    started: float
    before: set[str] = field(default_factory=set)


class Ended(NamedTuple):
    """End of a child."""

    code: int | None
    signal: int | None
    out: str
    err: str
    megabytes: float
    seconds: float


def status(name: str) -> float:
    """Return a figure of /proc/self/status in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").open())
    return int(lines[name].split()[0]) / 1024


def run_command(arguments: list[str], work: Path, seconds: float) -> None:
    """Be the child: run `aft` with all that it prints in files, and end."""
    os.chdir(work)
    os.setpgid(0, 0)
    own = work.parent
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(own / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    most = int(status("VmSize") * 2**20) + OWN_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    from aftcli.cli import app as cli

    sys.argv = ["aft", *arguments]
    code = 99
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 98
    except BaseException as error:
        sys.stderr.write(f"escaped: {error!r}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (own / "peak").write_text(str(status("VmHWM")))
        os._exit(code)


def start(kind: Kind, case: Case, folder: Path) -> tuple[int, Running]:
    """Lay a mutant's files out and fork the child that works on them."""
    work = folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    case.lay_out(work)
    running = Running(kind, case, work, time.monotonic(), files_of(work))
    process = os.fork()
    if process == 0:
        run_command(list(case.arguments), work, SECONDS + kind.usual)
    return process, running


def files_of(work: Path) -> set[str]:
    """Return all files below a folder."""
    return {str(p.relative_to(work)) for p in work.rglob("*") if p.is_file()}


def ended(running: Running, wait_status: int) -> Ended:
    """Read what a child has left."""
    own = running.work.parent
    peak = own / "peak"
    killed = os.WIFSIGNALED(wait_status)
    return Ended(
        None if killed else os.WEXITSTATUS(wait_status),
        os.WTERMSIG(wait_status) if killed else None,
        (own / "stdout").read_text(errors="replace"),
        (own / "stderr").read_text(errors="replace"),
        float(peak.read_text()) if peak.exists() else 0.0,
        time.monotonic() - running.started,
    )


def no_constant(text: str) -> None:
    """Refuse what JSON has no numbers for."""
    raise ValueError(f"{text} in JSON")


def judge(running: Running, end: Ended) -> tuple[str, str]:
    """Return what an outcome is: "right", "error", or a finding and its detail."""
    kind, lines = running.kind, end.err.splitlines()
    if end.signal is not None:
        name = signal.Signals(end.signal).name
        return ("hang", f"{end.seconds:.0f} s") if name == "SIGALRM" else ("crash", name)
    if end.megabytes > MEGABYTES:
        return "memory", f"{end.megabytes:.0f} MB"
    if "Traceback" in end.err or "fault of aft" in end.err or end.code not in (0, 1):
        return "traceback", f"exit {end.code}: {end.err.strip()[-300:]}"
    if not all(line.startswith("aft: ") and line.isprintable() for line in lines):
        return "stderr", end.err[:300]
    left = damaged_files(running)
    if left:
        return "left over", ", ".join(left)[:300]
    if end.code == 1:
        silent = not end.out or end.out == "[]\n"
        if kind.one_line and not (len(lines) == 1 and silent):
            return "stderr", f"{len(lines)} lines: {end.err[:300]} {end.out[:100]}"
        return "error", lines[0] if lines else ""
    try:
        found = json.loads(end.out, parse_constant=no_constant)
    except ValueError as error:
        return "result", f"{error}: {end.out[:100]}"
    if running.case.expected is not None and plain(found) != running.case.expected:
        return "wrong", difference(plain(found), running.case.expected)
    return "right", ""


def difference(found: Any, expected: Any, where: str = "") -> str:  # noqa: ANN401 - JSON
    """Return where two results differ first."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            if found.get(key) != expected.get(key):
                return difference(found.get(key), expected.get(key), f"{where}.{key}")
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if a != b:
                return difference(a, b, f"{where}[{i}]")
    return f"{where}: {str(found)[:100]} instead of {str(expected)[:100]}"


def damaged_files(running: Running) -> list[str]:
    """Return new files that are temporary or not whole."""
    left = []
    for name in sorted(files_of(running.work) - running.before):
        path = running.work / name
        if path.name == "EXECUTED" or (path.name[0] == "." and path.name[1:2].isdigit()):
            left.append(name)
        elif path.suffix == ".png":
            try:
                with Image.open(path) as image:
                    image.load()
            except Exception as error:
                left.append(f"{name} ({error})")
        elif path.suffix == ".npy" and not np.isfinite(np.load(path)).all():
            left.append(f"{name} (not finite)")
    return left


def run_all(work: Iterator[tuple[Kind, Case]], jobs: int, keep: Path) -> Iterator[Outcome]:
    """Run mutants, several at once."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        free = [Path(name) / str(i) for i in range(jobs)]
        busy: dict[int, Running] = {}
        more = True
        while more or busy:
            while more and free:
                following = next(work, None)
                if following is None:
                    more = False
                else:
                    process, running = start(*following, free.pop())
                    busy[process] = running
            if busy:
                process, wait_status = os.wait()
                running = busy.pop(process)
                end = ended(running, wait_status)
                what, detail = judge(running, end)
                if what not in ("right", "error"):
                    save(running, end, what, detail, keep)
                free.append(running.work.parent)
                yield Outcome(
                    running.kind.name, what, detail, running.case.change, end.seconds, end.megabytes
                )


def save(running: Running, end: Ended, what: str, detail: str, keep: Path) -> None:
    """Keep a mutant with a finding, and how to see it again."""
    kept = keep / f"{running.kind.name}-{len(list(keep.glob('*')))}-{what.replace(' ', '_')}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    running.case.lay_out(kept)
    command = f"cd {shlex.quote(str(kept))} && aft {shlex.join(running.case.arguments)} --debug"
    said = f"{command}\n{what}: {detail}\n{running.case.change}\n{end.err[:2000]}\n"
    (kept / "FINDING.txt").write_text(said)


def table(outcomes: list[Outcome]) -> tuple[str, list[dict[str, Any]]]:
    """Return the figures by kind, as text and as values."""
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    rows = []
    for kind, own in [*by_kind.items(), ("all", outcomes)]:
        rows.append(
            {
                "kind": kind,
                "mutants": sum(o.change.count(",") + 1 for o in own),
                "commands": len(own),
                "right results": sum(o.what == "right" for o in own),
                "one-line errors": sum(o.what == "error" for o in own),
                "findings": sum(o.what not in ("right", "error") for o in own),
                "slowest s": round(max(o.seconds for o in own), 1),
                "peak MB": round(max(o.megabytes for o in own)),
            }
        )
    names = list(rows[0])
    wide = [max(len(name), *(len(str(row[name])) for row in rows)) for name in names]
    lines = ["  ".join(name.rjust(w) for name, w in zip(names, wide, strict=True))]
    for row in rows:
        lines.append("  ".join(str(v).rjust(w) for v, w in zip(row.values(), wide, strict=True)))
    return "\n".join(lines), rows


def wanted_cases(kinds: list[Kind], mutants: int, seed: int) -> Iterator[tuple[Kind, Case]]:
    """Return the mutants of all kinds by their shares, the same for the same seed."""
    whole = sum(kind.share for kind in kinds)
    for kind in kinds:
        made = number = 0
        while made < mutants * kind.share / whole:
            case = kind.case(random.Random(f"{seed}-{kind.name}-{number}"))
            made, number = made + case.change.count(",") + 1, number + 1
            yield kind, case


def main() -> None:
    """Make the real files, damage them, run the commands, print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="names, separated by commas; default all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--large", action="store_true", help="100 megapixels and bombs instead")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    args.keep = args.keep.resolve()
    args.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as folder:
        make: Callable[..., list[Kind]] = fuzz_kinds.large if args.large else fuzz_kinds.usual
        kinds = make(Path(folder), set(filter(None, args.kinds.split(","))))
        gc.collect()
        gc.freeze()
        outcomes = []
        count = len(kinds) if args.large else args.mutants
        for outcome in run_all(wanted_cases(kinds, count, args.seed), args.jobs, args.keep):
            outcomes.append(outcome)
            if outcome.what not in ("right", "error"):
                print(
                    f"{outcome.kind}: {outcome.what}: {outcome.detail} [{outcome.change}]",
                    flush=True,
                )
            if len(outcomes) % 100 == 0:
                print(f"{len(outcomes)} commands", file=sys.stderr, flush=True)
    text, rows = table(outcomes)
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "rows": rows}, indent=1))
    sys.exit(any(row["findings"] for row in rows))
