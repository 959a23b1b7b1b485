"""Controls of equal amount: against loops over cells and pixels."""

import math

import pytest
import torch

from aftcli.measures import controls
from aftcli.measures.controls import (
    GAMMAS,
    SHIFTS,
    disc,
    equal_gamma,
    exchanged,
    gamma_means,
    nearest_shift,
    random_cells,
    shifted,
    shifted_areas,
)
from aftcli.tft.threshold import SCORE_ROUNDING
from tests.reference import controls as slow

SIZES = [((4, 4), (16, 16)), ((3, 5), (17, 26)), ((7, 7), (24, 31)), ((6, 4), (6, 4))]


def some_cells(shape, count=3, seed=0):
    """Maps in [0, 1]; no score lies on a shift of the grid."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(count, *shape, generator=generator, dtype=torch.double).relu()
    cells = (cells * 100).floor() / 100 + 0.005
    cells = (cells - 0.3).relu()
    return cells / cells.amax((1, 2), keepdim=True)


def test_the_rounding_is_that_of_thresholds():
    assert controls.ROUNDING == SCORE_ROUNDING


@pytest.mark.parametrize(("cells", "size"), SIZES)
@pytest.mark.parametrize("t", [0.0, 0.01, 0.37, 0.9, 1.0])
def test_a_shift_is_that_of_the_loop(cells, size, t):
    maps = some_cells(cells)
    for own, found in zip(maps, shifted(maps, t), strict=True):
        wanted = slow.shifted(own.tolist(), t)
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.double))


@pytest.mark.parametrize(("cells", "size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_areas_of_shifts_are_those_of_the_maps(cells, size, dtype):
    maps = some_cells(cells).to(dtype)
    areas = shifted_areas(maps, size)
    assert areas.shape == (3, len(SHIFTS)) and areas[:, -1].tolist() == [0, 0, 0]
    for n, own in enumerate(maps.tolist()):
        for k in (0, 1, 7, 37, 64, 99):
            stretched = slow.stretched(slow.shifted(own, SHIFTS[k]), size)
            kept = sum(v != 0 for line in stretched for v in line)
            assert float(areas[n, k]) == pytest.approx(kept / (size[0] * size[1]), abs=1e-6)
    empty = shifted_areas(torch.zeros(1, *cells), size)
    assert not empty.any() and not shifted(torch.zeros(1, *cells), 0.2).any()


def test_the_nearest_shift_and_the_gamma_of_equal_mean():
    maps = some_cells((5, 6), 4, 1)
    areas = shifted_areas(maps, (20, 24))
    for goal in (0.05, 0.31, 0.5, 0.99):
        t = nearest_shift(areas, goal)
        off = [abs(sum(float(v) for v in areas[:, k]) / 4 - goal) for k in range(len(SHIFTS))]
        assert off[SHIFTS.index(t)] == pytest.approx(min(off))
    means = gamma_means(maps)
    for k in (0, 40, 48, 96):
        for n in range(4):
            own = [v ** GAMMAS[k] for line in maps[n].tolist() for v in line]
            assert float(means[n, k]) == pytest.approx(sum(own) / len(own))
    plain = float(maps.mean())
    assert equal_gamma(means, plain) == pytest.approx(1)
    for goal in (plain / 2, plain * 0.9, plain * 1.3):
        g = equal_gamma(means, goal)
        assert float((maps**g).mean()) == pytest.approx(goal, abs=2e-4)
    assert equal_gamma(means, 1.0) == GAMMAS[0] and equal_gamma(means, 0.0) == GAMMAS[-1]
    assert equal_gamma(gamma_means(torch.zeros(2, 3, 3)), 0.0) == GAMMAS[0]


@pytest.mark.parametrize("count", [2, 3, 4, 10, 101])
def test_no_image_keeps_its_own_value(count):
    own = torch.arange(count)
    found = exchanged(own)
    assert sorted(found.tolist()) == own.tolist() and not (found == own).any()
    assert torch.equal(found, exchanged(own)) and torch.equal(own, torch.arange(count))
    if count > 3:
        assert (found != own.roll(1)).any()


def test_one_image_has_none_to_exchange_with():
    assert exchanged(torch.ones(1)) is None and exchanged(torch.ones(0)) is None


@pytest.mark.parametrize(("cells", "size"), SIZES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4321, 0.987, 1.0])
def test_random_cells_and_discs_are_those_of_the_loop(cells, size, share):
    pixels = size[0] * size[1]
    for seed in range(3):
        found = random_cells(cells, size, share, seed)
        assert found.tolist() == slow.random_cells(cells, size, share, seed)
        assert int(found.sum()) == round(share * pixels)
    found = disc(size, share)
    assert found.tolist() == slow.disc(size, share) and int(found.sum()) == round(share * pixels)


def test_random_cells_are_others_for_each_image():
    one, two = (random_cells((4, 4), (16, 16), 0.5, seed) for seed in range(2))
    assert not torch.equal(one, two)
    # Whole cells, not pixels: few neighbours differ.
    assert (one[:, 1:] != one[:, :-1]).float().mean() < 0.3


def test_a_disc_is_in_the_centre_and_round():
    found = disc((41, 41), 0.3)
    at = found.nonzero().double() - 20
    assert at.mean(0).abs().max() < 0.2
    radius = math.sqrt(0.3 * 41 * 41 / math.pi)
    assert at.square().sum(1).sqrt().max() == pytest.approx(radius, abs=1)
    wide = disc((20, 40), 0.3).nonzero()
    high, across = (wide.amax(0) - wide.amin(0) + 1).tolist()
    assert across == pytest.approx(2 * high, abs=3)
