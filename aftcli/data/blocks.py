"""Images of a data set, decoded block by block in worker processes, and hashes of their files."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import mmap
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGINT, SIGKILL, SIGTERM, signal
from typing import Any, NamedTuple

import numpy as np
import torch

from aftcli.core.classes import Preprocessing
from aftcli.data.images import check_channels, read_image, to_input
from aftcli.data.picture import Picture, picture_at
from aftcli.data.sets import DataSet
from aftcli.errors import AftError
from aftcli.files import durable

AHEAD = 2  # blocks a worker that are decoded or wait to be taken

SPARE = 2**16  # bytes an image: its name, what is wrong with it

GONE = 0  # the content of what can't be read


class Broken(NamedTuple):
    """An image that can't be read, and the content of its file (`content_of`)."""

    path: str
    reason: str
    content: int = GONE


class Loaded(NamedTuple):
    """A decoded block of images.

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


@dataclass(frozen=True)
class _Decoder:
    """Blocks of images, each decoded by its number.

    Attributes:
        data_set: what the images are of.
        spans: the images of each block.
        preprocessing: what makes them inputs.
    """

    data_set: DataSet
    spans: Sequence[Sequence[int]]
    preprocessing: Preprocessing

    def __call__(self, block: int) -> Loaded:
        inputs, indices, seen, broken = [], [], [], []
        for i in self.spans[block]:
            name, content = self.data_set.samples[i].name, GONE
            try:
                picture = self.data_set.picture(i)
                # Before it is decoded: of a file that changes meanwhile the old stamp is kept.
                stamp, content = stamp_of(picture), content_of(picture)
                inputs.append(to_input(read_image(picture), self.preprocessing))
                indices.append(i)
                seen.append((content, *stamp))
            except AftError as error:
                reason = str(error).removeprefix(f"{self.data_set.root / name}: ")
                broken.append(Broken(name, reason, content))
        x = torch.cat([torch.empty(0, *self.preprocessing.shape), *inputs])
        columns = np.array(seen, np.int64).reshape(-1, 3)
        return Loaded(block, x.numpy(), indices, broken, columns[:, 0], columns[:, 1:])

    def bytes_of_block(self) -> int:
        """Return the size of the largest block as `_decode_into` writes it, with room to spare."""
        return max(map(len, self.spans)) * (math.prod(self.preprocessing.shape) * 4 + SPARE)


def batches(loaded: Loaded, size: int, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Move the inputs of a block to a network, batch by batch, one batch ahead.

    Args:
        loaded: the block.
        size: images in a batch.
        like: one of its weights, for the device and the type; to CUDA they go from pinned memory,
            without waiting for the copy.

    Yields:
        x, shape (n, 3, H, W); none of a block without a readable image.
    """
    x = torch.from_numpy(loaded.x)
    pinned = like.device.type == "cuda"
    x = x.pin_memory() if pinned else x
    moved = (part.to(like, non_blocking=pinned) for part in x.split(size) if len(part))
    ahead = next(moved, None)
    while ahead is not None:
        following = next(moved, None)
        yield ahead
        ahead = following


def load_blocks(
    preprocessing: Preprocessing,
    data_set: DataSet,
    spans: Sequence[Sequence[int]],
    todo: Sequence[int],
    workers: int,
) -> Iterator[Loaded]:
    """Decode blocks of images, in worker processes.

    Args:
        preprocessing: what makes images inputs.
        data_set: what the images are of.
        spans: the images of each block.
        todo: numbers of the blocks that are decoded.
        workers: processes; 0 decodes in this one, as systems without fork do.

    Yields:
        Each block of `todo`, in its order.

    Raises:
        AftError: a worker died, or no picture has the channels that the model takes.
    """
    check_channels(preprocessing)
    decode = _Decoder(data_set, spans, preprocessing)
    workers = min(workers, len(todo)) if hasattr(os, "fork") else 0
    if not workers:
        yield from map(decode, todo)
        return
    # Blocks come back in these, not through the pool's pipe: who reads that waits for ever for the
    # rest of a block whose worker is killed amid it. Of no file: containers keep /dev/shm small.
    size = decode.bytes_of_block()
    places = [mmap.mmap(-1, size) for _ in range(AHEAD * workers)]
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_worker, (decode, places))
    processes, died = pool._processes, False
    jobs = zip(todo, itertools.cycle(range(len(places))), strict=False)
    try:
        ahead = deque(pool.submit(_decode_into, *job) for job in islice(jobs, len(places)))
        while ahead:
            loaded = pickle.loads(places[ahead.popleft().result()])
            ahead.extend(pool.submit(_decode_into, *job) for job in islice(jobs, 1))
            yield loaded
        died = bool(wait([process.sentinel for process in processes.values()], timeout=0))
    except BrokenProcessPool:
        died = True
    finally:
        for process in processes.values():
            process.kill()
        pool.shutdown()
    if died:
        others = {process.exitcode for process in processes.values()} - {-SIGKILL, -SIGTERM}
        how = f"exited unexpectedly with code {others.pop()}" if others else "Killed"
        raise AftError(
            f"a process that decodes images died ({how}); the same command resumes where it "
            "stopped, with fewer --workers if memory is short"
        )


