"""OmniXAI's tests of its explainers of images (T-TAME, the other fork of such maps, has none)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model

from aftcli import (
    Classes,
    Preprocessing,
    attribution_map,
    cut_classifier,
    explain,
    read_image,
    to_input,
)
from aftcli.attributions import perturbation
from aftcli.attributions.perturbation import superpixels
from aftcli.data.images import view_of
from aftcli.report import explain as report
from aftcli.settings import Search
from tests.helpers.compare import assert_near
from tests.peers.networks import of_torchcam, plain, raw
from tests.peers.pending import pending

PHOTO = Path(__file__).parents[2] / "docs/images/chelsea.jpg"
HALF = Preprocessing(size=(32, 32), resize=32, mean=(0.5,) * 3, std=(0.5,) * 3)


class Small(nn.Module):
    """OmniXAI's network of CIFAR's pictures, or with one channel of MNIST's."""

    def __init__(self, channels=3, side=5, softmax=False):
        super().__init__()
        torch.manual_seed(1)
        self.conv_layers = nn.Sequential(
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
        )
        self.fc_layers = nn.Sequential(
            nn.Linear(16 * side**2, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 10)
        )
        self.end = nn.Softmax(1) if softmax else nn.Identity()
        with torch.no_grad():
            self.fc_layers[-1].weight.mul_(10)

    def forward(self, x):
        return self.end(self.fc_layers(torch.flatten(self.conv_layers(x), 1)))


@pytest.fixture(scope="module")
def photo():
    return read_image(PHOTO)


@pytest.fixture(scope="module")
def seen(photo):
    """The network, which names its classes, and the photo as its input."""
    names = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    f = cut_classifier(Small(), preprocessing=HALF, classes=Classes(names))
    return f, to_input(photo, HALF)


def test_the_five_likeliest_classes(seen):
    """OmniXAI: gradcam/test_gradcam_torch.py::test_classification"""
    f, x = seen
    found = explain(f, x, ["gradcam"], top_k=5)
    top = f(x).softmax(1).topk(5)
    assert [e.class_index for e in found] == top.indices[0].tolist()
    assert [e.probability for e in found] == pytest.approx(top.values[0].tolist())


METHODS = ("gradcam", "scorecam", "guidedbackprop", "integratedgradients", "smoothgrad")


@pytest.mark.parametrize("method", METHODS)
def test_explanations_survive_json(method, seen):
    """OmniXAI: gradcam/test_gradcam_torch.py::test_explain, scorecam, guided_bp, ig, smoothgrad"""
    f, x = seen
    settings = Search(thresholds=(0.0, 0.3, 0.6))
    (found,) = explain(f, x, [method], settings=settings)
    assert found.attribution.shape == (32, 32) and 0.5 < found.attribution.max() <= 1
    values = report.as_dict(f, report.Report(PHOTO, found, {}), settings)
    assert json.loads(json.dumps(values)) == values
    assert values["class_name"] == f.classes.name(found.class_index)
    assert values["tft"]["thresholds"] == [0.0, 0.3, 0.6]


def test_layer_cam_inside_a_published_stage(photo):
    """OmniXAI: gradcam/test_layercam_torch.py::test_explain, layer3[-3]"""
    torch.manual_seed(2)
    model, size = get_model("resnet18").eval(), Preprocessing(size=(64, 64), resize=72)
    x = to_input(photo, size)
    f = cut_classifier(model, "layer3.0", preprocessing=size)
    found = raw(f, x, 281, "layercam")
    assert found.shape == (1, 4, 4) and found.any()
    assert_near(found, of_torchcam("LayerCAM", model, "layer3.0", x, 281), 1e-4)


@pytest.mark.parametrize("method", ["lime", "kernelshap"])
def test_superpixels_are_weighed_whole_and_the_same_each_time(method, seen, monkeypatch):
    """OmniXAI: lime/test_lime_image_classification.py::test_explain, shap/shap_image_torch.py"""
    f, x = seen
    monkeypatch.setattr(perturbation, "COALITIONS", 200)
    first, again = (attribution_map(f, x, 3, method) for _ in range(2))
    assert torch.equal(first, again) and first.max() == 1
    parts = superpixels(f, x[0], 50 if method == "lime" else 25)
    for part in parts.unique():
        assert first[0][parts == part].unique().numel() == 1


