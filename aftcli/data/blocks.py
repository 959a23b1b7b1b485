"""Decode the images of a data set, block by block, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from aftcli.core.classifier import Preprocessing
from aftcli.data.contents import GONE, content_of, stamp_of
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import DataSet
from aftcli.errors import AftError


class Broken(NamedTuple):
    """An image that could not be read; `content` is that of its file (`contents.content_of`)."""

    path: str
    reason: str
    content: int = GONE


class Loaded(NamedTuple):
    """A block of images, decoded.

    An array, not a tensor: workers would hand tensors over in shared memory, which containers
    keep small.

    Attributes:
        block: its number.
        x: inputs of the images that could be read, shape (n, 3, H, W).
        indices: which these are.
        broken: the others.
        contents: of the files of the inputs, shape (n,) int64 (`contents.content_of`).
        stamps: of these files, shape (n, 2) int64 (`contents.stamp_of`).
    """

    block: int
    x: np.ndarray
    indices: list[int]
    broken: list[Broken]
    contents: np.ndarray
    stamps: np.ndarray


class _Blocks(Dataset[Loaded]):
    """Decodes the images of a block; runs in the worker processes."""

    def __init__(
        self,
        data_set: DataSet,
        spans: Sequence[Sequence[int]],
        todo: Sequence[int],
        preprocessing: Preprocessing,
    ) -> None:
        self.data_set, self.spans, self.todo = data_set, spans, todo
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, index: int) -> Loaded:
        inputs, indices, seen, broken = [], [], [], []
        for i in self.spans[self.todo[index]]:
            name, content = self.data_set.samples[i].name, GONE
            try:
                path = self.data_set.path(i)
                # Before it is decoded: of a file that changes meanwhile the old stamp is kept.
                stamp, content = stamp_of(path), content_of(path)
                inputs.append(to_input(read_image(path), self.preprocessing))
                indices.append(i)
                seen.append((content, *stamp))
            except AftError as error:
                reason = str(error).removeprefix(f"{self.data_set.root / name}: ")
                broken.append(Broken(name, reason, content))
        x = torch.cat([torch.empty(0, 3, *self.preprocessing.size), *inputs])
        columns = np.array(seen, np.int64).reshape(-1, 3)
        contents, stamps = columns[:, 0], columns[:, 1:]
        return Loaded(self.todo[index], x.numpy(), indices, broken, contents, stamps)


def batches(loaded: Loaded, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Inputs of a block on a device, batch by batch, the next one already on its way there.

    Args:
        loaded: the block.
        size: images in a batch.
        device: where they go; to CUDA from pinned memory, without waiting for the copy.

    Yields:
        x, shape (n, 3, H, W); none of a block without a readable image.
    """
    x = torch.from_numpy(loaded.x)
    pinned = device.type == "cuda"
    x = x.pin_memory() if pinned else x
    moved = (part.to(device, non_blocking=pinned) for part in x.split(size) if len(part))
    ahead = next(moved, None)
    while ahead is not None:
        following = next(moved, None)
        yield ahead
        ahead = following


def _as_it_is(loaded: Any) -> Any:  # noqa: ANN401 - what torch declares
    return loaded


def load_blocks(
    preprocessing: Preprocessing,
    data_set: DataSet,
    spans: Sequence[Sequence[int]],
    todo: Sequence[int],
    workers: int,
) -> Iterator[Loaded]:
    """Decode blocks of images, in worker processes.

    Args:
        preprocessing: of the model.
        data_set: the images.
        spans: which images each block holds.
        todo: which blocks to decode, in this order.
        workers: how many processes; 0 decodes in this one.

    Yields:
        Each block of `todo`, in its order.

    Raises:
        AftError: a worker died.
    """
    if not todo:
        return
    loader: DataLoader[Loaded] = DataLoader(
        _Blocks(data_set, spans, todo, preprocessing),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=min(workers, len(todo)),
        worker_init_fn=begin_worker,
        # Forked workers see that their parent has died; those of a fork server live on.
        multiprocessing_context="fork" if workers and hasattr(os, "fork") else None,
    )
    try:
        yield from awaited(loader)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise AftError(
            f"a process that decodes images died ({str(error).splitlines()[0][:120].strip()}); the "
            "same command goes on where it stopped, with fewer --workers if memory is short"
        ) from error


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


BLOCK = 32  # images stored at a time, at the least

PARTS = 4000  # blocks, at the most


@dataclass(frozen=True)
class Processes:
    """The processes that share a run, as torchrun and accelerate launch start them.

    Attributes:
        index: of this one.
        count: of all.
        wait: returns when all have called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


def spans_of(count: int, block: int | None = None) -> list[range]:
    """Divide images into blocks: small enough to lose little, few enough for any file system."""
    size = block or max(BLOCK, -(-count // PARTS))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
