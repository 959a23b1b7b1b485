"""Whatever ends gen-masks, finetune and evaluate, the same command finishes to the same bytes."""

import ast
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import aftcli
from tests.conftest import ROOT
from tests.helpers import faulty
from tests.helpers.faulty import COMMANDS, At, aft, arguments, content
from tests.helpers.trained import make_colours

pytestmark = pytest.mark.slow

HINT = "the same command resumes where it stopped"
WRITES = {"gen-masks": "masks", "finetune": "tuned", "evaluate": "results"}
# A moment when decoding workers are at work.
LOADING = {"gen-masks": At("pass", 9), "finetune": At("pass", 8), "evaluate": At("pass", 8)}
# How each ends: exit code, and what is said.
ENDS = {
    faulty.terminate: (143, f"aft: terminated; {HINT}\n"),
    faulty.terminate_all: (143, f"aft: terminated; {HINT}\n"),
    faulty.press_ctrl_c: (130, f"aft: interrupted; {HINT}\n"),
    faulty.kill: (-9, ""),
}

each_command = pytest.mark.parametrize("command", COMMANDS)


class Whole(NamedTuple):
    """A run that nothing happened to: its data and folder, how its commands ended."""

    data: Path
    folder: Path
    ended: dict


@pytest.fixture(scope="module")
def whole(tmp_path_factory, processes):
    folder = tmp_path_factory.mktemp("whole")
    data = make_colours(folder / "data")
    ended = {c: aft(processes, folder, *arguments(c, data)) for c in COMMANDS}
    assert [(e.code, e.err) for e in ended.values()] == [(0, "")] * 3
    return Whole(data, folder, ended)


@pytest.fixture
def begun(whole, processes, tmp_path):
    """Makes a run with what a command needs of earlier ones; gives what runs the command."""

    class Begun:
        run = tmp_path / "run"

        def need(self, command):
            for name in list(WRITES.values())[: list(COMMANDS).index(command)]:
                shutil.copytree(whole.folder / "run" / name, self.run / name)

        def aft(self, command, workers=1, **fault):
            return aft(processes, tmp_path, *arguments(command, whole.data, workers), **fault)

        def assert_finished(self, command, **fault):
            """The same command ends well, and what it leaves is what one run in one go leaves."""
            ended = self.aft(command, **fault)
            assert (ended.code, ended.err, ended.orphans) == (0, "", [])
            there = content(self.run)
            expected = content(whole.folder / "run", {Path(n).parts[0] for n in there})
            assert sorted(there) == sorted(expected)
            assert [name for name in there if there[name] != expected[name]] == []
            assert any(name.startswith(WRITES[command]) for name in there)
            if command == "evaluate":
                assert ended.out == whole.ended[command].out
            return ended

    return Begun()


def temporary(run):
    return [path for path in run.rglob(".*") if re.match(r"\.\d+-", path.name)]


STOPS = [
    *((command, act) for command in COMMANDS for act in ENDS if act is not faulty.terminate),
    ("finetune", faulty.terminate),
]


