"""captum's tests of relevance and of changed images: LRP, Occlusion, KernelSHAP, LIME."""

import numpy as np
import pytest
import torch
from captum.attr import LRP, InputXGradient, Occlusion
from torch import nn

from aftcli import METHODS, AftError, attribution_map, cut_classifier
from aftcli.attributions import perturbation
from aftcli.attributions.decomposition import signed_lrp
from aftcli.attributions.perturbation import signed_kernel_shap, signed_lime, signed_occlusion
from tests.helpers.compare import assert_near
from tests.peers.networks import one_convolution, pixel, pixels, plain, weighted
from tests.reference import perturbation as reference

C = torch.tensor([0])
TOLERANCE = 1e-5  # of relevance, of which epsilon takes a part


def two_layers(activation=None, first=None, scale=1.0):
    """captum's simple network: twos, a ReLU, threes; and another class."""
    rows = first or [[2, 2, 2]] * 3
    layers = [weighted(*([scale * w for w in row] for row in rows))]
    layers += [activation or nn.ReLU(), nn.Flatten()]
    return pixel(*layers, weighted([3 * scale] * 3, [1, 0, -1], flat=True))


def test_relevance_of_a_convolution_of_ones_equals_captums():
    """captum: test_lrp.py::test_lrp_basic_attributions"""
    model, f, x = one_convolution()
    theirs = LRP(model).attribute(x.clone().requires_grad_(), target=0).detach()
    found = signed_lrp(f, C, x, "epsilon")
    assert_near(found, theirs, TOLERANCE)
    assert found.any()


@pytest.mark.parametrize("inplace", [False, True])
def test_relevance_by_the_epsilon_rule(inplace):
    """captum: test_lrp.py::test_lrp_simple_attributions, ::test_lrp_simple_attributions_batch

    ::test_lrp_simple_inplaceReLU
    """
    _, f = two_layers(nn.ReLU(inplace))
    found = signed_lrp(f, C.repeat(2), pixels([1.0, 2.0, 3.0], [3.0, 6.0, 9.0]), "epsilon")
    # 12 in each of three neurons, times 3: 108, shared as 1 : 2 : 3.
    expected = torch.tensor([[18.0, 36.0, 54.0], [54.0, 108.0, 162.0]])
    assert_near(found.flatten(1), expected.double(), TOLERANCE)


def test_relevance_leaves_the_network():
    """captum: test_lrp.py::test_lrp_simple_repeat_attributions"""
    _, f = two_layers()
    x = pixels([1.0, 2.0, 3.0])
    before, first = f(x), signed_lrp(f, C, x, "gamma")
    assert torch.equal(signed_lrp(f, C, x, "gamma"), first)
    assert torch.equal(f(x), before)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU])
def test_relevance_passes_activations_unchanged(activation):
    """captum: test_lrp.py::test_lrp_simple_tanh"""
    model, f = two_layers(activation(), scale=0.1)
    x = pixels([1.0, 2.0, 3.0])
    y = model(x)[0, 0].item()
    expected = y * torch.tensor([1.0, 2.0, 3.0]).double() / 6
    assert_near(signed_lrp(f, C, x, "epsilon").flatten(), expected, TOLERANCE)


def test_relevance_of_what_raises_a_neuron():
    """captum: test_lrp.py::test_lrp_simple_attributions_AlphaBeta"""
    _, f = two_layers(first=[[-2, 2, 2], [2, 2, 2], [2, 2, 2]])
    found = signed_lrp(f, C, pixels([1.0, 2.0, 3.0]), "z-plus").flatten()
    # 24 of the first neuron as 0 : 4 : 6, 36 of each other one as 2 : 4 : 6.
    first, others = torch.tensor([0.0, 0.4, 0.6]) * 24, torch.tensor([1.0, 2.0, 3.0]) / 6 * 72
    assert_near(found, (first + others).double(), TOLERANCE)


def test_relevance_by_the_gamma_rule():
    """captum: test_lrp.py::test_lrp_simple_attributions_GammaRule, with gamma = 1 / 4"""
    _, f = two_layers(first=[[-2, 2, 2], [2, 2, 2], [2, 2, 2]])
    found = signed_lrp(f, C, pixels([1.0, 2.0, 3.0]), "gamma").flatten()
    # The layer that copies the pixel, between 0 and 1, keeps it. In the next the weights of 2
    # count 2.5: the first neuron is -2 + 5 + 7.5.
    first, others = torch.tensor([-2.0, 5.0, 7.5]) / 10.5 * 24, torch.tensor([1.0, 2, 3]) / 6 * 72
    assert_near(found, (first + others).double(), TOLERANCE)


