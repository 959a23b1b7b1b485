"""Layers that other paths pass by, tokens and channels-last maps, networks torch.fx can't trace."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from aftcli import Search, attribution_map, cut_classifier, explain, fine_tune_threshold
from aftcli.core.cam import ablated_scores, grad_cam, score_gradient
from aftcli.core.classes import Preprocessing
from aftcli.cutting.layers import default_layer
from aftcli.cutting.layouts import Layout, before_maps, from_maps, to_maps
from aftcli.cutting.watched import RunTo
from aftcli.errors import AftError
from tests.helpers.compare import assert_near
from tests.reference import paper as reference

SIZE = (24, 32)
PREPROCESSING = Preprocessing(SIZE)
CLASSES = 5


class Residual(nn.Module):
    """conv2 is passed by, by its input and by a mean that the head scales with."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        n, _, h, w = x.shape
        z = self.conv1(x).relu()
        z = z + self.conv2(z).tanh()
        return self.fc(z.reshape(n, 6, h // 4 * (w // 4)).mean(2)) * x.mean((1, 2, 3))[:, None]


class ValueDependent(Residual):
    """The same, in a form that torch.fx can't trace."""

    def forward(self, *inputs):
        if inputs[0].abs().max() < 99:
            return super().forward(*inputs)
        raise ValueError("too bright")


class Tokens(nn.Module):
    """A class token and cells' tokens through two blocks by torch; batch first or second."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.first = batch_first
        make = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first, norm_first=True)
        self.blocks = nn.ModuleList([make, copy.deepcopy(make)])
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        tokens = tokens if self.first else tokens.transpose(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.fc(tokens[:, 0] if self.first else tokens[0])


class ChannelsLast(nn.Module):
    """Maps (N, h, w, K), mixed by a convolution between permutations."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        z = self.patch(x).permute(0, 2, 3, 1)
        z = z + self.mix(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc(self.norm(z).mean((1, 2)))


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=8,
        depth=2,
        embed_dim=12,
        num_heads=2,
        num_classes=CLASSES,
    )


# Network, layer, the place of its cells, and whether its graph is known.
CASES = {
    "residual": (Residual, "conv2", None, True),
    "untraceable": (ValueDependent, "conv2", None, False),
    "tokens": (Tokens, "blocks.1.norm1", Layout("tokens", 6, 8, 1), False),
    "sequence": (lambda: Tokens(False), "blocks.1.norm1", Layout("sequence", 6, 8, 1), False),
    "channels last": (ChannelsLast, "norm", Layout("last", 6, 8), True),
    "vit": (vit, "blocks.1.norm1", Layout("tokens", 3, 4, 1), True),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    build, layer, layout, traced = CASES[request.param]
    torch.manual_seed(3)
    model = build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape))
    notes = []
    f = cut_classifier(model, layer, preprocessing=PREPROCESSING, note=notes.append)
    assert isinstance(f.layer, RunTo) == (not traced)
    assert len(notes) == (not traced)
    x = torch.randn(3, 3, *SIZE, dtype=torch.double)
    return model, layer, layout, f, x


def by_hooks(model, layer, x, change=lambda out: out):
    """Run the network itself; return its output and the layer's, which `change` may replace."""
    seen = []

    def hook(module, args, out):
        out = change(out)
        seen.append(out)
        return out

    handle = model.get_submodule(layer).register_forward_hook(hook)
    logits = model(x)
    handle.remove()
    return logits, seen[-1]


def cells_of(out, layout, n, k, i, j):
    """One number of a layer's output, by its layout."""
    if layout is None:
        return out[n, k, i, j]
    place = layout.prefix + i * layout.width + j
    return {
        "last": lambda: out[n, i, j, k],
        "tokens": lambda: out[n, place, k],
        "sequence": lambda: out[place, n, k],
    }[layout.kind]()


def test_logits_and_activations_are_the_networks_own(case):
    model, layer, layout, f, x = case
    logits, out = by_hooks(model, layer, x)
    # Where a network runs as it is, torch's own fused kernels may be left out.
    tolerance = 1e-12 if isinstance(f.layer, RunTo) else 0
    assert (f(x) - logits).abs().max() <= tolerance
    g, activation = f.at(x)
    assert (g.head(activation) - logits).abs().max() <= tolerance
    assert not torch.equal(logits[0], logits[1])
    k, h, w = f.activation_shape
    assert activation.shape == (3, k, h, w)
    for n, c, i, j in [(0, 0, 0, 0), (1, k - 1, h - 1, w - 2), (2, 3, 1, 2)]:
        own = cells_of(out, layout, n, c, i, j)
        assert abs(float(activation[n, c, i, j] - own)) <= tolerance


def test_the_head_is_the_network_behind_the_layer_with_the_rest_held(case):
    model, layer, layout, f, x = case
    g, activation = f.at(x)
    changed = activation * 1.5 + 0.1

    def change(out):
        out = out.clone()
        cells = out
        if layout is not None and layout.prefix:
            # A view of the tokens that belong to cells.
            cells = out[:, layout.prefix :] if layout.kind == "tokens" else out[layout.prefix :]
        cells.mul_(1.5).add_(0.1)
        return out

    expected, _ = by_hooks(model, layer, x, change)
    assert (g.head(changed) - expected).abs().max() < 1e-12
    assert (g.head(changed) - g.head(activation)).abs().max() > 1e-3


def test_grad_cam_is_that_of_hooks(case):
    model, layer, layout, f, x = case
    c = torch.tensor([0, 2, 4])
    out = by_hooks(model, layer, x)[1].detach().requires_grad_()
    logits, _ = by_hooks(model, layer, x, lambda _: out)
    (gradient,) = torch.autograd.grad(logits.gather(1, c[:, None]).sum(), out)
    k, h, w = f.activation_shape
    expected = torch.zeros(3, h, w, dtype=torch.double)
    for n in range(3):
        for channel in range(k):
            every = [(i, j) for i in range(h) for j in range(w)]
            alpha = sum(cells_of(gradient, layout, n, channel, i, j) for i, j in every) / (h * w)
            for i, j in every:
                expected[n, i, j] += alpha * cells_of(out, layout, n, channel, i, j).detach()
    g, activation = f.at(x)
    found = grad_cam(g, activation, c, x)
    assert (found - expected.relu()).abs().max() < 1e-12
    assert found.abs().max() > 0


def test_ablation_zeroes_one_channel_of_one_image_at_a_time(case):
    model, layer, layout, f, x = case
    c = torch.tensor([1, 0, 3])
    g, activation = f.at(x)
    found = ablated_scores(g, activation, c)
    for n in (0, 2):
        for k in (0, f.activation_shape[0] - 1):
            without = activation.clone()
            without[n, k] = 0
            assert abs(float(found[n, k] - g.head(without)[n, c[n]])) < 1e-12
    assert (found[:, 0] - f(x).gather(1, c[:, None])[:, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("method", ["gradcam", "layercam", "scorecam", "eigencam"])
def test_a_batch_is_its_images(case, method):
    *_, f, x = case
    batch = attribution_map(f, x, [0, 1, 2], method)
    single = [attribution_map(f, x[n : n + 1], n, method)[0] for n in range(3)]
    assert (batch - torch.stack(single)).abs().max() < 1e-10
    assert batch.amax() > 0.5


def test_the_threshold_is_searched_by_the_network_itself(case):
    model, *_, f, x = case
    search = Search(thresholds=(0.0, 0.3, 0.6))
    (found,) = explain(f, x[:1], ["gradcam"], targets=1, settings=search)
    result = fine_tune_threshold(f, x[:1], found.attribution[None], 1, search.thresholds)
    assert torch.equal(result.tau, found.tft.tau)
    for t, tau in enumerate(search.thresholds):
        kept = (found.attribution >= tau) & (found.attribution > 0)
        y_hat = model(x[:1] * kept).softmax(1)[0, 1]
        assert abs(float(found.tft.probabilities[0, t] - y_hat)) < 1e-6
    assert abs(found.probability - float(model(x[:1]).softmax(1)[0, 1])) < 1e-6


def test_the_users_network_and_its_weights_stay_as_they_are(case):
    model, layer, _, f, x = case
    assert not any(m._forward_hooks for m in [*model.modules(), *f.modules()])
    assert f.weights().keys() == model.state_dict().keys()
    for name, value in f.weights().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_classifier_that_holds_values_still_runs_other_images(case):
    *_, f, x = case
    g, activation = f.at(x[:1])
    assert (g(x) - f(x)).abs().max() < 1e-12
    two = g.head(activation.repeat(2, 1, 1, 1))
    assert (two - f(x[:1])).abs().max() < 1e-12
    h, several = f.at(x)
    for n in range(3):
        assert (h.image(n).head(several[n : n + 1]) - f(x)[n]).abs().max() < 1e-12


def test_each_weight_belongs_to_one_part():
    torch.manual_seed(0)
    f = cut_classifier(vit(), "blocks.1.norm1", preprocessing=PREPROCESSING)
    parts = [{id(p) for p in part.parameters()} for part in (f.stem, f.layer, f.head)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert len(parts[1]) == 2


@pytest.mark.parametrize(
    "layout",
    [
        Layout("last", 2, 3),
        Layout("tokens", 2, 3),
        Layout("tokens", 2, 3, 2),
        Layout("sequence", 2, 3, 1),
    ],
)
def test_layouts_there_and_back(layout):
    shape = {"last": (4, 2, 3, 5), "tokens": (4, layout.prefix + 6, 5)}
    shape = shape.get(layout.kind, (layout.prefix + 6, 4, 5))
    out = torch.randn(shape)
    before = [before_maps(out, *layout)] if layout.prefix else []
    back = from_maps(to_maps(out, *layout), before, *layout)
    assert torch.equal(back, out)
    assert back.stride() == out.stride() or layout.kind == "sequence"


@pytest.mark.parametrize("kind", ["last", "tokens"])
def test_numbers_that_lie_in_another_order_stay_so(kind):
    # What follows would sum them in another order, and round otherwise.
    layout = Layout(kind, 2, 3, contiguous=False)
    shape, order = ((4, 2, 5, 3), (0, 1, 3, 2)) if kind == "last" else ((4, 5, 6), (0, 2, 1))
    out = torch.randn(shape).permute(order)
    back = from_maps(to_maps(out, *layout), [], *layout)
    assert torch.equal(back, out)
    assert back.stride() == out.stride()


# Default layers


def test_the_stem_shares_no_weights_where_the_graph_is_known(case):
    f = case[3]
    if not isinstance(f.layer, RunTo):
        own = {id(p) for p in f.stem.parameters()}
        assert own and not any(id(p) in own for p in [*f.layer.parameters(), *f.head.parameters()])


def test_a_number_of_all_images_that_passes_by_is_run_as_it_is():
    class Scaled(Residual):
        def forward(self, x):
            return super().forward(x) * x.mean().sign()

    torch.manual_seed(0)
    model, notes = Scaled().eval(), []
    f = cut_classifier(model, "conv2", preprocessing=PREPROCESSING, note=notes.append)
    x = torch.randn(1, 3, *SIZE)
    assert torch.equal(f(x), model(x)) and "without a row for each image" in notes[0]


class Asking(Residual):
    """Asks for sizes and types before it runs, and takes whatever it is given."""

    def forward(self, *inputs, **others):
        x = inputs[0]
        if x.shape[-1] < 8 or x.dtype != self.fc.weight.dtype or x.dim() != 4:
            raise ValueError("not such an input")
        return super().forward(x)


class AskingForImages(Residual):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 or x.shape[0] < 2 else None


class AskingForValues(Residual):
    def forward(self, x):
        return super().forward(x) if x.mean() < 9 else None


@pytest.mark.parametrize(
    ("kind", "traced"), [(Asking, True), (AskingForImages, False), (AskingForValues, False)]
)
def test_a_question_about_sizes_and_types_is_no_obstacle(kind, traced):
    torch.manual_seed(0)
    model = kind().eval()
    f, plain = (
        cut_classifier(m, "conv2", preprocessing=PREPROCESSING, note=lambda _: None)
        for m in (model, _with_weights(Residual(), model))
    )
    assert isinstance(f.layer, RunTo) != traced
    x = torch.randn(3, 3, *SIZE)
    assert torch.allclose(f(x), model(x), atol=1e-6)
    maps = [attribution_map(g, x, [0, 1, 2], "gradcam") for g in (f, plain)]
    assert maps[0].any() and torch.allclose(*maps, atol=1e-5)


def _with_weights(model, other):
    model.load_state_dict(other.state_dict())
    return model.eval()


def test_a_layer_that_returns_several_tensors_is_run_as_it_is():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, stride=4)

        def forward(self, x):
            y = self.conv(x).relu()
            return y, y.amax((2, 3))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.fc = Both(), nn.Linear(6, CLASSES)

        def forward(self, x):
            y, top = self.both(x)
            return self.fc(y.mean((2, 3)) + top)

    torch.manual_seed(0)
    model, notes = Net().eval(), []
    f = cut_classifier(model, "both", preprocessing=PREPROCESSING, note=notes.append)
    assert "the layer returns several tensors" in notes[0]
    x = torch.randn(2, 3, *SIZE)
    logits, (a, _) = by_hooks(model, "both", x)
    assert torch.allclose(f(x), logits, atol=1e-6) and torch.equal(f.activation(x), a)


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
def test_a_score_that_does_not_depend_on_the_layer_is_refused(method):
    class Elsewhere(Residual):
        """Its other output runs the same modules again."""

        def forward(self, x):
            return {"logits": super().forward(x), "mirrored": super().forward(x.flip(3))}

    f = cut_classifier(Elsewhere(), "conv2", preprocessing=PREPROCESSING, note=lambda _: None)
    with pytest.raises(AftError, match=r"does not depend on layer conv2.*--layer"):
        attribution_map(f, torch.randn(1, 3, *SIZE), 1, method)


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (Residual, "conv2"),
        (Tokens, "blocks.1.norm1"),
        (ChannelsLast, "norm"),
        (vit, "blocks.1.norm1"),
    ],
)
def test_the_default_is_the_last_layer_whose_cells_move_the_logits(build, layer):
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(1, 3, *SIZE)
    assert default_layer(model, x, note=lambda _: None) == layer
    # By brute force: cells behind it move nothing, or there is no such module.
    logits, out = by_hooks(model, layer, x)
    moved, _ = by_hooks(model, layer, x, lambda out: out + torch.randn_like(out))
    assert not torch.equal(moved, logits)


def test_a_module_that_passes_on_what_came_in_is_not_the_last():
    class Both(nn.Module):
        """Returns its first input as it is, and a convolution of its second."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, early, late):
            return early, self.conv(late)

    class Scales(Residual):
        def __init__(self):
            super().__init__()
            self.both = Both()

        def forward(self, x):
            early = self.conv1(x)
            early, late = self.both(early, self.conv2(early.relu()))
            return self.fc(early.mean((2, 3)) + late.tanh().mean((2, 3)))

    torch.manual_seed(0)
    x = torch.randn(1, 3, *SIZE)
    assert default_layer(Scales().eval(), x, note=lambda _: None) == "both.conv"


def test_zero_weights_do_not_hide_a_path():
    torch.manual_seed(0)
    model = Residual().eval()
    nn.init.zeros_(model.fc.weight)
    x = torch.randn(1, 3, *SIZE)
    assert default_layer(model, x, note=lambda _: None) == "conv2"
    assert not model.fc.weight.any()


def test_a_layer_before_the_last_convolution_is_said():
    class Gate(nn.Module):
        """A convolution whose cells are only summed: it has none of its own."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, stride=4)
            self.gate = nn.Conv2d(3, 6, 3, stride=8)
            self.fc = nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)) + 0 * self.gate(x).mean((2, 3)))

    notes = []
    f = cut_classifier(Gate(), preprocessing=PREPROCESSING, note=notes.append)
    assert f.layer_name == "conv"
    assert notes == [
        "layer conv is explained, not the last convolution gate, most of whose cells do not move "
        "the output; --layer NAME chooses another"
    ]


