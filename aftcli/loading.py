"""Decode the images of a data set, block by block, in worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from aftcli.contents import GONE, content_of, stamp_of
from aftcli.core.classifier import Preprocessing
from aftcli.data import read_image, to_input
from aftcli.datasets import DataSet
from aftcli.errors import AftError
from aftcli.loading_workers import awaited, begin_worker


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
