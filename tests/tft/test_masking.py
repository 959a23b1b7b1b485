"""Masked images: fills, and equation 6 (§4.1)."""

import pytest
import torch

from aftcli.tft.masking import FILLS
from aftcli.tft.search import fine_tune_threshold
from aftcli.tft.threshold import masked_image
from tests.helpers.compare import assert_near
from tests.helpers.small import MEAN, SIZE, STD, small
from tests.reference import paper as reference


@pytest.mark.parametrize("fill", FILLS)
def test_fill_equals_its_definition(fill):
    s = small("linear", 6)
    filled = FILLS[fill](s.f, s.x)
    for n in range(3):
        expected = reference.fill_of(s.x[n].numpy(), fill, MEAN, STD)
        assert_near(filled[n], expected)


def test_blur_reaches_three_sigma_on_an_image_that_is_large_enough():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 40, 70, dtype=torch.float64)
    assert_near(FILLS["blur"](small("linear").f, x)[0], reference.blur(x[0].numpy()))


def test_black_is_the_colour_zero_before_normalisation():
    s = small("linear")
    black = FILLS["black"](s.f, s.x)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    assert_near(black * std + mean + 1, torch.ones_like(black))


@pytest.mark.parametrize("fill", FILLS)
def test_a_mask_of_ones_leaves_the_image_as_it_is(fill):
    s = small("linear")
    ones = torch.ones(3, *SIZE, dtype=torch.float64)
    filled = FILLS[fill](s.f, s.x)
    assert torch.equal(masked_image(s.x, ones, filled), s.x)
    assert torch.equal(masked_image(s.x, torch.zeros_like(ones), filled), filled)
    found = fine_tune_threshold(s.f, s.x, ones, s.class_index, fill=fill)
    assert_near(found.rpi, torch.zeros_like(found.rpi), 1e-6)
    assert_near(found.probabilities, found.probability[:, None].expand(3, 11), 1e-6)
