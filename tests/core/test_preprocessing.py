"""Inputs that a network says itself: channels, size, type, normalisation."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Preprocessing, preprocessing_of_timm
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.data.images import to_input
from aftcli.errors import AftError
from aftcli.settings import Search
from aftcli.tft.explain import explain
from aftcli.tft.judges import Judge
from tests.helpers.compare import assert_near

SIZE = (32, 32)


def network(channels=3, seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def of_channels(channels):
    preprocessing = Preprocessing(SIZE, 36, mean=(0.4,) * channels, std=(0.2,) * channels)
    return cut_classifier(network(channels), "2+3", preprocessing=preprocessing)


class Sized(nn.Module):
    """A network that takes one size alone, as those with a large last layer."""

    def __init__(self, side, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.last = nn.Linear(4 * side * side, 3)

    def forward(self, x):
        return self.last(self.flatten(self.relu(self.conv(x))))


# Channels


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_all_of_explain_takes_any_number_of_channels(channels):
    f = of_channels(channels)
    x = torch.randn(1, channels, *SIZE, generator=torch.Generator().manual_seed(0))
    methods = [m for m in METHODS if METHODS[m].family == "cam" and m != "layercam-fusion"]
    for name in [*methods, "occlusion", "integratedgradients", "gradientshap", "lrp", "rise"]:
        assert attribution_map(f, x, [0], name).shape == (1, *SIZE)
    for fill in ("mean", "black", "blur"):
        (found,) = explain(f, x, ["gradcam"], settings=Search((0.3, 0.6), fill=fill))
        assert found.tft is not None


def test_occlusion_hides_every_channel():
    """A grey network's map is that of a coloured one which sees the grey picture three times."""
    f, x = of_channels(1), torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    wide = network(3)
    with torch.no_grad():
        wide.load_state_dict(network(1).state_dict() | {"0.weight": wide[0].weight})
        wide[0].weight.copy_(network(1)[0].weight.expand(-1, 3, -1, -1) / 3)
    preprocessing = Preprocessing(SIZE, 36, mean=(0.4,) * 3, std=(0.2,) * 3)
    g = cut_classifier(wide, "2+3", preprocessing=preprocessing)
    for name in ("occlusion", "scorecam", "gradcam"):
        one = attribution_map(f, x, [1], name)
        assert one.any()
        assert_near(one, attribution_map(g, x.expand(-1, 3, -1, -1), [1], name), 1e-4)


def test_channels_come_from_the_first_convolution_and_are_guessed_aloud():
    notes = []
    f = cut_classifier(network(1), note=notes.append)
    assert f.preprocessing.shape == (1, 224, 224)
    usual = Preprocessing()
    assert f.preprocessing.mean == (round(sum(usual.mean) / 3, 6),)
    assert "Sequential records no preprocessing; guessed: 1 x 224 x 224 values" in notes[0]
    f = cut_classifier(network(5), note=notes.append)
    assert f.preprocessing.mean == (0.0,) * 5 and f.preprocessing.std == (1.0,) * 5
    assert "mean 0 and std 1" in notes[1]


def test_a_size_alone_says_nothing_of_the_channels():
    grey = network(1)
    f = cut_classifier(grey, "2+3", preprocessing=Preprocessing(SIZE), note=pytest.fail)
    assert f.preprocessing.shape == (1, *SIZE)
    even = Preprocessing(SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    f = cut_classifier(grey, "2+3", preprocessing=even, note=pytest.fail)
    assert (f.preprocessing.mean, f.preprocessing.std) == ((0.5,), (0.25,))
    f = cut_classifier(network(5), "2+3", preprocessing=even, note=pytest.fail)
    assert f.preprocessing.mean == (0.5,) * 5
    own = Preprocessing(SIZE, mean=(0.5, 0.4, 0.3))
    with pytest.raises(AftError, match=r"can't run an input of shape \(1, 3, 32, 32\)"):
        cut_classifier(grey, "2+3", preprocessing=own)


def test_a_first_convolution_that_is_not_the_inputs_misleads_nobody():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Sequential(nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.first = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU())

        def forward(self, x):
            return self.last(self.first(x))

    given = Preprocessing(SIZE)
    f = cut_classifier(Late(), "first", preprocessing=given, note=pytest.fail)
    assert f.preprocessing == given
    assert cut_classifier(Late(), "first", note=lambda _: None).preprocessing == Preprocessing()


def test_a_grey_input_is_the_pictures_luma():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    preprocessing = Preprocessing((40, 40), 40, mean=(0.25,), std=(0.5,))
    found = to_input(Image.fromarray(pixels), preprocessing)
    assert found.shape == (1, 1, 40, 40)
    red, green, blue = (pixels[..., i].astype(float) for i in range(3))
    luma = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    # Pillow rounds to whole numbers.
    assert np.abs(found[0, 0].numpy() * 0.5 + 0.25 - luma).max() < 1.5 / 255


def test_no_picture_has_four_channels():
    preprocessing = Preprocessing(SIZE, 36, mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(AftError, match="takes 4 channels, a picture has 1 or 3; make x yourself"):
        to_input(Image.new("RGB", (40, 40)), preprocessing)


def test_a_judge_may_be_grey():
    f, g = of_channels(3), of_channels(1)
    x = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    colours = x * 0.2 + 0.4
    luma = 0.299 * colours[:, :1] + 0.587 * colours[:, 1:2] + 0.114 * colours[:, 2:]
    expected = g((luma - 0.4) / 0.2).softmax(1)
    assert_near(Judge("grey", g).probabilities(f, x), expected, 1e-5)
    grey = x[:, :1]
    expected = f(grey.expand(-1, 3, -1, -1)).softmax(1)
    assert_near(Judge("colour", f).probabilities(g, grey), expected, 1e-5)
    with pytest.raises(AftError, match="--judge four: takes 4 channels, Sequential takes 3"):
        Judge("four", of_channels(4)).check(f)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.5] * 2}, "one value a channel"),
        ({"mean": [], "std": []}, "one value a channel"),
        ({"mean": [0.5] * 2000, "std": [0.5] * 2000}, "one value a channel, of 1 to 1024"),
        ({"mean": [0.5] * 999, "std": [0.5] * 999, "size": [4000, 4000]}, "too large"),
    ],
)
def test_a_file_can_not_ask_for_inputs_of_any_depth(values, message):
    with pytest.raises(AftError, match=message):
        Preprocessing.from_dict(Preprocessing().as_dict() | values)