def test_five_pictures_at_once(seen):
    """OmniXAI: shap/shap_image_torch.py::test_explain"""
    f, _ = seen
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    classes = f(x).argmax(1)
    found = attribution_map(f, x, classes, "gradientshap")
    assert found.shape == (5, 32, 32)
    for n in range(5):
        one = attribution_map(f, x[n : n + 1], classes[n : n + 1], "gradientshap")
        assert_near(one[0], found[n], 1e-4)


def test_a_network_that_ends_in_softmax(photo):
    """OmniXAI: shap/shap_image_torch.py::test_explain, its CIFARNet"""
    model = Small(softmax=True).eval()
    f = cut_classifier(model, "conv_layers.4", preprocessing=HALF)
    x = to_input(photo, HALF)
    (found,) = explain(f, x, ["gradcam"])
    assert found.probability == pytest.approx(model(x).max().item(), rel=1e-5)


def test_a_network_of_grey_pictures():
    """OmniXAI: shap/shap_image_torch.py, its MNISTNet"""
    model = Small(channels=1, side=4).eval()
    f = cut_classifier(model, "conv_layers.4", preprocessing=plain(28, 28))
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    found = attribution_map(f, x, model(x).argmax(1), "gradcam")
    assert found.shape == (5, 28, 28) and found.isfinite().all()


@pending("target")
def test_a_loss_as_a_target(seen):
    """OmniXAI: gradcam/vlm_gradcam_torch.py::test, its loss_function"""
    f, x = seen
    (found,) = explain(f, x, ["gradcam"], target=lambda y: y[..., 1].sum())
    assert_near(found.attribution, attribution_map(f, x, 1, "gradcam")[0])


@pytest.mark.parametrize("size", [(360, 240), (112, 112), (30, 45)])
def test_pictures_are_resized_whole(size, photo):
    """OmniXAI: preprocessing/test_image_transform.py::test_resize_1, ::test_resize_2"""
    x = to_input(photo, Preprocessing(size=size, resize=None))
    assert x.shape == (1, 3, *size)
    view = view_of(photo.size, Preprocessing(size=size, resize=None))
    assert view.box(photo.size) == pytest.approx((0, 0, *photo.size))


@pytest.mark.parametrize("side", [120, 240])
def test_pictures_are_resized_by_their_shorter_side(side, photo):
    """OmniXAI: preprocessing/test_image_transform.py::test_resize_3"""
    for picture in (photo, photo.rotate(90, expand=True)):
        view = view_of(picture.size, Preprocessing(size=(side, side), resize=side))
        wide, high = view.scaled
        assert min(wide, high) == side
        assert wide / high == pytest.approx(picture.width / picture.height, abs=1 / side)
        assert to_input(picture, Preprocessing(size=(side, side), resize=side)).shape[-1] == side


def test_pictures_are_scaled_to_0_and_1():
    """OmniXAI: preprocessing/test_image_transform.py::test_scale"""
    values = np.zeros((4, 4, 3), dtype=np.uint8)
    values[1, 2] = 255
    x = to_input(Image.fromarray(values), plain(4, 4))
    assert (float(x.min()), float(x.max())) == (0, 1)


def test_grey_and_large_pictures_are_read(tmp_path, photo):
    """OmniXAI: data/test_image.py::test_1, ::test_2, ::test_3"""
    Image.fromarray(np.arange(28 * 28, dtype=np.uint16).reshape(28, 28).astype(np.uint8)).save(
        tmp_path / "grey.png"
    )
    grey = read_image(tmp_path / "grey.png")
    assert (grey.mode, grey.size) == ("RGB", (28, 28))
    assert photo.mode == "RGB"
    assert to_input(grey, plain(28, 28)).shape == (1, 3, 28, 28)


def test_superpixels_are_numbered_from_0(seen):
    """OmniXAI: utils/test_segmentation.py::test"""
    f, x = seen
    parts = superpixels(f, x[0], 40)
    assert parts.shape == (32, 32)
    assert torch.equal(parts.unique(), torch.arange(int(parts.max()) + 1))
    assert 10 < int(parts.max()) < 60
