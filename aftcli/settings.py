"""Settings of a threshold search (§4.1), and the words and numbers that options take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from aftcli.errors import AftError, check_name

THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))

# Choices of `--objective` with the words of its help; `aft.loss.OBJECTIVES` has their functions.
OBJECTIVES = {
    "tuner": "the tuner's output (the paper)",
    "cam": "the CAM itself",
    "zero-level": "where the CAM is zero; no prediction changes",
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
        listed = ", ".join(f"{tau:g}" for tau in self.thresholds) or "none"
        if not self.thresholds or not all(0 <= tau <= 1 for tau in self.thresholds):
            raise AftError(f"thresholds must lie in [0, 1], got {listed}")
        if any(b <= a for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise AftError(f"thresholds must increase, got {listed}")
        check_name("masking", self.masking, MASKINGS)
        check_name("fill", self.fill, FILLS)
        check_name("threshold mode", self.mode, MODES)
        check_name("search", self.search, SEARCHES)


def check_zero_level(share: float) -> None:
    """Check a share of a map's maximum that becomes its zero."""
    if not 0 <= share < 1:
        raise AftError(f"the zero level must lie in [0, 1) of the map's maximum, got {share:g}")


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
    if not all(0 <= value <= 1 for value in values):
        raise AftError(f"thresholds {text!r} must lie in [0, 1]; {form}")
    if any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise AftError(f"thresholds {text!r} must increase; {form}")
    return values
