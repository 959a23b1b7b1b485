"""zennit's tests of its rules, canonizers and attributors, of what aft builds on them."""

import numpy as np
import pytest
import torch
from torch import nn

from aftcli import attribution_map, cut_classifier
from aftcli.attributions import decomposition, gradient, perturbation
from aftcli.attributions.canonical import canonical
from aftcli.attributions.decomposition import signed_lrp, signed_rap
from aftcli.attributions.gradient import signed_integrated_gradients, signed_smooth_grad
from aftcli.attributions.perturbation import signed_occlusion
from tests.helpers.compare import assert_near
from tests.peers.networks import Residual, pixel, pixels, plain, resnet, weighted
from tests.reference import decomposition as shares

# Our rules of the layer that sees the pixels, and of linear layers: shares of each contribution.
BOX = shares.box([0.0] * 3, [1.0] * 3)
FIRST = {
    "composite": shares.flat,
    "epsilon": shares.epsilon,
    "gamma": BOX,
    "alpha-beta": shares.alpha_beta,
    "z-plus": shares.z_plus_without_bias,
    "z-plus-box": BOX,
}
LINEAR = dict.fromkeys(FIRST, shares.epsilon) | {
    "alpha-beta": shares.epsilon,
    "z-plus": shares.z_plus_without_bias,
    "z-plus-box": shares.z_plus_without_bias,
}


def by_shares(weight, bias, x, relevance, share):
    """Relevance of inputs, each with its channel, neuron by neuron."""
    found = torch.zeros_like(x)
    for j, r in enumerate(relevance):
        w = [(i // (len(x) // 3), v.item()) for i, v in enumerate(weight[j])]
        c = [float(a) * v for a, (_, v) in zip(x, w, strict=True)]
        found += float(r) * torch.tensor(share(c, bias[j].item(), w), dtype=x.dtype)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FIRST)
def test_rules_of_a_convolution(name, bias):
    """zennit: test_rules.py::test_linear_rule, a convolution of the whole picture"""
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 4, (2, 3), bias=bias)
    f = cut_classifier(nn.Sequential(conv, nn.Flatten()).double(), "0", preprocessing=plain(2, 3))
    x = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(2)).double()
    classes = torch.tensor([1, 3])
    found = signed_lrp(f, classes, x, name).flatten(1)
    biases = conv.bias if bias else torch.zeros(4)
    for n, c in enumerate(classes.tolist()):
        r = torch.zeros(4).double()
        r[c] = f(x)[n, c].detach()
        expected = by_shares(conv.weight.flatten(1), biases, x[n].flatten(), r, FIRST[name])
        assert expected.any()
        assert_near(found[n], expected, 1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_rules_of_a_linear_layer(name):
    """zennit: test_rules.py::test_linear_rule, a linear layer"""
    torch.manual_seed(2)
    linear = nn.Linear(12, 5)
    model = nn.Sequential(nn.Identity(), nn.Flatten(), linear).double()
    f = cut_classifier(model, "0", preprocessing=plain(2, 2))
    x = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    found = signed_lrp(f, torch.tensor([2]), x, name)[0].flatten()
    r = torch.zeros(5).double()
    r[2] = f(x)[0, 2].detach()
    expected = by_shares(linear.weight, linear.bias, x[0].flatten(), r, LINEAR[name])
    assert_near(found, expected, 1e-6)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.SiLU])
def test_activations_pass_relevance(act):
    """zennit: test_rules.py::test_simple_rule, Pass"""
    _, f = pixel(act(), nn.Flatten(), weighted([1, 2, -1], [0, 1, 1], flat=True))
    x = pixels([0.5, -0.4, 2.0])
    a = act()(x).flatten()
    expected = a * torch.tensor([1.0, 2.0, -1.0])
    assert_near(signed_lrp(f, torch.tensor([0]), x, "epsilon").flatten(), expected, 1e-4)


@pytest.mark.parametrize("name", ["composite", "gamma"])
def test_the_first_layer_has_its_own_rule(name):
    """zennit: test_composites.py::test_composite_special_first_layer_map_registered"""
    torch.manual_seed(3)
    one, two = nn.Conv2d(3, 4, 2, bias=False).double(), nn.Conv2d(4, 4, 2, bias=False).double()
    model = nn.Sequential(one, nn.ReLU(), two, nn.Flatten()).eval()
    f = cut_classifier(model, "1", preprocessing=plain(3, 3))
    x = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(4)).double()
    c = int(model(x).argmax())
    r = torch.zeros(4, 1, 1).double()
    r[c] = model(x)[0, c].detach()
    a = model[:2](x)[0].detach()
    inner = shares.z_plus if name == "composite" else shares.gamma
    with torch.no_grad():
        r = shares.through_convolution(a, two, r, inner)
        expected = shares.through_convolution(x[0], one, r, FIRST[name])
    assert expected.any()
    assert_near(signed_lrp(f, torch.tensor([c]), x, name)[0], expected, 1e-5)


