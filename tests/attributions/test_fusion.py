"""Multi-layer Layer-CAM against hooks on the uncut network."""

import copy
import gc
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from aftcli.attributions import activation as fusion
from aftcli.attributions.activation import fuse, layer_cam_fusion, stage_maps, stages
from aftcli.core.cam import layer_cam, upsample
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.errors import AftError
from tests.helpers.small import SIZE, small


class Block(nn.Module):
    """A residual block whose sum is written into, and whose activation runs twice."""

    def __init__(self, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 1, stride=stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv2(self.relu(self.conv1(x)))
        out += self.down(x)
        return self.relu(out)


class Staged(nn.Module):
    """Four stages; two end before an activation that writes into them, and runs several times."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 4, 2, stride=2)
        self.block = Block(4, 1)
        self.layer = Block(8, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv2(self.pool(self.relu(self.conv1(x))))
        x = self.layer(self.block(self.relu(self.strided(F.relu(x, inplace=True)))))
        return self.fc(x.mean((2, 3)))


# The last module of each spatial size, as one reads it from forward; relu runs again later.
ENDS = ("conv1", "conv2", "block", "layer")


@pytest.fixture
def staged():
    torch.manual_seed(0)
    model = Staged().double().eval()
    f = cut_classifier(model, "layer", preprocessing=Preprocessing(size=(12, 16)))
    return model, f, torch.randn(3, 3, 12, 16, dtype=torch.float64), torch.tensor([0, 3, 4])


def hooked(model, ends, x, class_index):
    """M_s of each image alone, pixel by pixel and channel by channel."""
    kept = []

    def keep(module, args, output):
        kept.append(output)
        # What follows may write into its input; the gradient is that of what was kept.
        return output.clone()

    modules = [model.get_submodule(name) for name in ends]
    handles = [module.register_forward_hook(keep) for module in modules]
    maps = [[] for _ in ends]
    for image, c in zip(x, class_index.tolist(), strict=True):
        kept.clear()
        y = model(image[None].clone().requires_grad_())[0, c]
        gradients = torch.autograd.grad(y, kept)
        for found, a, g in zip(maps, kept, gradients, strict=True):
            _, channels, h, w = a.shape
            m = torch.zeros(h, w, dtype=a.dtype)
            for i in range(h):
                for j in range(w):
                    terms = (
                        max(g[0, k, i, j].item(), 0) * a[0, k, i, j].item() for k in range(channels)
                    )
                    m[i, j] = max(sum(terms), 0)
            found.append(m)
    for handle in handles:
        handle.remove()
    return [torch.stack(found) for found in maps]


@torch.no_grad()
def test_stage_maps_are_layer_cam_by_hooks(staged):
    model, f, x, class_index = staged
    with torch.enable_grad():
        expected = hooked(model, ENDS, x, class_index)
    found = stage_maps(f, f.activation(x), class_index, x)
    assert [m.shape[1:] for m in found] == [(12, 16), (6, 8), (3, 4), (2, 2)]
    for m, literal in zip(found, expected, strict=True):
        assert literal.count_nonzero()
        assert_close(m, literal)


@torch.no_grad()
def test_fusion_is_the_maximum_of_scaled_maps(staged):
    model, f, x, class_index = staged
    with torch.enable_grad():
        maps = hooked(model, ENDS, x, class_index)
    stretched = []
    for s, literal in enumerate(maps):
        m = torch.stack([m / m.max() if m.max() > 0 else m for m in literal])
        if s < 2:  # all stages but the last two
            m.apply_(lambda v: math.tanh(2 * v))
        stretched.append(F.interpolate(m[:, None], (12, 16), mode="bilinear")[:, 0])
    expected = stretched[0]
    for m in stretched[1:]:
        expected = torch.where(m > expected, m, expected)
    found = layer_cam_fusion(f, f.activation(x), class_index, x)
    assert_close(found, expected)
    assert len(torch.stack(stretched).argmax(0).unique()) >= 3


@torch.no_grad()
def test_empty_maps_stay_empty_and_few_are_not_scaled():
    x = torch.zeros(1, 3, 4, 4)
    one = torch.rand(1, 4, 4)
    assert not fuse([torch.zeros(1, 4, 4), torch.zeros(1, 2, 2), torch.zeros(1, 1, 1)], x).any()
    assert_close(fuse([one, torch.zeros(1, 2, 2)], x), one / one.max())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
def test_a_batch_equals_its_images(kind, monkeypatch):
    _, _, f, x, class_index = small(kind)
    before = torch.get_rng_state()
    together = layer_cam_fusion(f, f.activation(x), class_index, x)
    assert together.shape == (3, *SIZE) and together.min() >= 0
    monkeypatch.setattr(fusion, "BATCH", 2)
    assert_close(layer_cam_fusion(f, f.activation(x), class_index, x), together)
    for n in range(3):
        here = slice(n, n + 1)
        alone = layer_cam_fusion(f, f.activation(x[here]), class_index[here], x[here])
        assert_close(alone, together[here])
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_without_an_earlier_stage_it_is_layer_cam():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    f = cut_classifier(model, "0+1", preprocessing=Preprocessing(size=(8, 8)))
    x, c = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    m = layer_cam(f, f.activation(x), c, x)
    peak = m.amax((1, 2), keepdim=True)
    found = layer_cam_fusion(f, f.activation(x), c, x)
    assert_close(found, upsample(m / torch.where(peak > 0, peak, 1), x))


def state(f):
    flags = [(m.training, getattr(m, "inplace", None), dict(m._forward_hooks)) for m in f.modules()]
    return (
        flags,
        {k: v.clone() for k, v in f.state_dict().items()},
        [p.requires_grad for p in f.parameters()],
    )


@torch.no_grad()
def test_the_model_is_untouched_and_trained_weights_are_seen(staged):
    _, f, x, class_index = staged
    f.stem.train()
    next(m for m in f.stem.modules() if isinstance(m, nn.Conv2d)).eval()
    before, x_before = state(f), x.clone()
    a = f.activation(x)
    kept = a.clone()
    first = layer_cam_fusion(f, a, class_index, x)
    flags, weights, grads = state(f)
    assert (flags, grads) == (before[0], before[2])
    assert_close(weights, before[1], rtol=0, atol=0)
    assert torch.equal(x, x_before) and torch.equal(a, kept)
    for p in f.parameters():
        p.mul_(1.1)
    trained = layer_cam_fusion(f, f.activation(x), class_index, x)
    assert not torch.allclose(trained, first)
    assert_close(trained, layer_cam_fusion(copy.deepcopy(f), f.activation(x), class_index, x))


@pytest.mark.slow
@torch.no_grad()
def test_parts_do_not_outlive_their_classifier():
    _, _, f, x, class_index = small("linear")
    layer_cam_fusion(f, f.activation(x), class_index, x)
    gc.collect()
    count = len(fusion._cut)
    assert f.stem in fusion._cut
    del f
    gc.collect()
    assert len(fusion._cut) == count - 1


@torch.no_grad()
def test_a_stem_that_can_not_be_looked_into_is_an_error(monkeypatch):
    _, _, f, x, class_index = small("linear")

    def fail(*args):
        raise RuntimeError("no shapes here")

    monkeypatch.setattr(fusion, "cut_points", fail)
    with pytest.raises(AftError, match="no shapes here.*use layercam"):
        layer_cam_fusion(f, f.activation(x), class_index, x)


@pytest.mark.slow
@torch.no_grad()
def test_stages_of_lite0(lite0, chelsea):
    c = lite0(chelsea).argmax(1)
    maps = stage_maps(lite0, lite0.activation(chelsea), c, chelsea)
    assert [m.shape[1] for m in maps] == [112, 56, 28, 14, 7]
    assert_close(maps[-1], layer_cam(lite0, lite0.activation(chelsea), c, chelsea))
    *_, last = stages(lite0, (224, 224), (7, 7))
    assert isinstance(last, nn.Sequential)


def vgg():
    torchvision = pytest.importorskip("torchvision")
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(512, 9))]
    return nn.Sequential(OrderedDict([("features", features), *head]))


def resnet():
    return pytest.importorskip("torchvision").models.resnet18(weights=None)


@pytest.mark.parametrize(
    ("build", "layer", "sides"),
    [(resnet, "layer4.1", [32, 16, 8, 4, 2]), (vgg, "features.28+features.29", [64, 32, 16, 8, 4])],
)
@torch.no_grad()
def test_stages_of_torchvision_networks(build, layer, sides):
    torch.manual_seed(0)
    f = cut_classifier(build(), layer, preprocessing=Preprocessing(size=(64, 64)), own=True)
    x = torch.randn(1, 3, 64, 64)
    maps = stage_maps(f, f.activation(x), torch.tensor([7]), x)
    assert [m.shape[1] for m in maps] == sides
