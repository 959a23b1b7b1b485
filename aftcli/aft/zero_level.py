"""The zero level of a network's maps, learned from masks (docs/method/zero-level.md).

It is no term of eq. 8: w0, w1 and w2 stay as they are, and so does every probability. What is
learned is s(x) = v . mean(A) - t, which all logits share, and which moves the signed map. Masks
teach v. The network itself is asked for t, as TFT asks for tau, but once for all images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

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
    shuffled,
)
from aftcli.core.classifier import Classifier
from aftcli.core.outputs import class_score
from aftcli.core.zero_level import (
    Learned,
    check_learnable,
    fold,
    give_zero_level,
    mean_maximum,
    moved_by,
    pieces_of,
    signed_map,
    without_constant,
    zero_level_loss,
)
from aftcli.cutting.networks import copied
from aftcli.data.parts import choose_held_out, spread
from aftcli.engine.accelerate import Accelerate, as_it_is
from aftcli.errors import AftError
from aftcli.tft.scoring import level_probabilities
from aftcli.tft.threshold import Tried, best_of, tried

DECAY = 0.03  # L2 on v, which has the unit of a class's weights; t is free

# Each t that is tried, as a share of the mean maximum of the maps; the first mutes nothing more.
SHARES = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3)

ASKED = 500  # training images that choose t, at the most

BLOCK = 16  # of them that are masked together


class Chosen(NamedTuple):
    """The zero level that training images chose.

    Attributes:
        t: in the unit of `signed_map`.
        images: that were masked.
        before: of the plain map.
        after: of the map with t.
        tried: of each t.
    """

    t: float
    images: int
    before: Tried
    after: Tried
    tried: list[Tried]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        both = {"before": self.before._asdict(), "after": self.after._asdict()}
        return {**self._asdict(), **both, "tried": [each._asdict() for each in self.tried]}


class Searching(NamedTuple):
    """So many of `total` images have been masked by each t."""

    images: int
    total: int


class Pictured(Examples, Protocol):
    """Training data whose images can be seen as well."""

    def inputs(self, spans: Sequence[Sequence[int]], todo: Sequence[int]) -> Iterator[Tensor]:
        """Yield x, shape (n, 3, H, W), of the blocks of `spans` that `todo` numbers."""


class ZeroLevelTraining:
    """Learning of a zero level; `restore` and `run` resume at a `state`, as `Training`'s.

    Gauge t is one number, of SHARES, that at most ASKED training images choose. Gauge v trains v
    and t by Adam, whose rate falls to 0 over the second half; then t is chosen again. Several
    processes share the passes of masked images, and all do the rest.

    Args:
        f: the classifier; it is not changed.
        examples: training data behind w0.
        full: M_tau* of one image, shape (H, W), by index.
        settings: gauge, learning rate, epochs, batch, held-out share and seed.
        accelerator: where it runs; default f's device.
        cam: the method that made the masks.
        fill: what muted pixels show, as when the masks were made.
        accelerate: gives the classifier that masked images pass.

    Raises:
        AftError: settings are out of range, no image can be read, the method's map has no sign,
            or f has a zero level, or can have none.

    Attributes:
        history: the epochs done, epoch 0 first.
        train, held_out: indices of the images.
        v, t: what is learned; t as a share of the training maps' mean maximum.
        chosen: how t was chosen, `Chosen.as_dict`; None before.
    """

    tuner = None

    def __init__(
        self,
        f: Classifier,
        examples: Pictured,
        full: Callable[[int], Tensor],
        settings: Recipe,
        accelerator: Accelerator | None = None,
        cam: str = "gradcam",
        fill: str = "mean",
        accelerate: Accelerate = as_it_is,
    ) -> None:
        check_settings(settings, cam)
        check_learnable(f)
        usable = list(examples.usable)
        if not usable:
            raise AftError("there is no readable image to train on")
        self.f, self.examples, self.settings, self.cam = f, examples, settings, cam
        names = [examples.names[i] for i in usable]
        labels = [int(examples.labels[i]) for i in usable]
        train, held_out = choose_held_out(names, labels, settings.held_out, settings.seed)
        self.train, self.held_out = [usable[i] for i in train], [usable[i] for i in held_out]
        self.device = accelerator.device if accelerator else f.device
        self.accelerator, self.fill, self.accelerate = accelerator, fill, accelerate
        self.chosen: dict[str, Any] | None = None
        self.place = {index: row for row, index in enumerate(usable)}
        self.learned = self._gather(usable, full)
        maximum = self.learned.maximum[self._rows(self.train)]
        self.unit = mean_maximum(maximum)
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
            g, activation = self._at(batch)
            found = signed_map(g, activation, batch.class_index, self.cam).detach()
            masks = torch.stack([full(i) for i in indices])
            means, area = pieces_of(masks, found.shape[1:])
            signed.append(found)
            kept.append(means.to(found))
        whole = torch.cat(signed)
        return Learned(whole, whole.amax((1, 2)), torch.cat(kept), area.to(whole))

    @torch.no_grad()
    def _at(self, batch: Batch, f: Classifier | None = None) -> tuple[Classifier, Tensor]:
        z = batch.features[0] if len(batch.features) == 1 else batch.features
        return (f or self.f).after(z)

    def _rows(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor([self.place[i] for i in indices], dtype=torch.long)

    def _moved(self, activation: Tensor, of: Learned) -> Tensor:
        """Return S + v . A / Z, shape (N, h, w)."""
        if self.settings.gauge == "t":
            return of.signed
        return of.signed + moved_by(self.v, activation, self.cam)

    def _loss(self, activation: Tensor, of: Learned) -> Tensor:
        return zero_level_loss(self._moved(activation, of) - self.t * self.unit, of)

    def state(self) -> State:
        """Return all that decides how training continues."""
        tensors = {"v": self.v.detach().clone(), "t": self.t.detach().clone()}
        tensors |= _under("optimizer", _tensors_of(self.optimizer))
        values = {
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums.tolist(),
            "history": [epoch.as_dict() for epoch in self.history],
            "chosen": self.chosen,
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
        self.chosen = state.values.get("chosen")

    def run(self) -> Iterator[Step | Searching | Chosen | Epoch]:
        """Train to the end; between what is yielded, `state` may be taken."""
        if not self.history:
            self.history.append(Epoch(0, None, self._held_out()))
            yield self.history[0]
        while self.epoch <= self.epochs:
            if self.settings.gauge == "v":
                yield from self._run_epoch()
            if self.epoch == self.epochs:
                yield from self._choose()
            if self.settings.gauge == "v":
                train, self.sums = Measured.of(self.sums), torch.zeros_like(self.sums)
            else:
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
            f, activation = self._at(batch)
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
                logits = f.head(activation)
            self.sums += _sums(loss, logits, batch.labels)
            self.step += 1
            yield Step(self.epoch, self.step, len(batches), Measured.of(self.sums))

    def _choose(self) -> Iterator[Searching | Chosen]:
        """Choose t of SHARES; one that is stopped starts again."""
        asked = [self.train[i] for i in spread(len(self.train), ASKED)]
        blocks = [asked[i : i + BLOCK] for i in range(0, len(asked), BLOCK)]
        several = self.accelerator
        index, count = (several.process_index, several.num_processes) if several else (0, 1)
        own = range(index, len(blocks), count)
        done, total = 0, sum(len(blocks[i]) for i in own)
        yield Searching(done, total)
        unit = self._mean_maximum()
        f = self.accelerate(self.f, len(asked) * (len(SHARES) + 1))
        # y, y_hat of the plain map, and of each t; what another process computes is 0 here.
        table = torch.zeros(len(asked), 2 + len(SHARES), device=self.device)
        levels = unit * torch.tensor(SHARES, dtype=torch.double, device=self.device)
        seen = self.examples.batches([blocks[i] for i in own], None)
        for i, x, batch in zip(own, self.examples.inputs(blocks, own), seen, strict=True):
            rows = slice(i * BLOCK, i * BLOCK + len(x))
            table[rows] = self._probabilities(f, x, batch, blocks[i], levels)
            done += len(x)
            yield Searching(done, total)
        table = several.reduce(table, "sum") if several else table
        y, plain, *y_hat = table.unbind(1)
        found = [tried(each, y, share) for each, share in zip(y_hat, SHARES, strict=True)]
        best = best_of(found)
        t = best.share * unit
        with torch.no_grad():
            self.t.fill_(t / self.unit)
        chosen = Chosen(t, len(asked), tried(plain, y, 0.0), best, found)
        self.chosen = chosen.as_dict()
        yield chosen

    @torch.no_grad()
    def _probabilities(
        self, f: Classifier, x: Tensor, batch: Batch, indices: Sequence[int], levels: Tensor
    ) -> Tensor:
        """Return y, y_hat of the plain map and y_hat of each t, shape (N, 2 + T)."""
        c, of = batch.class_index, self.learned.rows(self._rows(indices))
        assert c is not None
        y = class_score(f.probabilities(f(x).float()), c)
        moved = self._moved(self._at(batch)[1], of)
        y_hat = level_probabilities(f, x, moved, levels, c, y, self.fill)
        plain = y_hat[:, :1]
        if self.settings.gauge == "v":
            plain = level_probabilities(f, x, of.signed, levels[:1], c, y, self.fill)
        return torch.cat([y[:, None], plain, y_hat], 1)

    @torch.no_grad()
    def _mean_maximum(self) -> float:
        """Return the mean maximum of ReLU(S + v . A / Z) over the images trained on."""
        if self.settings.gauge == "t":
            return self.unit
        size = self.settings.batch
        batches = [self.train[i : i + size] for i in range(0, len(self.train), size)]
        maxima = [
            self._moved(self._at(batch)[1], self.learned.rows(self._rows(some))).amax((1, 2))
            for some, batch in zip(batches, self.examples.batches(batches, None), strict=True)
        ]
        return mean_maximum(torch.cat(maxima))

    def _held_out(self) -> Measured | None:
        return self.measure(self.examples, self.held_out) if self.held_out else None

    @torch.no_grad()
    def measure(self, examples: Examples, indices: Sequence[int]) -> Measured:
        """Return means over images, by the network with its zero level; 0 for a lack of masks."""
        size = self.settings.batch
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        sums, g = torch.zeros_like(self.sums), self.classifier()
        for some, batch in zip(batches, examples.batches(batches, None), strict=True):
            (held, activation), loss = self._at(batch, g), torch.zeros(len(some))
            if batch.class_index is not None:
                of = self.learned.rows(self._rows(some))
                loss = self._loss(without_constant(g, activation), of)
            sums += _sums(loss, held.head(activation), batch.labels)
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