class Skip(nn.Module):
    """Fives, beside which the input passes."""

    def __init__(self):
        super().__init__()
        self.linear = weighted([5, 5, 0], [5, 5, 0], [0, 0, 0])

    def forward(self, x):
        return self.linear(x) + x


def test_relevance_of_a_sum_of_branches():
    """captum: test_lrp.py::test_lrp_skip_connection"""
    model = nn.Sequential(Skip(), nn.Flatten()).double().eval()
    f = cut_classifier(model, "0", preprocessing=plain(1, 1))
    found = signed_lrp(f, torch.tensor([1]), pixels([2.0, 3.0, 0.0]), "epsilon")
    # 25 of 28 through the layer, as 10 : 15, and 3 beside it.
    assert_near(found.flatten(), torch.tensor([10.0, 18.0, 0.0]).double(), TOLERANCE)


def test_relevance_of_a_maximum_goes_to_it():
    """captum: test_lrp.py::test_lrp_maxpool2D"""
    same = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    layers = [weighted(*same), nn.MaxPool2d(2), nn.Flatten(), weighted(*same, flat=True)]
    f = cut_classifier(nn.Sequential(*layers).double(), "1", preprocessing=plain(2, 2))
    x = torch.zeros(1, 3, 2, 2, dtype=torch.double)
    x[0, 0] = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    found = signed_lrp(f, C, x, "epsilon")
    assert_near(found[0, 0], torch.tensor([[0.0, 0.0], [0.0, 6.0]]).double(), TOLERANCE)
    assert not found[0, 1:].any()


def test_relevance_is_the_gradient_times_the_input():
    """captum: test_lrp.py::test_lrp_ixg_equivalency"""
    model, f = two_layers()
    x = pixels([1.0, 2.0, 3.0])
    theirs = InputXGradient(model).attribute(x.clone().requires_grad_(), target=0)
    assert_near(signed_lrp(f, C, x, "epsilon"), theirs.detach(), TOLERANCE)


