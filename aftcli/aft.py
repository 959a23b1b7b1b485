"""Activation fine-tuning (§4.2, equation 8).

w0 stays as it is, so training sees its outputs only: what is trained is w1, w2 and w', from
there to the logits and to the tuner's masks.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from aftcli.core.classifier import Classifier
from aftcli.core.tuner import Tuner
from aftcli.errors import AftError

Features = tuple[Tensor, ...]  # what w0 hands to w1: one tensor for most networks


@dataclass(frozen=True)
class AftSettings:
    """How a classifier is fine-tuned.

    Attributes:
        lam: lambda of eq. 8; None for plain cross-entropy, without a tuner.
        learning_rate: of Adam.
        epochs: at the most.
        batch: images a step.
        patience: epochs without a better held-out loss after which training stops.
        held_out: share of the training images that choose the epoch and are not trained on.
        seed: of the tuner, the order of the images and the choice of the held-out ones.
    """

    lam: float | None = 1.0
    learning_rate: float = 1e-4
    epochs: int = 10
    batch: int = 32
    patience: int = 3
    held_out: float = 0.1
    seed: int = 0


def check_settings(settings: AftSettings) -> None:
    """Check the settings before anything is computed.

    Raises:
        AftError: a value is out of range.
    """
    lam, rate, share = settings.lam or 0.0, settings.learning_rate, settings.held_out
    for fine, what in (
        (lam >= 0 and math.isfinite(lam), f"lambda must be 0 or more, got {lam:g}"),
        (rate > 0 and math.isfinite(rate), f"the learning rate must be above 0, got {rate:g}"),
        (0 <= share < 1, f"the held-out share must lie in [0, 1), got {share:g}"),
        (settings.epochs >= 1, f"the number of epochs must be 1 or more, got {settings.epochs}"),
        (settings.batch >= 1, f"the batch size must be 1 or more, got {settings.batch}"),
    ):
        if not fine:
            raise AftError(what)


class AftLoss(NamedTuple):
    """Equation 8 for a batch; each term is its mean over the images.

    Attributes:
        total: cross_entropy + lam * mask.
        cross_entropy: CE(f(x), y).
        mask: ||f_tuner(A) - M_tau*||_2^2, summed over the cells.
    """

    total: Tensor
    cross_entropy: Tensor
    mask: Tensor


def mask_distance(tuned: Tensor, mask: Tensor) -> Tensor:
    """||f_tuner(A) - M_tau*||_2^2 of each image, shape (N,) (eq. 8).

    Args:
        tuned: f_tuner(A), shape (N, h, w).
        mask: M_tau*, shape (N, h, w), in [0, 1].
    """
    return (tuned - mask).square().sum((1, 2))


def aft_loss(
    logits: Tensor, labels: Tensor, tuned: Tensor | None, mask: Tensor | None, lam: float | None
) -> AftLoss:
    """CE(f(x), y) + lambda ||f_tuner(A) - M_tau*||_2^2 (eq. 8), mean over the batch.

    Args:
        logits: f(x), shape (N, C).
        labels: y, shape (N,).
        tuned: f_tuner(A), shape (N, h, w); None without a tuner.
        mask: M_tau*, shape (N, h, w), in [0, 1]; None without a tuner.
        lam: lambda; None for cross-entropy alone.
    """
    cross_entropy = F.cross_entropy(logits.float() if logits.itemsize < 4 else logits, labels)
    if lam is None or tuned is None or mask is None:
        return AftLoss(cross_entropy, cross_entropy, torch.zeros_like(cross_entropy))
    tuned = tuned.float() if tuned.itemsize < 4 else tuned
    distance = mask_distance(tuned, mask.to(tuned)).mean()
    return AftLoss(cross_entropy + lam * distance, cross_entropy, distance)


class Batch(NamedTuple):
    """Training pairs: what w0 makes of the images, labels, masks (None without masks)."""

    features: Features
    labels: Tensor
    mask: Tensor | None


class Examples(Protocol):
    """The training data, as w0 hands it on.

    Attributes:
        labels: of all images, shape (N,).
    """

    labels: Tensor

    @property
    def names(self) -> Sequence[str]:
        """Of all images."""

    @property
    def usable(self) -> Sequence[int]:
        """Indices of the images that could be read."""

    def batches(self, wanted: Sequence[Sequence[int]], epoch: int | None) -> Iterator[Batch]:
        """The wanted batches, in their order; epoch None asks for images as they are."""


class Tail(nn.Module):
    """What is trained: w1, w2 and w'.

    Batch norms keep their statistics and dropout is off: what is tuned is the very function
    that is explained, and a batch's images do not depend on each other.
    """

    def __init__(self, f: Classifier, tuner: Tuner | None) -> None:
        super().__init__()
        # Together: parameters that w1 and w2 share stay shared.
        self.layer, self.head = copy.deepcopy((f.layer, f.head))
        self.tuner = tuner
        self.eval()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, shape (N, C), and f_tuner(A), shape (N, h, w)."""
        activation = self.layer(features[0] if len(features) == 1 else features)
        return self.head(activation), self.tuner(activation) if self.tuner else None


