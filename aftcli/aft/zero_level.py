"""The zero level of a network's maps, learned from masks (docs/zero-level.md).

It is no term of eq. 8: w0, w1 and w2 stay as they are, and so does every probability. What is
learned is s(x) = v . mean(A) - t, which all logits share, and which moves the signed map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from aftcli.aft.jobs import Job
from aftcli.aft.loss import Batch, Recipe, check_settings
from aftcli.aft.tail import with_parts
from aftcli.aft.training import (
    Epoch,
    Examples,
    Measured,
    State,
    Step,
    _load_optimizer,
    _tensors_of,
    _under,
    choose_held_out,
    shuffled,
)
from aftcli.core.classifier import Classifier
from aftcli.core.networks import copied
from aftcli.core.zero_level import (
    check_plain,
    fold,
    give_zero_level,
    moved_by,
    signed_map,
    support,
    without_constant,
)
from aftcli.errors import AftError

SHARPNESS = 20.0  # of the sigmoid that stands for the support, for a map with maximum 1

DECAY = 0.03  # L2 on v, which has the unit of a class's weights; t is free

HALVINGS = 60  # of the interval where t lies: to the last bit


def check_job(job: Job, augment: bool) -> None:
    """Check that a zero level can be learned from a job's masks.

    Raises:
        AftError: it can't.
    """
    check_plain(job.f)
    if (job.made or {}).get("masking") == "soft":
        raise AftError(
            f"{job.name}: a zero level is learned from binary masks, these were searched with soft "
            "masking, which rewards high scores and not the support (on ImageNet the average "
            "increase fell from .337 to .270); make masks with aft gen-masks --masking binary"
        )
    if job.earlier:
        raise AftError("--objective zero-level is of one layer, the masks'; give one --layer")
    if augment:
        raise AftError("--objective zero-level trains on maps of whole images; leave --augment out")


def pieces_of(mask: Tensor, cells: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Average masks over the pieces of `support`.

    Args:
        mask: shape (N, H, W).
        cells: (h, w).

    Returns:
        Means, shape (N, h + 1, w + 1), 0 where a piece has no pixel, and the pieces' areas as
        shares of the input, shape (h + 1, w + 1).
    """
    rows, columns = (
        _membership(size, count).to(mask.device)
        for size, count in zip(mask.shape[1:], cells, strict=True)
    )
    pixels = rows.sum(1)[:, None] * columns.sum(1)
    kept = rows @ mask.to(rows) @ columns.T / pixels.clamp(min=1)
    return kept, pixels / pixels.sum()


def _membership(size: int, cells: int) -> Tensor:
    """Return which piece each pixel of a side lies in, shape (cells + 1, size), 0 or 1."""
    # Pixel p's centre is at (p + 1/2) cells / size - 1/2, counted in centres of cells.
    piece = ((2 * torch.arange(size) + 1) * cells + size) // (2 * size)
    return F.one_hot(piece, cells + 1).T.float()


class Learned(NamedTuple):
    """What a zero level is learned from, of all training images that could be read.

    Attributes:
        signed: S, shape (N, h, w), in the unit of `signed_map`.
        maximum: of each S, shape (N,); images without a cell above 0 teach nothing.
        kept: mean of M_tau* over each piece, shape (N, h + 1, w + 1).
        area: of each piece, shape (h + 1, w + 1), summing to 1.
    """

    signed: Tensor
    maximum: Tensor
    kept: Tensor
    area: Tensor

    def rows(self, rows: Tensor) -> Learned:
        """Take some images."""
        return Learned(self.signed[rows], self.maximum[rows], self.kept[rows], self.area)


def zero_level_loss(signed: Tensor, of: Learned) -> Tensor:
    """Compare the support of maps with masks: cross-entropy, mean over the input, shape (N,).

    sum over pieces of area * BCE(sigmoid(20 L / max S), mean of M_tau*), where S is the map
    before training and L the support of the map now.

    Args:
        signed: the map now, shape (N, h, w).
        of: the same images' masks, and their maps before.
    """
    some = of.maximum > 0
    maximum = torch.where(some, of.maximum, 1)[:, None, None]
    logits = SHARPNESS * support(signed) / maximum
    losses = F.binary_cross_entropy_with_logits(logits, of.kept, reduction="none")
    return torch.where(some, (of.area * losses).sum((1, 2)), 0)


