"""torchcam's tests of its extractors: test_methods_core, _activation, _gradient, _utils."""

import copy

import pytest
import torch
from torch import nn
from torchcam.methods import LayerCAM
from torchcam.methods._utils import locate_candidate_layer
from torchvision.models import get_model

from aftcli import METHODS, AftError, attribution_map, cut_classifier, explain
from aftcli.attributions.activation import fuse, layer_cam_fusion, stage_maps
from aftcli.attributions.maps import denoised
from aftcli.core import cam
from aftcli.core.cam import normalise
from tests.helpers.compare import assert_near
from tests.helpers.small import small
from tests.peers.networks import (
    of_torchcam,
    plain,
    raw,
    scaled,
    smooth_of_torchcam,
    tiny,
    tiny_cut,
)
from tests.reference import paper as reference

CAMS = ("gradcam", "gradcam++", "layercam", "xgradcam", "hirescam", "ablationcam", "scorecam")


def hooks(model):
    """Count what is registered in a network."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


@pytest.fixture(scope="module")
def mobilenet():
    torch.manual_seed(0)
    return get_model("mobilenet_v2").eval().requires_grad_(False)


def test_a_layer_must_be_the_networks():
    """torchcam: test_methods_core.py::test_cam_constructor"""
    for layer in ("7", "missing", "0.0", " "):
        with pytest.raises(AftError, match="unknown layer"):
            cut_classifier(tiny(), layer, preprocessing=plain(8, 8))


def test_a_layer_of_a_wrong_type_is_told():
    """torchcam: test_methods_core.py::test_cam_constructor"""
    for layer in (3, [3], nn.ReLU()):
        with pytest.raises(AftError):
            cut_classifier(tiny(), layer, preprocessing=plain(8, 8))


def test_a_layer_may_be_given_as_a_module():
    """torchcam: test_methods_gradient.py::test_img_cams"""
    model = tiny()
    assert cut_classifier(model, model[2], preprocessing=plain(8, 8)).layer_name == "2"


def test_nothing_is_left_in_the_network():
    """torchcam: test_methods_core.py::test_cam_context_manager, ::test_cam_remove_hooks"""
    model, f, x = tiny_cut()
    for method in CAMS:
        attribution_map(f, x, [0, 1], method)
    assert hooks(model) == hooks(f) == 0


def test_nothing_is_left_after_an_error():
    """torchcam: test_methods_core.py::test_cam_context_manager_cleans_up_on_exception"""
    model, f, x = tiny_cut()
    for method in CAMS:
        with pytest.raises(AftError):
            attribution_map(f, x, [0, 7], method)
    assert hooks(model) == hooks(f) == 0
    assert not any(module.training for module in f.modules())


def test_hooks_of_the_user_stay():
    """torchcam: test_methods_core.py::test_cam_remove_hooks_idempotent"""
    model, seen = tiny(), []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    f = cut_classifier(model, "2", preprocessing=plain(8, 8))
    attribution_map(f, torch.rand(1, 3, 8, 8, dtype=torch.double), 0, "gradcam")
    assert hooks(model) == 1
    seen.clear()
    model(torch.rand(1, 3, 8, 8, dtype=torch.double))
    assert seen == [1]


def test_training_flags_stay():
    """torchcam: test_methods_core.py::test_cam_eval_mode_restores_state"""
    model = tiny().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    f = cut_classifier(model, "2", preprocessing=plain(8, 8))
    attribution_map(f, torch.rand(1, 3, 8, 8, dtype=torch.double), 0, "scorecam")
    assert [module.training for module in model.modules()] == flags
    assert not any(module.training for module in f.modules())


@pytest.mark.parametrize("wrong", [-1, [-1], 3, [3], [0, 0], 0.5, None, "0"])
def test_a_class_must_be_the_networks(wrong):
    """torchcam: test_methods_core.py::test_cam_precheck"""
    _, f, x = tiny_cut()
    with pytest.raises(AftError):
        attribution_map(f, x[:1], wrong, "gradcam")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (4, 1, 9), (2, 1, 1)])
def test_maps_are_scaled_to_0_and_1(shape):
    """torchcam: test_methods_core.py::test_cam_normalize"""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.stack([torch.from_numpy(reference.scale(v.numpy())) for v in values])
    assert_near(normalise(values), expected)
    assert not normalise(torch.full(shape, 3.0)).any()


def test_the_cut_network_says_where_it_is_cut():
    """torchcam: test_methods_core.py::test_cam_repr"""
    model, f, _ = tiny_cut()
    assert (f.name, f.layer_name) == (type(model).__name__, "2")
    assert f.activation_shape == (4, 8, 8)


@pytest.mark.parametrize("kind", ["mlp", "mixing", "conv", "late norm"])
def test_cam_needs_a_mean_and_a_linear_layer(kind):
    """torchcam: test_methods_activation.py::test_base_cam_constructor"""
    case = small(kind)
    with pytest.raises(AftError, match="cam needs a head of global average pooling"):
        attribution_map(case.f, case.x, case.class_index, "cam")


@pytest.mark.parametrize("count", [1, 2])
def test_cam_equals_torchcams(count, mobilenet):
    """torchcam: test_methods_activation.py::test_img_cams"""
    f = cut_classifier(mobilenet, "features", preprocessing=plain(64, 64))
    x = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    classes = list(range(count))
    expected = of_torchcam("CAM", mobilenet, "features", x, classes, fc_layer="classifier.1")
    assert expected.shape == (count, 2, 2)
    assert_near(raw(f, x, classes, "cam"), expected, 1e-5)


def test_score_cam_inside_a_published_block(mobilenet):
    """torchcam: test_methods_activation.py::test_scorecam_torchvision_integration"""
    layer, x = "features.1.conv.2", torch.ones(1, 3, 16, 16)
    f = cut_classifier(mobilenet, layer, preprocessing=plain(16, 16))
    c = int(f(x).argmax())
    expected = of_torchcam("ScoreCAM", mobilenet, layer, x, c)
    assert expected.shape == (1, 8, 8) and expected.any()
    assert_near(raw(f, x, c, "scorecam"), expected, 1e-4)


def test_cam_of_a_convolution_as_the_last_layer():
    """torchcam: test_methods_activation.py::test_cam_conv1x1"""
    model = tiny(head=[nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten()]).eval()
    f = cut_classifier(model, "3", preprocessing=plain(8, 8))
    x = torch.rand(1, 3, 8, 8, dtype=torch.double)
    weight = model[5].weight[1, :, 0, 0]
    expected = torch.einsum("k,nkhw->nhw", weight, model[:4](x)).relu()
    assert_near(raw(f, x, 1, "cam"), expected.detach())


@pytest.mark.parametrize("classes", [[1, 1], [1, 2]])
def test_score_cam_in_parts_of_any_size(classes, monkeypatch):
    """torchcam: test_methods_activation.py::test_scorecam_chunk_parity"""
    model, f, x = tiny_cut(layer="3")
    found = {}
    for size in (3, 64):
        monkeypatch.setattr(cam, "BATCH", size)
        found[size] = attribution_map(f, x, classes, "scorecam")
    assert found[3].shape == (2, 8, 8) and found[3].dtype == torch.double
    assert_near(found[3], found[64], 1e-12)
    expected = of_torchcam("ScoreCAM", model, "3", x, classes)
    assert_near(raw(f, x, classes, "scorecam"), expected, 1e-6)


def test_score_cam_leaves_flags_after_an_error(monkeypatch):
    """torchcam: test_methods_activation.py::test_scorecam_restores_state_on_error"""
    model, f, x = tiny_cut()

    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(cam, "masked_scores", fail)
    with pytest.raises(RuntimeError, match="boom"):
        attribution_map(f, x, [0, 1], "scorecam")
    assert hooks(model) == hooks(f) == 0
    assert not any(module.training for module in (*f.modules(), *model.modules()))
    assert torch.is_grad_enabled()


THEIRS = {"gradcam": "GradCAM", "xgradcam": "XGradCAM", "layercam": "LayerCAM"}


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
@pytest.mark.parametrize("method", THEIRS)
def test_cams_equal_torchcams(method, kind):
    """torchcam: test_methods_gradient.py::test_img_cams; each image with a class of its own"""
    case = small(kind, seed=4)
    for x, classes in ((case.x[:1], case.class_index[:1]), (case.x, case.class_index)):
        expected = of_torchcam(THEIRS[method], case.model, case.layer, x, classes.tolist())
        assert_near(raw(case.f, x, classes, method), expected, 1e-5)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "xgradcam", "layercam"])
def test_cams_before_an_activation_in_place(method):
    """torchcam: test_methods_gradient.py::test_img_cams, its network with ReLU(inplace=True)"""
    found = []
    for inplace in (False, True):
        model = tiny()
        model[3].inplace = inplace
        f = cut_classifier(model, "2", preprocessing=plain(8, 8))
        x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
        assert f.activation(x).min() < 0
        found.append(attribution_map(f, x, [0, 2], method))
        assert model[3].inplace is inplace
    assert torch.equal(*found)


def test_grad_cam_plus_plus_equals_its_sums():
    """torchcam: test_methods_gradient.py::test_img_cams; theirs divides a copy, so a loop does"""
    case = small("linear", seed=5)
    for n in range(3):
        x, c = case.x[n : n + 1], int(case.class_index[n])
        expected = reference.gradcam_plus_plus(case.model, case.layer, x, c)
        assert_near(raw(case.f, x, c, "gradcam++")[0], torch.as_tensor(expected).relu())


@pytest.mark.parametrize("kind", ["linear", "signed"])
def test_noise_equals_torchcams_smooth_grad_cam_plus_plus(kind):
    """torchcam: test_methods_gradient.py::test_img_cams, its SmoothGradCAMpp

    Behind a mean and a linear layer the gradient is the same at each copy, so that the mean of its
    powers, which theirs takes, is the power of its mean.
    """
    case = small(kind, seed=5)
    classes = case.class_index.tolist()
    expected = smooth_of_torchcam(case.model, case.layer, case.x, classes)
    found = denoised("gradcam++", case.f, case.f.activation(case.x), case.class_index, case.x)
    assert_near(found, expected, 1e-5)


def test_smoothed_maps_say_how_they_were_made():
    """torchcam: test_methods_gradient.py::test_smoothgradcampp_repr"""
    f = cut_classifier(tiny(), "2", preprocessing=plain(8, 8))
    x = torch.rand(1, 3, 8, 8, dtype=torch.double)
    (found,) = explain(f, x, ["gradcam++"], smooth="noise")
    assert (f.layer_name, found.cam, found.smooth) == ("2", "gradcam++", "noise")


def test_smoothing_leaves_nothing_after_an_error(monkeypatch):
    """torchcam: test_methods_gradient.py::test_smoothgradcampp_restores_input_hook_on_error"""
    f = cut_classifier(tiny(), "2", preprocessing=plain(8, 8))
    x = torch.rand(2, 3, 8, 8, dtype=torch.double)
    before = attribution_map(f, x, [0, 1], "gradcam++", smooth="noise")

    def broken(*_):
        raise RuntimeError("boom")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="boom"):
        patched.setattr(cam, "gradient_of", broken)
        attribution_map(f, x, [0, 1], "gradcam++", smooth="noise")
    assert not hooks(f) and f.gradients is None and torch.is_grad_enabled()
    assert torch.equal(attribution_map(f, x, [0, 1], "gradcam++", smooth="noise"), before)


def test_gradients_of_the_weights_stay():
    """torchcam: test_methods_gradient.py

    ::test_gradcam_supports_per_sample_output_targets_without_touching_parameter_grads
    """
    model = tiny()
    f = cut_classifier(model, "2", preprocessing=plain(8, 8), own=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    for method in CAMS:
        attribution_map(f, torch.rand(2, 3, 8, 8, dtype=torch.double), [0, 1], method)
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in model.parameters())


def test_one_map_fuses_to_itself():
    """torchcam: test_methods_gradient.py::test_layercam_fuse_cams"""
    x = torch.zeros(1, 3, 32, 32)
    maps = [torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert_near(fuse(maps[:1], x), maps[0] / maps[0].max(), 1e-6)
    two = fuse([maps[0], maps[1][:, :16, :16]], x)
    assert two.shape == (1, 32, 32)
    # The last two are not scaled, the first of three is, as in the paper.
    assert_near(
        fuse(maps, x),
        torch.maximum(torch.tanh(2 * maps[0] / maps[0].max()), fuse(maps[1:], x)),
        1e-6,
    )


def test_fused_layer_cam_takes_torchcams_maps():
    """torchcam: test_methods_gradient.py::test_layercam_fuse_cams, from its maps of two layers"""
    case = small("linear", seed=6)
    with LayerCAM(case.model, ["relu1", "relu2"]) as extract:
        theirs = extract(case.class_index.tolist(), case.model(case.x), normalized=False)
    with torch.no_grad():
        a = case.f.activation(case.x)
    ours = stage_maps(case.f, a, case.class_index, case.x)
    assert [m.shape for m in ours] == [m.shape for m in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert_near(own, other.relu())
    found = layer_cam_fusion(case.f, a, case.class_index, case.x)
    assert_near(found, fuse([m.relu() for m in theirs], case.x))


def test_maps_do_not_depend_on_those_before():
    """torchcam: test_methods_gradient.py::test_gradcam_does_not_accumulate_hook_handles"""
    _, f, x = tiny_cut()
    for method in CAMS:
        first = attribution_map(f, x, [0, 1], method)
        for _ in range(2):
            attribution_map(f, x.flip(3), [2, 2], method)
        assert torch.equal(attribution_map(f, x, [0, 1], method), first)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "custom"])
def test_the_default_layer_has_torchcams_output(name):
    """torchcam: test_methods_utils.py::test_locate_candidate_layer"""
    torch.manual_seed(0)
    side = 64
    model = tiny().float() if name == "custom" else get_model(name)
    model.train()
    next(model.children()).eval()
    flags = [module.training for module in model.modules()]
    f = cut_classifier(model, preprocessing=plain(side, side))
    assert [module.training for module in model.modules()] == flags
    theirs = locate_candidate_layer(model, (3, side, side))
    seen = []
    uncut = copy.deepcopy(model).eval()
    uncut.get_submodule(theirs).register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        uncut(x)
        assert torch.equal(f.activation(x), seen[0])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_finer_cam_equals_torchcams(count):
    """torchcam: test_methods_gradient.py::test_finercam_matches_manual_contrastive_score

    ::test_finercam_caps_automatic_references_for_small_outputs
    ::test_finercam_automatic_references_cap_and_use_closest_scores
    """
    model, f, x = tiny_cut(count)
    y = model(x).detach()
    expected = []
    for n, c in enumerate((0, 1)):
        others = [k for k in range(count) if k != c]
        nearest = sorted(others, key=lambda k: abs(float(y[n, k] - y[n, c])))[:3]  # noqa: B023
        weight = model[6].weight.detach()
        contrast = weight[c] - 0.6 * weight[nearest].mean(0)
        activation = model[:3](x[n : n + 1]).detach()
        inside = (activation > 0).double().mean((2, 3))
        expected.append(torch.einsum("nk,nkhw->nhw", contrast * inside, activation).relu()[0])
    theirs = of_torchcam("FinerCAM", model, "2", x, [0, 1])
    assert_near(scaled(torch.stack(expected)), scaled(theirs), 1e-6)
    assert_near(attribution_map(f, x, [0, 1], "finercam"), scaled(theirs), 1e-5)


def test_finer_cam_contrasts_before_its_relu():
    """torchcam: test_methods_gradient.py::test_finercam_aggregates_before_relu"""
    model, f, x = tiny_cut()
    with torch.no_grad():
        model[6].weight.copy_(torch.tensor([1.0, 2.5, 1.0])[:, None].expand(3, 4))
    f = cut_classifier(model, "3", preprocessing=plain(8, 8))
    # 1 - 0.6 (2.5 + 1) / 2 < 0, though against class 2 alone it is positive.
    assert not attribution_map(f, x, [0, 0], "finercam").any()


def test_finer_cam_keeps_type_and_network():
    """torchcam: test_methods_gradient.py::test_finercam_preserves_dtype_and_device

    ::test_finercam_lifecycle_repr_and_metric_compatibility
    """
    model, f, x = tiny_cut()
    before = f.weights_hash()
    found = attribution_map(f, x, [0, 1], "finercam")
    assert found.dtype == torch.double and found.shape == (2, 8, 8)
    assert "finercam" in METHODS
    assert f.weights_hash() == before and hooks(f) == hooks(model) == 0


@pytest.mark.parametrize("wrong", [[0], [0, 3], [0.0, 1.0], True])
def test_finer_cam_needs_classes(wrong):
    """torchcam: test_methods_gradient.py

    ::test_finercam_rejects_invalid_scores_targets_and_references
    """
    _, f, x = tiny_cut()
    assert "finercam" in METHODS or pytest.fail("there is no Finer-CAM")
    with pytest.raises(AftError):
        attribution_map(f, x, wrong, "finercam")


@pytest.mark.parametrize("layer", ["0", "2"])
def test_finer_cam_of_layers_of_any_size(layer):
    """torchcam: test_methods_gradient.py::test_finercam_multiple_layers_and_compute_cams"""
    model = tiny()
    model[2].stride = (2, 2)
    f = cut_classifier(model.eval(), layer, preprocessing=plain(8, 8))
    x = torch.rand(1, 3, 8, 8, dtype=torch.double)
    found = attribution_map(f, x, 0, "finercam")
    cells = reference.upsample(
        scaled(of_torchcam("FinerCAM", model, layer, x, 0))[0].numpy(), (8, 8)
    )
    assert_near(found[0], cells, 1e-5)


def test_finer_cam_takes_no_target():
    """torchcam: test_methods_gradient.py::test_finercam_rejects_output_targets"""
    _, f, x = tiny_cut()
    assert "finercam" in METHODS or pytest.fail("there is no Finer-CAM")
    with pytest.raises(AftError):
        explain(f, x[:1], ["finercam"], target=lambda y: y.flatten()[0])
