"""No cut, maximum, increase, order or star turns on rounding."""

from itertools import product
from pathlib import Path

import pytest
import torch

from aftcli.core.cam import stretch
from aftcli.evaluation.tables import Difference
from aftcli.measures import metrics
from aftcli.settings import MODES, THRESHOLDS
from aftcli.tft.masking import cut_off
from aftcli.tft.threshold import (
    LOG_ODDS_ROUNDING,
    SCORE_ROUNDING,
    first_maximum,
    mask_of,
    relative_probability_increase,
    rises,
    threshold_map,
)
from tests.helpers.command import aft
from tests.reference import paper as reference

ROOT = Path(__file__).parents[2]
NOISE = 3e-7  # of the same map by another engine, in the mean


def masks_of(attribution, mode, thresholds=THRESHOLDS):
    """M_tau for all thresholds, shape (N, |T|, H, W)."""
    cut = cut_off(attribution, torch.tensor(thresholds), mode)
    return mask_of(threshold_map(attribution[:, None], cut))


def noisy(values, seed):
    generator = torch.Generator().manual_seed(seed)
    return values + NOISE * (2 * torch.rand(values.shape, generator=generator) - 1)


@pytest.mark.parametrize("size", [(224, 224), (227, 227), (20, 28)])
def test_between_equal_cells_and_beyond_the_outermost_all_score_the_same(size):
    torch.manual_seed(0)
    cells = torch.rand(1, 7, 7)
    cells[0, 2:4, 3:5] = cells[0, 2, 3]
    (large,) = stretch(cells, size)
    for r, c in product(range(size[0]), range(size[1])):
        at = [(i + 0.5) * 7 / side - 0.5 for i, side in ((r, size[0]), (c, size[1]))]
        if 2 <= at[0] <= 3 and 3 <= at[1] <= 4:
            assert large[r, c] == cells[0, 2, 3]
        if at[0] <= 0 and at[1] <= 0:
            assert large[r, c] == cells[0, 0, 0]
    if size == (224, 224):  # weights that float32 holds exactly
        assert torch.equal(large.flip(0, 1), stretch(cells.flip(1, 2), size)[0])


def test_stretching_keeps_to_its_definition_at_a_size_that_divides_no_cell():
    torch.manual_seed(1)
    cells = torch.rand(1, 13, 13)
    expected = torch.from_numpy(reference.upsample(cells[0].double().numpy(), (227, 227)))
    assert (stretch(cells, (227, 227))[0] - expected).abs().max() <= 2e-7


@pytest.mark.parametrize("mode", MODES)
def test_a_map_that_scores_the_thresholds_themselves_is_cut_alike_whatever_its_rounding(mode):
    """Eleven levels, each a flat part: a cut must not go through one."""
    torch.manual_seed(2)
    level = torch.randint(11, (1, 40, 40))
    masks = masks_of(level / 10, mode)
    for t, tau in enumerate(THRESHOLDS):
        cut = tau if mode == "value" else torch.quantile(level.double() / 10, tau).item()
        expected = (level * 10 >= round(cut * 100)) & (level > 0)
        assert torch.equal(masks[:, t], expected)
    if mode == "value":
        for seed in range(3):
            rounded = torch.where(level > 0, noisy(level / 10, seed), 0)
            assert torch.equal(masks_of(rounded, mode), masks)


