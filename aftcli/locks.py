"""Locks on files that are written: they end with their process."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from aftcli.errors import AftError, AftWarning

HELD = {errno.EACCES, errno.EAGAIN}  # answers of a lock that another process holds

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

LONGEST = 4096  # bytes that are read of a lock


class BusyError(AftError):
    """A file that another process holds."""


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


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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
