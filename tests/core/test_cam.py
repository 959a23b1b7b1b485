"""The CAM methods against their definitions (§2.4, §3.1)."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aftcli.attributions.maps import attribution_map
from aftcli.core.cam import (
    ablated_by_batches,
    ablated_scores,
    normalise,
    scaled_map,
    score_gradient,
    upsample,
)
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.head import ablated_before_mlp, ablated_in_closed_form
from aftcli.core.methods import CAMS, METHODS, Entry, named
from aftcli.errors import AftError
from aftcli.models.load import load_classifier
from tests.helpers.compare import assert_near, uncut
from tests.helpers.small import CELLS, KINDS, POOL_LINEAR, SIZE, small, small_model
from tests.reference import paper as reference

SEEDS = (0, 1, 2)
FITTING = [
    (method, kind) for method in CAMS for kind in KINDS if method != "cam" or kind in POOL_LINEAR
]


def pre_map(s, method):
    """I_pre, before scaling."""
    activation = s.f.activation(s.x)
    return CAMS[method].load()(s.f, activation, s.class_index, s.x).detach()


def test_every_method_has_a_reference():
    assert set(CAMS) == set(reference.CAMS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("method", "kind"), FITTING)
def test_method_equals_its_definition(method, kind, seed):
    s = small(kind, seed)
    maps = pre_map(s, method)
    expected = [
        reference.CAMS[method](s.model, s.layer, s.x[n : n + 1], int(c))
        for n, c in enumerate(s.class_index)
    ]
    for actual, wanted in zip(maps, expected, strict=True):
        assert_near(actual, wanted)
    # A comparison of zeros would show nothing.
    assert any(wanted.max() > 0 for wanted in expected)


@pytest.mark.parametrize(("method", "kind"), FITTING)
def test_map_at_the_inputs_size_equals_its_definition(method, kind):
    s = small(kind, 3)
    maps = attribution_map(s.f, s.x, s.class_index, method)
    for n, c in enumerate(s.class_index):
        expected = reference.attribution_map(s.model, s.layer, s.x[n : n + 1], int(c), method)
        assert_near(maps[n], expected)


@pytest.mark.parametrize(("method", "kind"), FITTING)
def test_batch_equals_its_images_one_by_one(method, kind):
    s = small(kind, 4)
    together = attribution_map(s.f, s.x, s.class_index, method)
    for n in range(len(s.x)):
        alone = attribution_map(s.f, s.x[n : n + 1], s.class_index[n : n + 1], method)
        assert_near(alone[0], together[n])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in POOL_LINEAR])
def test_cam_refuses_a_head_that_is_not_pooling_and_one_linear_layer(kind):
    s = small(kind)
    with pytest.raises(AftError, match="global average pooling and one linear layer"):
        attribution_map(s.f, s.x, s.class_index, "cam")


def test_unknown_method_names_the_nearest():
    s = small("linear")
    with pytest.raises(AftError, match="'grad-cam'; nearest: gradcam"):
        attribution_map(s.f, s.x, s.class_index, "grad-cam")


@pytest.mark.parametrize("kind", KINDS)
def test_explaining_leaves_the_users_model_as_it_was(kind):
    model = small_model(kind, 0)
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model)

    f = cut_classifier(model, KINDS[kind][1], preprocessing=Preprocessing(size=SIZE))
    weights = {name: value.clone() for name, value in f.state_dict().items()}
    x, c = torch.randn(2, 3, *SIZE, dtype=torch.float64), torch.tensor([0, 3])
    for method in CAMS:
        if method != "cam" or kind in POOL_LINEAR:
            attribution_map(f, x, c, method)

    for network, old in ((model, before.state_dict()), (f, weights)):
        assert all(torch.equal(v, old[name]) for name, v in network.state_dict().items())
        for module in network.modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            assert not any(hooks)
        assert all(p.grad is None for p in network.parameters())
    assert not any(module.training for module in f.modules())
    for module, old in zip(model.modules(), before.modules(), strict=True):
        assert module.training == old.training
        assert getattr(module, "inplace", None) == getattr(old, "inplace", None)
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert p.requires_grad == old.requires_grad


@pytest.mark.parametrize(("method", "kind"), FITTING)
def test_zero_activation_gives_a_zero_map(method, kind):
    s = small(kind)
    activation = torch.zeros(3, 8, *CELLS, dtype=torch.float64)
    assert torch.equal(
        scaled_map(s.f, activation, s.class_index, s.x, method),
        torch.zeros(3, *CELLS, dtype=torch.float64),
    )


@pytest.mark.parametrize("method", CAMS)
def test_an_empty_channel_changes_nothing(method):
    s = small("linear", 5)
    activation = s.f.activation(s.x)
    activation[:, 2] = 0
    maps = scaled_map(s.f, activation, s.class_index, s.x, method)
    assert maps.isfinite().all()
    # Its score and its gradient do not matter, whatever weight they give the channel.
    if method != "scorecam":
        f = copy.deepcopy(s.f)
        f.head.get_submodule("fc").weight[:, 2] = 1e3
        assert_near(scaled_map(f, activation, s.class_index, s.x, method), maps)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, -2.0])
def test_a_constant_map_becomes_zero(value):
    constant = torch.full((2, 4, 5), value)
    assert torch.equal(normalise(constant), torch.zeros(2, 4, 5))


def test_a_map_that_is_not_finite_is_an_error():
    s = small("linear")
    activation = s.f.activation(s.x)
    activation[0, 0, 0, 0] = float("nan")
    with pytest.raises(AftError, match="not finite"):
        scaled_map(s.f, activation, s.class_index, s.x, "gradcam")


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_is_to_the_unit_interval_map_by_map(seed):
    torch.manual_seed(seed)
    values = torch.randn(3, 5, 7, dtype=torch.float64) * 10 + 2
    scaled = normalise(values)
    for actual, value in zip(scaled, values, strict=True):
        assert_near(actual, reference.scale(value.numpy()))
        assert (actual.min(), actual.max()) == (0, 1)


@pytest.mark.parametrize("size", [(20, 28), (17, 31), (5, 7), (3, 4)])
def test_upsampling_is_bilinear_between_pixel_centres(size):
    values = torch.rand(2, 5, 7, dtype=torch.float64)
    stretched = upsample(values, torch.empty(2, 3, *size))
    for actual, value in zip(stretched, values, strict=True):
        assert_near(actual, reference.upsample(value.numpy(), size))


def test_gradient_is_that_of_the_score_of_each_images_own_class():
    s = small("mlp", 6)
    gradient = score_gradient(s.f, s.f.activation(s.x), s.class_index)
    for n, c in enumerate(s.class_index):
        expected = reference.gradient_of(s.model, s.layer, s.x[n : n + 1], int(c))
        assert_near(gradient[n], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_grad_cam_plus_plus_survives_tiny_gradients(seed):
    # s = g^2 / (2 g^2 + ...) underflows in float32 where g is below 1e-19; so does an epsilon.
    s = small("mlp", seed)
    f = copy.deepcopy(s.f).float()
    for name in ("weight", "bias"):
        getattr(f.head.get_submodule("fc2"), name).mul_(1e-25)
    activation = f.activation(s.x.float())
    plain = CAMS["gradcam++"].load()(f, activation, s.class_index, s.x.float())
    exact = copy.deepcopy(f).double()
    expected = CAMS["gradcam++"].load()(exact, activation.double(), s.class_index, s.x)
    assert expected.max() > 0
    assert_near(normalise(plain), normalise(expected).float(), 1e-4)


# Ablation-CAM


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_ablate_agree_with_zeroing_each_channel(kind, seed):
    s = small(kind, seed)
    activation, ways = s.f.activation(s.x), [ablated_scores]
    if s.f.linear_head:
        ways += [lambda f, a, c: ablated_before_mlp(f.linear_head, a, c)]
    if s.f.linear_head and s.f.linear_head.is_last:
        ways += [lambda f, a, c: ablated_in_closed_form(f.linear_head, a, c)]
    expected = torch.tensor(
        [
            [reference.ablated_score(s.model, s.layer, s.x[n : n + 1], int(c), k) for k in range(8)]
            for n, c in enumerate(s.class_index)
        ],
        dtype=torch.float64,
    )
    for way in [*ways, ablated_by_batches]:
        assert_near(way(s.f, activation, s.class_index), expected)


def test_small_heads_take_the_ways_they_are_meant_to_test():
    heads = {kind: small(kind).f.linear_head for kind in KINDS}
    assert heads["conv"] is None and heads["mixing"] is None
    assert [heads[k].is_last for k in ("linear", "signed", "late norm", "mlp")] == [
        True,
        True,
        True,
        False,
    ]
    assert [kind for kind, head in heads.items() if head and head.is_last and head.is_mean] == [
        *POOL_LINEAR
    ]


def pooled(*layers):
    """A network whose head is mean pooling, then these layers."""
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), *layers).double().eval()
    plain = Preprocessing((6, 6), None, "bilinear", (0.0,) * 3, (1.0,) * 3)
    return model, cut_classifier(model, "0", preprocessing=plain)


def test_a_convolution_of_one_cell_is_a_linear_layer():
    x = torch.rand(2, 3, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(4))
    c = torch.tensor([0, 2])
    last = pooled(nn.Conv2d(8, 4, 1), nn.Flatten())
    inner = pooled(nn.Conv2d(8, 6, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(6, 4))
    relu = pooled(nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(), nn.Flatten())
    for (model, f), is_last in ((last, True), (inner, False), (relu, False)):
        assert (f.linear_head.is_last, f.linear_head.is_mean) == (is_last, True)
        expected = torch.tensor(
            [
                [reference.ablated_score(model, "0", x[n : n + 1], int(c[n]), k) for k in range(8)]
                for n in range(2)
            ],
            dtype=torch.double,
        )
        activation = f.activation(x)
        assert_near(ablated_scores(f, activation, c), expected)
        assert_near(ablated_by_batches(f, activation, c), expected)
    model, f = last
    alpha = model[2].weight[c, :, 0, 0].detach()
    expected = torch.einsum("nk,nkij->nij", alpha, f.activation(x)).relu()
    assert_near(CAMS["cam"].load()(f, f.activation(x), c, x), expected)
    # The weights are the network's own: what is trained later counts.
    own, before = f.head.get_submodule("2").weight, f.linear_head.weight.clone()
    with torch.no_grad():
        own.mul_(2)
    assert torch.equal(f.linear_head.weight, own.flatten(1))
    assert torch.equal(f.linear_head.weight, 2 * before)


@pytest.mark.parametrize(
    "head",
    [
        [nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],  # of many cells
        [nn.AdaptiveAvgPool2d(2), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 4)],
        [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1, groups=2), nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1, padding=1), nn.Flatten(), nn.Linear(36, 4)],
    ],
)
def test_other_convolutions_are_none(head):
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    plain = Preprocessing((6, 6), None, "bilinear", (0.0,) * 3, (1.0,) * 3)
    assert (
        cut_classifier(nn.Sequential(stem, *head).eval(), "0", preprocessing=plain).linear_head
        is None
    )


def compare_ablations(f, model, layer, x, count):
    """Drops y - y_k of some channels, zeroed one by one in the whole uncut network."""
    with torch.no_grad():
        activation = f.activation(x)
        logits = f.head(activation)
        c = logits.argmax(1)
        ways = [ablated_by_batches(f, activation, c)]
        if f.linear_head:
            ways.append(ablated_scores(f, activation, c))
            ways.append(ablated_before_mlp(f.linear_head, activation, c))
        if f.linear_head and f.linear_head.is_last:
            ways.append(ablated_in_closed_form(f.linear_head, activation, c))
    y = logits[0, c]
    # The strongest and weakest channels, and some between.
    order = (y - ways[0])[0].abs().argsort()
    channels = order[torch.linspace(0, len(order) - 1, count).long()].tolist()
    expected = [reference.ablated_score(model, layer, x, int(c), k) for k in channels]
    drop = y - torch.tensor(expected, dtype=torch.float64)
    assert drop.abs().max() > 0
    for way in ways:
        assert_near(way, ways[0])
        assert_near(y - way[0, channels], drop, 1e-4)
    return len(ways)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "ways"),
    [("resnet18", "layer4.1", 4), ("vgg11", "features.19", 3), ("squeezenet1_0", "features.12", 1)],
)
def test_ablation_of_a_published_network_equals_zeroing_channels_in_it(name, layer, ways):
    from torchvision.models import get_model

    torch.manual_seed(0)
    f = load_classifier(name, weights=False).double()
    if name == "vgg11":
        # Most channels are empty, which also saves most of the head's passes.
        last = f.layer.get_submodule("features.18")
        last.weight[48:] = last.bias[48:] = 0
    with torch.device("meta"):
        model = get_model(name)
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    assert compare_ablations(f, uncut(f, model), layer, x, count=5) == ways


@pytest.mark.slow
def test_ablation_of_lite0_equals_zeroing_channels_in_it(lite0, uncut_lite0, chelsea):
    f = copy.deepcopy(lite0).double()
    model = uncut(f, copy.deepcopy(uncut_lite0))
    assert compare_ablations(f, model, "bn2", chelsea.double(), count=16) == 4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_negative_score_does_not_turn_the_ablation_map_inside_out(seed):
    # A bias moves the score and no drop, so the map must stay whatever the score's sign.
    s = small("linear", seed)
    activation = s.f.activation(s.x)
    maps = []
    for bias in (100.0, -100.0):
        f = copy.deepcopy(s.f)
        f.head.get_submodule("fc").bias += bias
        y = f.head(activation)
        assert torch.equal(y.sign(), torch.full_like(y, bias).sign())
        maps.append(scaled_map(f, activation, s.class_index, s.x, "ablationcam"))
    assert maps[0].max() == 1
    assert_near(maps[1], maps[0])


# Limit cases


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", POOL_LINEAR)
def test_on_a_pooled_head_the_weights_of_several_methods_coincide(kind, seed):
    # dy/dA is W_c / Z in every cell: Grad-CAM is CAM / Z, and HiResCAM and XGrad-CAM are Grad-CAM.
    s = small(kind, seed)
    plain = pre_map(s, "cam")
    assert plain.max() > 0
    cells = CELLS[0] * CELLS[1]
    for method in ("gradcam", "hirescam", "xgradcam"):
        assert_near(pre_map(s, method) * cells, plain)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_a_pooled_head_of_positive_activations_ablation_weighs_by_mean_and_weight(seed):
    s = small("linear", seed)
    activation = s.f.activation(s.x)
    y = s.f.head(activation).gather(1, s.class_index[:, None])
    weight = s.f.head.get_submodule("fc").weight[s.class_index]
    alpha = weight * activation.mean((2, 3)) / y.abs()
    expected = F.relu((alpha[:, :, None, None] * activation).sum(1))
    assert_near(pre_map(s, "ablationcam"), expected)


@pytest.mark.parametrize("method", CAMS)
def test_maps_lie_in_the_unit_interval_and_reach_both_ends_at_the_layers_size(method):
    s = small("signed", 7)
    activation = s.f.activation(s.x)
    maps = scaled_map(s.f, activation, s.class_index, s.x, method)
    assert maps.shape == (3, *CELLS)
    for values in maps:
        assert values.min() == 0
        assert values.max() in (0, 1)
    assert maps.max() == 1


def test_methods_on_a_batch_explain_each_image_by_its_own_class():
    s = small("linear", 8)
    x, c = s.x[:1].expand(5, -1, -1, -1), torch.arange(5)
    maps = attribution_map(s.f, x, c, "gradcam")
    for n in range(5):
        alone = attribution_map(s.f, s.x[:1], torch.tensor([n]), "gradcam")
        assert_near(maps[n], alone[0])
    assert len({tuple(m.flatten().tolist()) for m in maps}) == 5


def loudest_channel(f, activation, class_index, x):
    """A method from outside: the largest activation of each cell."""
    return activation.amax(1).relu()


def test_a_method_from_outside_is_a_function_and_a_line(monkeypatch):
    entry = Entry("Loudest", "nobody", f"{__name__}:loudest_channel")
    monkeypatch.setitem(METHODS, "loudest", entry)
    s = small("mlp", 4)
    found = attribution_map(s.f, s.x, s.class_index, "loudest")
    for n, activation in enumerate(s.f.activation(s.x)):
        rows = activation.permute(1, 2, 0).tolist()
        cells = np.array([[max(0, *channels) for channels in row] for row in rows])
        assert_near(found[n], reference.upsample(reference.scale(cells), s.x.shape[-2:]))
    assert named(["loudest"]) == ["loudest"]
