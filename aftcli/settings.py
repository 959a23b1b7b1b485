"""Settings of a threshold search (§4.1), and the words and numbers that options take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from aftcli.errors import AftError, check_name

SELF, MIRROR = "self", "mirror"  # judges: the network itself, and it on mirrored images

JUDGES = "tft_judges"  # those of a search, in the settings of masks

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
# Of those in aftcli.attributions.maps.
Smooth = Literal["none", "aug", "eigen", "noise"]
Fuse = Literal["max", "product"]

# Of matplotlib's: the first three are perceptual, equal steps of a score look equal.
Colormap = Literal["viridis", "inferno", "magma", "turbo", "jet"]

# What makes probabilities of a network's outputs: softmax, sigmoid, or nothing as they are some;
# auto finds out (aftcli.core.classes.output_of).
Output = Literal["auto", "softmax", "sigmoid", "none"]

AUTO, SOFTMAX, SIGMOID, NONE = get_args(Output)

MASKINGS: tuple[str, ...] = get_args(Masking)
FILLS: tuple[str, ...] = get_args(Fill)
MODES: tuple[str, ...] = get_args(Mode)
SEARCHES: tuple[str, ...] = get_args(SearchKind)
OUTPUTS: tuple[str, ...] = get_args(Output)
COLORMAPS: tuple[str, ...] = get_args(Colormap)


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
    "alpha": Range("the opacity", 0, 1),
    "top_k": Range("the number of classes", 1),
    "limit": Range("the number of images", 1),
    "workers": Range("the number of workers", 0),
    "lam": Range("lambda", 0),
    "consistency": Range("consistency", 0),
    "learning_rate": Range("the learning rate", 0, above=True),
    "held_out": Range("the held-out share", 0, 1, below=True),
    "val_share": Range("the share of a val split", 0, 1, below=True),
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


class Shaping(NamedTuple):
    """Steps that change a method's map, on its way to the map that is shown.

    `aftcli.attribution_map` explains each.

    Attributes:
        cells: a map of pixels is averaged over the activation's cells.
        zero_level: the share of the maximum that is subtracted from maps of cells, in [0, 1).
        smooth: one of Smooth.
        fuse: one of Fuse, which combines the maps of several layers.
    """

    cells: bool = False
    zero_level: float = 0.0
    smooth: str = "none"
    fuse: str = "max"


AS_COMPUTED = Shaping()  # the map of a method as it is


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
