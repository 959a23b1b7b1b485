"""The cut f(x) = head(layer(stem(x))) equals the uncut network bit for bit (§4.2)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.cutting.cut import cut
from aftcli.errors import AftError
from aftcli.models.load import load_classifier
from tests.helpers.compare import uncut

# Layer l and the shape of A: the last convolution with spatial extent, its norm and activation.
NETWORKS = {
    "resnet18": ("layer4.1", (512, 7, 7)),
    "resnet50": ("layer4.2", (2048, 7, 7)),
    "vgg16": ("features.28+features.29", (512, 14, 14)),
    "vgg16_bn": ("features.40+features.41+features.42", (512, 14, 14)),
    "densenet121": ("features.denseblock4+features.norm5", (1024, 7, 7)),
    "mobilenet_v3_large": ("features.16", (960, 7, 7)),
    "efficientnet_b0": ("features.8", (1280, 7, 7)),
    "convnext_tiny": ("features.7.2", (768, 7, 7)),
    "squeezenet1_0": ("features.12", (512, 13, 13)),
    "regnet_y_400mf": ("trunk_output.block4.block4-5", (440, 7, 7)),
    "inception_v3": ("Mixed_7c", (2048, 8, 8)),
    "timm:tf_efficientnet_lite0": ("conv_head+bn2", (1280, 7, 7)),
    "timm:resnet26d": ("layer4.1", (2048, 7, 7)),
}
OTHER_LAYERS = {"resnet50": ["layer3.0", "maxpool"], "vgg16": ["features.21"]}


def as_published(name):
    """The network as its authors wrote it, without numbers."""
    # RegNets compute their widths with tensors.
    with torch.device("cpu" if "regnet" in name else "meta"):
        if name.startswith("timm:"):
            import timm

            return timm.create_model(name.removeprefix("timm:"))
        # With published weights Inception converts ImageNet's usual normalisation to its own.
        options = {"transform_input": True} if name == "inception_v3" else {}
        return get_model(name, **options)


def spread_out(model):
    """Let random batch norms and layer scales pass on enough for inputs to tell apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("layer_scale"):
                value.uniform_(0.5, 1, generator=generator)
            elif value.dim() == 1:
                value.add_(torch.rand(value.shape, generator=generator) * 0.5)


def assert_bit_identical(f, model, x):
    with torch.no_grad():
        logits = model(x)
        g, activation = f.at(x)
        before = activation.clone()
        assert torch.equal(g.head(activation), logits)
        # Cached activations and a second CAM rely on it.
        assert torch.equal(activation, before)
    # Comparing numbers that do not depend on x would show nothing.
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])
    assert activation.shape[1:] == f.activation_shape


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    f = load_classifier(request.param, weights=False)
    spread_out(f)
    model = uncut(f, as_published(request.param))
    return request.param, f, model, torch.randn(2, 3, *f.preprocessing.size)


@pytest.mark.slow
def test_parts_equal_the_uncut_network_bit_for_bit(network):
    _, f, model, x = network
    assert_bit_identical(f, model, x)


@pytest.mark.slow
def test_default_layer_is_the_last_convolutional_one(network):
    name, f, _, _ = network
    assert (f.layer_name, f.activation_shape) == NETWORKS[name]
    assert f.preprocessing.size == ((299, 299) if name == "inception_v3" else (224, 224))
    assert (len(f.classes), f.name) == (1000, name)


@pytest.mark.slow
def test_other_layers_can_be_cut_bit_for_bit(network):
    name, default, model, x = network
    for layer in OTHER_LAYERS.get(name, []):
        f = cut_classifier(uncut(default, as_published(name)), layer, own=True)
        assert f.layer_name == layer
        # A is what the named module gives.
        seen = []
        handle = model.get_submodule(layer).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.clone())
        )
        assert_bit_identical(f, model, x)
        handle.remove()
        with torch.no_grad():
            assert torch.equal(f.activation(x), seen[0])


@pytest.mark.slow
def test_weights_are_divided_into_w0_w1_and_w2_without_rest(network):
    name, f, model, _ = network
    parts = [dict(part.named_parameters()) for part in (f.stem, f.layer, f.head)]
    together = {name: p for part in parts for name, p in part.items()}
    assert sum(map(len, parts)) == len(together)
    for key, p in model.named_parameters():
        assert key.startswith("AuxLogits.") or torch.equal(together.pop(key), p)
    assert not together
    # w1 are the weights of the layer's modules.
    owners = tuple(f"{module}." for module in f.layer_name.split("+"))
    assert parts[1]
    assert all(key.startswith(owners) for key in parts[1])


