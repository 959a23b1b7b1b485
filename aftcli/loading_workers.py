"""Worker processes that decode: how they end with their parent, and it learns that one died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch

T = TypeVar("T")


def begin_worker(_: int) -> None:
    """Set up a worker process: Ctrl-C is its parent's matter, and it does not outlive that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int | None) -> None:
    """End this process when its parent is gone.

    torch's workers look for that too, but then wait until somebody takes their last block.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Deaths:
    """Holds back what torch raises when a worker dies until a block is awaited.

    torch raises it from a signal's handler, wherever the process is: amid a pass or a write,
    whose error it then seems to be.
    """

    def __init__(self) -> None:
        self.users, self.awaited = 0, False
        self.missed: RuntimeError | None = None
        self.tell: Callable[[int, FrameType | None], object] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold deaths back; nothing changes where no loader of torch has set a handler."""
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if not callable(handler) or not _in_main_thread():
            yield
            return
        if self.users == 0:
            self.tell, self.missed = handler, None
            signal.signal(signal.SIGCHLD, self._handle)
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if self.users == 0 and _in_main_thread():
                signal.signal(signal.SIGCHLD, self.tell)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise here what was held back, and whatever happens meanwhile."""
        self.awaited = True
        try:
            missed, self.missed = self.missed, None
            if missed:
                raise missed
            yield
        finally:
            self.awaited = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self.tell
        try:
            # At once: nobody can be asked about a child that somebody else has waited for.
            self.tell(number, frame)
        except RuntimeError as error:
            if self.awaited:
                raise
            self.missed = error


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


_deaths = _Deaths()


def awaited(loader: Iterable[T]) -> Iterator[T]:
    """What a loader loads; that one of its workers died is raised only while that is awaited."""
    blocks = iter(loader)
    with _deaths.held():
        try:
            while True:
                with _deaths.told():
                    try:
                        block = next(blocks)
                    except StopIteration:
                        return
                yield block
        finally:
            # Now, not when the iterator is collected: then nothing holds their deaths back.
            end = getattr(blocks, "_shutdown_workers", None)
            if end:
                end()
