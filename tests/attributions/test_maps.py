"""Smoothed maps and maps of several layers against literal loops and two other libraries."""

import json

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from PIL import Image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchcam.methods.core import _CAM

from aftcli.attributions import activation as beyond
from aftcli.attributions.maps import (
    FUSIONS,
    SCORES,
    SMOOTHINGS,
    WEIGHTS,
    attribution_map,
    fused,
)
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.errors import AftError
from aftcli.models.source import Source
from aftcli.settings import Search, Shaping
from aftcli.tft.explain import explain, passes
from aftcli.tft.search import fine_tune_threshold
from tests.helpers.command import aft, usage_error
from tests.helpers.compare import assert_near
from tests.helpers.small import CELLS, MEAN, SIZE, STD, small
from tests.reference import paper as reference

LAYERS = ("conv1+bn1+relu1", "conv2+bn2+relu2")
THEIRS = {
    "gradcam": pytorch_grad_cam.GradCAM,
    "layercam": pytorch_grad_cam.LayerCAM,
    "xgradcam": pytorch_grad_cam.XGradCAM,
    "hirescam": pytorch_grad_cam.HiResCAM,
}
BOTH = [(method, kind) for method in THEIRS for kind in ("linear", "mlp", "signed")]
# Their XGrad-CAM adds an epsilon to a channel's sum, which is near 0 where signs are mixed.
BOTH.remove(("xgradcam", "signed"))


def on_cells(s, method, **smoothing):
    """pytorch-grad-cam's maps, shape (N, h, w), not stretched: its own sizes are the cells'."""
    targets = [ClassifierOutputTarget(int(c)) for c in s.class_index]
    with THEIRS[method](s.model, [s.model.get_submodule(s.layer)]) as extract:
        extract.get_target_width_height = lambda x: CELLS[::-1]
        return torch.from_numpy(extract(s.x, targets, **smoothing)).double()


def scaled(maps):
    return np.stack([reference.scale(m) for m in np.asarray(maps)])


def ours_on_cells(s, method, smooth):
    """Our maps where the input has as many pixels as the layer has cells: nothing is stretched."""
    from aftcli.attributions.maps import layer_map

    shaping = Shaping(smooth=smooth)
    return layer_map((s.f, s.f.activation(s.x)), s.class_index, s.x, method, shaping)


# Smoothing


@pytest.mark.parametrize("kind", ["linear", "signed", "mlp"])
@pytest.mark.parametrize("method", WEIGHTS)
def test_a_methods_weights_make_its_map(method, kind):
    if method == "cam" and kind == "mlp":
        return
    s = small(kind, 1)
    activation = s.f.activation(s.x)
    alpha = WEIGHTS[method](s.f, activation, s.class_index, s.x)
    weighted = alpha * activation if alpha.dim() == 4 else alpha[..., None, None] * activation
    plain = METHODS[method].load()(s.f, activation, s.class_index, s.x)
    assert_near(weighted.sum(1).relu(), plain)
    assert plain.max() > 0


def principal(weighted):
    """The first principal component of cells, by the covariance's eigenvectors, as the sum's."""
    channels, h, w = weighted.shape
    centred = [[v - sum(c) / len(c) for v in c] for c in weighted.reshape(channels, -1).tolist()]
    covariance = np.zeros((channels, channels))
    for p in range(channels):
        for q in range(channels):
            covariance[p, q] = sum(a * b for a, b in zip(centred[p], centred[q], strict=True))
    values, vectors = np.linalg.eigh(covariance)
    first = vectors[:, np.argmax(values)]
    cells = [sum(first[k] * centred[k][i] for k in range(channels)) for i in range(h * w)]
    total = [sum(c[i] for c in weighted.reshape(channels, -1).tolist()) for i in range(h * w)]
    sign = -1 if sum(a * b for a, b in zip(cells, total, strict=True)) < 0 else 1
    return np.maximum(sign * np.array(cells).reshape(h, w), 0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ["gradcam", "layercam", "hirescam"])