class Measured(NamedTuple):
    """Means over some images.

    Attributes:
        total: eq. 8.
        cross_entropy: its first term.
        mask: its second term without lambda; 0 without a tuner.
        accuracy: share of images whose largest logit is the label's.
        images: how many.
    """

    total: float
    cross_entropy: float
    mask: float
    accuracy: float
    images: int

    @classmethod
    def of(cls, sums: Tensor) -> Measured:
        """Means of sums over images, the last of which is their number."""
        total, cross_entropy, mask, accuracy, count = sums.tolist()
        n = max(count, 1)
        return cls(total / n, cross_entropy / n, mask / n, accuracy / n, int(count))


@dataclass(frozen=True)
class Epoch:
    """How an epoch went; epoch 0 is before training.

    Attributes:
        number: of the epoch.
        train: means over its batches, each before its step; None for epoch 0.
        held_out: of the model after it, on held-out training images; None where there are none.
    """

    number: int
    train: Measured | None
    held_out: Measured | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "number": self.number,
            "train": self.train._asdict() if self.train else None,
            "held_out": self.held_out._asdict() if self.held_out else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Epoch:
        """The inverse of `as_dict`."""
        train, held_out = (
            Measured(**values[key]) if values[key] else None for key in ("train", "held_out")
        )
        return cls(values["number"], train, held_out)


class Step(NamedTuple):
    """Where training is: `step` of `steps` of an epoch done, the epoch's means so far."""

    epoch: int
    step: int
    steps: int
    train: Measured


class State(NamedTuple):
    """All that decides how training goes on."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def choose_held_out(
    names: Sequence[str], labels: Sequence[int], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide training images into those trained on and those that choose the epoch.

    Every n-th image in the order of the classes, within a class in an order that depends on
    the name and the seed only: the held-out images are spread over the classes.

    Args:
        names: of the images.
        labels: of the images.
        share: to hold out, in [0, 1).
        seed: another one gives others.

    Returns:
        Positions of those to train on and of those held out, each ascending.
    """

    def rank(i: int) -> tuple[int, bytes]:
        name = f"{seed}\0{names[i]}".encode("utf-8", "surrogateescape")
        return labels[i], hashlib.sha256(name).digest()

    order = sorted(range(len(names)), key=rank)
    count = int(len(order) * share)
    picked = {order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)}
    return [i for i in range(len(names)) if i not in picked], sorted(picked)


