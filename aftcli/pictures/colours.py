"""Colours of maps: a colour map of matplotlib's, and the score that takes its last colour."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.settings import COLORMAPS

DIVERGING = "RdBu_r"  # white at 0, red for the class, blue against it

OUTSHINING = 0.001  # share of pixels that colours need not tell apart

OUTSHINING_SIGNED = 0.01  # the same of maps with signs, whose 0 is the palest colour


class Look(NamedTuple):
    """Colours of maps and how much they cover.

    Attributes:
        colormap: of COLORMAPS.
        alpha: opacity of the colours over the picture, in [0, 1].
        signed: maps have scores in [-1, 1], in the colours of DIVERGING.
    """

    colormap: str = COLORMAPS[0]
    alpha: float = 0.5
    signed: bool = False

    @property
    def colours(self) -> str:
        """The colour map of matplotlib's."""
        return DIVERGING if self.signed else self.colormap

    def end(self, attribution: Tensor) -> float:
        """Return the score that takes the last colour."""
        if self.signed:
            return end_of_colours(attribution.abs(), OUTSHINING_SIGNED)
        return end_of_colours(attribution)

    def ends(self, attribution: Tensor) -> tuple[str, str]:
        """Return what a colour bar says of its first and its last colour."""
        end = self.end(attribution)
        last = "1" if end == 1 else f"≥ {end:.2g}"
        if not self.signed:
            return "0", last
        return "-1" if end == 1 else f"≤ -{end:.2g}", last


LOOK = Look()


def end_of_colours(attribution: Tensor, outshining: float = OUTSHINING) -> float:
    """Return 1, or less where few pixels would take most colours, as in maps of gradients."""
    high = float(np.quantile(attribution.numpy(), 1 - outshining))
    return high if 0 < high < 0.5 else 1.0


@functools.cache
def palette(colormap: str) -> bytes:
    """Return the 256 colours of a colour map, red, green and blue of each."""
    from matplotlib import colormaps

    return bytes((colormaps[colormap](np.arange(256))[:, :3] * 255).round().astype(np.uint8))


def heat(attribution: Tensor, size: tuple[int, int], look: Look = LOOK) -> Image.Image:
    """Return a map as a picture of colours, of mode P.

    Args:
        attribution: I, shape (H, W), in [0, 1], or signed.
        size: width and height of the picture.
        look: its colours.
    """
    scores = (attribution / look.end(attribution)).clamp(-1, 1)
    values = (scores / 2 + 0.5 if look.signed else scores).mul(255).round()
    found = Image.fromarray(values.to(torch.uint8).numpy()).resize(size, Image.Resampling.BILINEAR)
    found.putpalette(palette(look.colours))
    return found


def bar(size: tuple[int, int], look: Look = LOOK) -> Image.Image:
    """Return the colours from the lowest score at the left to the highest one at the right."""
    scores = np.linspace(0, 255, size[0]).round().astype(np.uint8)
    found = Image.fromarray(np.broadcast_to(scores, size[::-1]).copy())
    found.putpalette(palette(look.colours))
    return found.convert("RGB")
