"""torchcam's tests of networks that are no plain CNN: tokens, videos, structured outputs."""

import pytest
import torch
from pytorch_grad_cam import GradCAM
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from aftcli import AftError, attribution_map, cut_classifier, explain
from aftcli.core.cam import normalise
from aftcli.evaluation import metrics
from tests.helpers.compare import assert_near
from tests.peers.networks import of_grad_cam, of_torchcam, plain, scaled, tiny_cut
from tests.peers.pending import pending
from tests.reference import paper as reference

NORM = "encoder.layers.encoder_layer_1.ln_1"


def transformer():
    """torchvision's, 4 x 4 patches of 8 x 8 pixels and a class token, in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, **sizes)
    nn.init.normal_(model.heads.head.weight)
    return model.double().eval()


def as_grid(tokens):
    """Arrange patches as channels first, without the class token."""
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


@pytest.fixture
def pictures():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pending("tokens")
@pytest.mark.parametrize(
    ("method", "theirs"),
    [("layercam", "LayerCAM"), ("scorecam", "ScoreCAM"), ("gradcam", "GradCAM")],
)
def test_maps_of_tokens_equal_torchcams(method, theirs, pictures):
    """torchcam: test_methods_transformer.py::test_layercam_with_reshape_transform

    ::test_scorecam_with_reshape_transform
    """
    model = transformer()
    expected = of_torchcam(theirs, model, NORM, pictures, [1, 7], reshape_transform=as_grid)
    assert expected.shape == (2, 4, 4) and (expected.flatten(1).std(1) > 0).all()
    f = cut_classifier(model, NORM, preprocessing=plain(32, 32))
    assert f.activation_shape == (32, 4, 4)
    found = attribution_map(f, pictures, [1, 7], method)
    for own, other in zip(found, scaled(expected), strict=True):
        assert_near(own, reference.upsample(other.numpy(), (32, 32)), 1e-5)


@pending("tokens")
def test_maps_of_tokens_equal_pytorch_grad_cams(pictures):
    """pytorch-grad-cam: README, its reshape_transform for ViTs"""
    model = transformer()
    expected = of_grad_cam(GradCAM, model, NORM, pictures, [1, 7], reshape_transform=as_grid)
    f = cut_classifier(model, NORM, preprocessing=plain(32, 32))
    found = scaled(attribution_map(f, pictures, [1, 7], "gradcam"))
    assert_near(found, expected.double(), 1e-4)


@pending("tokens")
def test_a_transformers_default_layer_is_its_last_norm(pictures):
    """torchcam: test_explain.py::test_explain_supports_torchvision_vit_with_legrad"""
    f = cut_classifier(transformer(), preprocessing=plain(32, 32))
    assert f.activation_shape == (32, 4, 4)
    (found,) = explain(f, pictures[:1], ["gradcam"])
    assert found.attribution.shape == (32, 32) and found.attribution.max() > 0
    assert found.class_index == int(f(pictures[:1]).argmax())


@pending("tokens")
def test_a_frozen_transformer_stays_as_it_is(pictures):
    """torchcam: test_methods_transformer.py

    ::test_legrad_torchvision_vit_repeated_calls_and_frozen_parameters
    """
    model = transformer().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    f = cut_classifier(model, NORM, preprocessing=plain(32, 32))
    one, two = (attribution_map(f, pictures, [0, 1], "gradcam") for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.double and one.isfinite().all()
    assert not any(w.requires_grad or w.grad is not None for w in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pending("tokens")
def test_a_transformer_in_training_keeps_its_flags(pictures):
    """torchcam: test_methods_transformer.py::test_legrad_restores_model_and_hooks"""
    model = transformer().train()
    model.encoder.layers[0].eval()
    for i, weight in enumerate(model.parameters()):
        weight.requires_grad_(i % 2 == 0)
    flags = [m.training for m in model.modules()], [w.requires_grad for w in model.parameters()]
    f = cut_classifier(model, NORM, preprocessing=plain(32, 32))
    attribution_map(f, pictures, [0, 1], "gradcam")
    assert [m.training for m in model.modules()] == flags[0]
    assert [w.requires_grad for w in model.parameters()] == flags[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Block(nn.Module):
    """A block of a transformer, by torch's own attention."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, tokens):
        normed = self.ln_1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(tokens)


class Tokens(nn.Module):
    """A small transformer: each pixel a patch, behind tokens of no place."""

    def __init__(self, prefix):
        super().__init__()
        torch.manual_seed(3)
        self.patch_embed = nn.Conv2d(3, 8, 1)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 8))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        prefix = self.prefix.expand(tokens.shape[0], -1, -1)
        tokens = self.blocks(torch.cat([prefix, tokens], 1))
        return self.head(self.norm(tokens.mean(1)))


