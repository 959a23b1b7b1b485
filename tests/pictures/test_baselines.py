"""Pictures look as they did when somebody looked at them; `make.py` draws the baselines again."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

import aftcli
from tests.pictures.make import SCENES, baseline, curve, distance, explained, png

# Grey levels. Noise and a shift by a pixel stay below, each wrong picture lies above 6.
MOST = 4


@pytest.fixture(scope="module")
def drawn():
    return {name: draw() for name, draw in SCENES.items()}


@pytest.mark.parametrize("name", SCENES)
def test_a_picture_looks_as_its_baseline(name, drawn):
    with Image.open(baseline(name)) as stored:
        far = distance(drawn[name], stored)
    assert far < MOST, f"{name} differs by {far:.1f}: if it is right, python -m tests.pictures.make"


def shifted(e, **how):
    """Change a search's result by name."""
    return replace(e, tft=e.tft._replace(**how))


def wrong():
    """Yield the name of a scene and a picture that is not it."""
    [e], [contrast], [plain] = (
        explained(tft=True),
        explained(contrast="pale grey"),
        explained("layercam"),
    )
    yield "plain", aftcli.overlay(plain, "magma")
    yield "plain", aftcli.overlay(plain, alpha=0.3)
    yield "plain", aftcli.overlay(replace(plain, attribution=plain.attribution.flip(1)))
    yield "plain", aftcli.overlay(explained("layercam", targets="pale grey")[0])
    yield "overlay", aftcli.overlay(explained())
    yield "overlay", aftcli.overlay(explained(tft=True, targets="orange"))
    yield "overlay", aftcli.overlay(shifted(e, attribution=e.tft.attribution.flip(2)))
    yield "figure", png(aftcli.figure(replace(e, probability=0.5)))
    yield "figure", png(aftcli.figure(shifted(e, attribution=e.tft.attribution.flip(2))))
    yield "figure", png(aftcli.figure(e, "magma"))
    yield "contrast", aftcli.overlay(replace(contrast, signed=-contrast.signed))
    yield "contrast", aftcli.overlay(replace(contrast, signed=None))
    yield "curve", curve(shifted(e, probabilities=e.tft.probabilities.flip(1)))
    yield "curve", curve(replace(e, probability=0.3))


def test_a_wrong_picture_is_told_apart(drawn):
    for name, picture in wrong():
        assert distance(picture, drawn[name]) > 1.5 * MOST
    # A grid with a column at another's place, turned, or without a row.
    grid = drawn["grid"]
    assert distance(ImageOps.mirror(grid), grid) > 1.5 * MOST
    assert distance(grid.crop((0, 0, grid.width, grid.height // 2)), grid) == 255


def test_what_fonts_and_processors_change_is_not(drawn):
    """A pixel's shift and a little noise: more than another version of freetype makes."""
    rng = np.random.default_rng(0)
    for picture in drawn.values():
        moved = Image.new("RGB", picture.size, "white")
        moved.paste(picture, (1, 0))
        noisy = np.asarray(picture) + rng.integers(-3, 4, (*picture.size[::-1], 3))
        for other in (moved, Image.fromarray(noisy.clip(0, 255).astype(np.uint8))):
            assert distance(other, picture) < MOST
