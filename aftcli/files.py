"""Files that are written whole or not at all, seals, and locks that end with their process."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from aftcli.errors import AftError, AftWarning

if TYPE_CHECKING:
    from torch import Tensor


FOLLOW = "AFT_FOLLOW_LINKS"  # set by who trusts the links in a data set

HELD = {errno.EACCES, errno.EAGAIN}  # answers of a lock that another process holds

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

LONGEST = 4096  # bytes that are read of a lock


class BusyError(AftError):
    """A file that another process holds."""


def check_folder(path: Path) -> None:
    """Check that a folder is there."""
    if not path.is_dir():
        raise AftError(f"{path}: there is no such folder")


def check_checkpoint(path: Path) -> None:
    """Check that a checkpoint is there."""
    if not path.is_file():
        raise AftError(f"{path}: there is no such checkpoint file")


def cache_folder() -> Path:
    """Return the folder of what is kept for later runs: $AFT_CACHE, or the user's cache/aft."""
    own = os.environ.get("AFT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "aft"


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote a file."""
    for left in path.parent.glob(f".*-{glob.escape(path.name)}"):
        writer = left.name[1:].partition("-")[0]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            left.unlink(missing_ok=True)


def inside(folder: Path, name: str, named: Path | None = None) -> Path:
    """Return a file below a folder that someone else may have packed, refusing any outside it.

    Args:
        folder: where names are relative to.
        name: of the file, from a listing or another file.
        named: the folder that the user named, which links must not leave; default `folder`.
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
    # Made exclusively, so that a link planted under its name is not followed.
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
            "or choose another --run; the same command resumes where it stopped"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Args:
        path: of the file.
        tensors: by name.
        metadata: text by name.
    """
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with durable(path) as temporary:
        # Not save_file: it writes another temporary file, which a kill would leave behind.
        temporary.write_bytes(save(plain, dict(metadata)))


def values_hash(values: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of plain values, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors, their names, shapes and types."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def write_sealed(
    path: Path, tensors: Mapping[str, Tensor], name: str, head: Mapping[str, Any]
) -> None:
    """Write tensors and plain values whole or not at all, with a hash of both.

    Args:
        path: of the safetensors file.
        tensors: by name.
        name: of the metadata's entry for the values.
        head: plain values, such as the settings that the tensors were computed with.
    """
    text = json.dumps(head)
    # One entry: safetensors writes several in an order that changes from run to run.
    sealed = {"head": text, "sha256": _seal(text, tensors)}
    write_tensors(path, tensors, {name: json.dumps(sealed)})


def read_sealed(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the tensors and the head of a sealed file; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
        with safe_open(path, "pt") as file:
            sealed = json.loads(file.metadata()[name])
        # Not load_file: its tensors are the file itself, which may change.
        tensors = dict(sorted(load(path.read_bytes()).items()))
        if sealed["sha256"] == _seal(sealed["head"], tensors):
            return tensors, json.loads(sealed["head"])
    return None


def _seal(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash both, so that a flipped bit in either is found."""
    return hashlib.sha256((text + tensors_hash(tensors)).encode()).hexdigest()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def file_stem(model: str, what: str) -> str:
    """Name the files of a run after a model and what was done with it.

    >>> file_stem("timm:resnet18.a1_in1k", "gradcam")
    'timm_resnet18.a1_in1k-gradcam'
    >>> file_stem("/home/me/nets/mine.py:small", "gradcam")
    'mine.py_small-gradcam'
    """
    kind, absolute, place = model.rpartition(":/")  # hf:/home/me/nets/vit
    if absolute or model.startswith("/"):
        model = f"{kind}{':' if absolute else ''}{Path(place).name}"
    return f"{model.replace(':', '_').replace('/', '_')}-{what}"


def make_folder(path: Path) -> Path:
    """Make a folder of a run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AftError(
            f"{path}: can't be made ({error.strerror or error}); give another --run"
        ) from error
    return path


@contextmanager
def locked(target: Path) -> Iterator[int]:
    """Hold a file in the making: a second process on it is refused.

    Yields the descriptor of the lock's file.

    The lock goes with the process, however it ends. Where the file system has no locks, as on NFS
    or Lustre, a file that names the process takes its place, and AftWarning says so.

    Args:
        target: the file; the lock lies beside it, hidden.
    """
    try:
        lock = open(_lock_of(target), "a", opener=_no_link)
    except OSError as error:
        raise _unwritable(target, error) from error
    with lock as file, ExitStack() as held:
        missing = _without_locks(file.fileno(), target)
        if missing:
            warnings.warn(
                f"{target.parent}: its file system has no locks ({missing}); hidden files "
                "(.*.held) that name the process take their place",
                AftWarning,
                stacklevel=3,
            )
            held.enter_context(_own_lock(target))
        elif _own_lock_of(target).exists():
            # Another machine may have mounted the same folder without locks.
            _clear_stale(_own_lock_of(target), target)
        yield file.fileno()


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.stem}.lock")


@contextmanager
def waiting(target: Path, seconds: float = 30.0) -> Iterator[None]:
    """Hold a file as `locked` does, for a moment: wait for others, and leave no lock behind.

    Args:
        target: the file.
        seconds: how long to wait.

    Raises:
        BusyError: another process still holds it.
    """
    lock, end = _lock_of(target), time.monotonic() + seconds
    with ExitStack() as held:
        while True:
            try:
                descriptor = held.enter_context(locked(target))
            except BusyError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
                continue
            with suppress(FileNotFoundError):
                # Who held it before may have removed the file that is locked now.
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    break
            held.close()
        held.callback(lock.unlink, missing_ok=True)
        yield


def _unwritable(target: Path, error: OSError) -> AftError:
    return AftError(
        f"{target}: can't be written ({error.strerror}); make its folder writable, free space "
        "or choose another --run; the same command resumes where it stopped"
    )


def _without_locks(descriptor: int, target: Path) -> str | None:
    """Take the system's lock; return the reason if its file system has none."""
    import fcntl

    try:
        # Not flock: forked workers would inherit it and outlive a killed parent.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return error.strerror or str(error)
        if error.errno in HELD:
            raise BusyError(
                f"{target}: another process is writing this file; wait for it or choose another "
                "--run"
            ) from error
        raise AftError(
            f"{target}: can't be locked ({error.strerror or error}); choose another --run, on "
            "another disk"
        ) from error
    return None


def _own_lock_of(target: Path) -> Path:
    return target.with_name(f".{target.stem}.held")


@contextmanager
def _own_lock(target: Path) -> Iterator[None]:
    """Hold a file by a second one that exists while this process works on it."""
    path = _own_lock_of(target)
    try:
        if path.exists():
            _clear_stale(path, target)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        raise _busy(path, target, _read_holder(path)) from None
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"host": platform.node(), "pid": os.getpid(), "machine": _machine()}, file)
        yield
    finally:
        path.unlink(missing_ok=True)


