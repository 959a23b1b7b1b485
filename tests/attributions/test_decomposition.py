"""Relevance propagation against its equations neuron by neuron, captum, and conservation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import get_model

from tests.attributions.test_canonical import every, random_statistics
from tests.helpers.small import KINDS, small
from tests.reference import decomposition as reference

pytest.importorskip("zennit")

from aftcli.attributions import decomposition  # noqa: E402
from aftcli.attributions.activation import (
    relevance_cam,  # noqa: E402
    signed_relevance,  # noqa: E402
)
from aftcli.attributions.canonical import canonical  # noqa: E402
from aftcli.attributions.decomposition import (
    Rules,  # noqa: E402
    contrast,  # noqa: E402
    named,  # noqa: E402
    relevance,  # noqa: E402
    score_of_class,  # noqa: E402
    signed_clrp,  # noqa: E402
    signed_lrp,  # noqa: E402
    signed_rap,  # noqa: E402
)
from aftcli.core.classes import Preprocessing  # noqa: E402
from aftcli.core.classifier import cut_classifier  # noqa: E402
from aftcli.core.methods import METHODS  # noqa: E402
from aftcli.errors import AftError  # noqa: E402
from aftcli.models.load import load_classifier  # noqa: E402

SIZE = (8, 10)
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
LOW = [-m / s for m, s in zip(MEAN, STD, strict=True)]
HIGH = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]
NAMES = ("lrp", "lrp-epsilon", "lrp-gamma", "lrp-alphabeta", "clrp", "rap", "relevancecam")
# First convolution, others, linear layers.
RULES = {
    "composite": (reference.flat, reference.z_plus, reference.epsilon),
    "epsilon": (reference.epsilon,) * 3,
    "gamma": (reference.box(LOW, HIGH), reference.gamma, reference.epsilon),
    "alpha-beta": (reference.alpha_beta, reference.alpha_beta, reference.epsilon),
    "z-plus": (reference.z_plus_without_bias,) * 3,
    "z-plus-box": (
        reference.box(LOW, HIGH),
        reference.z_plus_without_bias,
        reference.z_plus_without_bias,
    ),
}


def residual(seed, bias=True):
    torch.manual_seed(seed)
    model = random_statistics(reference.Residual(bias=bias)).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(2)
    # Every class has something that speaks for it: else z+ has nowhere to go.
    model.fc.weight[:, 0].abs_()
    preprocessing = Preprocessing(size=SIZE, mean=MEAN, std=STD)
    f = cut_classifier(model, "conv1", preprocessing=preprocessing)
    x = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return model, f, x, torch.tensor([0, 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_rules_are_their_equations(name):
    model, f, x, class_index = residual(0)
    found = signed_lrp(f, class_index, x, name)
    for n, c in enumerate(class_index.tolist()):
        start = torch.zeros(4, dtype=x.dtype)
        start[c] = model(x[n : n + 1])[0, c]
        by_magnitude = name != "epsilon"
        expected = reference.propagated(model, x[n], start, *RULES[name], by_magnitude)
        assert expected.abs().max() > 1e-4
        assert_close(found[n], expected.to(x), rtol=1e-7, atol=1e-10)


# alpha-beta conserves only where a neuron has contributions of both signs.
@pytest.mark.parametrize("name", sorted(RULES.keys() - {"alpha-beta"}))
def test_relevance_is_conserved_without_biases(name):
    _, f, x, class_index = residual(3, bias=False)
    y = f(x).gather(1, class_index[:, None]).squeeze(1)
    found = signed_lrp(f, class_index, x, name)
    assert_close(found.sum((1, 2, 3)), y, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module", params=["resnet50", "vgg16", "efficientnet_lite0"])
def without_biases(request):
    """A network as its authors wrote it, less what keeps a share of the relevance."""
    if request.param == "efficientnet_lite0":
        f = load_classifier(request.param)
    else:
        torch.manual_seed(0)
        f = cut_classifier(get_model(request.param), preprocessing=Preprocessing(size=(64, 64)))
    with torch.no_grad():
        for name, values in [*f.named_parameters(), *f.named_buffers()]:
            if name.endswith(("bias", "running_mean")):
                values.zero_()
    return f


@pytest.mark.slow
def test_relevance_is_conserved_in_whole_networks(without_biases):
    f = without_biases
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (f.preprocessing.mean, f.preprocessing.std)
    )
    x = (x - mean) / std
    class_index = f(x).argmax(1)
    y = f(x).gather(1, class_index[:, None])[:, 0]
    for name in ("composite", "epsilon", "gamma"):
        assert_close(signed_lrp(f, class_index, x, name).sum((1, 2, 3)), y, rtol=1e-2, atol=0)
    assert_close(signed_rap(f, class_index, x).sum((1, 2, 3)), y.abs(), rtol=0.03, atol=0)
    contrasted = signed_clrp(f, class_index, x).sum((1, 2, 3))
    assert_close(contrasted, torch.zeros_like(y), rtol=0, atol=1e-4 * y.abs().max().item())


def test_epsilon_rule_is_gradient_times_input_without_biases():
    _, f, x, class_index = residual(4, bias=False)
    x = (0.3 * x).requires_grad_()
    y = f(x).gather(1, class_index[:, None]).sum()
    expected = x * torch.autograd.grad(y, x)[0]
    found = signed_lrp(f, class_index, x, "epsilon")
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_bias_keeps_its_share():
    """One linear layer on the mean: what is missing from y^c is its bias."""
    s = small("linear")
    head = canonical(s.f, part="head")
    activation = s.f.activation(s.x)
    found = relevance(s.f, head, s.class_index, activation, named(s.f, "epsilon"), score_of_class)
    y = s.f(s.x).gather(1, s.class_index[:, None]).squeeze(1)
    bias = s.f.linear_head.linear.bias[s.class_index]
    assert_close(found.sum((1, 2, 3)), y - bias, rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    """A network that captum can take: no sums, no ReLU6, no flattening module."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(self.mean(self.pool(x)).flatten(1))