# Networks of the user's own

SIZE = (40, 32)


class Fuse(nn.Module):
    """A module with two tensor inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, a, b):
        return self.conv(a) + b


class TwoBranches(nn.Module):
    """Two branches from an in-place activation meet in one module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.fuse = Fuse()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        h = F.relu(self.stem(x), inplace=True)
        h = self.fuse(self.left(h), self.right(h))
        h = F.relu(h, inplace=True)
        return self.fc(h.mean((2, 3)))


class InPlace(nn.Module):
    """After `conv` everything that can write into its input does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.act = nn.Hardswish(inplace=True)
        self.fc = nn.Linear(8, 4)
        self.write = None

    def forward(self, x):
        h = self.write(self, self.conv(self.stem(x)))
        h = self.act(h)
        return self.fc(h.flatten(2).mean(2))


def relu(self, h):
    return F.relu(h, inplace=True)


def relu_positional(self, h):
    return F.relu(h, True)


def relu_module(self, h):
    return self.act(h)


def relu_method(self, h):
    return h.relu_().mul_(2)


def residual(self, h):
    y = self.branch(h * 2)
    y += h
    return F.relu(y, inplace=True)


def residual_into_the_activation(self, h):
    h += self.branch(h * 2)
    h *= 3
    return F.relu(h, inplace=True)


WRITERS = [
    relu,
    relu_positional,
    relu_module,
    relu_method,
    residual,
    residual_into_the_activation,
]


@pytest.mark.parametrize("layer", ["conv", "stem", "stem.0"])
@pytest.mark.parametrize("write", WRITERS)
def test_in_place_operations_after_the_layer_leave_the_activation_alone(write, layer):
    torch.manual_seed(1)
    model = InPlace()
    model.write = write
    f = cut_classifier(model, layer, preprocessing=Preprocessing(SIZE))
    assert_bit_identical(f, model.eval(), torch.randn(2, 3, *SIZE))


@pytest.mark.parametrize("layer", ["fuse", "stem", None])
def test_a_module_with_two_inputs_can_be_the_layer(layer):
    torch.manual_seed(2)
    model = TwoBranches()
    f = cut_classifier(model, layer, preprocessing=Preprocessing(SIZE))
    x = torch.randn(2, 3, *SIZE)
    assert_bit_identical(f, model.eval(), x)
    assert torch.equal(f(x), model(x))
    assert f.layer_name == (layer or "fuse")


def test_gradients_through_the_head_alone_equal_those_through_the_whole_network():
    torch.manual_seed(3)
    model = InPlace().double().eval()
    model.write = residual
    # A Hardswish in place would overwrite what the ReLU before it needs to go backwards.
    model.act = nn.Identity()
    f = cut_classifier(model, "conv", preprocessing=Preprocessing(SIZE))
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    activation = f.activation(x).requires_grad_()
    (through_head,) = torch.autograd.grad(f.head(activation)[:, 1].sum(), activation)
    leaf = []

    def restart(module, args, output):
        leaf.append(output.detach().clone().requires_grad_())
        return leaf[0].clone()

    model.conv.register_forward_hook(restart)
    (whole,) = torch.autograd.grad(model(x)[:, 1].sum(), leaf)
    assert whole.abs().max() > 0
    torch.testing.assert_close(through_head, whole, rtol=1e-12, atol=1e-15)


def test_a_network_of_double_precision_is_cut_where_one_of_single_precision_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = cut_classifier(model.double(), preprocessing=Preprocessing(SIZE))
    assert found.layer_name == "0+1"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITERS)
def test_cutting_leaves_the_users_model_as_it_was(write, training):
    model = InPlace().train(training)
    model.write = write
    model.stem[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    f = cut_classifier(model, "conv", preprocessing=Preprocessing(SIZE))
    assert not any(m.training for m in f.modules())
    with torch.no_grad():
        for p in f.parameters():
            p.zero_()
    for module, old in zip(model.modules(), before.modules(), strict=True):
        assert type(module) is type(old)
        assert module.training == old.training
        assert getattr(module, "inplace", None) == getattr(old, "inplace", None)
        assert not module._forward_hooks
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old)
        assert p.requires_grad == old.requires_grad
    x = torch.randn(2, 3, *SIZE)
    assert torch.equal(model(x), before(x))


# Layers that cannot be cut


@pytest.fixture(scope="module")
def resnet18():
    return get_model("resnet18")


def suggested(error):
    """The layers that an error message says can be cut."""
    return str(error.value).split("layers that can")[1].split(": ", 1)[1].split(", ")


@pytest.mark.parametrize("layer", ["layer3.0.conv1", "layer4.1.bn2", "layer2.0.downsample"])
def test_a_layer_inside_a_residual_block_is_not_the_only_path(layer, resnet18):
    with pytest.raises(AftError, match=f"'{layer}' can't be cut: .*not the only path") as error:
        cut(resnet18, layer)
    names = suggested(error)
    # The block itself is among them.
    assert layer.rsplit(".", 1)[0] in names
    for name in names:
        cut(resnet18, name)


@pytest.mark.parametrize("layer", ["layer3.7", "layer5", "layer4.1+layer4.9"])
def test_an_unknown_layer_is_refused_with_the_nearest(layer, resnet18):
    wrong = layer.split("+")[-1]
    with pytest.raises(AftError, match=f"unknown layer '{wrong}'; nearest: layer") as error:
        cut_classifier(resnet18, layer)
    for name in suggested(error):
        cut(resnet18, name)


def test_a_module_is_a_layer_by_its_name(resnet18):
    assert cut_classifier(resnet18, resnet18.layer4).layer_name == "layer4"
    for wrong in (3, ["layer4"], nn.ReLU(), resnet18):
        with pytest.raises(AftError, match="layer must be the name of a module of ResNet"):
            cut_classifier(resnet18, wrong)


@pytest.mark.parametrize("layer", ["", "+layer4", "layer4+"])
def test_an_empty_name_is_refused(layer, resnet18):
    with pytest.raises(AftError, match="unknown layer ''"):
        cut_classifier(resnet18, layer or "+")


def test_modules_that_do_not_follow_each_other_are_refused(resnet18):
    with pytest.raises(AftError, match=r"'layer2\+bn1' can't be cut"):
        cut_classifier(resnet18, "layer2+bn1")


def test_an_output_without_spatial_dimensions_is_refused(resnet18):
    with pytest.raises(AftError, match=r"shape \(N, 1000\), a CAM needs \(N, K, h, w\)"):
        cut_classifier(resnet18, "fc")


def test_a_network_without_convolutions_is_refused():
    class Perceptron(nn.Sequential):
        pass

    model = Perceptron(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(AftError, match="Perceptron has no layer with cells"):
        cut_classifier(model, preprocessing=Preprocessing((16, 16)))


def test_a_write_that_the_trace_loses_is_run_as_it_is():
    # An in-place write whose result is not used again is lost in the trace.
    model = InPlace()

    def write_without_assignment(self, h):
        h.mul_(2)
        return h

    model.write = write_without_assignment
    f = cut_classifier(model, "conv", preprocessing=Preprocessing(SIZE), note=lambda _: None)
    assert_bit_identical(f, model.eval(), torch.randn(2, 3, *SIZE))


def test_a_module_that_writes_into_the_activation_is_run_as_it_is():
    class Shift(nn.Module):
        def forward(self, x):
            x -= 1
            return x

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Shift(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    notes = []
    f = cut_classifier(model, "0", preprocessing=Preprocessing(SIZE), note=notes.append)
    assert len(notes) == 1
    assert "a module after '0' writes into its output" in notes[0]
    x = torch.randn(2, 3, *SIZE)
    assert_bit_identical(f, model.eval(), x)
    g, activation = f.at(x)
    before = activation.clone()
    g.head(activation)
    assert torch.equal(activation, before)
    assert torch.equal(activation, model[0](x))


def test_a_model_in_training_mode_is_cut_as_it_will_be_evaluated():
    # Neither dropout nor running statistics may take part in the check.
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).train()
    f = cut_classifier(model, "0+1", preprocessing=Preprocessing(SIZE))
    assert_bit_identical(f, model.eval(), torch.randn(2, 3, *SIZE))


def test_class_names_must_be_as_many_as_classes(resnet18):
    from aftcli.core.classes import Classes

    with pytest.raises(AftError, match="2 class names for a model with 1000 classes"):
        cut_classifier(resnet18, "layer4", classes=Classes(("cat", "dog")))
