"""A classifier taken apart: the same logits and gradients, elementary modules, f untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from aftcli.attributions.canonical import canonical
from aftcli.attributions.elements import Product, Sum
from aftcli.core.cam import score_gradient
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.errors import AftError
from tests.helpers.small import CELLS, KINDS, SIZE, small


class Block(nn.Module):
    """A residual block as torchvision writes it: one activation for all, sums in place."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Functional(nn.Module):
    """A network that writes most of its layers as functions and methods."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.block = Block(6)
        self.mix = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu6(self.bn(self.conv(x)), inplace=True)
        x = F.max_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, padding=1)
        x = self.block(x).add_(1.0)
        x = F.dropout(self.mix(x) + self.shift, training=self.training)
        x = F.hardtanh(x, 0.0, 0.5).mul(F.adaptive_avg_pool2d(x, 1).sigmoid())
        return self.fc(x.mean((2, 3)))


def random_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.3, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


@pytest.fixture(scope="module")
def functional():
    torch.manual_seed(0)
    model = random_statistics(Functional()).double()
    return cut_classifier(model, "block", preprocessing=Preprocessing(size=SIZE))


def every(f):
    """Return what must stay the same: modules, their settings, weights."""
    tensors = {name: t.clone() for name, t in f.state_dict().items()}
    settings = [
        (type(m), m.training, getattr(m, "inplace", None), len(m._forward_hooks), dir(m))
        for m in f.modules()
    ]
    flags = [p.requires_grad for p in f.parameters()]
    return tensors, settings, flags


def calls(network):
    return [n.target for n in network.graph.nodes if n.op == "call_module"]


def functions(network):
    return {
        getattr(n.target, "__name__", n.target)
        for n in network.graph.nodes
        if n.op in ("call_function", "call_method")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_f(kind):
    f, x, class_index = (getattr(small(kind), k) for k in ("f", "x", "class_index"))
    whole, head = canonical(f, part="all"), canonical(f, part="head")
    activation = f.activation(x)
    assert_close(whole(x), f(x), rtol=1e-10, atol=1e-12)
    assert_close(head(activation), f(x), rtol=1e-10, atol=1e-12)
    a = activation.clone().requires_grad_()
    y = head(a).gather(1, class_index[:, None]).sum()
    (gradient,) = torch.autograd.grad(y, a)
    assert_close(gradient, score_gradient(f, activation, class_index), rtol=1e-9, atol=1e-12)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in whole.modules())


def test_functions_and_methods_become_modules(functional):
    f, x = functional, torch.randn(3, 3, *SIZE, dtype=torch.float64)
    network = canonical(f)
    assert_close(network(x), f(x), rtol=1e-10, atol=1e-12)
    kinds = [type(network.get_submodule(name)) for name in calls(network)]
    for kind, count in {nn.ReLU: 2, Sum: 2, Product: 1, nn.ReLU6: 1, nn.Hardtanh: 1}.items():
        assert kinds.count(kind) == count, kind
    assert kinds.count(nn.AdaptiveAvgPool2d) == 2 and nn.BatchNorm2d not in kinds
    # A constant is added by a function: no rule shares relevance with it. What several
    # non-linearities read is cloned.
    assert functions(network) == {"stack", "add", "flatten", "clone"}
    for node in network.graph.nodes:
        if node.op == "call_module":
            layer, (x, *_) = network.get_submodule(node.target), node.all_input_nodes
            assert len(x.users) == 1 or isinstance(layer, (nn.Conv2d, Product))
    assert len(calls(network)) == len(set(calls(network)))
    modules = [network.get_submodule(name) for name in calls(network)]
    assert len({id(m) for m in modules}) == len(modules)
    assert not any(getattr(m, "inplace", False) for m in modules)


def test_relu6_is_a_difference_of_two_relus(functional):
    f, x = functional, 4 * torch.randn(3, 3, *SIZE, dtype=torch.float64)
    network = canonical(f, split_relu6=True)
    kinds = [type(network.get_submodule(name)) for name in calls(network)]
    assert kinds.count(nn.ReLU) == 6 and nn.ReLU6 not in kinds and nn.Hardtanh not in kinds
    assert_close(network(x), f(x), rtol=1e-10, atol=1e-12)
    x.requires_grad_()
    expected = torch.autograd.grad(f(x)[:, 1].sum(), x)[0]
    found = torch.autograd.grad(network(x)[:, 1].sum(), x)[0]
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_captum_completes_on_split_relu6():
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU6(), Block(6), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 5)).double()
    nn.init.normal_(random_statistics(model)[0].weight, 0, 2)
    f = cut_classifier(model, "2", preprocessing=Preprocessing(size=SIZE))
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    network, target = canonical(f, split_relu6=True), torch.tensor([1, 3])
    assert (model[0](torch.zeros(1, 3, *SIZE).double()).amax() < 6) and f.stem(x).amax() == 6
    with pytest.warns(UserWarning):
        found = captum.DeepLift(network).attribute(x, 0 * x, target=target)
    expected = (f(x) - f(0 * x)).gather(1, target[:, None]).squeeze(1)
    assert_close(found.sum((1, 2, 3)), expected, rtol=1e-8, atol=1e-10)


def test_f_and_the_random_state_stay_as_they_are(functional):
    before, state = every(functional), torch.get_rng_state()
    network = canonical(functional)
    for module in network.modules():
        module.register_forward_hook(lambda *_: None)
    after = every(functional)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_trained_in_place_are_noticed(functional):
    f, x = copy.deepcopy(functional), torch.randn(2, 3, *SIZE, dtype=torch.float64)
    canonical(f)
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.mul_(1.1)
    assert_close(canonical(f)(x), f(x), rtol=1e-10, atol=1e-12)


def test_weights_computed_in_forward_are_constants():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    torch.manual_seed(0)
    layers = [Standardised(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 5)).double()
    f = cut_classifier(model, "0", preprocessing=Preprocessing(size=SIZE))
    network = canonical(f)
    assert [type(network.get_submodule(name)) for name in calls(network)][0] is nn.Conv2d
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    assert_close(network(x), f(x), rtol=1e-10, atol=1e-12)


def test_a_network_that_cannot_be_taken_apart_says_what_to_use():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), Branching(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 5))
    f = cut_classifier(model, "1", preprocessing=Preprocessing(size=SIZE))
    with pytest.raises(AftError, match="taken apart.*integratedgradients"):
        canonical(f)


def test_code_that_fails_when_it_is_traced_again_prints_nothing(capsys):
    class WithToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.token, self.fc = nn.Parameter(torch.zeros(1, 4, 1)), nn.Linear(4, 5)

        def forward(self, x):
            cells = self.mix(self.conv(x)).flatten(2)
            token = self.token.expand(cells.shape[0], -1, -1)
            return self.fc(torch.cat([token, cells], 2).mean(2))

    f = cut_classifier(WithToken().eval(), "mix", preprocessing=Preprocessing(size=SIZE))
    with pytest.raises(AftError, match="taken apart.*integratedgradients"):
        canonical(f)
    assert capsys.readouterr() == ("", "")


def test_a_copy_with_other_logits_is_refused(functional, monkeypatch):
    from aftcli.attributions.canonical import _Builder

    monkeypatch.setattr(_Builder, "_branch", lambda self, node: self._skip(node))
    with pytest.raises(AftError, match="changes its logits.*integratedgradients"):
        canonical(functional)


def test_a_classifier_in_training_mode_is_refused(functional):
    f = copy.deepcopy(functional).train()
    with pytest.raises(AftError, match="training mode"):
        canonical(f)


def test_lite0_is_taken_apart(lite0, chelsea):
    network = canonical(lite0)
    with torch.no_grad():
        logits, found = lite0.head(lite0.activation(chelsea)), network(chelsea)
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()
    kinds = {type(m).__name__ for m in network.modules()}
    elementary = {"Conv2d", "Conv2dSame", "ReLU6", "Sum", "AdaptiveAvgPool2d", "Flatten", "Linear"}
    assert kinds == elementary | {"GraphModule"}
    assert functions(network) == {"stack"}


def test_the_head_takes_activations_of_any_size():
    f = small("linear").f
    activation = torch.randn(2, 8, *(2 * side for side in CELLS), dtype=torch.float64)
    assert_close(canonical(f, part="head")(activation), f.head(activation))
