"""torchcam's tests of videos, of structured outputs and of targets."""

import pytest
import torch
from torch import nn

from aftcli import AftError, attribution_map, cut_classifier, explain
from aftcli.core.cam import normalise
from aftcli.measures import metrics
from tests.helpers.compare import assert_near
from tests.peers.networks import of_torchcam, plain, scaled, smooth_of_torchcam, tiny_cut


def video(classes=3):
    """torchcam's small network of videos, in float64."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    ).double()


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("cam", "CAM"),
        ("gradcam", "GradCAM"),
        ("xgradcam", "XGradCAM"),
        ("layercam", "LayerCAM"),
        ("scorecam", "ScoreCAM"),
        ("finercam", "FinerCAM"),
        ("gradcam++", None),
    ],
)
def test_maps_of_videos(method, theirs):
    """torchcam: test_methods_gradient.py::test_video_cams

    ::test_finercam_video_cam
    test_methods_activation.py::test_video_cams
    """
    model = video().eval()
    x = torch.rand(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(6)).double()
    f = cut_classifier(model, "3", preprocessing=plain(4, 6))
    found = attribution_map(f, x, [0, 2], method)
    assert found.shape == (2, 4, 6, 6) and found.isfinite().all()
    if theirs:
        assert_near(found, scaled(of_torchcam(theirs, model, "3", x, [0, 2])), 1e-6)


def test_smooth_maps_of_videos():
    """torchcam: test_methods_gradient.py::test_video_cams, its SmoothGradCAMpp"""
    model = video().eval()
    x = torch.rand(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(6)).double()
    f = cut_classifier(model, "3", preprocessing=plain(4, 6))
    found = attribution_map(f, x, [0, 2], "gradcam++", smooth="noise")
    assert_near(found, scaled(smooth_of_torchcam(model, "3", x, [0, 2])), 1e-5)


def test_maps_of_videos_are_scaled_to_0_and_1():
    """torchcam: test_methods_core.py::test_cam_normalize, its maps of three dimensions"""
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    assert_near(normalise(values), scaled(values))


def test_deletion_of_videos():
    """torchcam: test_metrics.py::test_metrics_spatial_inputs"""
    x = torch.arange(1.0, 9).double().view(1, 1, 2, 2, 2) / 36
    found = metrics.deletion(x, x[:, 0], lambda part: part.flatten(1).sum(1), 2)
    # 1, then without 8, 7, 6 and 5 of 36, then 0.
    assert float(found) == pytest.approx((1 / 2 + 10 / 36) / 2)


class Structured(nn.Module):
    """torchcam's network of two scores by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.features = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        scores = self.features(x).flatten(2).mean(-1)
        return {"primary": scores[:, 0], "secondary": scores[:, 1]}


def named(name):
    """Take a score of an image's output, or of a batch of one."""
    return lambda output: output[name].squeeze()


@pytest.mark.parametrize("method", ["gradcam", "scorecam"])
def test_targets_of_named_outputs(method):
    """torchcam: test_methods_activation.py::test_score_cams_support_per_sample_output_targets"""
    model = Structured().double().eval()
    f = cut_classifier(model, "features", preprocessing=plain(8, 8))
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    maps = []
    for k, name in enumerate(("primary", "secondary")):
        (found,) = explain(f, x, [method], target=named(name))
        maps.append(found.attribution)
        if method == "gradcam":
            assert_near(found.attribution[None], scaled(model.features(x)[:, k].detach().relu()))
    assert not torch.equal(*maps)


def test_targets_of_smoothed_maps():
    """torchcam: test_methods_gradient.py::test_smoothgradcampp_supports_output_targets"""
    model = Structured().double().eval()
    f = cut_classifier(model, "features", preprocessing=plain(8, 8))
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    for k, name in enumerate(("primary", "secondary")):
        (found,) = explain(f, x, ["gradcam++"], target=named(name), smooth="noise")
        assert_near(found.attribution[None], scaled(model.features(x)[:, k].detach().relu()))


class Pair(nn.Module):
    """torchcam's network of a tuple: the logits, and again."""

    def __init__(self):
        super().__init__()
        self.inner, _, _ = tiny_cut()

    def forward(self, x):
        y = self.inner(x)
        return y, 2 * y


def test_the_first_tensor_of_a_tuple_is_the_logits():
    """torchcam: test_explain.py::test_explain_rejects_invalid_outputs; ours takes the first"""
    model = Pair().eval()
    f = cut_classifier(model, "inner.2", preprocessing=plain(8, 8))
    x = torch.rand(1, 3, 8, 8, dtype=torch.double)
    assert torch.equal(f(x), model(x)[0])


@pytest.mark.parametrize(
    "target",
    [
        lambda y: y.flatten()[0].detach() * 1.0,
        lambda y: y.flatten()[:2],
        lambda y: 1,
        lambda y: "1",
        3,
    ],
    ids=["not connected", "two values", "a number", "a text", "not callable"],
)
def test_a_target_must_be_a_scalar_of_the_output(target):
    """torchcam: test_methods_gradient.py::test_gradcam_reports_disconnected_output_target

    ::test_output_target_must_return_a_scalar_tensor
    test_methods_core.py::test_output_target_validation
    """
    _, f, x = tiny_cut()
    with pytest.raises(AftError):
        explain(f, x[:1], ["gradcam"], target=target)


def test_a_target_and_a_class_exclude_each_other():
    """torchcam: test_methods_core.py::test_output_target_validation"""
    _, f, x = tiny_cut()
    with pytest.raises(AftError):
        explain(f, x[:1], ["gradcam"], targets=1, target=lambda y: y.flatten()[1])


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "layercam", "scorecam", "ablationcam"])
def test_a_target_in_place_of_a_class(method):
    """torchcam: test_methods_gradient.py::test_refinecam_supports_output_targets"""
    _, f, x = tiny_cut()
    (found,) = explain(f, x[:1], [method], target=lambda y: y.flatten()[1])
    assert_near(found.attribution, attribution_map(f, x[:1], 1, method)[0])
