"""Training pairs (§4.2): images behind w0 with labels and masks, augmented where asked for."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from aftcli.aft.features import Cache, Masks, check_cache, choose_cache
from aftcli.aft.jobs import Job
from aftcli.aft.loss import Batch, Features, Recipe
from aftcli.core.classifier import Classifier
from aftcli.data.sets import DataSet, validation_of
from aftcli.engine.accelerate import Accelerate, as_it_is
from aftcli.models.load import advice

SAVE_EVERY = 30.0  # seconds between stored states, at the least

StemPass = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


NEW_HEAD_ADVICE = (
    "; the new last layer has the classes of the training images: add images of the other classes "
    "to these, or move their folders out of the val split"
)


class Crop(NamedTuple):
    """A square part of an input, in shares of its sides, that may be mirrored."""

    top: float
    left: float
    side: float
    mirrored: bool


def random_crop(name: str, seed: int, epoch: int) -> Crop:
    """Choose a part with 60 to 100 % of the area; the same for the same name, seed and epoch."""
    digest = hashlib.sha256(f"{seed}\0{epoch}\0{name}".encode("utf-8", "surrogateescape"))
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))
    area, top, left, mirror = torch.rand(4, generator=generator).tolist()
    side = (0.6 + 0.4 * area) ** 0.5
    return Crop(top * (1 - side), left * (1 - side), side, mirror < 0.5)


def crop(x: Tensor, views: Sequence[Crop], size: Sequence[int]) -> Tensor:
    """Take a part of each input, shape (N, C, H, W), and bring it to a height and width."""
    high, wide = x.shape[2:]
    out = []
    for one, view in zip(x, views, strict=True):
        top, left = round(view.top * high), round(view.left * wide)
        down, right = round(view.side * high), round(view.side * wide)
        part = one[None, :, top : top + down, left : left + right]
        part = F.interpolate(
            part, tuple(size), mode="bilinear", align_corners=False, antialias=True
        )
        out.append(part.flip(3) if view.mirrored else part)
    return torch.cat(out)


class CachedExamples:
    """Training pairs: a data set's images behind w0, with labels and masks.

    Args:
        cache: filled.
        masks: of the images; None without.
        augment: flip and crop images and masks at random, by seed and epoch.
        seed: of the augmentation.
        hidden: the same images as x_hat_tau*; None where they are not needed.
        shapes: (K, h, w) of earlier layers that are tuned.
    """

    def __init__(
        self,
        cache: Cache,
        masks: Masks | None,
        augment: bool = False,
        seed: int = 0,
        hidden: Cache | None = None,
        shapes: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self.cache, self.masks, self.augment, self.seed = cache, masks, augment, seed
        self.hidden = hidden
        samples = cache.data_set.samples
        self.low = [masks.low] if masks else []
        if masks and shapes:
            sizes = [(h, w) for _, h, w in shapes]
            self.low = [*_at_sizes(masks, len(samples), sizes), masks.low]
        self.names = [sample.name for sample in samples]
        self.labels = torch.tensor([sample.label for sample in samples])

    @property
    def usable(self) -> Sequence[int]:
        """Indices of the images that could be read."""
        return self.cache.usable

    def inputs(self, spans: Sequence[Sequence[int]], todo: Sequence[int]) -> Iterator[Tensor]:
        """Yield inputs of blocks of images, see `Cache.inputs`."""
        return self.cache.inputs(spans, todo)

    def batches(self, wanted: Sequence[Sequence[int]], epoch: int | None) -> Iterator[Batch]:
        """Yield the wanted batches in order; epoch None asks for images without augmentation."""
        changing = self.augment and epoch is not None
        device = self.cache.f.device

        def views(indices: Sequence[int]) -> list[Crop]:
            return [random_crop(self.names[i], self.seed, epoch or 0) for i in indices]

        def change(x: Tensor, indices: Sequence[int]) -> Tensor:
            return crop(x, views(indices), x.shape[2:]) if changing else x

        hidden: Iterator[Features | None] = itertools.repeat(None, len(wanted))
        if self.hidden is not None:
            hidden = self.hidden.batches(wanted, change)
        seen = self.cache.batches(wanted, change)
        for indices, features, masked in zip(wanted, seen, hidden, strict=True):
            rows = torch.tensor(indices, dtype=torch.long)
            batch = Batch(features, self.labels[rows].to(device), masked=masked)
            if self.masks is not None:
                low = [mask[rows] for mask in self.low]
                if changing:
                    full = torch.stack([self.masks.full(i) for i in indices])[:, None].float()
                    low = [crop(full, views(indices), mask.shape[1:])[:, 0] >= 0.5 for mask in low]
                batch = batch._replace(
                    masks=tuple(mask.to(device) for mask in low),
                    class_index=self.masks.class_index[rows].to(device),
                )
            yield batch


def _at_sizes(masks: Masks, count: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return M_tau* of all images at other sizes, bool: a cell is kept if half of it is."""
    found: list[list[Tensor]] = [[] for _ in sizes]
    for i in range(count):
        full = masks.full(i)[None].float()
        for column, size in zip(found, sizes, strict=True):
            column.append(F.adaptive_avg_pool2d(full, size)[0] >= 0.5)
    return [torch.stack(column) for column in found]