@pytest.mark.parametrize(
    "method", ["lrp", "lrp-epsilon", "lrp-gamma", "lrp-alphabeta", "clrp", "rap"]
)
def test_rules_are_taken_off(method):
    """zennit: test_composites.py::test_composite_layer_map_registered

    test_core.py::test_composite_context
    """
    model = resnet(8, 8)
    f = cut_classifier(model, "5", preprocessing=plain(8, 8))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)).double()
    before, first = f.weights_hash(), attribution_map(f, x, [0, 1], method)
    assert torch.equal(attribution_map(f, x, [0, 1], method), first)
    assert f.weights_hash() == before
    for module in (*model.modules(), *f.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_every_layer_has_a_rule():
    """zennit: test_composites.py, where layers without a rule keep their gradient"""
    model = resnet(8, 8)
    f = cut_classifier(model, "5", preprocessing=plain(8, 8))
    network = canonical(f)
    composite = decomposition.composite_of(f, network, decomposition.named(f, "composite"))
    kinds = {}
    for name, layer in network.named_children():
        kinds.setdefault(type(layer), []).append(composite.module_map({}, name, layer))
    assert {nn.Conv2d, nn.Linear, nn.ReLU, nn.AdaptiveAvgPool2d} <= set(kinds)
    without = {kind for kind, hooks in kinds.items() if None in hooks}
    # Their gradient is their rule.
    assert without == {nn.Flatten}
    first, *others = kinds[nn.Conv2d]
    assert all(type(hook) is not type(first) for hook in others)


NORMS = {
    "convolution": ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], 4 * 36),
    "convolution without a bias": ([nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], 4 * 36),
    "groups": ([nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)], 6 * 36),
    "transposed": ([nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)], 4 * 81),
    "not affine": ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)], 4 * 36),
}


def with_statistics(model):
    """The network in eval mode, its norms not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.1, 2)
                nn.init.normal_(module.bias)
    return model.double().eval()


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_folded(kind):
    """zennit: test_canonizers.py::test_merge_batchnorm_consistency, ::test_merge_batchnorm_apply"""
    torch.manual_seed(5)
    layers, count = NORMS[kind]
    last = [nn.ReLU(), nn.Flatten(), nn.Linear(count, 5), nn.BatchNorm1d(5)]
    model = with_statistics(nn.Sequential(*layers, *last))
    f = cut_classifier(model, "1", preprocessing=plain(8, 8))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    before, network = f(x), canonical(f)
    assert len(norms(f)) == 2 and not norms(network)
    assert_near(network(x), before)
    assert torch.equal(f(x), before)


def test_a_vggs_norms_are_folded():
    """zennit: test_torchvision.py::test_vgg_canonizer"""
    torch.manual_seed(6)
    layers = []
    for ins, outs in ((3, 4), (4, 6), (6, 6)):
        layers += [nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(inplace=True)]
    model = with_statistics(nn.Sequential(*layers, nn.Dropout(), nn.Linear(8, 4)))
    f = cut_classifier(model, preprocessing=plain(16, 16))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6)).double()
    assert len(norms(f)) == 3 and not norms(canonical(f))
    assert_near(canonical(f)(x), model(x))


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_a_resnets_norms_are_folded_and_its_sums_are_modules(name):
    """zennit: test_torchvision.py::test_resnet_canonizer"""
    from torchvision.models import get_model

    torch.manual_seed(7)
    model = with_statistics(resnet(16, 16) if name == "small" else get_model(name))
    f = cut_classifier(model, "5" if name == "small" else None, preprocessing=plain(16, 16))
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).double()
    before, network = f(x), canonical(f)
    assert not norms(network)
    blocks = [m for m in f.modules() if isinstance(m, Residual) or type(m).__name__ == "BasicBlock"]
    sums = [m for m in network.modules() if type(m).__name__ == "Sum"]
    assert len(sums) == (2 if name == "small" else 8) >= len(blocks)
    assert_near(network(x), before, 1e-8)
    assert torch.equal(f(x), before)


class Logging(nn.Module):
    """A layer that keeps what it is given, image by image."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen += x.detach().clone().split(1)
        return x * 1


def logged(side=6):
    """A linear network that logs its inputs, an input, and its slope for class 1."""
    torch.manual_seed(8)
    conv = nn.Conv2d(3, 2, side)
    model = nn.Sequential(Logging(), conv, nn.Flatten()).double().eval()
    f = cut_classifier(model, "1", preprocessing=plain(side, side), own=True)
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(8)).double()
    model[0].seen.clear()
    return model[0].seen, f, x, conv.weight[1:].detach()


