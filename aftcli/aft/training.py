"""The training of w1, w2 and w' (§4.2), from w0's outputs to the tuned classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from aftcli.aft.loss import (
    OPTIMIZERS,
    AftLoss,
    Batch,
    Outputs,
    Recipe,
    aft_loss,
    check_settings,
)
from aftcli.aft.tail import Earlier, Tail
from aftcli.core.classifier import Classifier
from aftcli.core.zero_level import check_plain
from aftcli.data.parts import choose_held_out
from aftcli.errors import AftError
from aftcli.models.checkpoint import Tuner


class Examples(Protocol):
    """Training data behind w0.

    Attributes:
        labels: of all images, shape (N,).
    """

    labels: Tensor

    @property
    def names(self) -> Sequence[str]:
        """The names of all images."""

    @property
    def usable(self) -> Sequence[int]:
        """Indices of the images that could be read."""

    def batches(self, wanted: Sequence[Sequence[int]], epoch: int | None) -> Iterator[Batch]:
        """Yield the wanted batches in order; epoch None asks for images without augmentation."""


class Measured(NamedTuple):
    """Means over some images.

    Attributes:
        total: what is minimised.
        cross_entropy: of the labels.
        mask: distance from the masks, without lambda; 0 without masks.
        accuracy: share of images whose largest logit is the label's.
        images: how many.
        consistency: cross-entropy on x_hat_tau*, without its weight; 0 without.
    """

    total: float
    cross_entropy: float
    mask: float
    accuracy: float
    images: int
    consistency: float = 0.0

    @classmethod
    def of(cls, sums: Tensor) -> Measured:
        """Return means of sums over images; the last sum is their number."""
        *means, count = sums.tolist()
        n = max(count, 1)
        total, cross_entropy, mask, consistency, accuracy = (mean / n for mean in means)
        return cls(total, cross_entropy, mask, accuracy, int(count), consistency)


@dataclass(frozen=True)
class Epoch:
    """The losses of an epoch; epoch 0 is before training.

    Attributes:
        number: of the epoch.
        train: means over its batches, each before its step; None for epoch 0.
        held_out: of the model after it, on held-out training images; None where there are none.
    """

    number: int
    train: Measured | None
    held_out: Measured | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "number": self.number,
            "train": self.train._asdict() if self.train else None,
            "held_out": self.held_out._asdict() if self.held_out else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Epoch:
        """Return the epoch of plain values, the inverse of `as_dict`."""
        train, held_out = (
            Measured(**values[key]) if values[key] else None for key in ("train", "held_out")
        )
        return cls(values["number"], train, held_out)


class Step(NamedTuple):
    """Progress: `step` of `steps` of an epoch are done, with the epoch's means so far."""

    epoch: int
    step: int
    steps: int
    train: Measured


class State(NamedTuple):
    """A training's resumable state: equal states train on to equal weights."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def part(self, prefix: str, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors under a prefix, without it."""
        start = f"{prefix}."
        found = ((k.removeprefix(start), v) for k, v in self.tensors.items() if k.startswith(start))
        return {name: value.to(device) for name, value in found}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def _tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state by the parameter's number and the name."""
    states = optimizer.state_dict()["state"].items()
    return {f"{i}.{k}": v for i, kept in states for k, v in kept.items() if v is not None}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that `_tensors_of` returned."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, what = name.partition(".")
        states.setdefault(int(number), {})[what] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _sums(loss: AftLoss, logits: Tensor, labels: Tensor, count: int, like: Tensor) -> Tensor:
    """Return a batch's loss sums and image count, for `Measured.of`."""
    right = (logits.argmax(1) == labels).float().mean()
    means = torch.stack([value.detach().to(like) for value in (*loss, right)])
    return torch.cat([means, means.new_ones(1)]) * count


def _check_w0_alone(f: Classifier, earlier: Earlier | None) -> None:
    """Check that w0, which is frozen, shares no weights with what is trained."""
    frozen = {id(p) for p in (earlier or f).stem.parameters()}
    trained = (*(earlier.parts if earlier else ()), f.layer, f.head)
    if any(id(p) in frozen for part in trained for p in part.parameters()):
        raise AftError(
            f"{f.layer_name}: shares weights with layers before it, so it can't be trained alone; "
            "choose another --layer"
        )


