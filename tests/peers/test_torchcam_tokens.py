"""torchcam's tests of transformers, whose activations are tokens: test_methods_transformer."""

import pytest
import torch
from pytorch_grad_cam import GradCAM
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from aftcli import AftError, attribution_map, cut_classifier, explain
from aftcli.measures import metrics
from tests.helpers.compare import assert_near
from tests.peers.networks import of_grad_cam, of_torchcam, plain, scaled
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


def test_maps_of_tokens_equal_pytorch_grad_cams(pictures):
    """pytorch-grad-cam: README, its reshape_transform for ViTs"""
    model = transformer()
    expected = of_grad_cam(GradCAM, model, NORM, pictures, [1, 7], reshape_transform=as_grid)
    f = cut_classifier(model, NORM, preprocessing=plain(32, 32))
    found = scaled(attribution_map(f, pictures, [1, 7], "gradcam"))
    assert_near(found, expected.double(), 1e-4)


def test_a_transformers_default_layer_is_its_last_norm(pictures):
    """torchcam: test_explain.py::test_explain_supports_torchvision_vit_with_legrad"""
    f = cut_classifier(transformer(), preprocessing=plain(32, 32))
    assert f.activation_shape == (32, 4, 4)
    (found,) = explain(f, pictures[:1], ["gradcam"])
    assert found.attribution.shape == (32, 32) and found.attribution.max() > 0
    assert found.class_index == int(f(pictures[:1]).argmax())


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


def test_a_transformer_in_training_keeps_its_flags(pictures):
    """torchcam: test_methods_transformer.py::test_legrad_restores_model_and_hooks

    ::test_legrad_remove_hooks_restores_attention
    """
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

    def attend(self, tokens):
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    def forward(self, tokens):
        tokens = tokens + self.attend(self.ln_1(tokens))
        return tokens + self.mlp(tokens)


class Tokens(nn.Module):
    """A small transformer: each pixel a patch, behind tokens of no place."""

    def __init__(self, prefix, block=Block):
        super().__init__()
        torch.manual_seed(3)
        self.patch_embed = nn.Conv2d(3, 8, 1)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 8))
        self.blocks = nn.Sequential(Block(), block())
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


def by_loop(model, x, classes, prefix, high, wide):
    """Grad-CAM of the last block's first norm, patch by patch."""
    seen = []
    handle = model.blocks[1].ln_1.register_forward_hook(lambda m, i, o: seen.append(o))
    y = model(x)
    handle.remove()
    found = torch.zeros(len(x), high, wide, dtype=torch.double)
    for n, c in enumerate(classes):
        gradient = torch.autograd.grad(y[n, c], seen[0], retain_graph=True)[0][n]
        patches, slopes = seen[0][n, prefix:].detach(), gradient[prefix:]
        for k in range(8):
            alpha = sum(float(g[k]) for g in slopes) / (high * wide)
            for place in range(high * wide):
                found[n, place // wide, place % wide] += alpha * float(patches[place, k])
    assert (found > 0).any()
    return scaled(found.relu())


@pytest.mark.parametrize(("high", "wide", "prefix"), [(2, 2, 1), (2, 3, 2), (4, 2, 0)])
def test_grids_and_prefixes_of_any_size(high, wide, prefix):
    """torchcam: test_methods_transformer.py::test_legrad_matches_manual_oracle, for Grad-CAM"""
    model = Tokens(prefix).double().eval()
    x = torch.randn(2, 3, high, wide, generator=torch.Generator().manual_seed(5)).double()
    expected = by_loop(model, x, (0, 2), prefix, high, wide)
    f = cut_classifier(model, "blocks.1.ln_1", preprocessing=plain(high, wide))
    assert_near(attribution_map(f, x, [0, 2], "gradcam"), expected)


class Positional(Block):
    """Attention that is asked by position, and for its weights."""

    def attend(self, tokens):
        return self.attention(tokens, tokens, tokens, None, True, None, True)[0]


class Crossed(Block):
    """Attention to tokens of other places."""

    def attend(self, tokens):
        moved = tokens.roll(1, 1)
        return self.attention(tokens, moved, moved, need_weights=False)[0]


class TokensFirst(Block):
    """Attention whose first dimension is the tokens."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, add_zero_attn=True)

    def attend(self, tokens):
        turned = tokens.transpose(0, 1)
        return self.attention(turned, turned, turned)[0].transpose(0, 1)


class Dropping(Block):
    """Attention with dropout."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)


@pytest.mark.parametrize("kind", [Positional, Crossed, TokensFirst, Dropping])
def test_attention_of_any_kind(kind):
    """torchcam: test_methods_transformer.py::test_legrad_supports_positional_attention_options

    ::test_legrad_rejects_cross_attention
    ::test_legrad_rejects_incompatible_attention_outputs
    What it refuses, since it looks at the attention, is no matter to maps of activations.
    """
    model = Tokens(1, kind).double().eval()
    x = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(6)).double()
    expected = by_loop(model, x, (1,), 1, 2, 3)
    f = cut_classifier(model.train(), "blocks.1.ln_1", preprocessing=plain(2, 3))
    assert_near(attribution_map(f, x, 1, "gradcam"), expected)


def test_transformers_in_inference_mode(pictures):
    """torchcam: test_methods_transformer.py

    ::test_legrad_rejects_disconnected_scores_and_invalid_forward_modes
    """
    f = cut_classifier(transformer(), NORM, preprocessing=plain(32, 32))
    expected = attribution_map(f, pictures, [1, 7], "layercam")
    with torch.inference_mode():
        assert torch.equal(attribution_map(f, pictures, [1, 7], "layercam"), expected)


def test_measures_of_maps_of_tokens(pictures):
    """torchcam: test_methods_transformer.py::test_legrad_classification_metric_compatibility"""
    f = cut_classifier(transformer(), NORM, preprocessing=plain(32, 32))
    classes = f(pictures).argmax(1)
    maps = attribution_map(f, pictures, classes, "layercam")

    def probability_of(x):
        with torch.no_grad():
            return f(x).softmax(1).gather(1, classes[:, None])[:, 0]

    y, y_hat = probability_of(pictures), probability_of(pictures * maps[:, None])
    for values in (metrics.drop(y_hat, y), metrics.deletion(pictures, maps, probability_of)):
        assert ((values >= 0) & (values <= 1)).all()


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
