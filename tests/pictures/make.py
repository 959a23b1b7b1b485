"""Pictures with stored baselines, of a network whose weights are written down.

    python -m tests.pictures.make

draws the baselines again; look at each before it is committed.
"""

import functools
import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from torch import nn

import aftcli
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.pictures.figure import draw_curve

HERE = Path(__file__).parent
PHOTO = HERE.parents[1] / "docs/images/chelsea.jpg"
STORED = 256  # pixels, the larger side of a baseline
COMPARED = 64  # pixels, the larger side of what is compared
TILE = 8  # pixels of it
METHODS = ("gradcam", "layercam", "xgradcam")


@functools.cache
def network():
    """A network of colours: its channels say how much each cell is of a colour."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 16, stride=16, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    # Of red, green, blue: orange, green, dark and pale cells.
    channels = [[1, 0, -1], [-1, 2, -1], [-1, -1, -1], [1, 1, 1]]
    of_classes = [[2, -2, 1, -1], [-1, 3, 1, 0], [-2, 1, 0, 2]]
    with torch.no_grad():
        model[0].weight[:] = torch.tensor(channels)[:, :, None, None] / 256
        model[4].weight[:] = torch.tensor(of_classes)
        model[4].bias[:] = 0
    return cut_classifier(
        model,
        "1",
        name="colours",
        preprocessing=Preprocessing(size=(224, 224)),
        classes=Classes(("orange", "green", "pale grey")),
    )


def png(drawn):
    """Render a figure."""
    held = io.BytesIO()
    drawn.savefig(held, format="png")
    return Image.open(held).convert("RGB")


def explained(methods="gradcam", **how):
    return aftcli.explain(network(), PHOTO, methods, **{"targets": "green", **how})


def curve(e):
    drawn = Figure(figsize=(4, 3), dpi=80, layout="constrained")
    FigureCanvasAgg(drawn)
    draw_curve(drawn.add_subplot(), e)
    return png(drawn)


SCENES = {
    "plain": lambda: aftcli.overlay(explained("layercam")),
    "overlay": lambda: aftcli.overlay(explained(tft=True)),
    "figure": lambda: png(aftcli.figure(explained(tft=True))),
    "grid": lambda: png(aftcli.grid(explained(METHODS, targets=["green", "orange"], tft=True))),
    "contrast": lambda: aftcli.overlay(explained(contrast="pale grey")),
    "contrast-figure": lambda: png(aftcli.figure(explained(contrast="pale grey", tft=True))),
    "curve": lambda: curve(explained(tft=True)[0]),
}


def reduced(picture, side):
    """Make a picture smaller, so that its larger side has `side` pixels."""
    scale = side / max(picture.size)
    size = [max(1, round(scale * each)) for each in picture.size]
    return picture.convert("RGB").resize(size, Image.Resampling.BOX)


def distance(one, two):
    """Compare pictures at 64 pixels: the mean difference of grey levels in the worst tile.

    Edges are blurred, which letters of other fonts and a pixel's shift move.
    """
    blur = ImageFilter.GaussianBlur(1)
    tiny = (reduced(reduced(each, STORED), COMPARED).filter(blur) for each in (one, two))
    small = [np.asarray(each).astype(float) for each in tiny]
    if small[0].shape != small[1].shape:
        return 255.0
    difference = abs(small[0] - small[1]).mean(2)
    rows, columns = difference.shape
    return max(
        difference[y : y + TILE, x : x + TILE].mean()
        for y in range(0, rows - TILE + 1, TILE // 2)
        for x in range(0, columns - TILE + 1, TILE // 2)
    )


def baseline(name):
    return HERE / "baseline" / f"{name}.png"


if __name__ == "__main__":
    for scene, draw in SCENES.items():
        baseline(scene).parent.mkdir(exist_ok=True)
        reduced(draw(), STORED).save(baseline(scene), optimize=True)
        print(f"wrote {baseline(scene).relative_to(HERE)}")
