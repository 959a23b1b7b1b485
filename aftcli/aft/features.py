"""The outputs of w0 (§4.2), the frozen stem, for all images, computed once.

The stem's output is kept in memory, on disk, or not at all. Images pass the stem in blocks of a
fixed composition, so what is kept depends neither on interruptions nor on the number of
processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aftcli.aft.loss import Features
from aftcli.core.classifier import Classifier
from aftcli.data.blocks import Broken, Loaded, load_blocks, stamp_of
from aftcli.data.sets import DataSet
from aftcli.errors import AftError, UsageError, nearest
from aftcli.files import make_folder, tensors_hash, write_tensors

CACHES = ("auto", "memory", "disk", "off")

BLOCK = 32  # images that pass the stem together

ROOM = 0.5  # share of free memory, or disk, that a cache may take


class Masks(NamedTuple):
    """Masks of all images of a data set.

    Attributes:
        low: M_tau* at the activation's size, shape (N, h, w), bool.
        full: M_tau* of one image at the input's size, shape (H, W), by index.
        class_index: c, the class that each explains, shape (N,).
        hide: x_hat_tau* of inputs, shape (n, 3, H, W), and their indices.
        made: names all that x_hat_tau* depends on, but for the images.
    """

    low: Tensor
    full: Callable[[int], Tensor]
    class_index: Tensor
    hide: Callable[[Tensor, Sequence[int]], Tensor]
    made: str


def stem_output(stem: Callable[[Tensor], Tensor | Features], x: Tensor) -> Features:
    """Return the outputs of w0, which w1 takes, as a tuple of tensors, each (N, ...)."""
    with torch.no_grad():
        out = stem(x)
    return out if isinstance(out, tuple) else (out,)


class Cache:
    """The stem's outputs for a data set's images, readable in any order.

    Args:
        f: the classifier, on the device where its stem runs.
        data_set: the images.
        how: "memory", "disk" or "off".
        folder: where "disk" keeps blocks.
        workers: processes that decode images.
        share: index and number of the processes that share the work.
        strict: an image that can't be read is an error.
        masks: to keep x_hat_tau* in the images' place; None for the images.
        stem: w0; None for f's own.

    Attributes:
        key: names what it depends on.
        run: computes what the stem does, which it is unless another is set.
        broken: images that could not be read.
        usable: indices of the others.
    """

    def __init__(
        self,
        f: Classifier,
        data_set: DataSet,
        how: str,
        folder: Path,
        workers: int = 1,
        share: tuple[int, int] = (0, 1),
        strict: bool = True,
        masks: Masks | None = None,
        stem: nn.Module | None = None,
    ) -> None:
        self.f, self.stem, self.data_set, self.how = f, stem or f.stem, data_set, how
        self.workers, self.share, self.strict, self.masks = workers, share, strict, masks
        self.run: Callable[[Tensor], Tensor | Features] = self.stem
        self.key = _key(f, self.stem, data_set, masks)
        self.folder = folder / self.key
        count = len(data_set.samples)
        self.spans = [range(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]
        self.broken: list[Broken] = []
        self.usable: Sequence[int] = range(count)
        self.columns: list[Tensor] = []
        self.blocks: dict[int, dict[str, Tensor]] = {}

    def fill(self) -> Iterator[int]:
        """Pass all images through the stem, unless that is done at each batch.

        Yields:
            The number of images that were passed since.
        """
        if self.how == "off":
            return
        index, count = self.share
        own = range(index, len(self.spans), count)
        if self.how == "disk":
            make_folder(self.folder)
        missing = [i for i in own if self.how == "memory" or self._block(i) is None]
        yield sum(len(self.spans[i]) for i in own) - sum(len(self.spans[i]) for i in missing)
        for loaded in self._load(self.spans, missing):
            features = tuple(t.cpu() for t in self._pass(loaded.x, loaded.indices))
            self.broken += loaded.broken
            if self.how == "memory":
                self._keep(loaded.indices, features)
            else:
                self._write(loaded, features)
            yield len(self.spans[loaded.block])

    def _load(self, spans: Sequence[Sequence[int]], todo: Sequence[int]) -> Iterator[Loaded]:
        for loaded in load_blocks(self.f.preprocessing, self.data_set, spans, todo, self.workers):
            if loaded.broken and (self.strict or self.how == "off"):
                first = loaded.broken[0]
                without = "make the masks again without it, aft gen-masks --overwrite"
                raise AftError(
                    f"{self.data_set.root / first.path}: {first.reason}; the image is needed for "
                    "training: restore it, or "
                    f"{without if self.strict else 'take it out of the data set'}"
                )
            yield loaded

    def inputs(self, spans: Sequence[Sequence[int]], todo: Sequence[int]) -> Iterator[Tensor]:
        """Decode blocks of images.

        Args:
            spans: the images of each block.
            todo: numbers of the blocks that are decoded.

        Yields:
            x of each block, shape (n, 3, H, W), on the classifier's device.
        """
        for loaded in self._load(spans, todo):
            yield torch.from_numpy(loaded.x).to(self.f.device, self._dtype())

    def _pass(
        self,
        x: object,
        indices: Sequence[int],
        change: Callable[[Tensor, Sequence[int]], Tensor] = lambda x, _: x,
    ) -> Features:
        inputs = torch.as_tensor(x)
        if self.masks is not None and len(inputs):
            inputs = self.masks.hide(inputs, indices)
        inputs = change(inputs, indices)
        # A block without one readable image still has the features' shape.
        padded = inputs if len(inputs) else inputs.new_zeros(1, *inputs.shape[1:])
        features = stem_output(self.run, padded.to(self.f.device, self._dtype()))
        return tuple(t[: len(inputs)] for t in features)

    def _dtype(self) -> torch.dtype:
        return next(self.f.parameters()).dtype

    def _keep(self, indices: Sequence[int], features: Features) -> None:
        if not self.columns:
            count = len(self.data_set.samples)
            self.columns = [t.new_zeros(count, *t.shape[1:]) for t in features]
            # Rows of images that can't be read stay 0.
            self.columns.append(torch.zeros(count, dtype=torch.uint8))
        rows = torch.tensor(indices, dtype=torch.long)
        for column, values in zip(self.columns, features, strict=False):
            column[rows] = values
        self.columns[-1][rows] = 1

    def _write(self, loaded: Loaded, features: Features) -> None:
        tensors = {str(i): t for i, t in enumerate(features)}
        tensors["rows"] = torch.tensor(loaded.indices, dtype=torch.long)
        write_tensors(self._path(loaded.block), tensors, {})

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.safetensors"

    def _block(self, block: int) -> dict[str, Tensor] | None:
        """Return a block's tensors, mapped into memory; None if it is missing or damaged."""
        if block not in self.blocks:
            try:
                self.blocks[block] = load_file(self._path(block))
            except Exception:  # noqa: BLE001 - missing, or damaged: to be made again
                return None
        return self.blocks[block]

    def _stored(self, block: int) -> dict[str, Tensor]:
        """Return a block's tensors, which must be there by now."""
        tensors = self._block(block)
        if tensors is None:
            raise AftError(f"{self._path(block)}: is gone or damaged; run the same command again")
        return tensors

    def share_out(self, add: Callable[[Tensor], Tensor], wait: Callable[[], None]) -> None:
        """Give every process what each has computed; `add` sums a tensor over the processes."""
        wait()
        if self.how == "memory":
            if self.share[1] > 1:
                self._add_columns(add)
            self.usable = self.columns[-1].nonzero()[:, 0].tolist()
        if self.how == "disk":
            blocks = range(len(self.spans))
            self.usable = [i for b in blocks for i in self._stored(b)["rows"].tolist()]
        names = {self.data_set.samples[i].name for i in self.usable}
        known = {b.path: b.reason for b in self.broken}
        self.broken = [
            Broken(s.name, known.get(s.name, "can't be read"))
            for s in self.data_set.samples
            if s.name not in names
        ]

    def _add_columns(self, add: Callable[[Tensor], Tensor]) -> None:
        if not self.columns:  # fewer blocks than processes
            x = torch.zeros(1, *self.f.preprocessing.shape)
            self._keep([], tuple(t[:0] for t in self._pass(x[:0], [])))
        for i, column in enumerate(self.columns):
            # What another process has computed is 0 here, so the sum is exact.
            for start in range(0, len(column), 4096):
                part = slice(start, start + 4096)
                self.columns[i][part] = add(column[part].to(self.f.device)).cpu()

    def batches(
        self, wanted: Sequence[Sequence[int]], change: Callable[[Tensor, Sequence[int]], Tensor]
    ) -> Iterator[Features]:
        """Yield features of the wanted batches in order, on the classifier's device.

        `change` makes other inputs of inputs (augmentation); only without a cache.
        """
        if self.how == "off":
            for loaded in self._load(wanted, range(len(wanted))):
                yield self._pass(loaded.x, loaded.indices, change)
            return
        for indices in wanted:
            found = self._from_memory(indices) if self.columns else self._from_disk(indices)
            yield tuple(t.to(self.f.device) for t in found)

    def _from_memory(self, indices: Sequence[int]) -> Features:
        rows = torch.tensor(indices, dtype=torch.long)
        return tuple(column[rows] for column in self.columns[:-1])

    def _from_disk(self, indices: Sequence[int]) -> Features:
        rows = []
        for i in indices:
            block = self._stored(i // BLOCK)
            row = int((block["rows"] == i).nonzero()[0, 0])
            rows.append([block[str(n)][row] for n in range(len(block) - 1)])
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def remove(self) -> None:
        """Delete what is kept on disk."""
        self.blocks.clear()
        if self.how == "disk":
            shutil.rmtree(self.folder, ignore_errors=True)


def _key(f: Classifier, stem: nn.Module, data_set: DataSet, masks: Masks | None) -> str:
    """Name what a cache depends on: w0, the preprocessing, the images' files, the masks."""
    digest = hashlib.sha256(repr((f.preprocessing, masks.made if masks else "")).encode())
    # What has no weights, a pooling say, shows in the structure only.
    digest.update(f"{tensors_hash(stem.state_dict())} {stem}".encode())
    for i, sample in enumerate(data_set.samples):
        digest.update(os.fsencode(sample.name))
        with contextlib.suppress(AftError):
            size, changed = stamp_of(data_set.picture(i))
            digest.update(f" {size} {changed}".encode())
    return digest.hexdigest()[:16]


def check_cache(how: str, augment: bool) -> None:
    """Check the name of a cache before anything is computed, and that images do not change."""
    if how not in CACHES:
        raise AftError(f"unknown cache {how!r}; nearest: {nearest(how, CACHES)}")
    if augment and how in ("memory", "disk"):
        raise UsageError(
            "--augment changes the images from epoch to epoch, so nothing can be cached: leave "
            "--cache out"
        )


def choose_cache(
    how: str,
    f: Classifier,
    images: int,
    folder: Path,
    processes: int,
    augment: bool,
    stem: nn.Module | None = None,
) -> str:
    """Choose where the stem's outputs are kept.

    Args:
        how: of CACHES; auto takes memory if they fill at most half of what is free, otherwise
            the disk if they fit, otherwise nothing.
        f: the classifier.
        images: their number.
        folder: on the disk.
        processes: that share this machine.
        augment: images change from epoch to epoch.
        stem: w0; None for f's own.
    """
    check_cache(how, augment)
    if augment:
        return "off"
    if how != "auto":
        return how
    import psutil

    needed = images * _bytes_per_image(f, stem or f.stem)
    if needed * processes <= ROOM * psutil.virtual_memory().available:
        return "memory"
    return "disk" if needed <= ROOM * shutil.disk_usage(folder).free else "off"


def _bytes_per_image(f: Classifier, stem: nn.Module) -> int:
    x = next(f.parameters()).new_zeros(1, *f.preprocessing.shape)
    return sum(t.numel() * t.element_size() for t in stem_output(stem, x))
