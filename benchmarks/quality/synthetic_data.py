"""Images whose deciding pixels are known, and a small network that learns their classes.

An object carries one of eight textures, and the texture is the class. Its shape, colours, size and
place, the background and a second object without a texture of any class are drawn without looking
at the class. So two images of one number and two classes differ on the object only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from aftcli import Classes, Classifier, Preprocessing, cut_classifier

Floats = NDArray[np.float64]

SIDE = 64  # pixels

CONTRAST = (0.15, 1.0)  # of a texture; a network that is sure of every image has nothing to raise

NOISE = 0.1  # the largest standard deviation

SPLITS = {"train": 0, "val": 1, "test": 2}

PREPROCESSING = Preprocessing((SIDE, SIDE), None, mean=(0.5,) * 3, std=(0.25,) * 3)

ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)


class Grain(NamedTuple):
    """A texture's size and place, drawn for every image alike, whatever its class.

    Attributes:
        period: pixels.
        phase: in [0, 1), shape (2,).
        centre: of the object, row and column.
    """

    period: float
    phase: Floats
    centre: Floats


def _stripes(down: float, right: float) -> Callable[[Grain], Floats]:
    def texture(grain: Grain) -> Floats:
        along = (down * ROWS + right * COLUMNS) / np.hypot(down, right)
        return np.mod(along / grain.period + grain.phase[0], 1) - 0.5

    return texture


def _checks(grain: Grain) -> Floats:
    one, two = _stripes(1, 0)(grain), _stripes(0, 1)(grain._replace(phase=grain.phase[::-1]))
    return one * two


def _dots(grain: Grain) -> Floats:
    one, two = _stripes(1, 0)(grain), _stripes(0, 1)(grain._replace(phase=grain.phase[::-1]))
    return 0.33 - np.hypot(one, two)


def _rings(grain: Grain) -> Floats:
    away = np.hypot(ROWS - grain.centre[0], COLUMNS - grain.centre[1])
    return np.mod(away / grain.period + grain.phase[0], 1) - 0.5


def _rays(grain: Grain) -> Floats:
    angle = np.arctan2(ROWS - grain.centre[0], COLUMNS - grain.centre[1]) / (2 * np.pi)
    return np.mod(8 * angle + grain.phase[0], 1) - 0.5


# The classes. A pixel where the texture is above 0 shows the object's first colour.
TEXTURES: dict[str, Callable[[Grain], Floats]] = {
    "across": _stripes(1, 0),
    "upright": _stripes(0, 1),
    "falling": _stripes(1, -1),
    "rising": _stripes(1, 1),
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
}


class Scene(NamedTuple):
    """One image and what decides its class.

    Attributes:
        image: shape (SIDE, SIDE, 3), in [0, 1].
        truth: pixels of the object, shape (SIDE, SIDE), bool.
        distractor: visible pixels of the second object; none in half of the images.
    """

    image: Floats
    truth: NDArray[np.bool_]
    distractor: NDArray[np.bool_]


def scene(split: str, number: int, label: int) -> Scene:
    """Draw image `number` of a split with the texture of a class; nothing else looks at the class.

    Args:
        split: a key of SPLITS.
        number: of the image; the seed of all that is drawn.
        label: the class, a place in TEXTURES.
    """
    rng = np.random.default_rng([SPLITS[split], number])
    image = _background(rng)
    radius = rng.uniform(11, 17)
    centre = rng.uniform(radius, SIDE - radius, 2)
    truth = _shape(rng, centre, radius)
    grain = Grain(rng.uniform(5, 7.5), rng.uniform(size=2), centre)
    dark, light = _colours(rng)
    middle, contrast = (dark + light) / 2, rng.uniform(*CONTRAST)
    other, other_colours = _distractor(rng, centre, radius), _colours(rng)
    image[other] = _mixed(rng, *other_colours)[other]
    texture = TEXTURES[list(TEXTURES)[label]](grain) > 0
    colour = np.where(texture[..., None], light, dark)
    image[truth] = (middle + contrast * (colour - middle))[truth]
    noise = rng.normal(0, rng.uniform(0, NOISE), image.shape)
    return Scene(np.clip(image + noise, 0, 1), truth, other & ~truth)


def _colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw a dark and a light colour."""
    return rng.uniform(0, 0.4, 3), rng.uniform(0.6, 1, 3)


def _smooth(rng: np.random.Generator, cells: int) -> Floats:
    """Draw a smooth field in [0, 1], shape (SIDE, SIDE): noise of few cells, stretched."""
    few = torch.from_numpy(rng.uniform(size=(1, 1, cells, cells)))
    field = F.interpolate(few, (SIDE, SIDE), mode="bicubic", align_corners=False)[0, 0].numpy()
    return np.clip(field, 0, 1)  # type: ignore[no-any-return]