def shuffled(indices: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The order of an epoch; it depends on seed and epoch only, so a run can go on anywhere."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]


class Training:
    """Fine-tuning of a classifier's w1 and w2 (§4.2); `run` goes on where `state` was taken.

    Args:
        f: the classifier; it is not changed.
        examples: training data behind w0.
        settings: of the training.
        accelerator: device, precision and processes; default one process on f's device.

    Raises:
        AftError: settings are out of range, no image can be read, or w0 shares weights with w1
            or w2.

    Attributes:
        history: the epochs done, epoch 0 first.
    """

    def __init__(
        self,
        f: Classifier,
        examples: Examples,
        settings: AftSettings,
        accelerator: Accelerator | None = None,
    ) -> None:
        check_settings(settings)
        frozen = {id(p) for p in f.stem.parameters()}
        if any(id(p) in frozen for part in (f.layer, f.head) for p in part.parameters()):
            raise AftError(
                f"{f.layer_name}: layers before it use the same weights as layers from it on, so "
                "these can't be trained alone; choose another --layer"
            )
        usable = list(examples.usable)
        if not usable:
            raise AftError("there is no readable image to train on")
        self.f, self.examples, self.settings = f, examples, settings
        names = [examples.names[i] for i in usable]
        labels = [int(examples.labels[i]) for i in usable]
        train, held_out = choose_held_out(names, labels, settings.held_out, settings.seed)
        self.train, self.held_out = [usable[i] for i in train], [usable[i] for i in held_out]
        tuner = None
        if settings.lam is not None:
            tuner = Tuner(f.activation_shape[0], seed=settings.seed)
            tuner = tuner.to(next(f.parameters()))
        self.accelerator = accelerator or Accelerator(cpu=f.device.type == "cpu")
        self.tail = Tail(f, tuner).to(self.accelerator.device)
        fused = self.accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(self.tail.parameters(), lr=settings.learning_rate, fused=fused)
        self.model, self.optimizer = self.accelerator.prepare(self.tail, optimizer)
        self.best = self._weights()
        self.best_epoch, self.epoch, self.step = 0, 1, 0
        self.sums = self._zeros()
        self.history: list[Epoch] = []

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.tail.state_dict().items()}

    def state(self) -> State:
        """All that decides how training goes on; equal on all processes."""
        tensors = {f"tail.{name}": value for name, value in self.tail.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in kept.items()}
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
        """Go back to a state that `state` gave."""
        tensors, values = state

        def part(prefix: str) -> dict[str, Tensor]:
            found = ((k.partition(".")[2], v) for k, v in tensors.items() if k.startswith(prefix))
            return {k: v.to(self.accelerator.device) for k, v in found}

        self.tail.load_state_dict(part("tail."))
        self.best = part("best.")
        kept: dict[int, dict[str, Tensor]] = {}
        for name, value in part("adam.").items():
            index, _, what = name.partition(".")
            kept.setdefault(int(index), {})[what] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})
        if self.accelerator.scaler and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.epoch, self.step = values["epoch"], values["step"]
        self.sums = self._zeros().new_tensor(values["sums"])
        self.best_epoch = values["best_epoch"]
        self.history = [Epoch.from_dict(e) for e in values["history"]]

    @property
    def done(self) -> bool:
        """Whether all epochs are done, or none of the last ones was better."""
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
            train, self.sums = Measured.of(self.sums), self._zeros()
            epoch = Epoch(self.epoch, train, self._held_out())
            self.history.append(epoch)
            if self._is_best():
                self.best, self.best_epoch = self._weights(), self.epoch
            self.epoch, self.step = self.epoch + 1, 0
            yield epoch

    def _run_epoch(self) -> Iterator[Step]:
        order = shuffled(self.train, self.settings.seed, self.epoch)
        size, rank, count = self.settings.batch, *self._place()
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        # A process without a share takes one image along, with weight 0.
        shares = [batch[rank::count] or batch[:1] for batch in batches]
        for batch in self.examples.batches(shares[self.step :], self.epoch):
            whole = len(batches[self.step])
            own = len(batches[self.step][rank::count])
            self._step(batch, own, whole, count)
            self.step += 1
            yield Step(self.epoch, self.step, len(batches), Measured.of(self.sums))

    def _place(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def _step(self, batch: Batch, own: int, whole: int, processes: int) -> None:
        """One step of Adam on eq. 8 of a batch, of which this process has `own` of `whole`."""
        logits, tuned = self.model(*batch.features)
        loss = aft_loss(logits, batch.labels, tuned, batch.mask, self.settings.lam)
        if not loss.total.isfinite():
            raise AftError(
                f"the loss is no longer finite in epoch {self.epoch}; lower the learning rate "
                f"(--lr, now {self.settings.learning_rate:g}) or lambda"
            )
        self.optimizer.zero_grad()
        # Processes' gradients are averaged: weighted so, that is the mean over the whole batch.
        weight = own * processes / whole
        self.accelerator.backward(loss.total if weight == 1 else loss.total * weight)
        self.optimizer.step()
        self.sums += self._reduced(self._sums(loss, logits, batch.labels, own))

    def _zeros(self) -> Tensor:
        # Apple's devices have no float64.
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(len(Measured._fields), dtype=dtype, device=device)

    def _sums(self, loss: AftLoss, logits: Tensor, labels: Tensor, count: int) -> Tensor:
        """What a batch adds to the sums that `Measured.of` divides."""
        right = (logits.argmax(1) == labels).float().mean()
        means = torch.stack([value.detach().to(self._zeros()) for value in (*loss, right)])
        return torch.cat([means, means.new_ones(1)]) * count

    def _reduced(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.reduce(sums, "sum")  # type: ignore[no-any-return]

    def _held_out(self) -> Measured | None:
        return self.measure(self.examples, self.held_out) if self.held_out else None

    def _is_best(self) -> bool:
        """Whether the last epoch has the lowest held-out loss so far; without images, it has."""
        *before, last = self.history[1:]
        if last.held_out is None:
            return True
        return all(e.held_out and last.held_out.total < e.held_out.total for e in before)

    @torch.no_grad()
    def measure(self, examples: Examples, indices: Sequence[int]) -> Measured:
        """Means over images, by the weights as they are now; all processes share the work."""
        size, rank, count = self.settings.batch, *self._place()
        batches = [indices[i : i + size] for i in range(0, len(indices), size)][rank::count]
        sums = self._zeros()
        for batch in examples.batches(batches, None):
            logits, tuned = self.tail(*batch.features)
            loss = aft_loss(logits, batch.labels, tuned, batch.mask, self.settings.lam)
            sums += self._sums(loss, logits, batch.labels, len(batch.labels))
        return Measured.of(self._reduced(sums))

    def use_best(self) -> None:
        """Take the weights of the best epoch."""
        self.tail.load_state_dict(self.best)

    def classifier(self, cam: str | None = None) -> Classifier:
        """The classifier with the weights as they are now; w0 is the same object as before.

        Args:
            cam: the method whose masks it was tuned with.
        """
        layer, head = copy.deepcopy((self.tail.layer, self.tail.head))
        f = Classifier(
            self.f.stem,
            layer.to(self.f.device),
            head.to(self.f.device),
            name=self.f.name,
            layer_name=self.f.layer_name,
            preprocessing=self.f.preprocessing,
            classes=self.f.classes,
            activation_shape=self.f.activation_shape,
            cam=cam,
        )
        return f.eval().requires_grad_(False)
