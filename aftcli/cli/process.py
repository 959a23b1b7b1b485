"""A command's process: signals that stop it, what is said of errors, its memory."""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from aftcli.errors import AftError, first_line
from aftcli.report.terminal import complain

INTERRUPTED = 128 + signal.SIGINT  # what typer, and shells, make of Ctrl-C

GO_ON = ("gen-masks", "finetune", "evaluate")  # commands that store what is done

CLEANING = 3.0  # seconds in which a second signal does not break off the end that the first began

# What a disk or its owner says no with; a file that is not there would be a bug.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

# glibc's names in malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class Stopping:
    """While it is entered, a signal to stop raises KeyboardInterrupt, once, in this process.

    Libraries may turn that into an error of their own; `signal` tells it all the same.

    Attributes:
        signal: the one that came; None before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._process, self._at = os.getpid(), 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            for number, handler in usual.items():
                # One that is ignored, in the background say, stays so.
                if signal.getsignal(number) == handler:
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A worker just forked: Ctrl-C reaches it too, but its parent ends it.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        # Under torchrun Ctrl-C comes twice: from the terminal and from torchrun.
        if self.signal is not None and time.monotonic() - self._at < CLEANING:
            return
        self.signal, self._at = number, time.monotonic()
        raise KeyboardInterrupt

    def tell(self, arguments: Sequence[str]) -> int:
        """Say on stderr that the command was stopped; its exit code."""
        number = self.signal or signal.SIGINT
        # Processes of one run stop together.
        if os.environ.get("RANK", "0") == "0":
            complain(how_to_go_on(number, arguments))
        return 128 + number


def how_to_go_on(number: int, arguments: Sequence[str]) -> str:
    """Say that a command was stopped, and how to resume it.

    Args:
        number: of the signal.
        arguments: of the command line.

    >>> how_to_go_on(signal.SIGINT, ["gen-masks", "photos"])
    'interrupted; the same command resumes where it stopped'
    >>> how_to_go_on(signal.SIGTERM, ["finetune", "--overwrite"])
    'terminated; the same command without --overwrite resumes where it stopped'
    >>> how_to_go_on(signal.SIGINT, ["explain", "cat.jpg"])
    'interrupted'
    """
    said = "interrupted" if number == signal.SIGINT else "terminated"
    if not set(arguments[:1]) & set(GO_ON):
        return said
    without = " without --overwrite" if "--overwrite" in arguments else ""
    return f"{said}; the same command{without} resumes where it stopped"


def what_is_wrong(error: Exception) -> str:
    """Say what is wrong, of an error that ends a command."""
    if isinstance(error, AftError):
        return str(error)
    if isinstance(error, OSError) and error.errno in REFUSED:
        if error.filename is None:  # files are written where an AftError names them
            return f"the result can't be printed ({error.strerror})"
        return (
            f"{error.filename}: can't be written ({error.strerror}); free space or choose another "
            "folder; what is finished is kept"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "gloo" in str(error):
        return (
            "another process of this run has ended, see its message; the same command resumes "
            "where it stopped"
        )
    return (
        f"{type(error).__name__}: {first_line(error)}; this is a fault of aft's, "
        "run again with --debug to see where and please report it"
    )


def open_streams() -> None:
    """Open those of stdin, stdout and stderr that the caller closed, as files that keep nothing.

    Otherwise the next file that is opened gets stdout's number, and native code, which prints to
    that number, writes into the file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def flush() -> None:
    """Print what is still to be printed, while it can be said that this fails.

    Raises:
        AftError: it fails.
        BrokenPipeError: nobody reads it.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # Otherwise it is tried once more, and fails, when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise AftError(f"the result can't be printed ({error.strerror})") from error


def keep_freed_memory() -> bool:
    """Let malloc keep large blocks instead of giving each back to the system.

    By default glibc maps every large tensor again and the system fills it with zeros page by
    page, in every layer of every pass: on a CPU that can cost as much as the convolutions. The
    setting is the whole process's, so commands make it, functions of the library do not.

    Returns:
        True if it took effect: it does on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def kept_from_collector() -> Iterator[None]:
    """Keep what is made here out of the search for reference cycles, then and later.

    Imports make hundreds of thousands of objects that stay, and Python walks over them again and
    again. The setting is the whole process's, so commands make it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # Otherwise libraries take what is left at the end for a leak, and say so.
        atexit.register(gc.unfreeze)
