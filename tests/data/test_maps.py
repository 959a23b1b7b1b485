"""Maps given to `aft tft --map`: what they cover, and our own read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.core.classes import Preprocessing
from aftcli.core.methods import CAMS
from aftcli.data.images import TURNS, Turn, view_of
from aftcli.data.maps import already_scaled, fit_map
from tests.helpers.command import aft
from tests.helpers.stored import small_float

PREP = Preprocessing((32, 32), 36)
X = torch.zeros(1, 3, 32, 32)
SHOWN = (120, 80)
VIEW = view_of(SHOWN, PREP)
# How the stored picture lies, by the orientation that turns it upright.
INVERSE = {1: None, **TURNS, 6: TURNS[8], 8: TURNS[6]}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A small network in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: small_float())
    return tmp_path


def smooth(width, height):
    """The same map of the whole picture at any size, without symmetry: shape (height, width)."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return np.exp(-((x[None] - 0.42) ** 2) * 20 - ((y[:, None] - 0.35) ** 2) * 9)


def as_stored(values, orientation):
    image, method = Image.fromarray(values), INVERSE[orientation]
    return np.array(image if method is None else image.transpose(method))


def turn_for(orientation):
    return Turn(SHOWN[::-1] if orientation > 4 else SHOWN, orientation)


# What the network sees of the map: pixels' centres of the view, in shares of the picture.
LEFT, TOP, RIGHT, BOTTOM = VIEW.crop
ACROSS = (np.arange(LEFT, RIGHT) + 0.5) / VIEW.scaled[0]
DOWN = (np.arange(TOP, BOTTOM) + 0.5) / VIEW.scaled[1]
SEEN = np.exp(-((ACROSS[None] - 0.42) ** 2) * 20 - ((DOWN[:, None] - 0.35) ** 2) * 9)
SEEN = torch.from_numpy((SEEN - SEEN.min()) / (SEEN.max() - SEEN.min())).float()


@pytest.mark.parametrize("scale", [3, 1, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("orientation", INVERSE)
def test_a_map_of_the_whole_picture_lies_on_it_at_any_size(orientation, scale):
    values = smooth(*(round(side * scale) for side in SHOWN))
    found = fit_map(torch.from_numpy(values), X, SHOWN, VIEW, turn=turn_for(orientation))
    torch.testing.assert_close(found[0], SEEN, rtol=0, atol=0.08)


@pytest.mark.parametrize("scale", [3, 1, 0.5, 0.25])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_map_of_the_stored_picture_is_turned_with_it(orientation, scale):
    values = as_stored(smooth(*(round(side * scale) for side in SHOWN)), orientation)
    found = fit_map(torch.from_numpy(values), X, SHOWN, VIEW, turn=turn_for(orientation))
    torch.testing.assert_close(found[0], SEEN, rtol=0, atol=0.08)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((32, 32), ""),
        ((120, 80), ""),
        ((80, 120), "120 x 80 values are taken as a map of the whole picture as stored (120 x 80)"),
        ((40, 60), "60 x 40 values are taken as a map of the whole picture as stored (120 x 80)"),
        ((60, 40), "40 x 60 values are taken as a map of the whole picture (80 x 120)"),
        ((8, 8), "8 x 8 values are taken as a map of what the network sees"),
        ((9, 90), "90 x 9 values have neither the picture's aspect ratio nor the network's"),
    ],
)
def test_what_is_assumed_of_a_map_is_said(shape, said):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise(SHOWN, 90).convert("RGB").save("turned.jpg", exif=exif)
    np.save("m.npy", np.random.default_rng(0).random(shape) * 7)
    result = aft("tft", "turned.jpg", "--map", "m.npy", "--save", "none")
    assert result.code in (0, None), result.err
    assert said in result.err and bool(said) == bool(result.err)
    assert not said or result.err.startswith("aft: m.npy: for turned.jpg, its ")
    assert aft("tft", "turned.jpg", "--map", "m.npy", "--save", "none", "--quiet").err == ""


def test_a_map_that_keeps_nothing_is_said():
    Image.new("RGB", (40, 30), "red").save("a.png")
    command = ("tft", "a.png", "--map", "m.npy", "--save", "none")
    scores = np.random.default_rng(0).random((30, 40))
    maps = {
        "it has no score but 0": np.zeros((30, 40)),
        "none of its scores is positive; --absolute takes": -scores,
    }
    for why, values in maps.items():
        np.save("m.npy", values)
        done = aft(*command)
        assert done.code in (0, None) and f"m.npy: for a.png, it keeps nothing: {why}" in done.err
        assert "keeps nothing" not in aft(*command, "--quiet").err
    assert "keeps nothing" not in aft(*command, "--absolute").err


@pytest.mark.parametrize("cam", CAMS)
def test_a_map_that_we_saved_gives_the_same_numbers_read_back(cam):
    Image.effect_noise((120, 80), 90).resize((60, 40)).convert("RGB").save("a.png")
    found = aft("explain", "a.png", "--cam", cam, "--tft", "--save", "map", "--json")
    (own,) = json.loads(found.out)
    read = aft("tft", "a.png", "--map", own["outputs"]["map"], "--save", "map", "--json")
    (given,) = json.loads(read.out)
    np.testing.assert_array_equal(*(np.load(r["outputs"]["map"]) for r in (own, given)))
    assert given["tft"] == own["tft"]


def test_only_what_was_stretched_of_scaled_cells_is_scaled_already():
    cells = torch.rand(1, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cells = (cells - cells.min()) / (cells.max() - cells.min())
    stretched = torch.nn.functional.interpolate(cells, (32, 40), mode="bilinear")[0, 0]
    assert stretched.max() < 1 and already_scaled(stretched)
    assert not already_scaled(stretched * 0.9)
    assert not already_scaled(stretched + 1e-3 * torch.rand(32, 40))
    assert not already_scaled(torch.rand(32, 40, dtype=torch.float64) * 0.9)
    assert not already_scaled(torch.from_numpy(smooth(40, 32)) * 0.8 + 0.1)
