"""Settings of a threshold search (§4.1), and the words and numbers that options take."""

from __future__ import annotations

from dataclasses import dataclass

THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))


@dataclass(frozen=True)
class Search:
    """How thresholds are searched; see `fine_tune_threshold`."""

    thresholds: tuple[float, ...] = THRESHOLDS
    masking: str = "binary"
    fill: str = "mean"
    mode: str = "value"
    search: str = "exact"