def test_eigen_smoothing_is_the_first_principal_component(method, seed):
    s = small("mlp", seed)
    found = attribution_map(s.f, s.x, s.class_index, method, smooth="eigen")
    for n, c in enumerate(s.class_index.tolist()):
        g = reference.gradient_of(s.model, s.layer, s.x[n : n + 1], c)
        alpha = {
            "gradcam": g.mean((1, 2), keepdims=True),
            "layercam": np.maximum(g, 0),
            "hirescam": g,
        }
        activation = reference.activation_of(s.model, s.layer, s.x[n : n + 1])
        expected = reference.scale(principal(alpha[method] * activation))
        assert expected.max() == 1
        assert_near(found[n], reference.upsample(expected, SIZE), 1e-7)


@pytest.mark.parametrize(("method", "kind"), BOTH)
def test_eigen_smoothing_is_pytorch_grad_cams_but_for_its_sign(method, kind, monkeypatch):
    s = small(kind, 2)
    from pytorch_grad_cam import base_cam, hirescam, layer_cam

    def turned(weighted):
        found = projection(weighted)
        agreement = (found * weighted.sum(1)).sum((1, 2), keepdims=True)
        return found * np.where(agreement < 0, -1, 1)

    projection = base_cam.get_2d_projection
    for module in (base_cam, hirescam, layer_cam):
        monkeypatch.setattr(module, "get_2d_projection", turned)
    expected = scaled(on_cells(s, method, eigen_smooth=True))
    assert expected.max() == 1
    assert_near(ours_on_cells(s, method, "eigen"), expected, 1e-5)


@pytest.mark.parametrize("method", ["gradcam", "layercam", "scorecam", "eigencam"])
def test_augmentation_is_the_mean_of_six_maps(method):
    s = small("mlp", 3)
    found = attribution_map(s.f, s.x, s.class_index, method, smooth="aug")
    for n, c in enumerate(s.class_index.tolist()):
        total = np.zeros(CELLS)
        for mirrored in (False, True):
            for factor in (0.9, 1.0, 1.1):
                copy = factor * s.x[n : n + 1]
                copy = copy.flip(3) if mirrored else copy
                cells = reference.scale(reference.CAMS[method](s.model, s.layer, copy, c))
                total += (cells[:, ::-1] if mirrored else cells) / 6
        assert_near(found[n], reference.upsample(reference.scale(total), SIZE))


@pytest.mark.parametrize(("method", "kind"), BOTH)
def test_augmentation_is_pytorch_grad_cams(method, kind):
    s = small(kind, 4)
    expected = scaled(on_cells(s, method, aug_smooth=True))
    assert expected.max() == 1
    assert_near(ours_on_cells(s, method, "aug"), expected, 1e-5)


@pytest.mark.parametrize("method", SCORES)
def test_noise_averages_the_gradient_over_copies(method, monkeypatch):
    s = small("mlp", 0)
    plain = attribution_map(s.f, s.x, s.class_index, method)
    found = attribution_map(
        s.f, s.x.clone().requires_grad_(), s.class_index, method, smooth="noise"
    )
    gradient_at = reference.gradient_of
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, *s.x.shape[1:], generator=generator, dtype=s.x.dtype) for _ in range(8)]

    def averaged(model, layer, x, c):
        values = x.flatten().tolist()
        sigma = 0.15 * (max(values) - min(values))
        return sum(gradient_at(model, layer, x + sigma * each, c) for each in noise) / 8

    monkeypatch.setattr(reference, "gradient_of", averaged)
    for n, c in enumerate(s.class_index.tolist()):
        cells = reference.CAMS[method](s.model, s.layer, s.x[n : n + 1], c)
        assert_near(found[n], reference.upsample(reference.scale(cells), SIZE), 1e-7)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_smoothing_is_of_each_image_and_leaves_the_plain_map_alone():
    s = small("mlp", 5)
    for smooth in SMOOTHINGS:
        together = attribution_map(s.f, s.x, s.class_index, "gradcam", smooth=smooth)
        for n in range(len(s.x)):
            c = s.class_index[n : n + 1]
            alone = attribution_map(s.f, s.x[n : n + 1], c, "gradcam", smooth=smooth)
            assert_near(alone[0], together[n], 1e-7)
    plain = attribution_map(s.f, s.x, s.class_index, "gradcam")
    assert torch.equal(attribution_map(s.f, s.x, s.class_index, "gradcam", smooth="none"), plain)