def _mixed(rng: np.random.Generator, one: Floats, two: Floats) -> Floats:
    """Mix two colours by a gradient or by smooth noise, shape (SIDE, SIDE, 3)."""
    down, right = rng.uniform(-1, 1, 2)
    slope = (down * ROWS + right * COLUMNS) / SIDE
    slope = (slope - slope.min()) / np.ptp(slope)
    share = (slope, _smooth(rng, int(rng.integers(3, 9))))[rng.integers(2)]
    return one + (two - one) * share[..., None]


def _background(rng: np.random.Generator) -> Floats:
    """Draw one colour, a mixture of two, or speckles on either."""
    one, two = rng.uniform(0, 1, (2, 3))
    mixed, noise = _mixed(rng, one, two), rng.normal(0, 0.12, (SIDE, SIDE, 3))
    kind = rng.integers(4)
    image = mixed if kind % 2 else np.broadcast_to(one, (SIDE, SIDE, 3))
    return np.clip(image + (noise if kind > 1 else 0), 0, 1)  # type: ignore[no-any-return]


def _shape(rng: np.random.Generator, centre: Floats, radius: float) -> NDArray[np.bool_]:
    """Draw a disc, a polygon, a star or a blob, shape (SIDE, SIDE), bool."""
    down, right = ROWS - centre[0], COLUMNS - centre[1]
    away, angle = np.hypot(down, right), np.arctan2(down, right) + rng.uniform(0, 2 * np.pi)
    sides, bumps = int(rng.integers(3, 7)), int(rng.integers(2, 6))
    within = np.mod(angle, 2 * np.pi / sides) - np.pi / sides
    edges = (
        np.full_like(angle, radius),
        radius * np.cos(np.pi / sides) / np.cos(within),
        radius * (0.72 + 0.28 * np.cos(5 * angle)),
        radius * (0.82 + 0.18 * np.cos(bumps * angle)),
    )
    return away < edges[rng.integers(4)]  # type: ignore[no-any-return]


def _distractor(rng: np.random.Generator, centre: Floats, radius: float) -> NDArray[np.bool_]:
    """Draw a second object beside the first; half of the images have none."""
    own = rng.uniform(8, 13)
    places = rng.uniform(own, SIDE - own, (30, 2))
    apart = np.hypot(*(places - centre).T) > own + radius
    shape = _shape(rng, places[apart.argmax()], own)
    return shape & bool(apart.any() and rng.integers(2))


class Images(NamedTuple):
    """Inputs with what decides their classes.

    Attributes:
        x: normalised, shape (N, 3, SIDE, SIDE).
        label: shape (N,); each class as often as the others.
        truth: pixels that decide, shape (N, SIDE, SIDE), bool.
        distractor: pixels of the second object, shape (N, SIDE, SIDE), bool.
    """

    x: Tensor
    label: Tensor
    truth: Tensor
    distractor: Tensor


def images(split: str, count: int) -> Images:
    """Draw the first images of a split; classes take turns."""
    label = torch.arange(count) % len(TEXTURES)
    scenes = [scene(split, n, int(c)) for n, c in enumerate(label)]
    pictures = np.stack([s.image for s in scenes]).astype(np.float32)
    mean, std = PREPROCESSING.channels(torch.empty(0))
    x = (torch.from_numpy(pictures).permute(0, 3, 1, 2) - mean) / std
    masks = (np.stack([getattr(s, name) for s in scenes]) for name in ("truth", "distractor"))
    return Images(x.contiguous(), label, *map(torch.from_numpy, masks))


def network(seed: int = 0) -> nn.Sequential:
    """Make the network: four convolutions to 8 x 8 cells, the largest of 2 x 2, mean, one layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            _block(3, 24, 5, 2),
            _block(24, 32, 3, 2),
            _block(32, 64, 3, 2),
            _block(64, 64, 3, 1),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, len(TEXTURES)),
        )


def _block(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def trained(drawn: Images, epochs: int, seed: int = 0) -> nn.Sequential:
    """Train the network with plain cross-entropy.

    Args:
        drawn: the images to train on.
        epochs: how often each is seen; the learning rate falls to 0 in one cycle.
        seed: of the weights and the order.
    """
    model, order = network(seed).train(), torch.Generator().manual_seed(seed)
    batches = -(-len(drawn.x) // 64)
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(drawn.x), generator=order).split(64):
            loss = F.cross_entropy(model(drawn.x[rows]), drawn.label[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    return model.eval()


def classifier(model: nn.Sequential) -> Classifier:
    """Cut the network behind its last convolution, where A has 8 x 8 cells."""
    classes = Classes(tuple(TEXTURES))
    return cut_classifier(
        model, "3", name="synthetic", preprocessing=PREPROCESSING, classes=classes
    )


@torch.no_grad()
def accuracy(f: Classifier, x: Tensor, label: Tensor) -> Tensor:
    """Return 1 for each image whose class f finds, otherwise 0, shape (N,)."""
    found = torch.cat([f(part).argmax(1) for part in x.split(100)])
    return (found == label).double()