# Size


@pytest.mark.parametrize("side", [32, 256])
def test_a_size_that_the_network_takes_is_found(side):
    notes = []
    f = cut_classifier(Sized(side), "conv+relu", note=notes.append)
    assert f.preprocessing.size == (side, side) and f.preprocessing.resize == round(side * 8 / 7)
    assert f"guessed: 3 x {side} x {side} values" in notes[0]
    assert "docs/guides/own-network.md" in notes[0]


def test_a_network_that_takes_no_size_says_why():
    with pytest.raises(AftError, match=r"Sized can't run an input of shape \(1, 3, 224, 224\)"):
        cut_classifier(Sized(17), "conv+relu", note=pytest.fail)
    with pytest.raises(AftError, match=r"can't run an input of shape \(1, 3, 32, 32\) \(.*say"):
        cut_classifier(Sized(17), preprocessing=Preprocessing(SIZE), note=pytest.fail)


def test_the_usual_size_is_not_searched_for():
    seen = []

    class Watched(Sized):
        def forward(self, x):
            if isinstance(x, torch.Tensor):  # it is traced too
                seen.append(tuple(x.shape))
            return super().forward(x)

    cut_classifier(Watched(224), "conv+relu", note=seen.append)
    assert all(shape[-1] == 224 for shape in seen if isinstance(shape, tuple))


# What the object records


def test_an_attribute_says_the_preprocessing():
    model, own = Sized(24, channels=1), Preprocessing((24, 24), None, "nearest", (0.1,), (0.3,))
    for value in (
        own,
        own.as_dict(),
        {
            "size": (24, 24),
            "resize": None,
            "interpolation": "nearest",
            "mean": (0.1,),
            "std": (0.3,),
        },
    ):
        model.preprocessing = value
        assert cut_classifier(model, "conv+relu", note=pytest.fail).preprocessing == own
    model.preprocessing = {"size": (24, 24), "means": (0.1,)}
    with pytest.raises(AftError, match="no preprocessing of images: .*means"):
        cut_classifier(model, "conv+relu")


@pytest.mark.parametrize(
    "name",
    [
        "resnet18.a1_in1k",
        "vit_base_patch16_384.augreg_in21k_ft_in1k",
        "tf_efficientnet_lite0.in1k",
        "inception_v3.tv_in1k",
        "xcit_nano_12_p16_224.fb_in1k",
        "tresnet_m.miil_in21k",
    ],
)
def test_timms_records_are_read_as_timm_reads_them(name):
    import timm
    from timm.data import resolve_data_config

    config = timm.get_pretrained_cfg(name).to_dict()
    expected = resolve_data_config(pretrained_cfg=config)
    found = preprocessing_of_timm(config)
    assert found.shape == expected["input_size"]
    assert (found.mean, found.std) == (expected["mean"], expected["std"])
    assert found.interpolation == expected["interpolation"]
    assert found.resize == int(found.size[0] / expected["crop_pct"])


def test_a_model_object_of_timms_knows_its_input():
    import timm

    notes = []
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64), "mean": (0.5,) * 3}
    f = cut_classifier(model, "conv_head+bn2", note=notes.append)
    assert (f.preprocessing.size, f.preprocessing.mean, notes) == ((64, 64), (0.5,) * 3, [])
    grey = timm.create_model("resnet10t", in_chans=1, num_classes=3)
    f = cut_classifier(grey, note=notes.append)
    assert len(f.preprocessing.mean) == 1 and "takes other inputs than it records" in notes[0]


# Type


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_network_is_explained_by_its_weights(dtype):
    preprocessing = Preprocessing(SIZE, 36)
    f = cut_classifier(network().to(dtype), "2+3", preprocessing=preprocessing)
    high = copy.deepcopy(f).double()
    x = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    settings = Search((0.2, 0.4, 0.6))
    (found,) = explain(f, x, ["layercam"], targets=[1], settings=settings)
    (expected,) = explain(high, x.double(), ["layercam"], targets=[1], settings=settings)
    assert found.attribution.dtype == torch.float32
    assert abs(found.probability - expected.probability) < 0.01
    assert_near(found.attribution.double(), expected.attribution, 0.1)


def test_autocast_around_everything_breaks_nothing():
    x = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    settings = Search((0.2, 0.4, 0.6))

    def explained():
        f = cut_classifier(network(), "2+3", preprocessing=Preprocessing(SIZE, 36))
        methods = ["gradcam", "layercam", "scorecam", "ablationcam", "eigencam"]
        return explain(f, x, methods, targets=[1], settings=settings)

    expected = explained()
    with torch.autocast("cpu", torch.bfloat16):
        found = explained()
    for one, other in zip(found, expected, strict=True):
        assert one.attribution.dtype == torch.float32
        assert one.attribution.isfinite().all()
        assert abs(one.probability - other.probability) < 0.01
        assert_near(one.attribution, other.attribution, 0.1)
