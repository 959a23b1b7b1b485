"""captum's tests of Grad-CAM and of gradients in the input: their literal networks, by our loops.

Their vectors are images of one pixel here, one channel a number.
"""

import numpy as np
import pytest
import torch
from captum.attr import GuidedBackprop, LayerGradCam
from torch import nn

from aftcli import METHODS, AftError, attribution_map, cut_classifier
from aftcli.attributions import gradient
from aftcli.attributions.gradient import (
    signed_deep_lift,
    signed_gradient_shap,
    signed_guided_backpropagation,
    signed_integrated_gradients,
    signed_smooth_grad,
)
from tests.helpers.compare import assert_near
from tests.helpers.small import small
from tests.peers.networks import (
    OneConvolution,
    one_convolution,
    pixel,
    pixels,
    plain,
    raw,
    resnet,
    weighted,
)
from tests.reference import paper as reference

C = torch.tensor([0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["conv1", "relu1"])
def test_grad_cam_of_a_convolution_of_ones(layer, frozen):
    """captum: layer/test_grad_cam.py::test_simple_input_conv, ::test_simple_input_conv_relu

    ::test_simple_input_conv_no_grad
    """
    model, f, x = one_convolution(layer)
    theirs = LayerGradCam(model, getattr(model, layer)).attribute(x, target=0).detach()
    model.requires_grad_(not frozen)
    f = cut_classifier(model, layer, preprocessing=plain(4, 4))
    found = raw(f, x, 0, "gradcam")
    if not frozen:
        by_loop = np.asarray(reference.gradcam(model, layer, x, 0)).clip(min=0)
        assert_near(found[0], torch.from_numpy(by_loop))
    assert_near(found, theirs[:, 0].relu())
    assert found.max() > 20


def test_grad_cam_ends_with_a_relu():
    """captum: layer/test_grad_cam.py::test_simple_input_conv_fc_with_final_relu

    ::test_simple_input_conv_without_final_relu
    """
    model, f, x = one_convolution("conv1")
    x[0, 0, 1, 1] = -20
    attribute = LayerGradCam(model, model.conv1).attribute
    signed = attribute(x, target=0).detach()[:, 0]
    assert signed.min() < 0 < signed.max()
    assert_near(
        raw(f, x, 0, "gradcam"), attribute(x, target=0, relu_attributions=True)[:, 0].detach()
    )
    assert_near(raw(f, x, 0, "gradcam"), signed.relu())


def test_a_layer_without_cells_is_refused():
    """captum: layer/test_grad_cam.py::test_simple_input_non_conv

    ::test_relu_gradcam_with_unused_layer
    """
    model = OneConvolution()
    model.unused = nn.Conv2d(3, 2, 1)
    for layer in ("fc1", "relu2", "unused"):
        with pytest.raises(AftError, match=layer):
            cut_classifier(model, layer, preprocessing=plain(4, 4))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("c", range(4))
def test_guided_backpropagation_equals_captums(c, inplace):
    """captum: test_guided_backprop.py::test_simple_input_conv_gb, ::test_gb_matching"""
    _, f, x = one_convolution(inplace=inplace)
    plain_model, _, _ = one_convolution()
    expected = GuidedBackprop(plain_model).attribute(x.clone().requires_grad_(), target=c)
    found = signed_guided_backpropagation(f, torch.tensor([c]), x)
    assert_near(found, expected.detach())
    # One channel of the picture counts as the next: the weights are ones.
    counted = torch.zeros(4, 4, dtype=torch.double)
    a = plain_model.relu1(plain_model.conv1(x))[0].flatten()
    for cell in range(5):  # the other three have negative weights
        if a[cell] > 0:
            row, column = cell % 4 // 2, cell % 2
            counted[row : row + 3, column : column + 3] += 1
    assert_near(found[0, 0], counted)


def deep_lift_example(activation=nn.ReLU, inplace=False):
    """2 a(x1) + 2 a(x2 - 1.5), and another class."""
    act = activation(inplace) if activation is nn.ReLU else activation()
    layers = [weighted([1, 0, 0], [0, 1, 0], bias=[0.0, -1.5]), act, nn.Flatten()]
    return pixel(*layers, weighted([2, 2], [-1, 1], flat=True))


def test_deep_lift_of_two_relus():
    """captum: test_deeplift_basic.py::test_relu_deeplift_exact_match"""
    _, f = deep_lift_example()
    found = signed_deep_lift(f, C, pixels([1.0, 2.0, 0.0]))
    # relu(2 - 1.5) - relu(-1.5) = 0.5, of which the weight is 2.
    assert_near(found.flatten(), torch.tensor([2.0, 1.0, 0.0]).double())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU])
