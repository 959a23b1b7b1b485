"""Colours of maps: a colour map of matplotlib's, and the score that takes its last colour."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.settings import COLORMAPS

OUTSHINING = 0.001  # share of pixels that colours need not tell apart


class Look(NamedTuple):
    """Colours of maps and how much they cover.

    Attributes:
        colormap: of COLORMAPS.
        alpha: opacity of the colours over the picture, in [0, 1].
    """

    colormap: str = COLORMAPS[0]
    alpha: float = 0.5


LOOK = Look()


def end_of_colours(attribution: Tensor) -> float:
    """Return 1, or less where few pixels would take most colours, as in maps of gradients."""
    high = float(np.quantile(attribution.numpy(), 1 - OUTSHINING))
    return high if 0 < high < 0.5 else 1.0


@functools.cache
def palette(colormap: str) -> bytes:
    """Return the 256 colours of a colour map, red, green and blue of each."""
    from matplotlib import colormaps

    return bytes((colormaps[colormap](np.arange(256))[:, :3] * 255).round().astype(np.uint8))


def heat(attribution: Tensor, size: tuple[int, int], look: Look = LOOK) -> Image.Image:
    """Return a map as a picture of colours, of mode P.

    Args:
        attribution: I, shape (H, W), in [0, 1].
        size: width and height of the picture.
        look: its colours.
    """
    values = (attribution / end_of_colours(attribution)).clamp(max=1).mul(255).round()
    found = Image.fromarray(values.to(torch.uint8).numpy()).resize(size, Image.Resampling.BILINEAR)
    found.putpalette(palette(look.colormap))
    return found


def bar(size: tuple[int, int], look: Look = LOOK) -> Image.Image:
    """Return the colours from the score 0 at the left to the last one at the right."""
    scores = np.linspace(0, 255, size[0]).round().astype(np.uint8)
    found = Image.fromarray(np.broadcast_to(scores, size[::-1]).copy())
    found.putpalette(palette(look.colormap))
    return found.convert("RGB")
