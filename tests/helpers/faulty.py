"""Whole commands on the small network, in processes of their own that something happens to.

What happens does so at an event that is counted, a convolution or a file that is renamed, so
that no test depends on time.
"""

import functools
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F

from aftcli.aft import features
from aftcli.aft import run as finetune
from aftcli.cli import app as cli
from aftcli.data import blocks
from aftcli.evaluation import study
from aftcli.models import load as models
from aftcli.models import source
from aftcli.models.checkpoint import read_card, restore
from tests.helpers.stored import small_float

COMMANDS = {
    "gen-masks": ("--cam", "gradcam", "--cam", "layercam", "--batch-size", "2"),
    "finetune": (
        *("--cam", "gradcam", "--objective", "tuner", "--epochs", "2", "--batch-size", "5"),
        *("--cache", "disk"),
    ),
    "evaluate": ("--table", "1,2,3,4", "--batch-size", "2", "--json"),
}


def arguments(command, data, workers=1):
    """Return the arguments that a command is called with."""
    given = (command, str(data)) if command == "gen-masks" else (command,)
    return (*given, *COMMANDS[command], "--run", "run", "--quiet", "--workers", str(workers))


def content(run, folders=None):
    """A run's files but locks, and what remembers the images' times."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file()
        and path.suffix != ".lock"
        and not path.name.startswith(".contents")
        and (folders is None or path.relative_to(run).parts[0] in folders)
    }


class At(NamedTuple):
    """The so-many-th event of a kind: "pass", a convolution; "write", before a file's rename."""

    kind: str
    number: int


def load_small(name=None, checkpoint=None, layer=None, **_):
    """The small network in the place of every other."""
    f = small_float()
    if checkpoint:
        restore(f, Path(checkpoint), read_card(Path(checkpoint)))
    return f


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def press_ctrl_c():
    """As a terminal does: to all processes of the group."""
    os.killpg(0, signal.SIGINT)


def terminate_all():
    """As systemd and batch systems do."""
    os.killpg(0, signal.SIGTERM)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_a_signal():
    Path("reached").touch()
    signal.pause()


def kill_a_worker():
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    # Not joined: that it died is the pool's to find out, which may have done so already.
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


def spoil_the_clock():
    """The clock that people read shows another year at each look."""
    real, years = time.time, itertools.cycle((0, 30, -20, 5, -50))

    def spoilt():
        return real() + next(years) * 365 * 86400

    time.time, time.time_ns = spoilt, lambda: int(spoilt() * 1e9)


def fill_stdout():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def limit_files(size):
    """No file may become larger: a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _small_everything():
    torch.set_num_threads(1)
    for module in (models, source, study):
        module.load_classifier = load_small
    blocks.BLOCK = features.BLOCK = 4
    finetune.Options = functools.partial(finetune.Options, save_every=0)


def _count_events(act, at):
    """Count events; write how many there were to a file at each; act at the one of `at`."""
    counted = {"pass": itertools.count(1), "write": itertools.count(1)}
    seen = {"pass": 0, "write": 0}
    owner = os.getpid()

    def counting(kind, real):
        def wrapped(*arguments, **options):
            if os.getpid() == owner:
                seen[kind] = next(counted[kind])
                Path("events").write_text(json.dumps(seen))
                if at == (kind, seen[kind]):
                    act()
            return real(*arguments, **options)

        return wrapped

    F.conv2d = counting("pass", F.conv2d)
    os.replace = counting("write", os.replace)


def run_aft(folder, arguments, act=None, at=None, before=None):
    """Run `aft` in this process, in a folder that its output goes to as well."""
    os.setsid()
    # What a shell runs in the background, as tests may be, ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    _small_everything()
    _count_events(act, at)
    if before:
        before()
    sys.argv = ["aft", *map(str, arguments)]
    cli.main()


def main():
    """Run `aft` with the small network, for torchrun: -m tests.helpers.faulty ARGUMENTS."""
    _small_everything()
    cli.main()


class Ended(NamedTuple):
    """End of a process: its exit code, what it said, its events, who outlived it."""

    code: int
    out: str
    err: str
    events: dict
    orphans: list


def aft(processes, folder, *arguments, act=None, at=None, before=None):
    """Run `aft` in a process of its own, and something amid it."""
    with suppress(FileNotFoundError):
        (folder / "events").unlink()
    options = {"act": act, "at": at, "before": before}
    process = processes.Process(target=run_aft, args=(folder, arguments), kwargs=options)
    process.start()
    process.join(40)
    assert process.exitcode is not None, "hangs"
    events = folder / "events"
    return Ended(
        process.exitcode,
        (folder / "out").read_text(),
        (folder / "err").read_text(),
        json.loads(events.read_text()) if events.exists() else {"pass": 0, "write": 0},
        # A killed process's workers see only after a while that it is gone.
        orphans_of(process.pid, patience=10 if process.exitcode < 0 else 0),
    )


def orphans_of(group, patience):
    """Processes that are left of a group, after a time in which they may end."""
    until = time.monotonic() + patience
    while True:
        left = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == group and process.status() != "zombie":
                    left.append(process.pid)
        if not left or time.monotonic() >= until:
            return left
        time.sleep(0.02)


if __name__ == "__main__":
    main()