def _machine() -> str:
    """Tell this machine, since it was started, and its numbering of processes from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {int(psutil.boot_time())}"


def _read_holder(path: Path) -> dict[str, Any]:
    """Read who holds a file; empty if its lock does not say, or not yet."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LONGEST))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _busy(path: Path, target: Path, holder: Mapping[str, Any]) -> BusyError:
    who = f"process {holder['pid']} on {holder.get('host')}" if holder else "another process"
    return BusyError(
        f"{target}: {who} is writing this file, as {path.name} beside it says; wait for it, or "
        f"delete {path.name} if that process no longer runs"
    )


def _clear_stale(path: Path, target: Path) -> None:
    """Remove the lock file of an ended process of this machine; any other is an error."""
    holder = _read_holder(path)
    if holder.get("machine") != _machine() or psutil.pid_exists(holder["pid"]):
        raise _busy(path, target, holder)
    claim = path.with_suffix(".claim")
    # Two processes may come here: one removes it, and only if it is still the same.
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        raise _busy(claim, target, {}) from None
    try:
        if _read_holder(path) == holder:
            path.unlink()
    finally:
        claim.unlink(missing_ok=True)
    warnings.warn(
        f"{path}: was left by process {holder['pid']} of this machine, which no longer runs; "
        "removed",
        AftWarning,
        stacklevel=4,
    )