class Repeated(nn.Module):
    """A layer without a bias that runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.fc(self.conv(self.conv(x).relu()).relu().mean((2, 3)))


def test_relevance_of_a_layer_that_runs_twice():
    """captum: test_lrp.py::test_lrp_repeated_module, which it refuses"""
    model = Repeated().double().eval()
    f = cut_classifier(model, "conv", preprocessing=plain(2, 2))
    x = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    c = model(x).argmax(1)
    assert_near(signed_lrp(f, c, x, "epsilon").sum(), model(x)[0, c[0]].detach(), 1e-3)


@pytest.mark.parametrize("method", ["lrp", "lrp-gamma", "clrp", "rap"])
def test_a_layer_without_a_rule_is_told(method):
    """captum: test_lrp.py::test_lrp_creator, ::test_lrp_creator_activation"""
    _, f = pixel(nn.LayerNorm([3, 1, 1]), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(AftError, match="LayerNorm"):
        attribution_map(f, pixels([1.0, 2.0, 3.0]), 0, method)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_occlusion_in_parts_of_any_size(size, monkeypatch):
    """captum: test_occlusion.py::test_simple_input, its perturbations_per_eval"""
    model, f, x = one_convolution()
    monkeypatch.setattr(perturbation, "BATCH", size)
    found = signed_occlusion(f, C, x)
    theirs = Occlusion(model).attribute(x, sliding_window_shapes=(3, 1, 1), target=0)
    assert_near(found, theirs[:, 0].detach(), 1e-6)
    assert found.any()


@pytest.mark.parametrize(("window", "stride"), [(1.0, 1.0), (0.5, 0.5), (0.5, 1.0), (0.75, 0.34)])
def test_occlusion_of_larger_windows(window, stride, monkeypatch):
    """captum: test_occlusion.py::test_simple_input_shape_with_stride

    ::test_simple_input_larger_shape, ::test_simple_multi_input_conv
    """
    model, f, x = one_convolution()
    monkeypatch.setattr(perturbation, "WINDOW", window)
    monkeypatch.setattr(perturbation, "STRIDE", stride)
    side = round(4 * window)
    step = max(1, round(side * stride))
    found = signed_occlusion(f, C, x)
    assert_near(found[0], reference.occlusion(model, x[0], 0, (side, side), (step, step)), 1e-6)
    if window == 1:
        change = (model(x) - model(0 * x))[0, 0].detach()
        assert_near(found, change.expand_as(found), 1e-6)


def test_occlusion_of_several_images():
    """captum: test_occlusion.py::test_multi_sample_ablation"""
    _, f, x = one_convolution()
    both = torch.cat([x, x.flip(2) + 3])
    found = signed_occlusion(f, torch.tensor([0, 2]), both)
    assert_near(found[1:], signed_occlusion(f, torch.tensor([2]), both[1:]))
    assert not torch.equal(found[0], found[1])


PARTS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 3], [2, 2, 2, 3]])


@pytest.fixture
def parted(monkeypatch):
    """The convolution of ones, with superpixels that are known; and two images."""
    monkeypatch.setattr(perturbation, "superpixels", lambda *_: PARTS)
    model, f, x = one_convolution()
    return model, f, torch.cat([x, x.flip(2) + 3])


def test_kernel_shap_of_superpixels(parted):
    """captum: test_kernel_shap.py::test_simple_kernel_shap_with_mask

    ::test_simple_batch_kernel_shap, ::test_simple_batch_kernel_shap_with_mask
    """
    model, f, x = parted
    classes = torch.tensor([0, 3])
    found = signed_kernel_shap(f, classes, x)
    for n in range(2):
        phi = torch.from_numpy(reference.shapley(model, x[n], int(classes[n]), PARTS))
        assert_near(found[n], phi[PARTS], 1e-6)
        change = (model(x[n : n + 1]) - model(0 * x[:1]))[0, classes[n]]
        assert float(phi.sum()) == pytest.approx(float(change))


def test_kernel_shap_of_a_sum_is_its_terms(monkeypatch):
    """captum: test_kernel_shap.py::test_linear_kernel_shap"""
    monkeypatch.setattr(perturbation, "superpixels", lambda *_: PARTS)
    conv = nn.Conv2d(3, 2, 4)
    torch.manual_seed(6)
    nn.init.normal_(conv.weight)
    model = nn.Sequential(conv, nn.Flatten()).double().eval()
    f = cut_classifier(model, "0", preprocessing=plain(4, 4))
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    terms = (conv.weight[0] * x[0]).sum(0).detach()
    sums = torch.stack([terms[PARTS == i].sum() for i in range(4)])
    assert_near(signed_kernel_shap(f, C, x)[0], sums[PARTS], 1e-6)


def test_lime_of_superpixels(parted):
    """captum: test_lime.py::test_simple_lime_with_mask, ::test_simple_batch_lime_with_mask"""
    model, f, x = parted
    with torch.no_grad():
        for m in (model.fc1, f.head.get_submodule("fc1")):
            m.weight[1:] *= torch.tensor([0.5, -1.0, 0.9]).double()[:, None]
            m.weight *= 0.05
    found = signed_lime(f, torch.tensor([0, 1]), x)
    z = np.random.RandomState(0).randint(0, 2, (1000, 4)).astype(float)
    z[0] = 1
    near = np.exp(-((1 - np.sqrt(z.mean(1))) ** 2) / 0.25**2) ** 0.5
    for n, c in enumerate((0, 1)):
        shown = np.unique(z, axis=0)
        known = {
            tuple(s): reference.probability(f, reference.show(x[n], PARTS, s), c) for s in shown
        }
        p = np.array([known[tuple(row)] for row in z])
        weights = torch.from_numpy(reference.ridge(z, p, near, 1.0))
        assert weights.abs().max() > 0.01
        assert_near(found[n], weights[PARTS], 1e-6)


@pytest.mark.parametrize("method", ["lime", "kernelshap"])
def test_what_the_network_does_not_see_has_no_weight(method, monkeypatch):
    """captum: test_lime.py::test_simple_lime, test_kernel_shap.py::test_simple_kernel_shap"""
    monkeypatch.setattr(perturbation, "superpixels", lambda *_: PARTS)
    conv = nn.Conv2d(3, 2, 4)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, :, :2, :2] = 1
    f = cut_classifier(nn.Sequential(conv, nn.Flatten()), "0", preprocessing=plain(4, 4))
    with torch.no_grad():
        x = torch.full((1, 3, 4, 4), 0.2)
        found = METHODS[method].load()(f, f.activation(x), C, x)[0]
    assert (found[PARTS == 0] > 0.05).all()
    assert found[PARTS != 0].abs().max() < 0.05 * found.max()
