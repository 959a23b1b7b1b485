"""Settings of a threshold search (§4.1) and of inputs; words and numbers that options take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from aftcli.errors import AftError, check_name

if TYPE_CHECKING:
    from torch import Tensor

SELF, MIRROR = "self", "mirror"  # judges: the network itself, and it on mirrored images

THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))

ZERO_LEVEL = "zero-level"  # the objective that trains no weights of the network

# Choices of `--objective` with the words of its help; `aft.loss.OBJECTIVES` has their functions.
OBJECTIVES = {
    "tuner": "the tuner's output (the paper)",
    "cam": "the CAM itself",
    ZERO_LEVEL: "where the CAM is zero; no prediction changes",
}

# The keys of the registries in aftcli.tft, which import torch.
Masking = Literal["binary", "soft"]
Fill = Literal["mean", "black", "blur"]
Mode = Literal["value", "percentile"]
SearchKind = Literal["exact", "fast"]

MASKINGS: tuple[str, ...] = get_args(Masking)
FILLS: tuple[str, ...] = get_args(Fill)
MODES: tuple[str, ...] = get_args(Mode)
SEARCHES: tuple[str, ...] = get_args(SearchKind)


class Range(NamedTuple):
    """Interval that a finite number must lie in.

    Attributes:
        what: the number's name in messages.
        low: its lower end.
        high: its upper end.
        above: the lower end is excluded.
        below: the upper end is excluded.
        unit: of the number, in messages.
    """

    what: str
    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    unit: str = ""

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"be above {self.low:g}" if self.above else f"be {self.low:g} or more"
        ends = "(" if self.above else "[", ")" if self.below else "]"
        return f"lie in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}{self.unit}"

    def check(self, value: float) -> None:
        """Check a number.

        Raises:
            AftError: it lies outside, or is not finite.

        >>> Range("the blend", 0, 1, above=True).check(1)
        """
        low = self.low < value if self.above else self.low <= value
        high = value < self.high if self.below else value <= self.high
        if not (low and high and math.isfinite(value)):
            raise AftError(f"{self.what} must {self}, got {value:g}")


# Of numbers that options and `aftcli.aft.loss.Recipe` take, by the names of their fields.
RANGES = {
    "threshold": Range("the threshold", 0, 1),
    "mute": Range("the share", 0, 100, unit=" percent"),
    "zero_level": Range("the zero level", 0, 1, below=True),
    "top_k": Range("the number of classes", 1),
    "limit": Range("the number of images", 1),
    "workers": Range("the number of workers", 0),
    "lam": Range("lambda", 0),
    "consistency": Range("consistency", 0),
    "learning_rate": Range("the learning rate", 0, above=True),
    "held_out": Range("the held-out share", 0, 1, below=True),
    "blend": Range("the blend", 0, 1, above=True),
    "epochs": Range("the number of epochs", 1),
    "batch": Range("the batch size", 1),
    "patience": Range("the patience", 0),
    "seed": Range("the seed", 0),
}


# From so many training images a class on, training generalises; it memorises fewer.
MANY = 50

STEPS = 420

# Fields of `aftcli.aft.loss.Recipe` that decide a zero level; others say nothing there.
ZERO_LEVEL_TAKES = {
    *("objective", "gauge", "learning_rate", "epochs", "batch", "held_out", "seed"),
}


class Situation(NamedTuple):
    """A situation in words, and its settings, fields of `aftcli.aft.loss.Recipe`.

    A small data set gets more epochs than these, for so many `steps`.
    """

    title: str
    settings: dict[str, Any]
    steps: int = 0


SITUATIONS = {
    ZERO_LEVEL: Situation(
        "the zero level",
        {"lam": None, "learning_rate": 2e-3, "epochs": 15, "patience": 0},
    ),
    "new": Situation("a new last layer", {"learning_rate": 3e-4, "epochs": 30}),
    "many": Situation(
        f"{MANY} or more images a class",
        {
            "lam": 0.1,
            "learning_rate": 3e-4,
            "epochs": 10,
            "consistency": 4.0,
            "classification": "labels",
        },
        STEPS,
    ),
    "few": Situation(
        f"fewer than {MANY} images a class",
        {
            "lam": 0.1,
            "learning_rate": 3e-4,
            "epochs": 8,
            "consistency": 1.0,
            "classification": "distillation",
            "blend": 0.7,
        },
        STEPS,
    ),
}


@dataclass(frozen=True)
class Search:
    """Settings of a threshold search, checked where they are made.

    `fine_tune_threshold` explains each.

    Attributes:
        thresholds: T, increasing, in [0, 1].
        masking: one of MASKINGS.
        fill: one of FILLS.
        mode: one of MODES.
        search: one of SEARCHES.

    Raises:
        AftError: thresholds are out of range or order, or a name is unknown.
    """

    thresholds: tuple[float, ...] = THRESHOLDS
    masking: str = "binary"
    fill: str = "mean"
    mode: str = "value"
    search: str = "exact"

    def __post_init__(self) -> None:
        if wrong := _wrong(self.thresholds):
            listed = ", ".join(f"{tau:g}" for tau in self.thresholds) or "none"
            raise AftError(f"thresholds {wrong}, got {listed}")
        check_name("masking", self.masking, MASKINGS)
        check_name("fill", self.fill, FILLS)
        check_name("threshold mode", self.mode, MODES)
        check_name("search", self.search, SEARCHES)


def _wrong(thresholds: tuple[float, ...]) -> str:
    """Say what is wrong with thresholds, or nothing."""
    if not thresholds or not all(0 <= tau <= 1 for tau in thresholds):
        return "must lie in [0, 1]"
    falls = any(b <= a for a, b in zip(thresholds, thresholds[1:], strict=False))
    return "must increase" if falls else ""


def read_thresholds(text: str) -> tuple[float, ...]:
    """Read thresholds, `start:stop:step` (stop included) or a list.

    Raises:
        AftError: the text is neither, or the values do not increase within [0, 1].

    >>> read_thresholds("0:1:0.25")
    (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    form = "write 0:1:0.1 or 0,0.2,0.5"
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if not (step > 0 and 0 <= start <= stop <= 1):
                raise AftError(f"thresholds {text!r} must increase within [0, 1]; {form}")
            if step < 1e-4:
                raise AftError(f"thresholds {text!r}: the step is below 0.0001; {form}")
            # Decimal thresholds, not sums of steps: 0.3, not 0.30000000000000004.
            count = int((stop - start) / step + 1e-6) + 1
            return tuple(min(round(start + i * step, 10), stop) for i in range(count))
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise AftError(f"thresholds {text!r} can't be read; {form}") from None
    if wrong := _wrong(values):
        raise AftError(f"thresholds {text!r} {wrong}; {form}")
    return values


LARGEST = 4096  # pixels of a side that a file may ask for

DEEPEST = 1024  # channels that a file may ask for

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an image to the input x of a model.

    Attributes:
        size: height and width of x, pixels.
        resize: the shorter side before the centre crop, pixels; None squashes the whole image
            to `size`.
        interpolation: nearest, bilinear or bicubic (with antialiasing).
        mean: of each channel, subtracted from values in [0, 1]; one value for grey inputs.
        std: of each channel, divided by.
    """

    size: tuple[int, int] = (224, 224)
    resize: int | None = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an input."""
        return (len(self.mean), *self.size)

    def channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std, shape (C, 1, 1), of the type and device of another tensor."""
        mean, std = (like.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return mean, std

    def with_channels(self, count: int) -> Preprocessing:
        """Return the same for another number of channels; their values are a guess.

        Grey takes the means of the colours' values, more than three channels stay as they are.
        """
        if count == len(self.mean):
            return self
        if len(self.mean) == 1 or count == 1:
            mean, std = (round(sum(v) / len(v), 6) for v in (self.mean, self.std))
        else:
            mean, std = 0.0, 1.0
        return replace(self, mean=(mean,) * count, std=(std,) * count)

    def with_size(self, size: tuple[int, int]) -> Preprocessing:
        """Return the same for another input size; the crop takes the usual share, 7/8."""
        return replace(self, size=size, resize=self.resize and round(min(size) * 8 / 7))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON gives them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Build it from the values of `as_dict`.

        Raises:
            AftError: the values, of a file, are none that an image can be prepared by.
        """
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        try:
            read = cls(**{**values, **lists})
            read._check()
        except (TypeError, ValueError) as error:
            raise AftError(f"no preprocessing of images: {error}") from error
        return read

    def _check(self) -> None:
        sides = (*self.size, *(() if self.resize is None else (self.resize,)))
        if len(self.size) != 2 or not all(type(n) is int and 0 < n <= LARGEST for n in sides):
            raise ValueError(f"sizes {self.size} and {self.resize} must lie in 1..{LARGEST}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}")
        if len(self.mean) != len(self.std) or not 0 < len(self.mean) <= DEEPEST:
            raise ValueError(f"mean and std have one value a channel, of 1 to {DEEPEST} channels")
        if math.prod(self.shape) > 3 * LARGEST**2:
            raise ValueError(f"inputs of {self.shape} values are too large")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}")


