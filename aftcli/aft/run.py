"""From jobs to tuned checkpoints (§4.2).

A run may be stopped at any point: the training's state is stored at short intervals, and the
same command resumes from it and reaches the same weights, bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from aftcli.aft.examples import Cached, CachedExamples, Gathering, Note
from aftcli.aft.examples import Options as Options
from aftcli.aft.jobs import Job, check_zero_level
from aftcli.aft.loss import ZERO_LEVEL, Choice, InSituation, Recipe, check_settings, situation_of
from aftcli.aft.training import Epoch, Measured, State, Step, Training
from aftcli.aft.zero_level import Chosen, Searching, ZeroLevelTraining
from aftcli.cutting.networks import outside_inference_mode
from aftcli.data.blocks import Broken, content_hash, contents_of, pack, stamp_of, unpack
from aftcli.errors import AftError
from aftcli.files import (
    durable,
    make_folder,
    read_sealed,
    sweep,
    write_sealed,
    write_tensors,
)
from aftcli.locks import locked
from aftcli.masks.settings import UNWRITTEN, refuse_other_settings
from aftcli.models.checkpoint import card_classes, checkpoint_of, read_card
from aftcli.version import __version__

HEAD = "aft_state"

AnyTraining = Training | ZeroLevelTraining

OVERHEAD = 0.05  # share of the time that storing them may take


class Begun(NamedTuple):
    """A job starts, or resumes after `epoch` epochs; `why` says who chose its objective."""

    job: Job
    epoch: int
    epochs: int
    train: int
    held_out: int
    broken: list[Broken]
    settings: Recipe
    why: str = ""


class Tuned(NamedTuple):
    """A job is done.

    Attributes:
        path: of the checkpoint.
        card: what it says of itself.
        before: true where it was done already.
    """

    path: Path
    card: dict[str, Any]
    before: bool


def _identity(
    job: Job, settings: Recipe, options: Options, accelerator: Accelerator, run: Path
) -> dict[str, Any]:
    """Return all that decides the result: entries of the card."""
    contents = None  # of images with masks: these are checked against them
    if job.masks is None:
        contents = content_hash(job.data_set.pictures(), _known_in(run, accelerator))
    return {
        "start": job.f.weights_hash(),
        "output": job.f.output,
        "layer": job.f.layer_name,
        "earlier_layers": list(job.earlier.names) if job.earlier else [],
        "masks": job.made,
        "images": len(job.data_set.samples),
        "images_hash": job.data_set.fingerprint(),
        **job.data_set.record,
        "augment": options.augment,
        "precision": accelerator.mixed_precision,
        "contents": contents,
        **settings.as_dict(),
    }


def _known_in(run: Path, accelerator: Accelerator) -> Path:
    return make_folder(run / "tuned") / f".contents-{accelerator.process_index}.json"


def _trained_contents(job: Job, usable: Sequence[int], known_in: Path) -> str:
    """Return the contents that f has learned from, those of what it started from included."""
    own = job.contents
    if own is None:
        own = contents_of([job.data_set.picture(i) for i in usable], known_in)
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
                f"{self.path}: the training starts from this file and would overwrite it; give "
                "another --run"
            )

    def start_again(self) -> None:
        """Forget the state, and name the checkpoint that stays until the new one is there."""
        self.state.unlink(missing_ok=True)
        self.marker.unlink(missing_ok=True)
        if self.path.exists():
            with durable(self.marker) as temporary:
                temporary.write_text(self._replaced(), encoding="utf-8")

    def end(self) -> None:
        """Delete the files that a finished checkpoint no longer needs."""
        for left in (self.state, self.marker):
            left.unlink(missing_ok=True)
            sweep(left)

    def _replaced(self) -> str:
        """Return the marker's text: the checkpoint that is there, and the new one's identity."""
        return json.dumps({"stamp": stamp_of(self.path), "identity": self.identity})

    def _is_replaced(self) -> bool:
        """Tell if an --overwrite of the checkpoint that is there was begun."""
        try:
            return self.marker.read_text(encoding="utf-8") == self._replaced()
        except (OSError, ValueError):
            return False

    def finished(self) -> dict[str, Any] | None:
        """Return the card of the finished checkpoint; refuse one of other settings."""
        if not self.path.exists() or self._is_replaced():
            return None
        card = read_card(self.path)
        if card is None:
            raise AftError(
                f"{self.path}: is damaged, or was not written by aft; move it away, or --overwrite"
            )
        found = {key: card[key] for key in {*self.identity, *UNWRITTEN} if key in card}
        refuse_other_settings(self.path, found, self.identity)
        return card

    def save(self, training: AnyTraining) -> None:
        tensors, values = training.state()
        write_sealed(self.state, tensors, HEAD, {"values": values, "identity": self.identity})

    def restore(self, training: AnyTraining) -> None:
        """Return to the stored state, if there is one that is whole."""
        stored = read_sealed(self.state, HEAD)
        if stored:
            tensors, head = stored
            refuse_other_settings(self.path, head["identity"], self.identity)
            training.restore(State(tensors, head["values"]))


Event = Begun | Cached | Note | Step | Searching | Chosen | Epoch | Tuned


@outside_inference_mode
def fine_tune(
    jobs: Sequence[Job],
    run: str | Path,
    settings: Recipe | Callable[[Job], Recipe],
    options: Options | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[Event]:
    """Tune classifiers, one after the other, resuming where a run stopped.

    Args:
        jobs: what to tune; jobs of the same w0 and images share its outputs.
        run: where the study lives; checkpoints are `<run>/tuned/<model>-<cam>.safetensors`.
        settings: of the training; a function where they depend on the job (`in_situation`).
        options: how the run goes.
        accelerator: device, precision and processes; default one process on f's device.

    Yields:
        Events of the run.

    Raises:
        AftError: a checkpoint of other settings is there, another process works on it, an image
            can't be read, or a file can't be written.
    """
    options = options or Options()
    accelerator = accelerator or Accelerator(cpu=jobs[0].f.device.type == "cpu")
    gathering = Gathering(Path(run), options, accelerator)
    for job in jobs:
        own, choice = settings, Choice("")
        if isinstance(own, InSituation):
            own = replace(own, augment=options.augment)
            choice = own.choose(job)
        yield from _tune(job, own(job) if callable(own) else own, choice, gathering)
    if accelerator.process_index == 0:
        gathering.remove()


def _tune(job: Job, settings: Recipe, choice: Choice, gathering: Gathering) -> Iterator[Event]:
    check_settings(settings, job.cam)
    if settings.objective == ZERO_LEVEL:
        check_zero_level(job, gathering.options.augment)
    run, options, accelerator = gathering.run, gathering.options, gathering.accelerator
    files = _Files(run, job, _identity(job, settings, options, accelerator, run))
    first = accelerator.process_index == 0
    with ExitStack() as held:
        if first:
            held.enter_context(locked(files.path))
            if options.overwrite:
                files.start_again()
        accelerator.wait_for_everyone()
        yield from map(Note, job.data_set.notes)
        if choice.note:
            yield Note(f"{job.name}: {choice.note}")
        card = files.finished()
        if card is None:
            yield from _train(job, settings, choice.why, gathering, files)
        else:
            if first:
                gathering.remove_left(job)
            if card_classes(card) != job.f.classes:
                yield Note(
                    f"{files.path}: was already tuned, with other class names; "
                    "--classes FILE names them where it is used, --overwrite tunes it again"
                )
            yield Tuned(files.path, card, True)
        if first:
            files.end()


def _train(
    job: Job, settings: Recipe, why: str, gathering: Gathering, files: _Files
) -> Iterator[Event]:
    """Train a job to the end, from its stored state if there is one, and write its checkpoint."""
    accelerator = gathering.accelerator
    first = accelerator.process_index == 0
    examples = yield from gathering.training(job, settings)
    training = _training(job, examples, settings, accelerator, gathering.options)
    val = yield from gathering.validation(job)
    before = training.measure(val, val.usable) if val else None
    files.restore(training)
    # All have read the state before the first writes a new one.
    accelerator.wait_for_everyone()
    counts = len(training.train), len(training.held_out)
    done = max(len(training.history) - 1, 0)
    yield Begun(job, done, training.epochs, *counts, examples.cache.broken, settings, why)
    yield from _steps(training, files if first else None, gathering.options)
    training.use_best()
    after = training.measure(val, val.usable) if val else None
    held_out = training.measure(examples, training.held_out)
    known_in = _known_in(gathering.run, accelerator)
    card = {
        **_card(job, files.identity, training, before, after, held_out),
        "trained_contents": _trained_contents(job, examples.usable, known_in),
    }
    if first:
        made = checkpoint_of(training.classifier(job.cam), training.tuner, card)
        write_tensors(files.path, *made)
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    if first and examples.hidden:
        examples.hidden.remove()
    yield Tuned(files.path, files.finished() or card, False)


def _training(
    job: Job,
    examples: CachedExamples,
    settings: Recipe,
    accelerator: Accelerator,
    options: Options,
) -> AnyTraining:
    """Return the training that an objective asks for."""
    if settings.objective == ZERO_LEVEL:
        assert job.masks is not None and job.cam is not None
        full, fill = job.masks.full, (job.made or {}).get("fill", "mean")
        own = (accelerator, job.cam, fill, options.accelerate)
        return ZeroLevelTraining(job.f, examples, full, settings, *own)
    return Training(job.f, examples, settings, accelerator, job.cam, job.earlier)


def _steps(training: AnyTraining, files: _Files | None, options: Options) -> Iterator[Event]:
    """Run a training, storing its state as often as `options` and OVERHEAD allow."""
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


def _card(
    job: Job,
    identity: dict[str, Any],
    training: AnyTraining,
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
        **({"zero_level": training.chosen} if isinstance(training, ZeroLevelTraining) else {}),
        "data_set": str(job.data_set.root.resolve()),
        "data_kind": job.data_set.kind,
        "new_head": job.new_head,
        "situation": situation_of(job, training.settings.objective).title,
        "trained_on": len(training.train),
        "versions": {"aft": __version__, "torch": torch.__version__},
        "metrics": {
            "epoch": training.best_epoch,
            "before": plain(history[0].held_out, before),
            "after": plain(held_out if held_out.images else None, after),
            "history": [epoch.as_dict() for epoch in history],
        },
    }