def _begin_worker(decode: Callable[[int], Loaded], places: Sequence[mmap.mmap]) -> None:
    """Set up a worker process, which leaves Ctrl-C to its parent and ends with it."""
    global _job
    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = decode, places


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _decode_into(block: int, place: int) -> int:
    """Decode a block in a worker process and write it to a place, which is returned."""
    decode, places = _job
    places[place].seek(0)
    pickle.dump(decode(block), places[place], protocol=5)
    return place


_job: tuple[Callable[[int], Loaded], Sequence[mmap.mmap]]  # of a worker process


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


def stamp_of(picture: Path | Picture) -> tuple[int, int]:
    """Return a file's size in bytes and time of the last change in ns; zeros if it is missing."""
    try:
        return picture_at(picture).stat()
    except OSError:
        return (0, 0)


def content_of(picture: Path | Picture) -> int:
    """Hash a file: the first 64 bits of its SHA-256, signed; GONE if it can't be read."""
    try:
        return _short(picture_at(picture).sha256())
    except OSError:
        return GONE


def _short(sha256: str) -> int:
    return int.from_bytes(bytes.fromhex(sha256)[:8], "little", signed=True)


def changed(
    pictures: Iterable[Path | Picture], contents: np.ndarray, stamps: np.ndarray
) -> Iterator[int]:
    """Find the files whose content has changed; those of the same stamp are not read.

    Args:
        pictures: n files.
        contents: of each when it was used, shape (n,) int64.
        stamps: likewise, shape (n, 2) int64.

    Yields:
        Their places; not those of files that can't be read, which their reader reports.
    """
    for i, (picture, content, stamp) in enumerate(zip(pictures, contents, stamps, strict=True)):
        if stamp_of(picture) != (stamp[0], stamp[1]) and content_of(picture) not in (content, GONE):
            yield i


class Used(NamedTuple):
    """Images that results were computed of: path, content and stamp as of `Loaded`."""

    path: np.ndarray
    content: np.ndarray
    stamp: np.ndarray


def changed_images(data_set: DataSet, used: Used | None, broken: Sequence[Broken]) -> list[str]:
    """Name the images of a data set that have changed since results were computed.

    Args:
        data_set: the images.
        used: images with results; None for none.
        broken: images that could not be read.
    """
    contents = np.array([b.content for b in broken], np.int64)
    names, stamps = [b.path for b in broken], np.full((len(broken), 2), -1)
    if used is not None:
        names += [os.fsdecode(bytes(path)) for path in used.path]
        contents = np.concatenate([contents, used.content])
        stamps = np.concatenate([stamps, used.stamp])

    form = data_set.format

    def picture(name: str) -> Path | Picture:
        try:
            return form.picture(data_set, name)
        except AftError:  # said by who reads it
            return data_set.root.parent

    return [names[i] for i in changed(map(picture, names), contents, stamps)]


def content_hash(files: Iterable[Path | Picture], known_in: Path) -> str:
    """Hash files' names and contents; a content is read again only if it changed.

    Args:
        files: in their order.
        known_in: a JSON file that remembers size, time and hash of each.

    """
    digest = hashlib.sha256()
    for path, found in _hashes(files, known_in):
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {found or 'unreadable'}\n"))
    return digest.hexdigest()


def contents_of(files: Iterable[Path | Picture], known_in: Path) -> list[int]:
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


def _hashes(files: Iterable[Path | Picture], known_in: Path) -> list[tuple[Path, str]]:
    """Hash files by SHA-256, "" for those that can't be read; remember them in `known_in`."""
    known = _known(known_in)
    seen: dict[str, list[Any]] = {}
    found = []
    for picture in map(picture_at, files):
        path = Path(picture.name)
        name = str(path.absolute())
        try:
            at = [*picture.stat()]
            old = known.get(name)
            new = old if old and old[:2] == at else [*at, picture.sha256()]
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