TIMM_CROP = 0.875  # timm's default share of the scaled picture


def preprocessing_of_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of timm's `pretrained_cfg`; what it lacks is timm's default."""
    usual, known = Preprocessing(), {k: v for k, v in config.items() if v}
    _, height, width = known.get("input_size", (3, *usual.size))
    whole = known.get("crop_mode") == "squash"
    interpolation = known.get("interpolation", "bicubic")
    return Preprocessing(
        (height, width),
        None if whole else int(min(height, width) / known.get("crop_pct", TIMM_CROP)),
        interpolation if interpolation in INTERPOLATIONS else "bicubic",
        tuple(known.get("mean", usual.mean)),
        tuple(known.get("std", usual.std)),
    )


def recorded_preprocessing(model: object) -> Preprocessing | None:
    """Read the preprocessing that a network's object records; None where it records none.

    That is its attribute `preprocessing`, a Preprocessing or the values of `as_dict`, or timm's
    `pretrained_cfg`.

    Raises:
        AftError: the values are none that an image can be prepared by.
    """
    own = getattr(model, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own
    if isinstance(own, Mapping):
        return Preprocessing.from_dict(own)
    config = getattr(model, "pretrained_cfg", None)
    return preprocessing_of_timm(config) if isinstance(config, Mapping) else None
