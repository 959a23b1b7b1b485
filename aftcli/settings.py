"""Settings of a threshold search (§4.1), and the words and numbers that options take."""

from __future__ import annotations

from dataclasses import dataclass

THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))

# Choices of `--objective` with the words of its help; `aft.loss.OBJECTIVES` has their functions.
OBJECTIVES = {"tuner": "the tuner's output (the paper)", "cam": "the CAM itself"}


@dataclass(frozen=True)
class Search:
    """How thresholds are searched; see `fine_tune_threshold`."""

    thresholds: tuple[float, ...] = THRESHOLDS
    masking: str = "binary"
    fill: str = "mean"
    mode: str = "value"
    search: str = "exact"