@pytest.mark.parametrize("tau", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_by_rank_the_pixel_at_a_whole_rank_is_kept(tau):
    """In float32 a tenth is above .1: the cut was just above the rank's own pixel."""
    torch.manual_seed(3)
    maps = torch.rand(64, 1, 1001)
    kept = masks_of(maps, "percentile", (tau, 1.0))[:, 0].sum((1, 2))
    assert kept.tolist() == [1001 - round(1000 * tau)] * 64


def test_a_difference_within_rounding_is_no_increase():
    for y in (1e-6, 0.01, 0.5, 0.99):
        odds = y / (1 - y)
        for times, expected in ((0, 0.0), (0.01, 0.0), (0.1, 0.0), (3, 1.0), (30, 1.0)):
            by = odds * torch.tensor(times * LOG_ODDS_ROUNDING, dtype=torch.double).exp().item()
            y_hat = by / (1 + by)
            pair = torch.tensor([y_hat]), torch.tensor([y])
            assert metrics.increase(*pair).item() == expected, (y, times)
            assert rises(*pair).item() == bool(expected)
    # Near 1 the last bits of a float32 are the larger error.
    near, nearer = torch.tensor([1 - 1e-5]), torch.tensor([1 - 4e-6])
    assert metrics.increase(nearer, near).tolist() == [1]
    assert metrics.increase(near + 1e-7, near).tolist() == [0]
    y = torch.tensor([0.3, 1.0])
    assert metrics.increase(y, y).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_of_thresholds_equal_up_to_rounding_the_first_is_taken(seed):
    torch.manual_seed(seed)
    y = torch.randint(1, 9, (200,)) / 10
    y_hat = torch.rand(200, 11).argsort(1) / 12 + 0.03
    best = y_hat.argmax(1)
    later = torch.randint(11, (200,))
    # Another threshold does a rounding better: an equal mask in another batch.
    y_hat[torch.arange(200), later] = y_hat.amax(1) * (1 + 1e-6)
    none = y_hat.amax(1) <= y
    expected = torch.where(none, 0, torch.minimum(best, later))
    rpi = relative_probability_increase(y_hat, y[:, None])
    assert torch.equal(first_maximum(rpi, y), expected)
    for n in range(200):
        assert reference.first_maximum(y_hat[n].tolist(), y[n].item()) == expected[n]
    # None helps but by rounding.
    rpi = relative_probability_increase(y[:, None] * (1 + 1e-6 * torch.rand(200, 11)), y[:, None])
    assert not first_maximum(rpi, y).any()


def test_thresholds_not_tried_and_a_probability_that_underflows_have_a_first_maximum():
    nan, inf = float("nan"), float("inf")
    rpi = torch.tensor([[nan, 0.1, nan, 0.3], [0.0, inf, inf, 0.0], [nan, 0.0, nan, 0.0]])
    assert first_maximum(rpi, torch.tensor([0.5, 0.0, 0.5])).tolist() == [3, 1, 1]


def test_order_and_maximum_of_a_map_do_not_depend_on_rounding():
    levels = torch.tensor([[[0.25, 1.0, 0.5], [1.0, 0.25, 0.5]]]) * 1023 / 1024
    region = torch.tensor([[[False, True, False], [False, False, False]]])
    for seed in range(5):
        rounded = noisy(levels, seed)
        assert metrics.order_of(rounded).tolist() == [[1, 3, 2, 5, 0, 4]]
        assert metrics.pointing(rounded, region).tolist() == [1]


def test_a_difference_within_rounding_has_no_star():
    where = ("data", "model", "gradcam", "binary", "average_drop", "aft", "original")
    for low, high, expected in (
        (1e-8, 3e-7, False),
        (-3e-7, -1e-8, False),
        (1e-3, 3e-3, True),
        (-3e-3, -1e-3, True),
        (-1e-3, 1e-3, False),
    ):
        difference = Difference(*where, (low + high) / 2, (low, high), 200)
        assert difference.is_clear is expected


def test_the_tolerance_is_what_decisions_say():
    page = (ROOT / "docs/method/decisions/search.md").read_text("utf-8")
    assert "2^-20" in page and SCORE_ROUNDING == 2.0**-20
    assert "log-odds rise by more than 1e-4" in page and LOG_ODDS_ROUNDING == 1e-4


@pytest.mark.slow
def test_the_readmes_first_command_prints_one_number_by_each_engine(tmp_path):
    """It did print .2191, .2037 and .2036: one pixel scores tau to six digits."""
    photo = str(ROOT / "docs" / "images" / "chelsea.jpg")
    found = []
    for cams, engine in (
        ("layercam", "auto"),
        ("layercam", "torch"),
        ("layercam", "onnxruntime"),
        ("cam gradcam layercam eigencam", "auto"),
    ):
        options = [part for cam in cams.split() for part in ("--cam", cam)]
        command = ["explain", photo, *options, "--tft", "--engine", engine, "--out", str(tmp_path)]
        run = aft(*command)
        assert run.code == 0, run.err
        found += [line.split()[-4:] for line in run.out.splitlines() if " layercam " in line]
    assert len(found) == 4 and found == [found[0]] * 4
    readme = (ROOT / "README.md").read_text("utf-8")
    (printed,) = {tuple(line.split()[-4:]) for line in readme.splitlines() if " layercam  " in line}
    assert list(printed) == found[0]