def test_an_activation_of_zeros_has_no_component():
    s = small("linear", 0)
    s.f.layer.get_submodule("bn2").weight.zero_()
    s.f.layer.get_submodule("bn2").bias.zero_()
    for smooth in ("aug", "eigen", "noise"):
        found = attribution_map(s.f, s.x, s.class_index, "gradcam", smooth=smooth)
        assert not found.any()


def test_smoothing_that_is_not_defined_is_refused():
    s = small("linear", 0)
    with pytest.raises(AftError, match="Eigen-CAM is no weighted sum.*--smooth eigen takes cam"):
        attribution_map(s.f, s.x, s.class_index, "eigencam", smooth="eigen")
    with pytest.raises(AftError, match="RISE takes no gradient.*--smooth noise takes gradcam, "):
        attribution_map(s.f, s.x, s.class_index, "rise", smooth="noise")
    with pytest.raises(AftError, match="smoothing 'eign'"):
        attribution_map(s.f, s.x, s.class_index, "gradcam", smooth="eign")


# Finer-CAM


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_finer_cam_is_torchcams(kind):
    s = small(kind, 6)
    with torchcam.methods.FinerCAM(s.model, s.layer, (3, *SIZE)) as extract:
        (raw,) = extract(s.class_index.tolist(), s.model(s.x), normalized=False)
    expected = scaled(raw.detach().relu())
    assert expected.max() == 1
    assert_near(ours_on_cells(s, "finercam", "none"), expected, 1e-9)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_finer_cam_against_one_class_is_pytorch_grad_cams(kind, monkeypatch):
    # Against several theirs weighs them by probability, the paper by their number.
    monkeypatch.setattr(beyond, "NEAREST", 1)
    s = small(kind, 7)
    expected = []
    for x, c in zip(s.x.split(1), s.class_index.tolist(), strict=True):
        module = s.model.get_submodule(s.layer)
        with torch.enable_grad():
            extract = pytorch_grad_cam.FinerCAM(s.model, [module])
            extract.base_cam.get_target_width_height = lambda x: CELLS[::-1]
            expected.append(extract(x, alpha=0.6, comparison_categories=[1], target_idx=c)[0])
            extract.base_cam.activations_and_grads.release()
    assert_near(ours_on_cells(s, "finercam", "none"), scaled(expected), 1e-5)