def test_smooth_grad_without_noise_is_the_gradient(monkeypatch):
    """zennit: test_attribution.py::test_smooth_grad_single"""
    case = resnet(8, 8)
    f = cut_classifier(case, "5", preprocessing=plain(8, 8))
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9)).double()
    monkeypatch.setattr(gradient, "NOISE", 0.0)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(case(x)[0, 2], x)
    assert_near(signed_smooth_grad(f, torch.tensor([2]), x), expected, 1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.15, 0.5])
def test_the_noise_of_smooth_grad(noise, monkeypatch):
    """zennit: test_attribution.py::test_smooth_grad_distribution"""
    seen, f, x, slope = logged()
    monkeypatch.setattr(gradient, "NOISE", noise)
    found = signed_smooth_grad(f, torch.tensor([1]), x)
    assert len(seen) == gradient.NOISY
    stack = torch.cat(seen)
    spread = (stack - stack.mean(0)).square().mean().sqrt() / (x.max() - x.min())
    assert float(spread) == pytest.approx(noise, rel=0.1, abs=1e-9)
    assert_near(found, slope, 1e-6)


def test_the_path_of_integrated_gradients():
    """zennit: test_attribution.py::test_integrated_gradients_path

    ::test_integrated_gradients_single
    """
    seen, f, x, slope = logged()
    found = signed_integrated_gradients(f, torch.tensor([1]), x)
    assert len(seen) == gradient.STEPS
    direction = x / x.norm()
    for step in seen:
        assert_near(step / step.norm(), direction, 1e-6)
    lengths = [float(step.norm() / x.norm()) for step in seen]
    nodes, _ = np.polynomial.legendre.leggauss(gradient.STEPS)
    assert_near(sorted(lengths), (np.sort(nodes) + 1) / 2, 1e-5)
    assert_near(found, x * slope, 1e-6)


@pytest.mark.parametrize("share", [1 / 6, 1 / 3, 1 / 2])
def test_windows_of_occlusion_that_do_not_overlap(share, monkeypatch):
    """zennit: test_attribution.py::test_occlusion_disjunct"""
    seen, f, x, slope = logged()
    monkeypatch.setattr(perturbation, "WINDOW", share)
    monkeypatch.setattr(perturbation, "STRIDE", 1.0)
    found = signed_occlusion(f, torch.tensor([1]), x)
    hidden = [x - v for v in seen if not torch.equal(v, x)]
    assert len(hidden) == round(1 / share) ** 2
    assert_near(sum(hidden), x)
    side = round(6 * share)
    terms = (x * slope).sum(1)
    sums = nn.functional.avg_pool2d(terms, side) * side**2
    assert_near(found, sums.repeat_interleave(side, 1).repeat_interleave(side, 2), 1e-6)


def test_a_window_of_occlusion_that_hides_all(monkeypatch):
    """zennit: test_attribution.py::test_occlusion_single"""
    seen, f, x, slope = logged()
    monkeypatch.setattr(perturbation, "WINDOW", 1.0)
    monkeypatch.setattr(perturbation, "STRIDE", 1.0)
    found = signed_occlusion(f, torch.tensor([1]), x)
    assert sum(not v.any() for v in seen) == 1
    assert_near(found, (x * slope).sum().expand_as(found), 1e-6)


def test_relevance_begins_at_the_class(monkeypatch):
    """zennit: test_attribution.py::test_gradient_attributor_output_fn"""
    _, f = pixel(nn.Flatten(), weighted([1, 2, 3], [3, 2, 1], flat=True))
    x = pixels([1.0, 1.0, 2.0])
    assert_near(signed_lrp(f, torch.tensor([1]), x, "epsilon").sum().item(), 7.0, 1e-5)
    ones = lambda logits, c: torch.ones_like(logits)  # noqa: E731
    monkeypatch.setattr(decomposition, "score_of_class", ones)
    assert_near(signed_lrp(f, torch.tensor([1]), x, "epsilon").sum().item(), 2.0, 1e-5)


def test_relevance_of_rap_keeps_the_magnitude():
    """zennit: test_rules.py, for the rules that are our own"""
    model = resnet(8, 8)
    f = cut_classifier(model, "5", preprocessing=plain(8, 8))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)).double()
    y = f(x).gather(1, torch.tensor([[0], [1]]))[:, 0].abs()
    assert_near(signed_rap(f, torch.tensor([0, 1]), x).sum((1, 2, 3)), y, 0.01)