def test_deep_lift_is_complete(activation):
    """captum: test_deeplift_basic.py::test_relu_deeplift, ::test_tanh_deeplift

    ::test_relu_deeplift_batch, ::test_relu_linear_deeplift_batch
    """
    model, f = deep_lift_example(activation)
    x = pixels([1.0, 2.0, 0.0], [-1.0, -2.0, 3.0], [1.0, 2.0, 0.0])
    classes = torch.tensor([0, 1, 0])
    change = (model(x) - model(0 * x)).gather(1, classes[:, None])[:, 0].detach()
    first = signed_deep_lift(f, classes, x)
    for _ in range(3):
        assert torch.equal(signed_deep_lift(f, classes, x), first)
    assert_near(first.sum((1, 2, 3)), change)
    assert torch.equal(first[0], first[2])


def test_deep_lift_of_an_activation_in_place():
    """captum: test_deeplift_basic.py::test_relu_linear_deeplift_compare_inplace"""
    x = pixels([-10.0, 1.0, -5.0], [2.0, 3.0, 4.0])
    found = [
        signed_deep_lift(deep_lift_example(nn.ReLU, inplace)[1], torch.tensor([0, 1]), x)
        for inplace in (False, True)
    ]
    assert torch.equal(*found) and found[0].any()


class Reused(nn.Module):
    """A ReLU and a convolution that run twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = self.relu(self.conv(self.relu(self.conv(x))))
        return self.fc(self.relu(x).mean((2, 3)))


def test_deep_lift_of_modules_that_run_twice():
    """captum: test_deeplift_basic.py::test_reusable_modules, which it refuses"""
    model = Reused().double().eval()
    f = cut_classifier(model, "conv", preprocessing=plain(3, 3))
    x = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    found = signed_deep_lift(f, torch.tensor([0, 1]), x)
    change = (model(x) - model(0 * x)).detach().diagonal()
    assert_near(found.sum((1, 2, 3)), change)


def test_deep_lift_through_a_maximum():
    """captum: test_deeplift_basic.py::test_lin_maxpool_lin_classification"""
    copy = nn.Conv2d(3, 3, 1, bias=False)
    copy.weight.data = torch.eye(3)[:, :, None, None]
    last = weighted([1, 0, 0], [0, 1, 0], flat=True)
    model = nn.Sequential(copy, nn.MaxPool2d(2), nn.Flatten(), last).double().eval()
    f = cut_classifier(model, "0", preprocessing=plain(2, 2))
    x = torch.zeros(1, 3, 2, 2, dtype=torch.double)
    x[0, 0] = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    found = signed_deep_lift(f, C, x)
    assert_near(found[0, 0], torch.tensor([[0.0, 0.0], [0.0, 9.0]]).double())
    assert not found[0, 1:].any()


def test_deep_lift_of_convolutions_and_maxima_is_complete():
    """captum: test_deeplift_classification.py::test_convnet_with_maxpool2d

    ::test_softmax_classification_batch_zero_baseline
    """
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 4, 3), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)]
    model = nn.Sequential(*layers).double().eval()
    f = cut_classifier(model, "3", preprocessing=plain(10, 10))
    x = 100 * torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(2)).double()
    classes = torch.tensor([2, 7])
    change = (model(x) - model(0 * x)).gather(1, classes[:, None])[:, 0].detach()
    assert_near(signed_deep_lift(f, classes, x).sum((1, 2, 3)), change)


def linear():
    """A network without a non-linearity, and inputs."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 3)).double().eval()
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    x.requires_grad_()
    classes = torch.tensor([1, 2])
    (slope,) = torch.autograd.grad(model(x).gather(1, classes[:, None]).sum(), x)
    return cut_classifier(model, "0", preprocessing=plain(4, 4)), x.detach(), classes, slope


def test_methods_agree_on_a_linear_network():
    """captum: test_gradient_shap.py::test_basic_multi_input

    test_deeplift_basic.py::test_relu_linear_deeplift
    test_saliency.py::test_saliency_test_basic_smoothgrad
    """
    f, x, classes, slope = linear()
    assert_near(signed_integrated_gradients(f, classes, x), x * slope, 1e-6)
    assert_near(signed_deep_lift(f, classes, x), x * slope)
    assert_near(signed_smooth_grad(f, classes, x), slope, 1e-6)
    # The share of white baselines is the same for all pixels; mean colour and black are 0 here.
    shap = signed_gradient_shap(f, classes, x)
    white = (x - shap / slope).flatten(1)
    assert_near(white, white.mean(1, keepdim=True).expand_as(white), 1e-4)
    assert ((white > 0.1) & (white < 0.6)).all()


