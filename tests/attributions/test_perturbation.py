"""Occlusion and RISE against literal loops."""

import pytest
import torch
from torch.testing import assert_close

from aftcli.attributions import perturbation
from aftcli.attributions.perturbation import rise, rise_masks, signed_occlusion
from aftcli.core.methods import METHODS
from tests.helpers.small import small
from tests.reference import perturbation as reference


@pytest.fixture
def few_masks(monkeypatch):
    monkeypatch.setattr(perturbation, "MASKS", 90)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("stride", [1 / 4, 3 / 4])
def test_occlusion_is_the_mean_drop_of_the_windows(kind, stride, monkeypatch):
    pytest.importorskip("captum")
    monkeypatch.setattr(perturbation, "STRIDE", stride)
    _, _, f, x, class_index = small(kind)
    found = signed_occlusion(f, class_index, x)
    # A seventh of 20 x 28; with strides of 2 and 3 the last window is cut at the bottom.
    window = (3, 4)
    strides = (1, 1) if stride == 1 / 4 else (2, 3)
    for n, c in enumerate(class_index):
        expected = reference.occlusion(f, x[n], c, window, strides)
        # captum adds up in float32.
        assert_close(found[n], expected, rtol=1e-4, atol=1e-5)
    assert_close(METHODS["occlusion"].load()(f, x, class_index, x), found.relu())


def test_rise_masks_are_the_papers(few_masks):
    x = torch.zeros(1, 3, 20, 29, dtype=torch.float64)
    masks = torch.cat(list(rise_masks(x)))
    generator = torch.Generator().manual_seed(0)
    cells = (torch.rand(45, 7, 7, generator=generator) < 0.5).double()
    tops = torch.randint(3, (45,), generator=generator).tolist()
    lefts = torch.randint(5, (45,), generator=generator).tolist()
    assert masks.shape == (90, 20, 29)
    for i in (31, 32):
        mask = reference.rise_mask(cells[i], tops[i], lefts[i], 20, 29)
        assert_close(masks[2 * i], mask)
        assert_close(masks[2 * i + 1], 1 - mask)
    assert {0, 1, 2} == set(tops) and max(lefts) == 4


def test_rise_masks_keep_half_of_every_pixel():
    """Eq. 6 divides by E[M] N; the masks' own sum is that."""
    masks = torch.cat(list(rise_masks(torch.zeros(1, 3, 21, 21))))
    assert len(masks) == perturbation.MASKS
    assert masks.min() == 0 and masks.max() == pytest.approx(1)
    assert_close(masks.mean(0), torch.full((21, 21), 0.5))
    # Neither is a pixel nearly always half shown, nor are pixels far apart shown together.
    assert masks[:, 10, 10].std() > 0.25
    assert torch.corrcoef(masks[:, [2, 18], [2, 18]].mT)[0, 1].abs() < 0.1


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
def test_rise_is_equation_6(kind, few_masks):
    _, _, f, x, class_index = small(kind)
    masks = torch.cat(list(rise_masks(x)))
    found = rise(f, x, class_index, x)
    for n, c in enumerate(class_index):
        assert_close(found[n], reference.rise(f, x[n], c, masks, 0.5))


def test_rise_of_a_score_that_needs_one_place_is_greatest_there(few_masks):
    """With p^c(x) = mean of x at one place, S is E[M_i(place) M_i] / E[M]: greatest there."""

    class Place(torch.nn.Module):
        def forward(self, x):
            seen = x[:, :1, 100:110, 150:160].mean((2, 3))
            return torch.cat([seen.log(), (1 - seen).log()], 1)

        def probabilities(self, logits):
            return logits.softmax(1)

    x = torch.ones(1, 3, 224, 224)
    found = rise(Place(), x, torch.tensor([0]), x)[0]
    top, left = divmod(int(found.argmax()), 224)
    assert abs(top - 105) < 32 and abs(left - 155) < 32


@pytest.mark.parametrize("method", ["occlusion", "rise"])
def test_batch_is_its_images_and_nothing_else_changes(method, few_masks):
    if method == "occlusion":
        pytest.importorskip("captum")
    _, _, f, x, class_index = small("mlp")
    found = reference.check_alone_and_clean(METHODS[method].load(), f, x, class_index)
    assert found.flatten(1).std(1).min() > 0
