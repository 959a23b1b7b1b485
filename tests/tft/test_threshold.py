"""Thresholds against equations 4, 5 and 7, one by one (§4.1)."""

import itertools

import pytest
import torch

from aftcli.attributions.maps import attribution_map
from aftcli.settings import MODES, THRESHOLDS
from aftcli.tft.masking import cut_off
from aftcli.tft.scoring import areas
from aftcli.tft.threshold import mask_at, mask_of, relative_probability_increase, threshold_map
from tests.helpers.small import small
from tests.reference import paper as reference
from tests.tft.test_search import SEEDS, ramp


def all_thresholds(attribution, mode):
    """I_tau of all thresholds, shape (N, |T|, H, W)."""
    tau = torch.tensor(THRESHOLDS, dtype=torch.float64)
    return threshold_map(attribution[:, None], cut_off(attribution, tau, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_cut_off_and_thresholded_map_equal_equation_4(mode, seed):
    torch.manual_seed(seed)
    # 101 x 10 pixels: ranks of whole tenths fall between pixels; 101: exactly on one.
    for size in ((101, 10), (101, 1)):
        attribution = torch.rand(2, *size, dtype=torch.float64)
        attribution[0, :40] = 0
        maps = all_thresholds(attribution, mode)
        for n, t in itertools.product(range(2), range(11)):
            expected = reference.thresholded(attribution[n].numpy(), THRESHOLDS[t], mode)
            assert torch.equal(maps[n, t], torch.from_numpy(expected))


def test_a_score_equal_to_the_threshold_is_kept():
    attribution = torch.tensor([[[0.1, 0.3, 0.5, 1.0]]])
    tau = torch.tensor([0.3, 0.5, 1.0])
    maps = threshold_map(attribution[:, None], cut_off(attribution, tau))
    assert maps[0, :, 0].tolist() == [
        pytest.approx([0, 0.3, 0.5, 1]),
        [0, 0, 0.5, 1],
        [0, 0, 0, 1],
    ]


def test_each_image_may_have_its_own_threshold():
    attribution = ramp().expand(2, -1, -1)
    own = torch.tensor([[0.2], [0.9]], dtype=torch.float64)
    for mode in MODES:
        (cut,) = cut_off(attribution, own, mode).mT
        assert mask_of(threshold_map(attribution, cut)).sum((1, 2)).tolist() == [80, 10]


@pytest.mark.parametrize("mode", MODES)
def test_the_mask_alone_is_that_of_the_cut_map(mode):
    torch.manual_seed(3)
    attribution = torch.rand(3, 9, 10)
    attribution[0, :4], attribution[1] = 0, 0
    cut = cut_off(attribution, torch.tensor(THRESHOLDS), mode)
    masks = mask_of(threshold_map(attribution[:, None], cut))
    assert torch.equal(mask_at(attribution[:, None], cut), masks)
    counted = [[sum(mask.flatten().tolist()) for mask in each] for each in masks]
    assert areas(attribution, cut).tolist() == counted


def test_pixels_of_score_zero_are_never_kept():
    # Eq. 5: M is 1 where I_tau is not 0, so even tau = 0 mutes them.
    attribution = torch.tensor([[[0.0, 0.4], [0.0, 1.0]]])
    maps = threshold_map(attribution, torch.tensor([0.0]))
    assert mask_of(maps)[0].tolist() == [[False, True], [False, True]]


def test_rpi_equals_equation_7():
    torch.manual_seed(0)
    y_hat, y = torch.rand(4, 5, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    rpi = relative_probability_increase(y_hat, y)
    for n, t in itertools.product(range(4), range(5)):
        expected = max(y_hat[n, t].item() - y[n].item(), 0) / y[n].item()
        assert rpi[n, t].item() == pytest.approx(expected, rel=1e-12)


def test_rpi_of_a_probability_that_underflows_is_no_number_only_where_it_must_be():
    zero = torch.tensor(0.0)
    assert relative_probability_increase(zero, zero) == 0
    assert relative_probability_increase(torch.tensor(0.5), zero) == float("inf")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_nested_and_their_area_falls_as_tau_grows(mode, seed):
    s = small("mlp", seed)
    attribution = attribution_map(s.f, s.x, s.class_index, "layercam")
    masks = mask_of(all_thresholds(attribution, mode))
    larger, smaller = masks[:, :-1], masks[:, 1:]
    assert not (smaller & ~larger).any()
    area = masks.sum((2, 3))
    assert (area.diff(dim=1) <= 0).all()
    assert (area[:, -1] < area[:, 0]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_by_rank_a_threshold_mutes_its_share_of_the_map(seed):
    torch.manual_seed(seed)
    attribution = torch.rand(2, 101, 10, dtype=torch.float64)
    masks = mask_of(all_thresholds(attribution, "percentile"))
    muted = 1 - masks.double().mean((2, 3))
    assert (muted - torch.tensor(THRESHOLDS)).abs().max() <= 1.001 / 1010