@pytest.mark.parametrize(("layer", "said"), [("norm", 1), ("blocks.1.norm1", 0)])
def test_a_layer_whose_cells_move_nothing_is_said(layer, said):
    torch.manual_seed(0)
    notes = []
    model = vit()
    nn.init.normal_(model.head.weight)
    f = cut_classifier(model, layer, preprocessing=PREPROCESSING, note=notes.append)
    assert len(notes) == said
    if said:
        assert notes[0].startswith("layer norm does not move the output")
    x = torch.randn(1, 3, *SIZE)
    assert bool(attribution_map(f, x, 1, "layercam").any()) == (not said)


def test_a_layer_run_as_it_is_can_be_named_only_if_it_has_cells():
    torch.manual_seed(0)
    with pytest.raises(AftError, match=r"'fc' can't be used: its output has shape \(N, 5\)"):
        cut_classifier(ValueDependent(), "fc", preprocessing=PREPROCESSING, note=lambda _: None)


def test_a_layer_that_does_not_run_is_named():
    model = Residual()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(AftError, match="'spare' can't be cut: spare is called nowhere"):
        cut_classifier(model, "spare", preprocessing=PREPROCESSING)


def test_the_gradient_behind_attention_can_be_trained():
    torch.manual_seed(0)
    model = vit().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape))
    f = cut_classifier(model, preprocessing=PREPROCESSING, note=lambda _: None)
    with torch.no_grad():
        g, a = f.at(torch.randn(1, 3, *SIZE, dtype=torch.double))
    c, u, v, step = torch.tensor([1]), torch.randn_like(a), torch.randn_like(a), 1e-5
    own = a.clone().requires_grad_()
    (u * score_gradient(g, own, c)).sum().backward()
    ahead, back = (score_gradient(g, a + s * v, c) for s in (step, -step))
    expected = (u * (ahead - back)).sum() / (2 * step)
    assert expected.abs() > 1e-3
    assert torch.allclose((own.grad * v).sum(), expected, rtol=1e-4)