def test_finer_cam_needs_another_class():
    with pytest.raises(AftError, match="finercam compares a class with others"):
        beyond.finer_score(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


# Several layers


def cut_at(s, layers=LAYERS):
    preprocessing = Preprocessing(size=SIZE, mean=MEAN, std=STD)
    return tuple(cut_classifier(s.model, name, preprocessing=preprocessing) for name in layers)


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("method", ["gradcam", "layercam", "eigencam", "scorecam"])
def test_maps_of_layers_are_fused_cell_by_cell(method, fuse):
    s = small("mlp", 8)
    found = attribution_map(cut_at(s), s.x, s.class_index, method, fuse=fuse)
    for n, c in enumerate(s.class_index.tolist()):
        maps = []
        for layer in ("relu1", "relu2"):
            cells = reference.scale(reference.CAMS[method](s.model, layer, s.x[n : n + 1], c))
            maps.append(reference.upsample(cells, (10, 14)))
        together = np.zeros((10, 14))
        for i in range(10):
            for j in range(14):
                values = [float(m[i, j]) for m in maps]
                together[i, j] = max(values) if fuse == "max" else values[0] * values[1]
        assert_near(found[n], reference.upsample(reference.scale(together), SIZE))


@pytest.mark.parametrize("seed", [0, 1])
def test_fusions_are_torchcams(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((8, 12), (4, 6), (8, 10))
    maps = [torch.rand(2, *size, generator=generator, dtype=torch.double) for size in sizes]
    scaled_maps = [torch.from_numpy(scaled(m)) for m in maps]
    assert_near(fused(scaled_maps, "max"), scaled(_CAM.fuse_cams(list(scaled_maps))), 1e-9)
    refined = torchcam.methods.RefineCAM.fuse_cams(list(scaled_maps))
    assert_near(fused(scaled_maps, "product"), refined, 1e-6)  # theirs has an epsilon
    assert torch.equal(fused(scaled_maps[:1], "product"), scaled_maps[0])


@pytest.mark.parametrize("fuse", FUSIONS)
def test_a_threshold_is_searched_for_the_fused_map(fuse):
    s = small("mlp", 9)
    layers, x = cut_at(s), s.x[:1]
    [found] = explain(layers, x, ["layercam"], [2], 1, Search(), Shaping(fuse=fuse, smooth="aug"))
    attribution = attribution_map(layers, x, 2, "layercam", fuse=fuse, smooth="aug")
    assert torch.equal(found.attribution, attribution[0])
    alone = fine_tune_threshold(layers[0], x, attribution, 2)
    assert found.tft.tau == alone.tau and torch.equal(found.tft.mask, alone.mask)
    assert (found.layers, found.fuse, found.smooth) == (LAYERS, fuse, "aug")
    [one] = explain(layers[:1], x, ["layercam"], [2])
    assert (one.layers, one.fuse, one.smooth) == ((), "", "none")


def test_layers_of_one_network_only():
    s = small("linear", 0)
    one, two = cut_at(s)
    with pytest.raises(AftError, match="different layers, got .'conv1"):
        attribution_map((one, one), s.x, s.class_index, "gradcam")
    with pytest.raises(AftError, match="different layers, got none"):
        explain((), s.x[:1], ["gradcam"])
    other = cut_classifier(s.model, LAYERS[1], classes=Classes(tuple("abcde")))
    with pytest.raises(AftError, match="only maps of one network"):
        attribution_map((one, other), s.x, s.class_index, "gradcam")
    with pytest.raises(AftError, match="fusion 'mean'"):
        attribution_map((one, two), s.x, s.class_index, "gradcam", fuse="mean")
    with pytest.raises(AftError, match="RISE gives the same map.*nothing can be fused"):
        attribution_map((one, two), s.x, s.class_index, "rise")


def test_copies_are_counted_as_passes():
    s = small("linear", 0)
    assert passes(s.f, ["gradcam", "layercam"], 2, None, "aug") == 1 + 2 * 6 * 2
    assert passes(s.f, ["gradcam", "layercam"], 2, None, "noise") == 1 + 2 * 8 * 2
    assert passes(s.f, ["gradcam", "layercam"], 2, None, "eigen") == 1


# The command line


def network():
    torch.manual_seed(3)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)),
    )
    with torch.no_grad():
        model[6].weight.mul_(40)
    return model