def best_zero(of: Learned) -> float:
    """Find the t with the lowest loss of S - t over images.

    The loss is convex in t, since L falls by t itself: its slope is halved down to its zero.
    """
    some = of.maximum > 0
    if not some.any():
        return 0.0
    level = support(of.signed[some]).double().cpu()
    maximum = of.maximum[some].double().cpu()[:, None, None]
    kept, area = of.kept[some].double().cpu(), of.area.double().cpu()
    low, high = -float(maximum.max()), float(maximum.max())
    for _ in range(HALVINGS):
        t = (low + high) / 2
        excess = torch.sigmoid(SHARPNESS * (level - t) / maximum) - kept
        if (area * excess / maximum).sum() > 0:
            low = t
        else:
            high = t
    return (low + high) / 2


class ZeroLevelTraining:
    """Learning of a zero level; `restore` and `run` resume at a `state`, as `Training`'s.

    Gauge t, one number, is found exactly. Gauge v trains v and t by Adam, whose rate falls to 0
    over the second half. Several processes all do the same.

    Args:
        f: the classifier; it is not changed.
        examples: training data behind w0.
        full: M_tau* of one image, shape (H, W), by index.
        settings: gauge, learning rate, epochs, batch, held-out share and seed.
        accelerator: where it runs; default f's device.
        cam: the method that made the masks.

    Raises:
        AftError: settings are out of range, no image can be read, the method's map has no sign,
            or f has a zero level.

    Attributes:
        history: the epochs done, epoch 0 first.
        train, held_out: indices of the images.
        v, t: what is learned; t as a share of the mean maximum of the training maps.
    """

    tuner = None

    def __init__(
        self,
        f: Classifier,
        examples: Examples,
        full: Callable[[int], Tensor],
        settings: Recipe,
        accelerator: Accelerator | None = None,
        cam: str = "gradcam",
    ) -> None:
        check_settings(settings, cam)
        check_plain(f)
        usable = list(examples.usable)
        if not usable:
            raise AftError("there is no readable image to train on")
        self.f, self.examples, self.settings, self.cam = f, examples, settings, cam
        names = [examples.names[i] for i in usable]
        labels = [int(examples.labels[i]) for i in usable]
        train, held_out = choose_held_out(names, labels, settings.held_out, settings.seed)
        self.train, self.held_out = [usable[i] for i in train], [usable[i] for i in held_out]
        self.device = accelerator.device if accelerator else f.device
        self.place = {index: row for row, index in enumerate(usable)}
        self.learned = self._gather(usable, full)
        maximum = self.learned.maximum[self._rows(self.train)]
        self.unit = max(float(maximum.mean()), 0.0) or 1.0
        self.v = maximum.new_zeros(f.activation_shape[0]).requires_grad_()
        self.t = maximum.new_zeros(()).requires_grad_()
        groups: list[dict[str, Any]] = [
            {"params": [self.v], "weight_decay": DECAY},
            {"params": [self.t]},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=settings.learning_rate)
        self.epoch, self.step = 1, 0
        self.sums = torch.zeros(len(Measured._fields), dtype=torch.float64)
        self.history: list[Epoch] = []

    @property
    def best_epoch(self) -> int:
        """The epoch whose result is taken: the last."""
        return self.epoch - 1

    @property
    def epochs(self) -> int:
        """The number of epochs: gauge t needs one."""
        return self.settings.epochs if self.settings.gauge == "v" else 1

    def _gather(self, usable: Sequence[int], full: Callable[[int], Tensor]) -> Learned:
        size = self.settings.batch
        batches = [usable[i : i + size] for i in range(0, len(usable), size)]
        signed, kept, area = [], [], torch.empty(0)
        for indices, batch in zip(batches, self.examples.batches(batches, None), strict=True):
            assert batch.class_index is not None
            activation = self._activation(batch)
            found = signed_map(self.f, activation, batch.class_index, self.cam).detach()
            masks = torch.stack([full(i) for i in indices])
            means, area = pieces_of(masks, found.shape[1:])
            signed.append(found)
            kept.append(means.to(found))
        whole = torch.cat(signed)
        return Learned(whole, whole.amax((1, 2)), torch.cat(kept), area.to(whole))

    @torch.no_grad()
    def _activation(self, batch: Batch, f: Classifier | None = None) -> Tensor:
        x = batch.features[0] if len(batch.features) == 1 else batch.features
        return (f or self.f).layer(x)  # type: ignore[no-any-return]

    def _rows(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor([self.place[i] for i in indices], dtype=torch.long)

    def _loss(self, activation: Tensor, of: Learned) -> Tensor:
        signed = of.signed - self.t * self.unit
        if self.settings.gauge == "v":
            signed = signed + moved_by(self.v, activation, self.cam)
        return zero_level_loss(signed, of)

    def state(self) -> State:
        """Return all that decides how training continues."""
        tensors = {"v": self.v.detach().clone(), "t": self.t.detach().clone()}
        tensors |= _under("optimizer", _tensors_of(self.optimizer))
        values = {
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums.tolist(),
            "history": [epoch.as_dict() for epoch in self.history],
        }
        return State(tensors, values)

    def restore(self, state: State) -> None:
        """Return to a state that `state` gave."""
        with torch.no_grad():
            self.v.copy_(state.tensors["v"])
            self.t.copy_(state.tensors["t"])
        _load_optimizer(self.optimizer, state.part("optimizer", self.device))
        self.epoch, self.step = state.values["epoch"], state.values["step"]
        self.sums = self.sums.new_tensor(state.values["sums"])
        self.history = [Epoch.from_dict(e) for e in state.values["history"]]

    def run(self) -> Iterator[Step | Epoch]:
        """Train to the end; between what is yielded, `state` may be taken."""
        if not self.history:
            self.history.append(Epoch(0, None, self._held_out()))
            yield self.history[0]
        while self.epoch <= self.epochs:
            if self.settings.gauge == "v":
                yield from self._run_epoch()
                train, self.sums = Measured.of(self.sums), torch.zeros_like(self.sums)
            else:
                found = best_zero(self.learned.rows(self._rows(self.train)))
                with torch.no_grad():
                    self.t.fill_(found / self.unit)
                train = self.measure(self.examples, self.train)
            self.history.append(Epoch(self.epoch, train, self._held_out()))
            self.epoch, self.step = self.epoch + 1, 0
            yield self.history[-1]

    def _run_epoch(self) -> Iterator[Step]:
        order = shuffled(self.train, self.settings.seed, self.epoch)
        size = self.settings.batch
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for batch in self.examples.batches(batches[self.step :], self.epoch):
            rows = self._rows(batches[self.step])
            done = ((self.epoch - 1) * len(batches) + self.step) / (self.epochs * len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * min(1.0, 2 * (1 - done))
            activation = self._activation(batch)
            loss = self._loss(activation, self.learned.rows(rows))
            if not loss.isfinite().all():
                raise AftError(
                    f"the loss is no longer finite in epoch {self.epoch}; lower the learning rate "
                    f"(--lr, now {self.settings.learning_rate:g})"
                )
            self.optimizer.zero_grad()
            loss.mean().backward()
            self.optimizer.step()
            with torch.no_grad():
                logits = self.f.head(activation)
            self.sums += _sums(loss, logits, batch.labels)
            self.step += 1
            yield Step(self.epoch, self.step, len(batches), Measured.of(self.sums))

    def _held_out(self) -> Measured | None:
        return self.measure(self.examples, self.held_out) if self.held_out else None

    @torch.no_grad()
    def measure(self, examples: Examples, indices: Sequence[int]) -> Measured:
        """Return means over images, by the network with its zero level; 0 for a lack of masks."""
        size = self.settings.batch
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        sums, g = torch.zeros_like(self.sums), self.classifier()
        for some, batch in zip(batches, examples.batches(batches, None), strict=True):
            activation, loss = self._activation(batch, g), torch.zeros(len(some))
            if batch.class_index is not None:
                of = self.learned.rows(self._rows(some))
                loss = self._loss(without_constant(g, activation), of)
            sums += _sums(loss, g.head(activation), batch.labels)
        return Measured.of(sums)

    def use_best(self) -> None:
        """Take the last epoch's result, which is there."""

    @torch.no_grad()
    def classifier(self, cam: str | None = None) -> Classifier:
        """Return f with the zero level; v is folded into the weights of a head that has the place.

        Args:
            cam: the method whose masks it was learned from.
        """
        layer, head = copied((self.f.layer, self.f.head))
        g = with_parts(self.f, self.f.stem, layer, head, self.f.activation_shape)
        v = self.v.detach() if self.settings.gauge == "v" else None
        if v is not None and fold(g, v):
            v = None
        give_zero_level(g, self.t.detach() * self.unit, v)
        g.cam = cam
        return g.eval().requires_grad_(False)


def _sums(losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return a batch's sums and image count, for `Measured.of`."""
    loss = losses.detach().double().sum().cpu()
    entropy = F.cross_entropy(logits.detach().double(), labels, reduction="sum").cpu()
    right = (logits.argmax(1) == labels).double().sum().cpu()
    nothing = torch.zeros_like(loss)
    return torch.stack([loss, entropy, loss, nothing, right, nothing + len(labels)])
