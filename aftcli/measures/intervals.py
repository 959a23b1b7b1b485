"""Means over images with intervals of the bootstrap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
SEED = 0
CHUNK = 4_000_000  # drawn places at a time


class Estimate(NamedTuple):
    """A mean over images.

    Attributes:
        value: the mean; NaN of no image.
        low: of the 95 % interval; NaN of fewer than two images.
        high: of it.
        n: how many images.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, low and high; None of fewer than two images."""
        return (self.low, self.high) if self.n > 1 else None


def estimate(values: Tensor) -> Estimate:
    """Average one value an image, with the 95 % interval of the percentile bootstrap.

    2000 resamples of the images with a fixed seed (Efron and Tibshirani, 1993, ch. 13). Paired
    differences are intervals of the difference of each image.

    Args:
        values: shape (N,); NaN where a measure is undefined, left out.
    """
    values = values[~values.isnan()].double()
    count = len(values)
    if not count:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean = float(values.mean())
    if count == 1:
        return Estimate(mean, float("nan"), float("nan"), 1)
    means = torch.cat([weights @ values for weights in _resamples(count)]) / count
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(mean, low, high, count)


def _resamples(count: int) -> Iterable[Tensor]:
    """Count how often each resample holds each image, shape (resamples, N), in pieces."""
    return _kept_resamples(count) if count * RESAMPLES <= CHUNK else _drawn(count)


@lru_cache(maxsize=4)
def _kept_resamples(count: int) -> tuple[Tensor, ...]:
    return tuple(_drawn(count))


def _drawn(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    at_once = max(CHUNK // count, 1)
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        drawn = torch.randint(count, (rows, count), generator=generator)
        often = torch.zeros(rows, count, dtype=torch.double)
        yield often.scatter_add_(1, drawn, torch.ones_like(often))
