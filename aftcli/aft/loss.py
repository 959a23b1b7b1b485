"""The loss of activation fine-tuning (§4.2, eq. 8), terms beyond the paper, and default recipes.

w0 stays as it is, so training sees its outputs only; `training` is the training itself. The
defaults are chosen by the masks' method and the number of images per class
(docs/results/aft-study.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from aftcli.core.cam import normalise
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS, method
from aftcli.core.outputs import cross_entropy as cross_entropy_of
from aftcli.core.outputs import divergence
from aftcli.core.zero_level import check_signed
from aftcli.data.sets import DataSet
from aftcli.errors import AftError, nearest
from aftcli.models.checkpoint import TUNERS, Tuner
from aftcli.settings import MANY, RANGES, SITUATIONS, SOFTMAX, ZERO_LEVEL_TAKES, Situation
from aftcli.settings import ZERO_LEVEL as ZERO_LEVEL

Features = tuple[Tensor, ...]  # what w0 hands to w1: one tensor for most networks


# Teachers of whole images' classes: their labels (eq. 8), or the network before fine-tuning.
CLASSIFICATIONS = ("labels", "distillation")
# Weights trained behind the frozen w0.
TRAINED = ("w1+w2", "w1")

# Terms of s(x) that move the zero level: t alone, or v and t.
GAUGES = ("t", "v")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **own: torch.optim.SGD(parameters, momentum=0.9, **own),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of fine-tuning; the defaults are equation 8 as it is printed.

    Attributes:
        lam: lambda of eq. 8; None for the classification term alone, without masks.
        learning_rate: of the optimizer.
        epochs: at the most.
        batch: images a step.
        patience: epochs without a better held-out loss after which training stops.
        held_out: share of the training images that choose the epoch and are not trained on.
        seed: of the tuner, the order of the images and the choice of the held-out ones.
        objective: a key of OBJECTIVES: what is compared with M_tau*.
        consistency: weight of the classification loss on x_hat_tau*.
        classification: of CLASSIFICATIONS.
        tuner: a key of TUNERS: what is between the tuner's convolutions.
        optimizer: a key of OPTIMIZERS.
        trained: of TRAINED.
        blend: the result is start + blend * (trained - start), for w1 and w2: 1 takes the
            trained weights, less goes back towards those before (Wortsman et al., CVPR 2022).
        gauge: of GAUGES, for the objective zero-level; that trains neither w1 nor w2.
    """

    lam: float | None = 1.0
    learning_rate: float = 1e-4
    epochs: int = 10
    batch: int = 32
    patience: int = 3
    held_out: float = 0.1
    seed: int = 0
    objective: str = "tuner"
    consistency: float = 0.0
    classification: str = "labels"
    tuner: str = "linear"
    optimizer: str = "adam"
    trained: str = "w1+w2"
    blend: float = 1.0
    gauge: str = "t"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without the gauge where no zero level is trained."""
        values = dict(vars(self))
        if self.objective != ZERO_LEVEL:
            del values["gauge"]
        return values


class Compared(NamedTuple):
    """The function whose values are compared with M_tau* at one layer.

    Attributes:
        values: of what the layer gives, A, shape (N, K, h, w), first, and of c, shape (N,); its
            values have shape (N, h, w).
        weights: trained with w1 and w2; None where the function has none of its own.
    """

    values: Callable[[Features, Tensor], Tensor]
    weights: nn.Module | None = None


@dataclass(frozen=True)
class Objective:
    """A choice of what is compared with the masks; `settings.OBJECTIVES` has its help text.

    Attributes:
        title: its name in the line that says what is minimised.
        build: makes it for one layer, of the classifier cut there, whose weights are those that
            are trained, and the method of the masks; None where another training than that of
            eq. 8 is meant.
        check: raises AftError where a method can't be trained so.
    """

    title: str
    build: Callable[[Classifier, str, Recipe], Compared] | None
    check: Callable[[str], None] = lambda cam: None


def _tuner(f: Classifier, cam: str, settings: Recipe) -> Compared:
    """Compare f_tuner(A), as eq. 8 does."""
    tuner = Tuner(f.activation_shape[0], kind=settings.tuner, seed=settings.seed)
    return Compared(lambda flow, class_index: tuner(flow[0]), tuner)


def _map(f: Classifier, cam: str, settings: Recipe) -> Compared:
    """Compare the CAM itself, a function of w1 and w2."""
    function = method(cam).load()
    return Compared(lambda flow, c: normalise(function(f.holding(flow[1:]), flow[0], c, flow[0])))


def _check_map(cam: str) -> None:
    if not method(cam).trainable:
        able = ", ".join(name for name, entry in METHODS.items() if entry.trainable)
        raise AftError(
            f"the map of {cam} can't be trained itself; use --objective tuner, or one of {able}"
        )


OBJECTIVES = {
    "tuner": Objective("tuner", _tuner),
    "cam": Objective("map", _map, _check_map),
    ZERO_LEVEL: Objective("zero level", None, check_signed),
}


def check_settings(settings: Recipe, cam: str | None = None) -> None:
    """Check the settings, and that masks of a method can be trained with them."""
    for field in ("lam", "consistency", "learning_rate", "held_out", "blend", "epochs", "batch"):
        value = getattr(settings, field)
        if value is not None:
            RANGES[field].check(value)
    for what, name, known in (
        ("objective", settings.objective, OBJECTIVES),
        ("classification term", settings.classification, CLASSIFICATIONS),
        ("tuner", settings.tuner, TUNERS),
        ("optimizer", settings.optimizer, OPTIMIZERS),
        ("choice of what is trained", settings.trained, TRAINED),
        ("gauge", settings.gauge, GAUGES),
    ):
        if name not in known:
            raise AftError(f"unknown {what} {name!r}; nearest: {nearest(name, known)}")
    if cam:
        OBJECTIVES[settings.objective].check(cam)


class Batch(NamedTuple):
    """Training pairs: w0's outputs, labels and masks.

    Attributes:
        features: w0's outputs for the images x.
        labels: y, shape (N,).
        masks: M_tau* at the size of each tuned layer, each (N, h, w), in [0, 1]; empty without.
        class_index: c, the class that the masks explain, shape (N,); None without masks.
        masked: w0's outputs for x_hat_tau*; None without mask consistency.
    """

    features: Features
    labels: Tensor
    masks: tuple[Tensor, ...] = ()
    class_index: Tensor | None = None
    masked: Features | None = None


class Outputs(NamedTuple):
    """The network's outputs for a batch.

    Attributes:
        logits: f(x), shape (N, C).
        tuned: what the objective compares, of each tuned layer, each (N, h, w), such as
            f_tuner(A); empty without masks.
        masked: f(x_hat_tau*), shape (N, C); None without mask consistency.
        teacher: f_0(x), of the network before fine-tuning; None where labels teach.
    """

    logits: Tensor
    tuned: tuple[Tensor, ...] = ()
    masked: Tensor | None = None
    teacher: Tensor | None = None


class AftLoss(NamedTuple):
    """The loss of a batch; each term is its mean over the images.

    Attributes:
        total: of the weighted terms.
        cross_entropy: CE(f(x), y); with distillation it is measured, not minimised.
        mask: ||f_tuner(A) - M_tau*||_2^2, summed over the cells and the layers.
        consistency: CE(f(x_hat_tau*), y); with distillation c is the label.
    """

    total: Tensor
    cross_entropy: Tensor
    mask: Tensor
    consistency: Tensor


def mask_distance(tuned: Tensor, mask: Tensor) -> Tensor:
    """Return ||f_tuner(A) - M_tau*||_2^2 of each image, shape (N,) (eq. 8).

    Args:
        tuned: f_tuner(A), shape (N, h, w).
        mask: M_tau*, shape (N, h, w), in [0, 1].
    """
    return (tuned - mask).square().sum((1, 2))


def aft_loss(out: Outputs, batch: Batch, settings: Recipe, output: str = SOFTMAX) -> AftLoss:
    """Return CE(f(x), y) + lambda ||f_tuner(A) - M_tau*||_2^2 (eq. 8), mean over the batch.

    Beyond the paper, KL(f_0(x) || f(x)) may take the place of the first term, and
    consistency * CE(f(x_hat_tau*), y) may join.

    Args:
        out: of the network.
        batch: that it was given.
        settings: lambda, consistency and the classification term.
        output: what makes probabilities of the logits, of `settings.OUTPUTS`.
    """
    logits = _float32(out.logits)
    cross_entropy = cross_entropy_of(logits, batch.labels, output)
    teacher = out.teacher
    total = cross_entropy if teacher is None else divergence(logits, _float32(teacher), output)
    mask = consistency = torch.zeros_like(cross_entropy)
    if batch.masks and settings.lam is not None:
        distances = [
            mask_distance(_float32(t), m.to(_float32(t))).mean()
            for t, m in zip(out.tuned, batch.masks, strict=True)
        ]
        mask = torch.stack(distances).sum()
        total = total + settings.lam * mask
    if out.masked is not None:
        target = batch.labels if out.teacher is None else batch.class_index
        assert target is not None
        consistency = cross_entropy_of(_float32(out.masked), target, output)
        total = total + settings.consistency * consistency
    return AftLoss(total, cross_entropy, mask, consistency)


def _float32(values: Tensor) -> Tensor:
    """Return half-precision values as float32, others as they are."""
    return values.float() if values.itemsize < 4 else values


class Situated(Protocol):
    """The part of a job (`aftcli.aft.jobs.Job`) that decides its situation."""

    @property
    def masks(self) -> object:
        """None for a job without masks."""

    @property
    def earlier(self) -> object:
        """None where one layer is tuned."""

    @property
    def new_head(self) -> bool:
        """True where the last layer is new."""

    @property
    def no_zero_level(self) -> str:
        """Why no zero level can be learned from the masks; "" where one can."""

    @property
    def data_set(self) -> DataSet:
        """The images."""


def situation_of(job: Situated, objective: str = Recipe.objective) -> Situation:
    """Return the situation that a job with an objective is in."""
    if objective == ZERO_LEVEL and job.masks is not None:
        return SITUATIONS[ZERO_LEVEL]
    if job.new_head:
        return SITUATIONS["new"]
    labels = [sample.label for sample in job.data_set.samples]
    return SITUATIONS["many" if len(labels) >= MANY * len(set(labels)) else "few"]


class Choice(NamedTuple):
    """An objective, and why it was chosen.

    Attributes:
        objective: a key of OBJECTIVES.
        why: in words that end the line that says what is minimised; "" for a control.
        note: what else a user should know of it.
    """

    objective: str
    why: str = ""
    note: str = ""


@dataclass(frozen=True)
class InSituation:
    """Settings asked for, and the others by a job's situation (`in_situation`).

    Attributes:
        given: fields of `Recipe`.
        augment: images are flipped and cropped at random, which leaves no zero level to learn.
    """

    given: Mapping[str, Any]
    augment: bool = False

    def choose(self, job: Situated) -> Choice:
        """Choose the objective: what was asked for, otherwise the zero level where it can be."""
        if job.masks is None:
            return Choice(Recipe.objective)
        asked = self.given.get("objective")
        if asked is not None:
            return Choice(asked, f"chosen by --objective {asked}")
        options = [_spelled(name) for name in self.given if name not in ZERO_LEVEL_TAKES]
        options += ["--augment"] * self.augment + ["--layer"] * (job.earlier is not None)
        if options:
            return Choice(Recipe.objective, f"chosen by {', '.join(options)}")
        if job.no_zero_level:
            note = (
                f"{job.no_zero_level}; the default is mask consistency, "
                "see docs/method/zero-level.md"
            )
            return Choice(Recipe.objective, f"chosen as {job.no_zero_level}", note)
        idle = [_spelled(name) for name in ("learning_rate", "epochs") if name in self.given]
        note = ""
        if idle and self.given.get("gauge", Recipe.gauge) == "t":
            note = f"{' and '.join(idle)} without effect: the default learns one number, the zero "
            note += "level; --objective tuner trains the network"
        return Choice(ZERO_LEVEL, "chosen as the masks' method has a sign", note)

    def __call__(self, job: Situated) -> Recipe:
        """Return a job's settings."""
        objective = self.choose(job).objective
        situation = situation_of(job, objective)
        if objective == ZERO_LEVEL:
            kept = {name: self.given[name] for name in ZERO_LEVEL_TAKES & self.given.keys()}
            return Recipe(**{**situation.settings, **kept, "objective": objective})
        found = Recipe(**{**situation.settings, **self.given, "objective": objective})
        if "epochs" not in self.given:
            an_epoch = math.ceil(len(job.data_set.samples) * (1 - found.held_out) / found.batch)
            enough = math.ceil(situation.steps / max(an_epoch, 1))
            found = replace(found, epochs=max(found.epochs, enough))
        if job.masks is not None:
            return found
        blend = self.given.get("blend", 1.0)
        how = Recipe.classification
        return replace(found, lam=None, consistency=0.0, classification=how, blend=blend)


def _spelled(name: str) -> str:
    """Return the option that sets a field, or the field's name where none does."""
    if name in ("tuner", "optimizer", "trained"):
        return name
    return "--lr" if name == "learning_rate" else f"--{name}"


def in_situation(**asked: Any) -> InSituation:  # noqa: ANN401
    """Return a function that gives a job's settings: those asked for, and its situation's.

    Without an objective, a job learns the zero level where its masks allow it and nothing is
    asked for that only the training of eq. 8 has. A job without masks has the learning rate and
    the epochs of one with masks, and plain cross-entropy.

    Args:
        asked: fields of `Recipe`; None leaves one to the situation.

    Raises:
        AftError: a value is out of range.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    check_settings(Recipe(**given))
    return InSituation(given)