def shuffled(indices: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch; seed and epoch decide it, so a run can resume anywhere."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]


class Training:
    """Fine-tuning of a classifier's w1 and w2 (§4.2); `restore` and `run` resume at a `state`.

    Args:
        f: the classifier; it is not changed.
        examples: training data behind w0.
        settings: of the training.
        accelerator: device, precision and processes; default one process on f's device.
        cam: the method that made the masks; None without masks.
        earlier: layers before l to tune with it; the examples are then of its stem.

    Raises:
        AftError: settings are out of range, no image can be read, w0 shares weights with what
            is trained, or the method's map can't be trained.

    Attributes:
        history: the epochs done, epoch 0 first.
    """

    def __init__(
        self,
        f: Classifier,
        examples: Examples,
        settings: Recipe,
        accelerator: Accelerator | None = None,
        cam: str | None = None,
        earlier: Earlier | None = None,
    ) -> None:
        cam = None if settings.lam is None else cam
        check_settings(settings, cam)
        check_plain(f)
        _check_w0_alone(f, earlier)
        usable = list(examples.usable)
        if not usable:
            raise AftError("there is no readable image to train on")
        self.f, self.examples, self.settings, self.earlier = f, examples, settings, earlier
        names = [examples.names[i] for i in usable]
        labels = [int(examples.labels[i]) for i in usable]
        train, held_out = choose_held_out(names, labels, settings.held_out, settings.seed)
        self.train, self.held_out = [usable[i] for i in train], [usable[i] for i in held_out]
        self.accelerator = accelerator or Accelerator(cpu=f.device.type == "cpu")
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        device = self.accelerator.device
        self.tail = Tail(f, settings, cam, earlier).to(device)
        optimizer = OPTIMIZERS[settings.optimizer](
            [p for p in self.tail.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            fused=device.type in ("cpu", "cuda"),
        )
        self.model, self.optimizer = self.accelerator.prepare(self.tail, optimizer)
        self.best = self.tail.weights()
        self.best_epoch, self.epoch, self.step = 0, 1, 0
        # Apple's devices have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(Measured._fields), dtype=dtype, device=device)
        self.history: list[Epoch] = []

    @cached_property
    def start(self) -> Tail:
        """w1 and w2 before training: the teacher of distillation, and the start of a blend."""
        start = Tail(self.f, self.settings, None, self.earlier)
        return start.to(self.accelerator.device).requires_grad_(False)

    @property
    def epochs(self) -> int:
        """The number of epochs at the most."""
        return self.settings.epochs

    @property
    def tuner(self) -> Tuner | None:
        """The tuner with the current weights; None where the objective has none."""
        return self.tail.tuner if isinstance(self.tail.tuner, Tuner) else None

    def state(self) -> State:
        """Return all that decides how training continues; equal on all processes."""
        tensors = _under("tail", self.tail.state_dict()) | _under("best", self.best)
        tensors |= _under("optimizer", _tensors_of(self.optimizer))
        scaler = self.accelerator.scaler
        values = {
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums.tolist(),
            "best_epoch": self.best_epoch,
            "history": [epoch.as_dict() for epoch in self.history],
            "scaler": scaler.state_dict() if scaler else None,
        }
        return State(tensors, values)

    def restore(self, state: State) -> None:
        """Return to a state that `state` gave."""
        values, device = state.values, self.accelerator.device
        self.tail.load_state_dict(state.part("tail", device))
        self.best = state.part("best", device)
        _load_optimizer(self.optimizer, state.part("optimizer", device))
        if self.accelerator.scaler and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.epoch, self.step = values["epoch"], values["step"]
        self.sums = self.sums.new_tensor(values["sums"])
        self.best_epoch = values["best_epoch"]
        self.history = [Epoch.from_dict(e) for e in values["history"]]

    @property
    def done(self) -> bool:
        """True if all epochs are done, or none of the last ones was better."""
        return self.epoch > self.settings.epochs or (
            bool(self.held_out) and self.epoch - 1 - self.best_epoch >= self.settings.patience > 0
        )

    def run(self) -> Iterator[Step | Epoch]:
        """Train to the end; between what is yielded, `state` may be taken."""
        if not self.history:
            self.history.append(Epoch(0, None, self._held_out()))
            yield self.history[0]
        while not self.done:
            yield from self._run_epoch()
            train, self.sums = Measured.of(self.sums), torch.zeros_like(self.sums)
            epoch = Epoch(self.epoch, train, self._held_out())
            self.history.append(epoch)
            if self._is_best():
                self.best, self.best_epoch = self.tail.weights(), self.epoch
            self.epoch, self.step = self.epoch + 1, 0
            yield epoch

    def _run_epoch(self) -> Iterator[Step]:
        order = shuffled(self.train, self.settings.seed, self.epoch)
        size = self.settings.batch
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        # A process without a share takes one image along, with weight 0.
        shares = [batch[self.rank :: self.processes] or batch[:1] for batch in batches]
        for batch in self.examples.batches(shares[self.step :], self.epoch):
            whole = batches[self.step]
            self._step(batch, len(whole[self.rank :: self.processes]), len(whole))
            self.step += 1
            yield Step(self.epoch, self.step, len(batches), Measured.of(self.sums))

    def _step(self, batch: Batch, own: int, whole: int) -> None:
        """Take one step on the loss of a batch, of which this process has `own` of `whole`."""
        out = self._outputs(self.model, batch)
        loss = aft_loss(out, batch, self.settings, self.f.output)
        if not loss.total.isfinite():
            raise AftError(
                f"the loss is no longer finite in epoch {self.epoch}; lower the learning rate "
                f"(--lr, now {self.settings.learning_rate:g}) or lambda"
            )
        self.optimizer.zero_grad()
        # Processes' gradients are averaged: weighted so, that is the mean over the whole batch.
        weight = own * self.processes / whole
        self.accelerator.backward(loss.total if weight == 1 else loss.total * weight)
        self.optimizer.step()
        self.sums += self._reduced(_sums(loss, out.logits, batch.labels, own, self.sums))

    def _outputs(self, network: nn.Module, batch: Batch) -> Outputs:
        """Return the outputs of a tail, or its wrapper, with the teacher's where it is needed."""
        out: Outputs = network(batch.features, batch.class_index, batch.masked)
        if self.settings.classification == "labels":
            return out
        with torch.no_grad():
            return out._replace(teacher=self.start(batch.features).logits)

    def _reduced(self, sums: Tensor) -> Tensor:
        if self.processes == 1:
            return sums
        return self.accelerator.reduce(sums, "sum")  # type: ignore[no-any-return]

    def _held_out(self) -> Measured | None:
        return self.measure(self.examples, self.held_out) if self.held_out else None

    def _is_best(self) -> bool:
        """Tell if the last epoch has the lowest held-out loss so far; without images, it has."""
        *before, last = self.history[1:]
        if last.held_out is None:
            return True
        return all(e.held_out and last.held_out.total < e.held_out.total for e in before)

    @torch.no_grad()
    def measure(self, examples: Examples, indices: Sequence[int]) -> Measured:
        """Return means over images, by the current weights; all processes share the work."""
        size = self.settings.batch
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        sums = torch.zeros_like(self.sums)
        for batch in examples.batches(batches[self.rank :: self.processes], None):
            out = self._outputs(self.tail, batch)
            loss = aft_loss(out, batch, self.settings, self.f.output)
            sums += _sums(loss, out.logits, batch.labels, len(batch.labels), sums)
        return Measured.of(self._reduced(sums))

    def use_best(self) -> None:
        """Take the weights of the best epoch, blended with those before training."""
        self.tail.load_state_dict(self.best)
        if self.settings.blend < 1:
            self.tail.blend(self.start, self.settings.blend)

    def classifier(self, cam: str | None = None) -> Classifier:
        """Return the classifier with the current weights; w0 is the same object as before.

        Args:
            cam: the method whose masks it was tuned with.
        """
        return self.tail.classifier(self.f, cam)