@pytest.fixture
def layers(tmp_path, monkeypatch):
    """Commands in a folder with a picture, with a network that is cut where they say."""
    made = {}

    def load(name, checkpoint, layer=None, **_):
        layer = layer or "2+3"
        if layer not in made:
            preprocessing = Preprocessing(size=(32, 32), resize=36)
            made[layer] = cut_classifier(network(), layer, preprocessing=preprocessing)
        return made[layer]

    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (44, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    monkeypatch.setattr("aftcli.models.load.load_classifier", load)
    return made


def objects(*arguments):
    done = aft(*arguments, "--target", "1", "--save", "map", "--engine", "torch", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("command", ["explain", "tft"])
@pytest.mark.parametrize("fuse", [(), ("--fuse", "product")])
def test_commands_fuse_layers(layers, command, fuse):
    options = ("--cam", "gradcam", "--layer", "0+1", "--layer", "2+3", "--smooth", "eigen", *fuse)
    [found] = objects(command, "a.png", *options)
    from aftcli.data.images import read_image, to_input

    f = tuple(layers[name] for name in ("0+1", "2+3"))
    x, kind = to_input(read_image("a.png"), f[0].preprocessing), fuse[1] if fuse else "max"
    expected = attribution_map(f, x, 1, "gradcam", smooth="eigen", fuse=kind)[0]
    assert_near(np.load(found["outputs"]["map"]), expected, 1e-5)
    assert found["layers"] == ["0+1", "2+3"] and found["fuse"] == kind
    assert found["smooth"] == "eigen"


def test_other_layers_and_smoothings_have_files_of_their_own(layers):
    settings = [
        (),
        ("--layer", "0+1"),
        ("--layer", "0+1", "--layer", "2+3"),
        ("--layer", "2+3", "--layer", "0+1"),
        ("--layer", "0+1", "--layer", "2+3", "--fuse", "product"),
        ("--smooth", "aug"),
        ("--smooth", "eigen"),
    ]
    files = {objects("explain", "a.png", *each)[0]["outputs"]["map"] for each in settings}
    assert len(files) == len(settings)
    [plain] = objects("explain", "a.png")
    assert not {"layers", "fuse", "smooth"} & set(plain)


def test_every_cam_that_fits_all_layers(layers):
    found = objects("explain", "a.png", "--cam", "all", "--layer", "2+3", "--layer", "0+1")
    assert [each["cam"] for each in found] == [m for m in reference.CAMS if m != "cam"]


def test_layers_that_a_command_does_not_take(layers):
    one = usage_error(aft("explain", "a.png", "--layer", "2+3", "--fuse", "product"))
    assert "takes the maps of two layers or more" in one
    again = usage_error(aft("explain", "a.png", "--layer", "2+3", "--layer", "2+3"))
    assert "--layer names a layer twice" in again
    for command in (("gen-masks", "."), ("evaluate", ".")):
        wrong = usage_error(aft(*command, "--layer", "2+3", "--layer", "0+1"))
        assert "give --layer once" in wrong


# Videos


class Videos(nn.Module):
    """3-d convolutions; layer `relu` of (3, 4, 5) cells for 6 frames of 8 x 10 pixels."""

    def __init__(self, pooled):
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.relu = nn.Conv3d(3, 5, 3, stride=2, padding=1), nn.ReLU()
        self.mix, self.pooled = nn.Conv3d(5, 5, 1), pooled
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        a = self.relu(self.conv(x))
        a = a if self.pooled else torch.tanh(self.mix(a)) * 3
        return self.fc(a.mean((2, 3, 4)))


def cut_videos(pooled):
    model = Videos(pooled).double().eval()
    preprocessing = Preprocessing(size=(8, 10), resize=None)
    f = cut_classifier(model, "relu", preprocessing=preprocessing)
    generator = torch.Generator().manual_seed(3)
    return model, f, torch.randn(2, 3, 6, 8, 10, generator=generator, dtype=torch.double)


def stretched(m, size):
    """Linear between cells, axis by axis, frames first."""
    for axis, side in enumerate(size):
        m = np.moveaxis(m, axis, 0)
        out = []
        for i in range(side):
            at = min(max((i + 0.5) * len(m) / side - 0.5, 0), len(m) - 1)
            low = int(at)
            high = min(low + 1, len(m) - 1)
            out.append(m[low] * (1 - (at - low)) + m[high] * (at - low))
        m = np.moveaxis(np.array(out), 0, axis)
    return m


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("method", [name for name in reference.CAMS if name != "eigencam"])
def test_maps_of_videos_are_those_of_rows_of_cells(method, pooled):
    if method == "cam" and not pooled:
        return
    # The same cells in two dimensions, d * h by w, behind a head that only takes their mean.
    model, f, x = cut_videos(pooled)
    c = torch.tensor([1, 3])
    found = attribution_map(f, x, c, method)
    assert found.shape == (2, 6, 8, 10)
    with torch.no_grad():
        a = model.relu(model.conv(x))
    for n in range(2):
        if method == "scorecam":
            scores = []
            for channel in a[n].numpy():
                mask = torch.from_numpy(stretched(reference.scale(channel), (6, 8, 10)))
                with torch.no_grad():
                    scores.append(float(model((x[n] * mask)[None])[0, c[n]]))
            alpha = np.exp(np.array(scores) - max(scores))
            cells = reference.weighted_sum(alpha / alpha.sum(), a[n].flatten(1, 2).numpy())
        else:
            flat = Flat(model)
            rows = a[n : n + 1].flatten(2, 3)
            cells = reference.CAMS[method](flat, "layer", rows, int(c[n]))
        expected = stretched(reference.scale(cells.reshape(a.shape[2:])), (6, 8, 10))
        assert_near(found[n], expected, 1e-7)


class Flat(nn.Module):
    """The part of `Videos` behind A, for A as rows of cells."""

    def __init__(self, model):
        super().__init__()
        self.layer, self.whole = nn.Identity(), [model]
        self.fc = model.fc

    def forward(self, rows):
        (model,) = self.whole
        a = self.layer(rows)
        if not model.pooled:
            mixed = torch.einsum("ok,nkij->noij", model.mix.weight[:, :, 0, 0, 0], a)
            a = torch.tanh(mixed + model.mix.bias[:, None, None]) * 3
        return self.fc(a.mean((2, 3)))


def test_videos_are_fused_smoothed_and_explained():
    model, f, x = cut_videos(False)
    deeper = cut_classifier(model, "mix", preprocessing=f.preprocessing)
    for smooth in SMOOTHINGS:
        found = attribution_map((f, deeper), x, [0, 2], "gradcam", smooth=smooth, fuse="product")
        assert found.shape == (2, 6, 8, 10) and found.max() > 0
    [explained] = explain(f, x[:1], ["layercam"], 1)
    assert torch.equal(explained.attribution, attribution_map(f, x[:1], 1, "layercam")[0])
    with pytest.raises(AftError, match="x must have shape .N, 3, H, W., got .1, 3, 6"):
        explain(f, x[:1], ["layercam"], 1, settings=Search())
    with pytest.raises(AftError, match="x must have shape .N, 3, D, H, W., got .2, 3, 8, 10"):
        attribution_map(f, x[:, :, 0], [0, 1], "gradcam")
    with pytest.raises(AftError, match="RISE explains images only; take a CAM for videos"):
        attribution_map(f, x, [0, 1], "rise")
    # Of layers with weights: mix, or conv where mix does not run.
    assert cut_classifier(model, preprocessing=f.preprocessing).layer_name == "mix"
    model.pooled = True
    assert cut_classifier(model, preprocessing=f.preprocessing).layer_name == "conv"


class Scan(nn.Module):
    """A network of volumes of one channel that takes 4 slices of 8 x 8 only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU())
        self.flat, self.fc = nn.Linear(4 * 8 * 8 * 6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.flat(self.features(x).flatten(1)).relu())


def test_volumes_of_one_channel_have_a_default_layer():
    model = Scan().double().eval()
    f = cut_classifier(model, preprocessing=Preprocessing(size=(4, 8, 8), resize=None))
    assert (f.layer_name, f.activation_shape) == ("features", (6, 4, 8, 8))
    x = torch.randn(2, 1, 4, 8, 8, dtype=torch.double)
    assert torch.equal(f(x), model(x))
    found = attribution_map(f, x, [0, 2], "hirescam")
    for n, c in enumerate((0, 2)):
        a = model.features(x[n : n + 1]).detach().requires_grad_()
        y = model.fc(model.flat(a.flatten(1)).relu())[0, c]
        (gradient,) = torch.autograd.grad(y, a)
        expected = np.zeros((4, 8, 8))
        for d, i, j in np.ndindex(4, 8, 8):
            terms = (gradient * a.detach())[0, :, d, i, j].tolist()
            expected[d, i, j] = max(sum(terms), 0.0)
        assert_near(found[n], reference.scale(expected))
    with pytest.raises(AftError, match="x must have shape .N, 1, D, H, W., got .2, 1, 8, 8"):
        attribution_map(f, x[:, :, 0], [0, 2], "gradcam")


def test_commands_say_what_to_do_with_volumes(monkeypatch):
    f = cut_classifier(Scan(), preprocessing=Preprocessing(size=(4, 8, 8), resize=None))
    monkeypatch.setattr("aftcli.models.source.load_classifier", lambda *_, **__: f)
    with pytest.raises(
        AftError, match="Scan takes volumes or videos, .N, 1, D, H, W., and comm.*Py"
    ):
        Source().load()
