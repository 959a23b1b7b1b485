"""Intervals of the bootstrap, against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from aftcli.measures import intervals
from aftcli.measures.intervals import estimate


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_intervals_are_those_of_scipy(seed):
    values = torch.rand(200, generator=torch.Generator().manual_seed(seed)).square()
    found = estimate(values)
    assert found.value == pytest.approx(float(values.double().mean())) and found.n == 200
    theirs = stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=9999, method="percentile", rng=seed
    ).confidence_interval
    width = float(theirs.high - theirs.low)
    assert found.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.06 * width)
    assert estimate(values) == found


def test_intervals_of_many_images_are_drawn_in_pieces(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = estimate(values)
    intervals._kept_resamples.cache_clear()
    monkeypatch.setattr(intervals, "CHUNK", 50 * 300)
    pieces = estimate(values)
    assert whole.interval == pytest.approx(pieces.interval, abs=1e-12)


def test_intervals_of_few_images():
    assert estimate(torch.tensor([])).n == 0
    assert estimate(torch.tensor([0.5])).interval is None
    assert estimate(torch.tensor([torch.nan, 0.5, 0.5])) == (0.5, 0.5, 0.5, 2)
