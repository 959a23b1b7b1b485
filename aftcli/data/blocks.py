"""Images of a data set, decoded block by block in worker processes, and hashes of their files."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from aftcli.core.classifier import Preprocessing
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import DataSet
from aftcli.errors import AftError
from aftcli.files import durable

T = TypeVar("T")


GONE = 0  # the content of what can't be read


class Broken(NamedTuple):
    """An image that can't be read, and the content of its file (`content_of`)."""

    path: str
    reason: str
    content: int = GONE


class Loaded(NamedTuple):
    """A decoded block of images.

    An array, not a tensor: workers would hand tensors over in shared memory, which containers
    keep small.

    Attributes:
        block: its number.
        x: inputs of the images that could be read, shape (n, 3, H, W).
        indices: which these are.
        broken: the others.
        contents: of the files of the inputs, shape (n,) int64 (`content_of`).
        stamps: of these files, shape (n, 2) int64 (`stamp_of`).
    """

    block: int
    x: np.ndarray
    indices: list[int]
    broken: list[Broken]
    contents: np.ndarray
    stamps: np.ndarray


class _Blocks(Dataset[Loaded]):
    """Blocks of images, decoded in the worker processes."""

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
    """Move the inputs of a block to a device, batch by batch, one batch ahead.

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

    Yields:
        Each block of `todo`, in its order.
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
            "same command resumes where it stopped, with fewer --workers if memory is short"
        ) from error


def begin_worker(_: int) -> None:
    """Set up a worker process that leaves Ctrl-C to its parent and ends with it."""
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
    """A guard that holds back what torch raises when a worker dies until a block is awaited.

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
    """Iterate over a loader; raise the death of a worker only while a block is awaited."""
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
    """A process and how many share its run, as torchrun and accelerate launch start them.

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


def stamp_of(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and time of the last change in ns; zeros if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_size, found.st_mtime_ns


def content_of(path: Path) -> int:
    """Hash a file: the first 64 bits of its SHA-256, signed; GONE if it can't be read."""
    try:
        return _short(_file_hash(path))
    except OSError:
        return GONE


def _short(sha256: str) -> int:
    return int.from_bytes(bytes.fromhex(sha256)[:8], "little", signed=True)


def changed(paths: Iterable[Path], contents: np.ndarray, stamps: np.ndarray) -> Iterator[int]:
    """Find the files whose content has changed; those of the same stamp are not read.

    Args:
        paths: n files.
        contents: of each when it was used, shape (n,) int64.
        stamps: likewise, shape (n, 2) int64.

    Yields:
        Their places; not those of files that can't be read, which their reader reports.
    """
    for i, (path, content, stamp) in enumerate(zip(paths, contents, stamps, strict=True)):
        if stamp_of(path) != (stamp[0], stamp[1]) and content_of(path) not in (content, GONE):
            yield i


def content_hash(files: Iterable[Path], known_in: Path) -> str:
    """Hash files' names and contents; a content is read again only if it changed.

    Args:
        files: in their order.
        known_in: a JSON file that remembers size, time and hash of each.

    """
    digest = hashlib.sha256()
    for path, found in _hashes(files, known_in):
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {found or 'unreadable'}\n"))
    return digest.hexdigest()


def contents_of(files: Iterable[Path], known_in: Path) -> list[int]:
    """Return the content of each file (`content_of`); arguments as for `content_hash`."""
    return [_short(found) if found else GONE for _, found in _hashes(files, known_in)]


def pack(contents: Iterable[int]) -> str:
    """Turn contents into text, each once.

    >>> sorted(unpack(pack([3, -1, 3])))
    [-1, 3]
    """
    return base64.b64encode(np.unique(np.array([*contents], "<i8")).tobytes()).decode()


def unpack(text: str) -> frozenset[int]:
    """Turn the text of `pack` back into contents."""
    return frozenset(np.frombuffer(base64.b64decode(text), "<i8").tolist())


def _hashes(files: Iterable[Path], known_in: Path) -> list[tuple[Path, str]]:
    """Hash files by SHA-256, "" for those that can't be read; remember them in `known_in`."""
    known = _known(known_in)
    seen: dict[str, list[Any]] = {}
    found = []
    for path in files:
        name = str(path.absolute())
        try:
            stat = path.stat()
            at = [stat.st_size, stat.st_mtime_ns]
            old = known.get(name)
            new = old if old and old[:2] == at else [*at, _file_hash(path)]
        except OSError:
            new = [0, 0, "unreadable"]
        seen[name] = new
        found.append((path, "" if new[2] == "unreadable" else str(new[2])))
    if any(known.get(name) != value for name, value in seen.items()):
        with durable(known_in) as temporary:
            temporary.write_text(json.dumps({**known, **seen}), encoding="utf-8")
    return found


def _known(path: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