@pytest.mark.parametrize("name", ["epsilon", "gamma", "z-plus"])
def test_rules_are_captums(name, monkeypatch):
    captum = pytest.importorskip("captum.attr")
    from captum.attr._utils import lrp_rules
    from zennit.rules import Epsilon, Gamma

    torch.manual_seed(0)
    model = Plain().double().eval()
    if name == "gamma":
        # zennit raises positive biases by gamma too, as the tutorial of the rule's authors does.
        for module in (model.conv1, model.conv2):
            nn.init.zeros_(module.bias)
    f = cut_classifier(model, "conv2", preprocessing=Preprocessing(size=SIZE))
    # captum's z+ and gamma take inputs that are not negative.
    x, class_index = torch.rand(2, 3, *SIZE, dtype=torch.float64), torch.tensor([1, 3])
    theirs = {
        "epsilon": lrp_rules.EpsilonRule(1e-6),
        "gamma": lrp_rules.GammaRule(0.25),
        "z-plus": lrp_rules.Alpha1_Beta0_Rule(set_bias_to_zero=True),
    }[name]
    if name == "gamma":
        # captum has no box rule.
        chosen = Rules(Gamma(0.25), Gamma(0.25), Epsilon(1e-6), None, None)
        monkeypatch.setattr(decomposition, "named", lambda *_: chosen)
    found = signed_lrp(f, class_index, x, name)
    for module in model.children():
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and name != "gamma"):
            module.rule = theirs
    expected = captum.LRP(model).attribute(x.clone().requires_grad_(), target=class_index)
    assert expected.abs().max() > 1e-3
    assert_close(found, expected.detach(), rtol=1e-3, atol=1e-6)


def test_contrast_is_the_difference_of_two_relevances():
    _, f, x, class_index = residual(5, bias=False)
    logits = f(x)
    y = logits.gather(1, class_index[:, None]).abs()

    def own(logits, c):
        return torch.zeros_like(logits).scatter(1, c[:, None], y)

    def dual(logits, c):
        return (y / 3).expand_as(logits).scatter(1, c[:, None], 0)

    network = canonical(f)
    box = named(f, "z-plus-box")
    r, r_dual = (relevance(f, network, class_index, x, box, start) for start in (own, dual))
    for part in (r, r_dual):
        assert_close(part.sum((1, 2, 3)), y[:, 0], rtol=1e-3, atol=1e-4)
    found = signed_clrp(f, class_index, x)
    assert_close(found, r - r_dual)
    assert_close(METHODS["clrp"].load()(f, None, class_index, x), (r - r_dual).sum(1).relu())
    assert_close(contrast(logits, class_index).sum(1), torch.zeros(2, dtype=x.dtype))


@pytest.mark.parametrize("seed", [0, 1])
def test_rap_is_its_equations(seed):
    model, f, x, class_index = residual(seed)
    found = signed_rap(f, class_index, x)
    y = f(x).gather(1, class_index[:, None]).abs()
    assert (found < 0).any() and (found > 0).any()
    for n, c in enumerate(class_index.tolist()):
        start = torch.zeros(4, dtype=x.dtype)
        start[c] = y[n, 0]
        box, linear = reference.box(LOW, HIGH), reference.absolute
        expected = reference.propagated(model, x[n], start, box, reference.RELATIVE, linear)
        assert_close(found[n], expected.to(x), rtol=1e-6, atol=1e-9)
    assert_close(found.sum((1, 2, 3)), y[:, 0], rtol=1e-3, atol=1e-4)