@pytest.mark.parametrize(("command", "act"), STOPS)
def test_stopped_at_random_moments_a_command_goes_on(whole, begun, command, act):
    rng, total = random.Random(f"{command} {act.__name__}"), whole.ended[command].events
    begun.need(command)
    for workers, kind in ((2, "pass"), (1, "write")):
        at = At(kind, rng.randint(2, total[kind] // 3))
        ended = begun.aft(command, workers, act=act, at=at)
        assert (ended.code, ended.err) == ENDS[act], at
        assert ended.orphans == [] and ended.out == ""
        assert act is faulty.kill or temporary(begun.run) == []
    assert begun.assert_finished(command).events["pass"] < total["pass"]


@pytest.mark.parametrize("kind", ["pass", "write"])
@each_command
def test_a_dead_decoding_process_is_told_as_such_and_the_command_goes_on(begun, command, kind):
    begun.need(command)
    at = LOADING[command] if kind == "pass" else At("write", 2)
    ended = begun.aft(command, workers=2, act=faulty.kill_a_worker, at=at)
    assert ended.code == 1 and ended.err.count("\n") == 1
    assert ended.err.startswith("aft: a process that decodes images died (") and HINT in ended.err
    assert "Killed" in ended.err or "exited unexpectedly" in ended.err
    assert ended.orphans == [] and temporary(begun.run) == []
    begun.assert_finished(command)


@pytest.mark.parametrize(("command", "size"), [("gen-masks", 6000), ("finetune", 5000)])
def test_files_that_can_not_grow_stop_a_command(begun, command, size):
    begun.need(command)
    ended = begun.aft(command, before=functools.partial(faulty.limit_files, size))
    assert_refused(ended, "File too large")
    assert temporary(begun.run) == []
    begun.assert_finished(command)


def assert_refused(ended, why):
    assert ended.code == 1 and ended.err.count("\n") == 1
    assert ended.err.startswith("aft: run/") and "can't be written (" in ended.err
    assert why in ended.err
    assert re.search("free space|make it writable", ended.err) and "--run" in ended.err
    assert ended.orphans == []


@pytest.fixture
def disk(begun):
    """A small disk in the place of the run."""
    begun.run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(begun.run)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield begun.run
    subprocess.run(["umount", str(begun.run)], check=True)


def fill(disk, free):
    """Fill a disk, but for so many bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(file.tell() - free)


@each_command
def test_a_full_disk_stops_a_command_that_goes_on_with_space(whole, begun, disk, command):
    begun.need(command)
    for free in (0, 16384):
        fill(disk, free)
        assert_refused(begun.aft(command), "No space left on device")
        assert temporary(disk) == []
        (disk / "ballast").unlink()
    begun.assert_finished(command)


@pytest.mark.parametrize("before", ["nothing", "some"])
@each_command
def test_a_read_only_disk_is_told_and_the_command_goes_on(begun, disk, command, before):
    begun.need(command)
    if before == "some":
        begun.aft(command, act=faulty.kill, at=LOADING[command])
    remount(disk, "ro")
    ended = begun.aft(command)
    assert ended.code == 1 and ended.err.startswith("aft: run/") and ended.err.count("\n") == 1
    assert "Read-only file system" in ended.err and "--run" in ended.err
    remount(disk, "rw")
    begun.assert_finished(command)


def remount(disk, how):
    command = ["mount", "-o", f"remount,{how}", str(disk)]
    for _ in range(100):  # what has just ended may still be busy there
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.05)
    raise AssertionError(done.stderr)


def test_what_is_evaluated_can_be_read_from_a_read_only_disk(begun, disk):
    begun.need("evaluate")
    begun.assert_finished("evaluate")
    remount(disk, "ro")
    begun.assert_finished("evaluate")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@each_command
def test_a_folder_of_somebody_else_is_told(begun, command):
    begun.need(command)
    begun.run.mkdir(exist_ok=True)
    begun.run.chmod(0o555)
    ended = begun.aft(command)
    begun.run.chmod(0o755)
    assert ended.code == 1 and "Permission denied" in ended.err and ended.err.count("\n") == 1
    begun.assert_finished(command)


@each_command
def test_clocks_that_jump_change_nothing(whole, begun, command):
    begun.need(command)
    total = whole.ended[command].events["pass"]
    # Stores record the images' times, and finetune's cache goes by them: other ones are other
    # bytes, or leave a cache behind.
    images = whole.data.rglob("*.png") if command == "evaluate" else []
    images = {path: path.stat() for path in images}
    try:
        for part, year in ((3, 1985), (2, 2099)):
            at = At("pass", total // part)
            begun.aft(command, act=faulty.kill, at=at, before=faulty.spoil_the_clock)
            for path in (*begun.run.rglob("*"), *images):
                os.utime(path, (when := (year - 1970) * 365 * 86400, when))
        begun.assert_finished(command, before=faulty.spoil_the_clock)
    finally:
        for path, stat in images.items():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_nothing_is_decided_by_the_clock_that_people_set():
    looks = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"}
    recorded = {"manifest.py": {"datetime.now"}}  # when a picture was made, for people to read
    for path in Path(aftcli.__file__).parent.rglob("*.py"):
        called = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        assert not (called & looks) - recorded.get(path.name, set()), path


# Sends itself a signal when a module is imported.
AMID_IMPORTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Finder())
from aftcli.cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("name", "code", "said"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")]
)
def test_stopped_amid_imports(whole, tmp_path, name, code, said):
    source = AMID_IMPORTS.format(module="torch.nn", signal=name)
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments("gen-masks", whole.data), "--overwrite"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    hint = "the same command without --overwrite resumes where it stopped"
    assert (done.returncode, done.stderr) == (code, f"aft: {said}; {hint}\n")


ALONE = """
import sys
sys.path.insert(0, {root!r})
from tests.helpers import faulty
faulty.run_aft({folder!r}, {arguments}, faulty.wait_for_a_signal, faulty.At("write", 3))
"""


def test_a_process_of_nobody_is_terminated_by_another_and_goes_on(whole, begun, tmp_path):
    given = list(arguments("gen-masks", whole.data, workers=2))
    source = ALONE.format(root=str(ROOT), folder=str(tmp_path), arguments=given)
    process = subprocess.Popen([sys.executable, "-c", source])
    while process.poll() is None and not (tmp_path / "reached").exists():
        time.sleep(0.01)
    assert len(faulty.orphans_of(process.pid, patience=0)) == 3  # with its workers
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert (tmp_path / "err").read_text() == f"aft: terminated; {HINT}\n"
    assert faulty.orphans_of(process.pid, patience=0) == [] and temporary(begun.run) == []
    assert len(list((begun.run / "masks").glob(".*.parts/0*"))) == 2
    begun.assert_finished("gen-masks")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_result_that_can_not_be_printed_is_told(begun):
    begun.need("evaluate")

    ended = begun.aft("evaluate", before=faulty.fill_stdout)
    assert ended.err == "aft: the result can't be printed (No space left on device)\n"
    assert ended.code == 1
    begun.assert_finished("evaluate")
