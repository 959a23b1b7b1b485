"""Files that are written whole or not at all, and locks that end with their process."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from aftcli.errors import AftError

if TYPE_CHECKING:
    from torch import Tensor

FOLLOW = "AFT_FOLLOW_LINKS"  # set by who trusts the links in a data set


def check_folder(path: Path) -> None:
    """Check that a folder is there.

    Raises:
        AftError: it is not.
    """
    if not path.is_dir():
        raise AftError(f"{path}: there is no such folder")


def check_checkpoint(path: Path) -> None:
    """Check that a checkpoint is there.

    Raises:
        AftError: it is not.
    """
    if not path.is_file():
        raise AftError(f"{path}: there is no such checkpoint file")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Delete what processes that were killed while they wrote a file have left of it."""
    for left in path.parent.glob(f".*-{glob.escape(path.name)}"):
        writer = left.name[1:].partition("-")[0]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            left.unlink(missing_ok=True)


def inside(folder: Path, name: str, named: Path | None = None) -> Path:
    """A file below a folder that someone else may have packed: nothing outside it is read.

    Args:
        folder: where names are relative to.
        name: of the file, from a listing or another file.
        named: what the user named, which links must not leave; default the folder.

    Raises:
        AftError: the name, or a link on the way, leads out.
    """
    path, named = folder / name, named or folder
    if os.path.isabs(name) or ".." in name.split("/"):
        raise AftError(f"{path}: leads out of {folder}; only files below it are read")
    if not os.environ.get(FOLLOW):
        real, allowed = os.path.realpath(path), os.path.realpath(named)
        if os.path.commonpath([real, allowed]) != allowed:
            raise AftError(
                f"{path}: is a link that leads out of {named}; set {FOLLOW}=1 if you trust the "
                "links there"
            )
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: to a temporary one, renamed at the end."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    sweep(path)
    temporary.unlink(missing_ok=True)
    # Made here, so that no link waiting under its name is written through.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all, also through a power loss.

    Args:
        path: of the file; what is written to the path that is yielded is renamed to it.

    Raises:
        AftError: it can't be written.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise AftError(
            f"{path}: can't be written ({getattr(error, 'strerror', None) or error}); free space "
            "or choose another --run; the same command goes on where it stopped"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Args:
        path: of the file.
        tensors: by name.
        metadata: text by name.

    Raises:
        AftError: it can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with durable(path) as temporary:
        try:
            save_file(plain, temporary, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # save_file leaves it to its owner alone.
        temporary.chmod(0o666 & ~_umask())


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def file_stem(model: str, what: str) -> str:
    """Name the files of a run after a model and what was done with it.

    >>> file_stem("timm:resnet18.a1_in1k", "gradcam")
    'timm_resnet18.a1_in1k-gradcam'
    """
    return f"{model.replace(':', '_').replace('/', '_')}-{what}"


def make_folder(path: Path) -> Path:
    """Make a folder of a run.

    Raises:
        AftError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AftError(
            f"{path}: can't be made ({error.strerror or error}); give another --run"
        ) from error
    return path


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a file in the making: a second process on it is refused.

    The lock goes with the process, however it ends.

    Args:
        target: the file; the lock lies beside it, hidden.

    Raises:
        AftError: another process holds it, or the lock can't be written.
    """
    import fcntl

    try:
        lock = open(target.with_name(f".{target.stem}.lock"), "a", opener=_no_link)
    except OSError as error:
        raise AftError(
            f"{target}: can't be written ({error.strerror}); make its folder writable, free space "
            "or choose another --run; the same command goes on where it stopped"
        ) from error
    with lock as file:
        try:
            # Not flock: forked workers would inherit it and outlive a killed parent.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AftError(
                f"{target}: another process is writing this file; wait for it or choose another "
                "--run"
            ) from error
        yield