@pytest.mark.parametrize("size", [6, 16, 48])
def test_smoothing_in_parts_of_any_size(size, monkeypatch):
    """captum: test_saliency.py::test_saliency_test_basic_multivar_sg_n_samples_batch_size_2, _3"""
    f, x, classes, slope = linear()
    monkeypatch.setattr(gradient, "BATCH", size)
    assert_near(signed_smooth_grad(f, classes, x), slope, 1e-6)
    assert_near(signed_integrated_gradients(f, classes, x), x * slope, 1e-6)


def gate(inner_bias, outer_bias):
    """relu(relu(x1 + inner) + outer - relu(x2)), and another class."""
    layers = [weighted([1, 0, 0], [0, 1, 0], bias=[inner_bias, 0.0]), nn.ReLU()]
    layers += [weighted([1, -1], [0, 1], bias=[outer_bias, 0.0]), nn.ReLU(), nn.Flatten()]
    return pixel(*layers, weighted([1, 0], [0, 1], flat=True))[1]


def test_integrated_gradients_do_not_depend_on_how_it_is_written():
    """captum: test_integrated_gradients_basic.py::test_multivariable_vanilla"""
    found = [
        signed_integrated_gradients(gate(*biases), C, pixels([3.0, 1.0, 0.0])).flatten()
        for biases in ((0.0, -1.0), (-1.0, 0.0))
    ]
    # The gate opens half-way: 3 and -1, each for half of the path.
    assert_near(found[0], torch.tensor([1.5, -0.5, 0.0]).double(), 0.03)
    assert_near(found[1], found[0], 1e-9)


def test_integrated_gradients_of_the_baseline_are_nothing():
    """captum: test_integrated_gradients_basic.py::test_univariable_vanilla"""
    f = gate(0.0, -1.0)
    assert not signed_integrated_gradients(f, C, pixels([0.0, 0.0, 0.0])).any()
    assert not signed_integrated_gradients(f, C, pixels([-3.0, 1.0, 0.0])).any()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_integrated_gradients_are_complete(kind):
    """captum: test_integrated_gradients_classification.py::test_softmax_classification_vanilla

    ::test_softmax_classification_vanilla_batch, each image with a class of its own
    """
    case = small(kind, seed=8)
    found = signed_integrated_gradients(case.f, case.class_index, case.x, steps=100)
    with torch.no_grad():
        change = case.model(case.x) - case.model(0 * case.x)
    assert_near(found.sum((1, 2, 3)), change.gather(1, case.class_index[:, None])[:, 0], 0.01)
    alone = signed_integrated_gradients(case.f, case.class_index[1:2], case.x[1:2], steps=100)
    assert_near(found[1:2], alone)


# The gradients in the input and what else works by hooks.
HOOKED = [name for name, e in METHODS.items() if e.family in ("gradient", "decomposition")]


@pytest.mark.parametrize("method", [*HOOKED, "occlusion", "rise", "relevancecam", "omcam"])
def test_no_hook_and_no_gradient_is_left(method):
    """captum: test_hook_removal.py, test_saliency.py::test_saliency_grad_unchanged"""
    model, f, x = one_convolution()
    x = x.repeat(2, 1, 1, 1).requires_grad_()
    x.grad = kept = torch.randn_like(x)
    before = f.weights_hash()
    for classes in ([0, 1], [0, 9]):
        if classes[1] < 4:
            found = attribution_map(f, x, classes, method)
            assert found.shape == (2, 4, 4) and not found.requires_grad
        else:
            with pytest.raises(AftError, match="out of range"):
                attribution_map(f, x, classes, method)
    assert x.grad is kept and f.weights_hash() == before
    for module in (*model.modules(), *f.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks and not module._backward_pre_hooks
    assert all(weight.grad is None for weight in f.parameters())


@pytest.mark.parametrize("method", HOOKED)
def test_no_hook_is_left_where_the_network_fails(method):
    """captum: test_hook_removal.py, its network that raises an error"""
    _, f, _ = one_convolution()
    wrong = torch.zeros(1, 3, 5, 5, dtype=torch.double)
    with pytest.raises((AftError, RuntimeError)):
        attribution_map(f, wrong, 0, method)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in f.modules())


@pytest.mark.parametrize("method", ["gradcam", "deeplift", "lrp", "guidedbackprop"])
def test_parallel_networks_are_those_inside(method):
    """captum: test_data_parallel.py"""
    model = resnet(16, 16)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    c = int(model(x).argmax())
    found = [
        attribution_map(cut_classifier(net, "5", preprocessing=plain(16, 16)), x, c, method)
        for net in (model, nn.DataParallel(model))
    ]
    assert torch.equal(*found) and found[0].any()
