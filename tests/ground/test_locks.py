"""Locks, also on file systems that have none: two processes never write one file."""

import errno
import fcntl
import hashlib
import json
import os
import platform
from pathlib import Path

import pytest
import torch

from aftcli import AftError, MaskStore
from aftcli.errors import AftWarning
from aftcli.files import tensors_hash
from aftcli.locks import locked
from tests.helpers import faulty
from tests.helpers.command import aft
from tests.helpers.stored import generate, make_images
from tests.helpers.trained import make_colours

ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def take_locks_away(patch, number=errno.ENOLCK):
    """Let the system answer as file systems without locks do."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", refuse)
    patch.setattr(fcntl, "lockf", refuse)


@pytest.fixture
def without(monkeypatch):
    take_locks_away(monkeypatch)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "small-gradcam.h5"


def hold_without(target, held, release):
    """Hold a file without the system's locks until told to let go."""
    with pytest.MonkeyPatch.context() as patch, pytest.warns(AftWarning):
        take_locks_away(patch)
        with locked(target):
            held.set()
            release.wait()


def held_files(folder):
    return [p.name for p in folder.rglob("*") if p.suffix in (".held", ".claim")]


def refused(target):
    with pytest.raises(AftError) as caught, locked(target):
        pass
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_every_command_works_without_locks_and_says_so(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    for module in ("models.load", "models.source", "evaluation.study"):
        monkeypatch.setattr(f"aftcli.{module}.load_classifier", faulty.load_small)
    make_colours(Path("data"))
    cams = ("--cam", "gradcam", "--cam", "layercam", "--workers", "0")
    assert aft("gen-masks", "data", "--run", "usual", *cams).code in (0, None)
    take_locks_away(monkeypatch, number)
    for folder, command in (
        ("masks", ("gen-masks", "data", *cams)),
        (
            "tuned",
            ("finetune", "--objective", "tuner", "--epochs", "1", "--workers", "0", "--quiet"),
        ),
        ("results", ("evaluate", "--masking", "binary", "--workers", "0")),
    ):
        done = aft(*command, "--run", "run")
        assert done.code in (0, None), done.err
        (line,) = done.err.splitlines()
        assert line.startswith(f"aft: run/{folder}: its file system has no locks (")
        assert os.strerror(number) in line
    for name in ("small-gradcam.h5", "small-layercam.h5"):
        assert Path("run/masks", name).read_bytes() == Path("usual/masks", name).read_bytes()
    assert held_files(tmp_path) == []


def test_a_store_is_read_where_hdf5_can_not_lock_it(tmp_path):
    make_images(tmp_path / "fruit", each=1)
    generate(tmp_path / "fruit", tmp_path / "run", ("gradcam",))
    path = tmp_path / "run/masks/small-gradcam.h5"
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # HDF5 fails where it asks for a lock
        with MaskStore(path) as store:
            store.verify()
    assert aft("gen-masks", "--show", path).code in (0, None)


def test_a_store_that_the_system_refuses_is_not_to_be_made_again(tmp_path, monkeypatch):
    make_images(tmp_path / "fruit", each=1)
    generate(tmp_path / "fruit", tmp_path / "run", ("gradcam",))
    path = tmp_path / "run/masks/small-gradcam.h5"

    def refuse(*_, **__):
        raise OSError(errno.EACCES, "Unable to synchronously open file")

    monkeypatch.setattr("h5py.File", refuse)
    with pytest.raises(AftError, match="can't be read .Permission denied.") as caught:
        MaskStore(path)
    assert "overwrite" not in str(caught.value)


@pytest.mark.slow
def test_without_locks_a_second_process_is_refused_by_name(target, processes, without):
    held, release = processes.Event(), processes.Event()
    child = processes.Process(target=hold_without, args=(target, held, release))
    child.start()
    assert held.wait(60)
    said = refused(target)
    assert said.startswith(f"{target}: process {child.pid} on {platform.node()} is writing this")
    assert "wait for it, or delete .small-gradcam.held" in said
    release.set()
    child.join()
    with pytest.warns(AftWarning, match="has no locks"), locked(target):
        assert held_files(target.parent) == [".small-gradcam.held"]
    assert held_files(target.parent) == []


def killed_holder(target, processes):
    """Kill a process that holds a file where there are no locks."""
    held, release = processes.Event(), processes.Event()
    child = processes.Process(target=hold_without, args=(target, held, release))
    child.start()
    assert held.wait(60)
    child.kill()
    child.join()
    return child


def test_a_killed_process_leaves_no_lock_for_ever(target, processes, without):
    child = killed_holder(target, processes)
    assert held_files(target.parent) == [".small-gradcam.held"]
    gone = f"was left by process {child.pid} of this machine, which no longer runs; removed"
    with pytest.warns(AftWarning, match=gone), locked(target):
        assert json.loads(target.with_name(".small-gradcam.held").read_text())["pid"] == os.getpid()
    assert held_files(target.parent) == []


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize(
    "content", [json.dumps({"host": "node7", "pid": 2**22 + 1, "machine": "another"}), "", "[1]"]
)
def test_a_lock_of_another_machine_is_never_removed(target, monkeypatch, content, locks):
    if not locks:
        take_locks_away(monkeypatch)
    own = target.with_name(".small-gradcam.held")
    own.write_text(content)
    said = refused(target)
    assert ("process 4194305 on node7" if "node7" in content else "another process") in said
    assert "or delete .small-gradcam.held if that process no longer runs" in said
    assert own.read_text() == content
    own.unlink()
    with locked(target):
        pass


def test_two_do_not_remove_a_lock_at_once(target, processes, without):
    killed_holder(target, processes)
    target.with_name(".small-gradcam.claim").touch()
    assert "delete .small-gradcam.claim if" in refused(target)
    assert ".small-gradcam.held" in held_files(target.parent)


def test_another_error_of_a_lock_is_said_as_it_is(target, monkeypatch):
    take_locks_away(monkeypatch, errno.EIO)
    assert f"can't be locked ({os.strerror(errno.EIO)})" in refused(target)
    assert held_files(target.parent) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_hash_is_that_of_names_shapes_types_and_bytes(dtype):
    tensors = {"b": torch.tensor(3).to(dtype), "a": torch.arange(6).view(2, 3).mT.to(dtype)}
    expected = hashlib.sha256()
    for name in ("a", "b"):
        value = tensors[name]
        expected.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        storage = value.contiguous().untyped_storage()
        expected.update(bytes(storage.tolist())[: value.numel() * value.element_size()])
    assert tensors_hash(tensors) == expected.hexdigest()
