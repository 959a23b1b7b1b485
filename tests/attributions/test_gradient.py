"""Attributions by gradients: completeness, literal loops and other libraries."""

import warnings

import numpy as np
import pytest
import torch

from tests.helpers.compare import assert_near
from tests.helpers.small import CLASSES, KINDS, small

pytest.importorskip("captum")
pytest.importorskip("zennit")

from torch import nn
from torchvision.models import get_model

from aftcli import AftError
from aftcli.attributions import gradient
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.errors import AftWarning


def score(model, x, c):
    return model(x)[0, c]


def score_change(s, baseline):
    """y^c(x) - y^c(x') of each image."""
    rows = torch.arange(len(s.x))
    return (s.model(s.x) - s.model(baseline))[rows, s.class_index]


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_are_a_literal_sum_of_gradients(kind):
    s = small(kind)
    found = gradient.signed_integrated_gradients(s.f, s.class_index, s.x, steps=7)
    nodes, weights = np.polynomial.legendre.leggauss(7)
    for n, c in enumerate(s.class_index.tolist()):
        expected = torch.zeros_like(s.x[n])
        for node, weight in zip(nodes, weights, strict=True):
            point = ((node + 1) / 2 * s.x[n])[None].requires_grad_()
            score(s.model, point, c).backward()
            expected += weight / 2 * point.grad[0] * s.x[n]
        # captum's nodes and weights are of single precision.
        assert_near(found[n], expected, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_sum_to_the_change_of_the_score(kind):
    s = small(kind)
    found = gradient.signed_integrated_gradients(s.f, s.class_index, s.x, steps=400)
    change = score_change(s, torch.zeros_like(s.x))
    assert torch.allclose(found.sum((1, 2, 3)), change, atol=2e-3 * float(change.abs().max()))


@pytest.mark.slow
def test_integrated_gradients_of_lite0_sum_to_the_change_of_the_score(lite0, chelsea):
    c = torch.tensor([282])
    with torch.no_grad():
        change = (lite0(chelsea) - lite0(torch.zeros_like(chelsea)))[0, 282]
        found = gradient.signed_integrated_gradients(lite0, c, chelsea)
    # 6 % at the default's 64 steps, 3 % at 128: ReLU6 makes the path rough.
    assert abs(found.sum() - change) < 0.1 * abs(change)


@pytest.mark.parametrize("kind", KINDS)
def test_deep_lift_sums_to_the_change_of_the_score(kind):
    s = small(kind)
    found = gradient.signed_deep_lift(s.f, s.class_index, s.x)
    assert_near(found.sum((1, 2, 3)), score_change(s, torch.zeros_like(s.x)))


def test_deep_lift_of_lite0_sums_to_the_change_of_the_score(lite0, chelsea):
    """Its ReLU6, at which captum alone takes the gradient, are rescaled too."""
    c = torch.tensor([282])
    with torch.no_grad():
        change = (lite0(chelsea) - lite0(torch.zeros_like(chelsea)))[0, 282]
        found = gradient.signed_deep_lift(lite0, c, chelsea)
    assert abs(found.sum() - change) < 1e-3 * abs(change)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vgg16"])
def test_deep_lift_of_torchvisions_networks_sums_to_the_change_of_the_score(name):
    """Their ReLUs run several times, or write in place: captum alone refuses or errs."""
    torch.manual_seed(0)
    f = cut_classifier(get_model(name), preprocessing=Preprocessing(size=(64, 64)), name=name)
    x, c = torch.randn(1, 3, 64, 64), torch.tensor([7])
    with torch.no_grad():
        change = (f(x) - f(torch.zeros_like(x)))[0, 7]
        found = gradient.signed_deep_lift(f, c, x).sum()
    assert abs(found - change) < 1e-3 * abs(change)


class TwoReLU6(nn.Module):
    """Small enough to be rescaled by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU6()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


def test_deep_lift_through_relu6_is_the_rescale_rule():
    torch.manual_seed(0)
    model = TwoReLU6().double()
    model.conv.weight.data *= 6
    f = cut_classifier(model, "conv+act", preprocessing=Preprocessing(size=(6, 6)))
    x, c = 2 * torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.tensor([1, 3])
    found = gradient.signed_deep_lift(f, c, x)
    z, z_0 = model.conv(x), model.conv(torch.zeros_like(x))
    assert (z > 6).any() and (z < 0).any()
    multiplier = (z.clamp(0, 6) - z_0.clamp(0, 6)) / (z - z_0)
    of_cells = multiplier * model.fc.weight[c][:, :, None, None] / 36
    expected = torch.einsum("nkhw,kchw->nchw", of_cells, model.conv.weight.expand(-1, -1, 6, 6)) * x
    assert_near(found, expected.detach())


IN_A_ROW = {
    "pooled, then rectified": (nn.MaxPool2d(2), nn.ReLU()),
    "rectified twice": (nn.ReLU(), nn.ReLU(inplace=True)),
    "three kinds": (nn.Softplus(), nn.Tanh(), nn.Sigmoid()),
    "pooled twice": (nn.MaxPool2d(2), nn.ReLU6(), nn.MaxPool2d(2), nn.LeakyReLU()),
    "pooled behind a layer": (nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)),
    "windows that overlap": (nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.MaxPool2d((2, 3), (1, 2))),
    "windows beyond the edge": (nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2)),
}


@pytest.mark.parametrize("row", IN_A_ROW)
def test_deep_lift_through_non_linearities_in_a_row(row):
    """captum alone loses multipliers there, and what cells in several windows contribute."""
    torch.manual_seed(1)
    mean = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *IN_A_ROW[row], *mean).double()
    model[0].weight.data *= 6
    f = cut_classifier(model, "0", preprocessing=Preprocessing(size=(8, 8)))
    x, c = 2 * torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    with torch.no_grad():
        change = (model(x) - model(torch.zeros_like(x))).gather(1, c[:, None])[:, 0]
    assert_near(gradient.signed_deep_lift(f, c, x).sum((1, 2, 3)), change, 1e-7)


def test_deep_lift_of_a_cell_in_two_windows():
    """Cells 1, 5, 2 against 0: each of the two windows hands its 5 to the middle one."""
    model = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.MaxPool2d((1, 2), 1), nn.Flatten())
    model.append(nn.Linear(2, 2)).double()
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[3].weight)
    f = cut_classifier(model, "0", preprocessing=Preprocessing(size=(1, 3)))
    x = torch.zeros(1, 3, 1, 3, dtype=torch.float64)
    x[0, 0, 0] = torch.tensor([1.0, 5.0, 2.0])
    found = gradient.signed_deep_lift(f, torch.tensor([0]), x)
    assert_near(found[0, 0, 0], torch.tensor([0.0, 10.0, 0.0], dtype=torch.float64))


def test_deep_lift_says_which_layer_it_has_no_rule_for():
    model = TwoReLU6()
    model.act = nn.SiLU()
    f = cut_classifier(model, "conv+act", preprocessing=Preprocessing(size=(6, 6)), name="silu")
    with pytest.raises(AftError, match="no rule for the SiLU of silu; use integratedgradients"):
        gradient.signed_deep_lift(f, torch.tensor([0]), torch.randn(1, 3, 6, 6))
    with pytest.raises(AftError, match="guidedbackprop needs a network with ReLUs"):
        gradient.signed_guided_backpropagation(f, torch.tensor([0]), torch.randn(1, 3, 6, 6))


def test_guided_backpropagation_is_that_of_another_library():
    from pytorch_grad_cam import GuidedBackpropReLUModel
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(weights=None, num_classes=10).eval()
    f = cut_classifier(model, preprocessing=Preprocessing(size=(64, 64)))
    x, c = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    found = gradient.signed_guided_backpropagation(f, c, x)
    for n in range(2):
        guided = GuidedBackpropReLUModel(model=model, device="cpu")
        expected = torch.from_numpy(guided(x[n : n + 1], int(c[n]))).permute(2, 0, 1)
        assert torch.allclose(
            found[n], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )


def test_guided_backpropagation_stops_at_both_ends_of_relu6():
    """By hand: negative gradients stop at the activation, all stop where it is flat."""
    torch.manual_seed(1)
    model = TwoReLU6().double()
    model.conv.weight.data *= 6
    f = cut_classifier(model, "conv+act", preprocessing=Preprocessing(size=(6, 6)))
    x, c = torch.randn(1, 3, 6, 6, dtype=torch.float64), torch.tensor([2])
    z = model.conv(x)
    of_cells = model.fc.weight[2][:, None, None].clamp(min=0) / 36 * ((z > 0) & (z < 6))
    expected = torch.einsum("nkhw,kc->nchw", of_cells, model.conv.weight[:, :, 0, 0])
    assert_near(gradient.signed_guided_backpropagation(f, c, x), expected.detach())


def test_smooth_grad_is_a_literal_mean_of_gradients():
    s = small("linear")
    found = gradient.signed_smooth_grad(s.f, s.class_index, s.x)
    for n, c in enumerate(s.class_index.tolist()):
        x = s.x[n]
        sigma = float(gradient.NOISE * (x.max() - x.min()))
        expected = torch.zeros_like(x)
        with torch.random.fork_rng():
            torch.manual_seed(gradient.SEED)
            for _ in range(gradient.NOISY // gradient.BATCH):
                for noise in torch.normal(0, torch.full((gradient.BATCH, *x.shape), sigma)):
                    noisy = (x + noise.to(x))[None].requires_grad_()
                    score(s.model, noisy, c).backward()
                    expected += noisy.grad[0] / gradient.NOISY
        assert_near(found[n], expected)


@pytest.mark.slow
def test_gradient_shap_sums_to_the_expected_change_of_the_score():
    s = small("linear")
    found = gradient.signed_gradient_shap(s.f, s.class_index, s.x, draws=6400).sum((1, 2, 3))
    plain = gradient.baselines(s.f, s.x)
    scores = s.model(s.x)[torch.arange(len(s.x)), s.class_index]
    expected = scores - s.model(plain)[:, s.class_index].mean(0)
    assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))


def test_baselines_are_mean_black_and_white():
    s = small("linear")
    p = s.f.preprocessing
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (p.mean, p.std))
    pictures = gradient.baselines(s.f, s.x) * std + mean
    for picture, colour in zip(pictures, (mean, 0 * mean, 0 * mean + 1), strict=True):
        assert torch.allclose(picture, colour.expand_as(picture))


@pytest.mark.parametrize(
    ("step", "said"),
    [(nn.Identity(), False), (nn.GroupNorm(2, 8), True), (nn.LayerNorm((6, 6)), True)],
)
def test_deep_lift_says_what_its_rule_misses(step, said):
    torch.manual_seed(2)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(stem, step, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    own = Preprocessing((6, 6), None, "bilinear", (0.0,) * 3, (1.0,) * 3)
    f = cut_classifier(model.double().eval(), "0", preprocessing=own)
    x = torch.rand(2, 3, 6, 6, dtype=torch.double)
    c = torch.tensor([1, 3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AftWarning)
        found = gradient.signed_deep_lift(f, c, x).sum((1, 2, 3))
    with torch.no_grad():
        change = f(x).gather(1, c[:, None])[:, 0] - f(torch.zeros_like(x))[0, c]
    missing = float(((found - change).abs() / change.abs()).max())
    assert (missing > 0.1) if said else (missing < 1e-6)
    texts = [str(each.message) for each in caught if each.category is AftWarning]
    assert [f"up to {missing:.0%} of the change" in text for text in texts] == [True] * said