class Pooled(nn.Module):
    """A layer that gives one token for all."""

    def forward(self, tokens):
        return tokens.mean(1, keepdim=True)


@pending("tokens")
@pytest.mark.parametrize(("high", "wide", "prefix"), [(2, 2, 1), (2, 3, 2), (4, 2, 0)])
def test_grids_and_prefixes_of_any_size(high, wide, prefix):
    """torchcam: test_methods_transformer.py::test_legrad_matches_manual_oracle, for Grad-CAM"""
    model = Tokens(prefix).double().eval()
    x = torch.randn(2, 3, high, wide, generator=torch.Generator().manual_seed(5)).double()
    seen = []
    handle = model.blocks[1].ln_1.register_forward_hook(lambda m, i, o: seen.append(o))
    y = model(x)
    handle.remove()
    gradients = [
        torch.autograd.grad(y[n, c], seen[0], retain_graph=True)[0][n] for n, c in enumerate((0, 2))
    ]
    expected = torch.zeros(2, high, wide, dtype=torch.double)
    for n in range(2):
        patches, slopes = seen[0][n, prefix:].detach(), gradients[n][prefix:]
        for k in range(8):
            alpha = sum(float(g[k]) for g in slopes) / (high * wide)
            for place in range(high * wide):
                expected[n, place // wide, place % wide] += alpha * float(patches[place, k])
    assert (expected > 0).any()
    f = cut_classifier(model, "blocks.1.ln_1", preprocessing=plain(high, wide))
    assert_near(attribution_map(f, x, [0, 2], "gradcam"), scaled(expected.relu()))


@pytest.mark.parametrize("layer", ["head", "norm", "patch_embed.0"])
def test_a_layer_without_places_is_refused(layer):
    """torchcam: test_methods_transformer.py::test_reshape_transform_validation

    ::test_legrad_rejects_invalid_configuration
    ::test_legrad_rejects_unsupported_target_blocks
    """
    with pytest.raises(AftError):
        cut_classifier(Tokens(1), layer, preprocessing=plain(2, 3))


def test_a_block_that_gives_no_tokens_is_refused():
    """torchcam: test_methods_transformer.py::test_legrad_rejects_incompatible_block_outputs"""
    model = Tokens(1).eval()
    model.blocks.append(Pooled())
    with pytest.raises(AftError):
        cut_classifier(model, "blocks.2", preprocessing=plain(2, 3))


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


@pending("video", AftError, RuntimeError, TypeError, AssertionError, ValueError)
@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("cam", "CAM"),
        ("gradcam", "GradCAM"),
        ("xgradcam", "XGradCAM"),
        ("layercam", "LayerCAM"),
        ("scorecam", "ScoreCAM"),
        ("gradcam++", None),
    ],
)
def test_maps_of_videos(method, theirs):
    """torchcam: test_methods_gradient.py::test_video_cams

    test_methods_activation.py::test_video_cams
    """
    model = video().eval()
    x = torch.rand(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(6)).double()
    f = cut_classifier(model, "3", preprocessing=plain(4, 6))
    found = attribution_map(f, x, [0, 2], method)
    assert found.shape == (2, 4, 6, 6) and found.isfinite().all()
    if theirs:
        assert_near(found, scaled(of_torchcam(theirs, model, "3", x, [0, 2])), 1e-6)


@pending("video")
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


@pending("structured", AftError, AttributeError, TypeError)
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


class Pair(nn.Module):
    """torchcam's network of a tuple: the logits, and again."""

    def __init__(self):
        super().__init__()
        self.inner, _, _ = tiny_cut()

    def forward(self, x):
        y = self.inner(x)
        return y, 2 * y


@pending("structured", AftError, AttributeError)
def test_the_first_tensor_of_a_tuple_is_the_logits():
    """torchcam: test_explain.py::test_explain_rejects_invalid_outputs; ours takes the first"""
    model = Pair().eval()
    f = cut_classifier(model, "inner.2", preprocessing=plain(8, 8))
    x = torch.rand(1, 3, 8, 8, dtype=torch.double)
    assert torch.equal(f(x), model(x)[0])


@pending("target")
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


@pending("target")
def test_a_target_and_a_class_exclude_each_other():
    """torchcam: test_methods_core.py::test_output_target_validation"""
    _, f, x = tiny_cut()
    with pytest.raises(AftError):
        explain(f, x[:1], ["gradcam"], targets=1, target=lambda y: y.flatten()[1])


@pending("target")
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "layercam", "scorecam", "ablationcam"])
def test_a_target_in_place_of_a_class(method):
    """torchcam: test_methods_gradient.py::test_refinecam_supports_output_targets"""
    _, f, x = tiny_cut()
    (found,) = explain(f, x[:1], [method], target=lambda y: y.flatten()[1])
    assert_near(found.attribution, attribution_map(f, x[:1], 1, method)[0])