class Shared(nn.Module):
    """One layer for the image and for its mirror image, or for its own output."""

    def __init__(self, serial, asks):
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.fc, self.serial, self.asks = nn.Linear(6, 4), serial, asks

    def forward(self, x):
        # torch.fx can't follow a question about values.
        one = self.layer(x * 2 if self.asks and x.sum() > 1e6 else x)
        two = self.layer(one if self.serial else x.flip(3))
        return self.fc(torch.cat([one.mean((2, 3)), two.amax((2, 3))], 1))


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("serial", [False, True])
def test_of_a_layer_that_runs_twice_the_last_output_is_explained_and_that_is_said(serial, asks):
    model, said = Shared(serial, asks).double().eval(), []
    f = cut_classifier(model, preprocessing=Preprocessing(size=(6, 8)), note=said.append)
    assert f.layer_name == "layer"
    assert "layer layer runs 2 times in a pass; maps explain its last output only" in said
    x = torch.randn(1, 3, 6, 8, dtype=torch.double)
    assert_near(f(x), model(x), 1e-12)
    with torch.no_grad():
        one = model.layer(x)
        last = model.layer(one if serial else x.flip(3))[0]
    g = np.zeros(last.shape)
    for k in range(3):
        i, j = divmod(int(last[k].argmax()), 8)
        g[k, i, j] = model.fc.weight[2, 3 + k].item()
    cells = np.maximum((g * last.numpy()).sum(0), 0)
    assert_near(attribution_map(f, x, 2, "hirescam")[0], reference.scale(cells))
