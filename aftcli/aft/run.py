"""From jobs to tuned checkpoints (§4.2).

A run may be stopped at any point: the training's state is stored at short intervals, and the
same command goes on from it to the same weights, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aftcli.aft.features import Cache, CachedExamples, Masks, check_cache, choose_cache
from aftcli.aft.jobs import Job
from aftcli.aft.loss import Recipe, check_settings
from aftcli.aft.recipes import situation_of
from aftcli.aft.training import Epoch, Measured, State, Step, Training
from aftcli.core.cam import Tuner
from aftcli.core.classifier import Classifier, check_several, tensors_hash
from aftcli.core.networks import outside_inference_mode
from aftcli.core.weights import card_classes, checkpoint_of, read_card
from aftcli.data.blocks import Broken
from aftcli.data.contents import content_hash, contents_of, pack, stamp_of, unpack
from aftcli.data.sets import DataSet, validation_of
from aftcli.errors import AftError
from aftcli.files import durable, locked, make_folder, sweep, write_tensors
from aftcli.tft.masks import refuse_other_settings
from aftcli.tft.stores import advice
from aftcli.version import __version__

SAVE_EVERY = 30.0  # seconds between stored states, at the least

OVERHEAD = 0.05  # share of the time that storing them may take

StemPass = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def _as_it_is(f: Classifier, stem: nn.Module, passes: int | None) -> StemPass:
    return stem


@dataclass(frozen=True)
class Options:
    """How a run goes, but for what it computes.

    Attributes:
        cache: of aftcli.aft.features.CACHES.
        augment: flip and crop images at random.
        workers: processes that decode images.
        overwrite: begin anew.
        save_every: seconds between stored states, at the least; 0 stores one at each step.
        fast_stem: gives what computes w0 of so many images (`aftcli.engine.accelerate.fast_stem`).

    Raises:
        AftError: see `check_cache`.
    """

    cache: str = "auto"
    augment: bool = False
    workers: int = 1
    overwrite: bool = False
    save_every: float = SAVE_EVERY
    fast_stem: Callable[[Classifier, nn.Module, int | None], StemPass] = _as_it_is

    def __post_init__(self) -> None:
        check_cache(self.cache, self.augment)


class Begun(NamedTuple):
    """A job begins, or goes on after `epoch` epochs."""

    job: Job
    epoch: int
    epochs: int
    train: int
    held_out: int
    broken: list[Broken]
    settings: Recipe


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


class Tuned(NamedTuple):
    """A job is done.

    Attributes:
        path: of the checkpoint.
        card: what it says of itself.
        before: whether it was done already.
    """

    path: Path
    card: dict[str, Any]
    before: bool


def _identity(
    job: Job, settings: Recipe, options: Options, accelerator: Accelerator, run: Path
) -> dict[str, Any]:
    """All that decides the result: entries of the card."""
    contents = None  # of images with masks: these are checked against them
    if job.masks is None:
        contents = content_hash(job.data_set.files(), _known_in(run, accelerator))
    return {
        "start": job.f.weights_hash(),
        "layer": job.f.layer_name,
        "earlier_layers": list(job.earlier.names) if job.earlier else [],
        "masks": job.made,
        "images": len(job.data_set.samples),
        "images_hash": job.data_set.fingerprint(),
        "split": job.data_set.split,
        "augment": options.augment,
        "precision": accelerator.mixed_precision,
        "contents": contents,
        **vars(settings),
    }


def _known_in(run: Path, accelerator: Accelerator) -> Path:
    return make_folder(run / "tuned") / f".contents-{accelerator.process_index}.json"


def _trained_contents(job: Job, usable: Sequence[int], known_in: Path) -> str:
    """The files that f has learned from, those of what it started from included."""
    own = job.contents
    if own is None:
        own = contents_of([job.data_set.path(i) for i in usable], known_in)
    card = read_card(Path(job.f.checkpoint)) if job.f.checkpoint else None
    return pack({*own, *unpack((card or {}).get("trained_contents", ""))})


class _Files:
    """The files of one job: its checkpoint and, on the way there, its state."""

    def __init__(self, run: Path, job: Job, identity: dict[str, Any]) -> None:
        self.folder = make_folder(run / "tuned")
        self.path = self.folder / f"{job.name}.safetensors"
        self.state = self.folder / f".{job.name}.state"
        self.marker = self.folder / f".{job.name}.overwrite"
        # As it comes back from a file: a tuple is a list in JSON.
        self.identity = json.loads(json.dumps(identity))
        if job.f.checkpoint and Path(job.f.checkpoint) == self.path.resolve():
            raise AftError(
                f"{self.path}: is what the training starts from; give another --run, so that it "
                "is not overwritten"
            )

    def begin_anew(self) -> None:
        """Forget the state, and name the checkpoint that stays until the new one is there."""
        self.state.unlink(missing_ok=True)
        self.marker.unlink(missing_ok=True)
        if self.path.exists():
            with durable(self.marker) as temporary:
                temporary.write_text(self._replaced(), encoding="utf-8")

    def end(self) -> None:
        """Delete what a finished checkpoint needs no more."""
        for left in (self.state, self.marker):
            left.unlink(missing_ok=True)
            sweep(left)

    def _replaced(self) -> str:
        """The checkpoint that is there, and what it is to be replaced with."""
        return json.dumps({"stamp": stamp_of(self.path), "identity": self.identity})

    def _is_replaced(self) -> bool:
        """Whether an --overwrite of the checkpoint that is there was begun."""
        try:
            return self.marker.read_text(encoding="utf-8") == self._replaced()
        except (OSError, ValueError):
            return False

    def finished(self) -> dict[str, Any] | None:
        """The card of the finished checkpoint; one of other settings is refused."""
        if not self.path.exists() or self._is_replaced():
            return None
        card = read_card(self.path)
        if card is None:
            raise AftError(
                f"{self.path}: is damaged, or was not written by aft; move it away, or --overwrite"
            )
        found = {key: card.get(key) for key in self.identity}
        refuse_other_settings(self.path, found, self.identity)
        return card

    def save(self, training: Training) -> None:
        tensors, values = training.state()
        metadata = {"values": json.dumps(values), "identity": json.dumps(self.identity)}
        write_tensors(self.state, tensors, {**metadata, "sha256": _seal(metadata, tensors)})

    def restore(self, training: Training) -> bool:
        """Go back to the stored state; False if there is none, or a damaged one."""
        if not self.state.exists():
            return False
        try:
            with safe_open(self.state, "pt") as file:
                read = file.metadata()
                values, identity = json.loads(read["values"]), json.loads(read["identity"])
            # Not load_file: its tensors are the file itself, which may change.
            tensors = safetensors.torch.load(self.state.read_bytes())
            if read["sha256"] != _seal({k: read[k] for k in ("values", "identity")}, tensors):
                return False
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return False
        refuse_other_settings(self.path, identity, self.identity)
        training.restore(State(tensors, values))
        return True


def _seal(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(metadata, sort_keys=True) + tensors_hash(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


Event = Begun | Cached | Note | Step | Epoch | Tuned


@outside_inference_mode
def fine_tune(
    jobs: Sequence[Job],
    run: Path,
    settings: Recipe | Callable[[Job], Recipe],
    options: Options | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[Event]:
    """Tune classifiers, one after the other, going on where a run stopped.

    Args:
        jobs: what to tune; jobs of the same w0 and images share its outputs.
        run: where the study lives; checkpoints are `<run>/tuned/<model>-<cam>.safetensors`.
        settings: of the training; a function where they depend on the job (`in_situation`).
        options: how the run goes.
        accelerator: device, precision and processes; default one process on f's device.

    Yields:
        What happens.

    Raises:
        AftError: a checkpoint of other settings is there, another process works on it, an image
            can't be read, or a file can't be written.
    """
    options = options or Options()
    accelerator = accelerator or Accelerator(cpu=jobs[0].f.device.type == "cpu")
    caches: dict[str, Cache] = {}
    for job in jobs:
        own = settings(job) if callable(settings) else settings
        yield from _tune(job, run, own, options, accelerator, caches)
    if accelerator.process_index == 0:
        for cache in caches.values():
            cache.remove()


def _tune(
    job: Job,
    run: Path,
    settings: Recipe,
    options: Options,
    accelerator: Accelerator,
    caches: dict[str, Cache],
) -> Iterator[Event]:
    check_several(len(job.f.classes))
    check_settings(settings, job.cam)
    files = _Files(run, job, _identity(job, settings, options, accelerator, run))
    first = accelerator.process_index == 0
    with ExitStack() as held:
        if first:
            held.enter_context(locked(files.path))
            if options.overwrite:
                files.begin_anew()
        accelerator.wait_for_everyone()
        yield from map(Note, job.data_set.notes)
        card = files.finished()
        if card is None:
            examples = yield from _examples(job, run, settings, options, accelerator, caches)
            training = Training(job.f, examples, settings, accelerator, job.cam, job.earlier)
            val = yield from _validation(job, run, options, accelerator, caches)
            before = training.measure(val, val.usable) if val else None
            files.restore(training)
            # All have read the state before the first writes a new one.
            accelerator.wait_for_everyone()
            yield _begun(job, training, examples)
            yield from _train(training, files if first else None, options)
            training.use_best()
            after = training.measure(val, val.usable) if val else None
            held_out = training.measure(examples, training.held_out)
            card = {
                **_card(job, files.identity, training, before, after, held_out),
                "trained_contents": _trained_contents(
                    job, examples.usable, _known_in(run, accelerator)
                ),
            }
            if first:
                tuned = training.classifier(job.cam)
                tuner = training.tail.tuner
                kept = tuner if isinstance(tuner, Tuner) else None
                tensors, metadata = checkpoint_of(tuned, kept, card)
                write_tensors(files.path, tensors, metadata)
            accelerator.free_memory()
            accelerator.wait_for_everyone()
            if first and examples.hidden:
                examples.hidden.remove()
            yield Tuned(files.path, files.finished() or card, False)
        else:
            if first:
                _clear_caches(job, run)
            if card_classes(card) != job.f.classes:
                yield Note(
                    f"{files.path}: was tuned before, under other names of its classes; "
                    "--classes FILE names them where it is used, --overwrite tunes it again"
                )
            yield Tuned(files.path, card, True)
        if first:
            files.end()


def _clear_caches(job: Job, run: Path) -> None:
    """Delete what a kill between the checkpoint and the end has left."""
    if any((run / "cache").glob("*")):
        kept: list[tuple[DataSet | None, Masks | None]] = [(job.data_set, None)]
        kept += [(validation_of(job.data_set, job.f.classes).data_set, None)]
        kept += [(job.data_set, job.masks)] if job.masks else []
        for data_set, masks in kept:
            if data_set is not None:
                Cache(job.f, data_set, "disk", run / "cache", masks=masks, stem=job.stem).remove()


def _begun(job: Job, training: Training, examples: CachedExamples) -> Begun:
    counts = len(training.train), len(training.held_out)
    done = max(len(training.history) - 1, 0)
    own = training.settings
    return Begun(job, done, own.epochs, *counts, examples.cache.broken, own)


def _train(training: Training, files: _Files | None, options: Options) -> Iterator[Event]:
    saved, cost = time.monotonic(), 0.0
    for event in training.run():
        least = 0.0 if isinstance(event, Epoch) else options.save_every
        pause = max(least, cost / OVERHEAD) if options.save_every else 0.0
        if files and time.monotonic() - saved >= pause:
            start = time.monotonic()
            files.save(training)
            saved = time.monotonic()
            cost = saved - start
        yield event


def _examples(
    job: Job,
    run: Path,
    settings: Recipe,
    options: Options,
    accelerator: Accelerator,
    caches: dict[str, Cache],
) -> Generator[Event, None, CachedExamples]:
    """The training images behind w0 and, where they are needed, what the masks keep of them."""
    share = run, options, accelerator
    strict, augment = job.contents is not None, options.augment
    cache = yield from _cache(job, job.data_set, *share, caches, strict, augment)
    hidden = None
    if job.masks and settings.consistency:
        # Each job has its own, so they are not kept for the next.
        hidden = yield from _cache(job, job.data_set, *share, {}, strict, augment, job.masks)
    shapes = job.earlier.shapes if job.earlier else ()
    return CachedExamples(cache, job.masks, augment, settings.seed, hidden, shapes)


def _cache(
    job: Job,
    data_set: DataSet,
    run: Path,
    options: Options,
    accelerator: Accelerator,
    caches: dict[str, Cache],
    strict: bool,
    augment: bool,
    masks: Masks | None = None,
) -> Generator[Event, None, Cache]:
    """w0's outputs for a data set: those of an earlier job where they are the same."""
    count = accelerator.num_processes
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    # One choice for all: each may see another amount of free memory.
    (how,) = broadcast_object_list(
        [choose_cache(options.cache, job.f, len(data_set.samples), run, here, augment, job.stem)]
    )
    share = accelerator.process_index, count
    folder, workers = run / "cache", options.workers
    cache = Cache(job.f, data_set, how, folder, workers, share, strict, masks, job.stem)
    if cache.key in caches and caches[cache.key].strict == strict:
        return caches[cache.key]
    done, total = 0, -(-len(data_set.samples) // count)
    # Of all images, so that the number of processes changes no result.
    images = None if how == "off" else len(data_set.samples)
    cache.run = options.fast_stem(job.f, job.stem, images)
    for more in cache.fill():
        done += more
        yield Cached(done, total, how, data_set.split, masks is not None)
    cache.share_out(lambda t: accelerator.reduce(t, "sum"), accelerator.wait_for_everyone)
    caches[cache.key] = cache
    return cache


def _validation(
    job: Job, run: Path, options: Options, accelerator: Accelerator, caches: dict[str, Cache]
) -> Generator[Event, None, CachedExamples | None]:
    """The val split, for the report only: nothing is chosen by it."""
    data_set, reason = validation_of(job.data_set, job.f.classes)
    if reason:
        yield Note(f"val is not measured: {reason}{advice(job.f)}")
    if data_set is None:
        return None
    yield from map(Note, data_set.notes)
    cache = yield from _cache(
        job, data_set, run, options, accelerator, caches, strict=False, augment=False
    )
    return CachedExamples(cache, None) if cache.usable else None


def _card(
    job: Job,
    identity: dict[str, Any],
    training: Training,
    before: Measured | None,
    after: Measured | None,
    held_out: Measured,
) -> dict[str, Any]:
    def plain(held_out: Measured | None, val: Measured | None) -> dict[str, Any]:
        return {
            "held_out": held_out._asdict() if held_out else None,
            "val": val._asdict() if val else None,
        }

    history = training.history
    return {
        **identity,
        "data_set": str(job.data_set.root.resolve()),
        "data_kind": job.data_set.kind,
        "new_head": job.new_head,
        "situation": situation_of(job).title,
        "trained_on": len(training.train),
        "versions": {"aft": __version__, "torch": torch.__version__},
        "metrics": {
            "epoch": training.best_epoch,
            "before": plain(history[0].held_out, before),
            "after": plain(held_out if held_out.images else None, after),
            "history": [epoch.as_dict() for epoch in history],
        },
    }
