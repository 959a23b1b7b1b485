"""Settings of a threshold search (§4.1), and the words and numbers that options take."""

from __future__ import annotations

from dataclasses import dataclass

from aftcli.errors import AftError, check_name

THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))

# Choices of `--objective` with the words of its help; `aft.loss.OBJECTIVES` has their functions.
OBJECTIVES = {"tuner": "the tuner's output (the paper)", "cam": "the CAM itself"}

# Keys of the registries in aftcli.tft, which import torch.
MASKINGS = ("binary", "soft")

FILLS = ("mean", "black", "blur")

MODES = ("value", "percentile")

SEARCHES = ("exact", "fast")


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