def test_relevance_cam_of_pooling_and_a_linear_layer():
    """alpha_k = sum_j s_j p_k w_jk^+ / sum_k' p_k' w_jk'^+, p the mean of A, s the contrast."""
    s = small("linear")
    activation = s.f.activation(s.x)
    p, w = activation.mean((2, 3)), s.f.linear_head.linear.weight.clamp(min=0)
    start = contrast(s.f(s.x), s.class_index)
    part = p[:, None] * w / (p[:, None] * w).sum(2, keepdim=True)
    alpha = (start[:, :, None] * part).sum(1)
    expected = (alpha[:, :, None, None] * activation).sum(1).relu()
    found = relevance_cam(s.f, activation, s.class_index, s.x)
    assert expected.amax((1, 2)).min() > 1e-3
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_relevance_cam_goes_through_two_linear_layers():
    s = small("mlp")
    activation = s.f.activation(s.x)
    first, second = (m for m in s.model.modules() if isinstance(m, nn.Linear))
    share = reference.z_plus_without_bias
    starts = contrast(s.f(s.x), s.class_index)
    with torch.no_grad():
        pooled = s.model.pool(activation).flatten(1)
        hidden = first(pooled).relu()
        found = s.model.pool(signed_relevance(s.f, activation, s.class_index))
        for n, start in enumerate(starts):
            r = reference.through_linear(hidden[n], second, start, share)
            r = reference.through_linear(pooled[n], first, r, share)
            # Cells overlap in adaptive pooling: sums of channels are what it keeps.
            whole = signed_relevance(s.f, activation[n : n + 1], s.class_index[n : n + 1])
            assert_close(whole[0].sum((1, 2)), r.view(8, -1).sum(1), rtol=1e-4, atol=1e-6)
    assert found.shape == (3, 8, 2, 3)


def test_a_gate_takes_no_relevance():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
            self.squeeze = nn.Conv2d(6, 6, 1)
            self.fc = nn.Linear(6, 4, bias=False)

        def forward(self, x):
            x = self.conv(x).relu()
            x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    f = cut_classifier(Gated().double(), "conv", preprocessing=Preprocessing(size=SIZE))
    x, class_index = torch.randn(2, 3, *SIZE, dtype=torch.float64), torch.tensor([1, 2])
    y = f(x).gather(1, class_index[:, None]).squeeze(1)
    found = signed_lrp(f, class_index, x, "epsilon")
    assert_close(found.sum((1, 2, 3)), y, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS[name].load() for name in NAMES], ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_each_image_alone(method, kind, monkeypatch):
    monkeypatch.setattr(decomposition, "BATCH", 2)
    s = small(kind)
    with torch.no_grad():
        activation = s.f.activation(s.x)
        found = method(s.f, activation, s.class_index, s.x)
        parts = zip(*(t.split(1) for t in (activation, s.class_index, s.x)), strict=True)
        alone = [method(s.f, *part) for part in parts]
    size = activation.shape[2:] if method is relevance_cam else s.x.shape[2:]
    assert found.shape == (3, *size) and found.min() >= 0 and not found.requires_grad
    assert_close(found, torch.cat(alone), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [METHODS[name].load() for name in NAMES], ids=NAMES)
def test_f_and_the_random_state_stay_as_they_are(method):
    _, f, x, class_index = residual(6)
    before, state = every(f), torch.get_rng_state()
    with torch.no_grad():
        activation = f.activation(x)
        method(f, activation, class_index, x)
        with pytest.raises((RuntimeError, IndexError)):
            method(f, activation, class_index + 100, x)
    after = every(f)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.Softmax(1)])
def test_a_layer_without_a_rule_says_what_to_use(layer):
    modules = [nn.Conv2d(3, 4, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    f = cut_classifier(nn.Sequential(*modules), "0", preprocessing=Preprocessing(size=SIZE))
    x, class_index = torch.randn(1, 3, *SIZE), torch.tensor([0])
    with pytest.raises(AftError, match=f"no rule.*{type(layer).__name__}.*integratedgradients"):
        METHODS["lrp"].load()(f, f.activation(x), class_index, x)
    with pytest.raises(AftError, match="no rule"):
        relevance_cam(f, f.activation(x), class_index, x)


def test_a_weighted_sum_of_branches_has_no_rule():
    class Weighted(nn.Conv2d):
        def forward(self, x):
            x = super().forward(x)
            return torch.add(x, x.relu(), alpha=2)

    modules = [Weighted(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    f = cut_classifier(nn.Sequential(*modules), "0", preprocessing=Preprocessing(size=SIZE))
    x, class_index = torch.randn(1, 3, *SIZE), torch.tensor([0])
    with pytest.raises(AftError, match=r"no rule.*add\(\)"):
        METHODS["lrp"].load()(f, f.activation(x), class_index, x)


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS[name].load() for name in NAMES], ids=NAMES)
def test_lite0_has_a_map(method, lite0, chelsea):
    with torch.no_grad():
        activation = lite0.activation(chelsea)
        class_index = lite0(chelsea).argmax(1)
        found = method(lite0, activation, class_index, chelsea)
    assert found.isfinite().all() and found.max() > 0