def _as_it_is(f: Classifier, stem: nn.Module, passes: int | None) -> StemPass:
    return stem


@dataclass(frozen=True)
class Options:
    """Options of a run that do not change what it computes, `augment` excepted.

    Attributes:
        cache: of aftcli.aft.features.CACHES.
        augment: flip and crop images at random.
        workers: processes that decode images.
        overwrite: start again.
        save_every: seconds between stored states, at the least; 0 stores one at each step.
        fast_stem: gives what computes w0 of so many images (`aftcli.engine.accelerate.fast_stem`).
        accelerate: gives the classifier that masked images pass.
    """

    cache: str = "auto"
    augment: bool = False
    workers: int = 1
    overwrite: bool = False
    save_every: float = SAVE_EVERY
    fast_stem: Callable[[Classifier, nn.Module, int | None], StemPass] = _as_it_is
    accelerate: Accelerate = as_it_is

    def __post_init__(self) -> None:
        check_cache(self.cache, self.augment)


class Cached(NamedTuple):
    """So many images of `total`, `masked` or whole, are behind w0; `where` they are kept."""

    images: int
    total: int
    where: str
    split: str
    masked: bool


class Note(NamedTuple):
    """Something that the user should know, in one sentence."""

    text: str


@dataclass
class Gathering:
    """Training pairs of a run's jobs; jobs of the same w0 and images share its outputs."""

    run: Path
    options: Options
    accelerator: Accelerator
    caches: dict[str, Cache] = field(default_factory=dict, init=False)

    def training(self, job: Job, settings: Recipe) -> Generator[Cached, None, CachedExamples]:
        """Gather the training images and, if settings need it, x_hat_tau*."""
        strict, augment = job.contents is not None, self.options.augment
        cache = yield from self._cache(job, job.data_set, strict, augment)
        hidden = None
        if job.masks and settings.consistency:
            hidden = yield from self._cache(job, job.data_set, strict, augment, job.masks)
        shapes = job.earlier.shapes if job.earlier else ()
        return CachedExamples(cache, job.masks, augment, settings.seed, hidden, shapes)

    def validation(self, job: Job) -> Generator[Cached | Note, None, CachedExamples | None]:
        """Gather the val split, for the report only: nothing is chosen by it."""
        data_set, reason = validation_of(job.data_set, job.f.classes)
        if reason:
            what_to_do = NEW_HEAD_ADVICE if job.new_head else advice(job.f)
            yield Note(f"val is not measured: {reason}{what_to_do}")
        if data_set is None:
            return None
        yield from map(Note, data_set.notes)
        cache = yield from self._cache(job, data_set, strict=False, augment=False)
        return CachedExamples(cache, None) if cache.usable else None

    def _cache(
        self,
        job: Job,
        data_set: DataSet,
        strict: bool,
        augment: bool,
        masks: Masks | None = None,
    ) -> Generator[Cached, None, Cache]:
        """Compute w0's outputs for a data set, or reuse those of an earlier job."""
        options, accelerator = self.options, self.accelerator
        count, total = accelerator.num_processes, len(data_set.samples)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        folder = self.run / "cache"
        # One choice for all: each may see another amount of free memory.
        (how,) = broadcast_object_list(
            [choose_cache(options.cache, job.f, total, self.run, here, augment, job.stem)]
        )
        share = accelerator.process_index, count
        cache = Cache(job.f, data_set, how, folder, options.workers, share, strict, masks, job.stem)
        known = None if masks else self.caches.get(cache.key)
        if known and known.strict == strict:
            return known
        done = 0
        # Of all images, so that the number of processes changes no result.
        cache.run = options.fast_stem(job.f, job.stem, None if how == "off" else total)
        for more in cache.fill():
            done += more
            yield Cached(done, -(-total // count), how, data_set.part, masks is not None)
        cache.share_out(lambda t: accelerator.reduce(t, "sum"), accelerator.wait_for_everyone)
        if not masks:  # each job has its own, so they are not kept for the next
            self.caches[cache.key] = cache
        return cache

    def remove(self) -> None:
        """Delete what is kept on disk."""
        for cache in self.caches.values():
            cache.remove()

    def remove_left(self, job: Job) -> None:
        """Delete what a kill between a job's checkpoint and its end has left on disk."""
        folder = self.run / "cache"
        if any(folder.glob("*")):
            val = validation_of(job.data_set, job.f.classes).data_set
            # Without masks the last is the first, again.
            for data_set, masks in ((job.data_set, None), (val, None), (job.data_set, job.masks)):
                if data_set is not None:
                    Cache(job.f, data_set, "disk", folder, masks=masks, stem=job.stem).remove()
