"""Pictures of one explanation: the overlay, what the network saw, the RPI curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.data.images import View
from aftcli.tft.explain import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = "turbo"

OPACITY = 0.5

OUTSHINING = 0.001  # share of pixels that colours need not tell apart

PANEL = 448  # pixels, the side of a figure's picture

STRIP = 512  # pixels, rows that are coloured at a time: a large picture is large in memory


class Subject(NamedTuple):
    """The picture that is explained, and the part that the model sees."""

    path: Path
    stem: str
    picture: Image.Image
    view: View


def overlay(picture: Image.Image, view: View, attribution: Tensor, kept: Tensor) -> Image.Image:
    """Lay a map on the picture where the model looked; muted cells show the picture.

    Args:
        picture: RGB, any size.
        view: what of it the model saw.
        attribution: I, shape (H, W), in [0, 1].
        kept: what is not muted, shape (H, W), bool.
    """
    left, top, right, bottom = (round(edge) for edge in view.box(picture.size))
    left, right = max(left, 0), min(max(right, left + 1), picture.width)
    top, bottom = max(top, 0), min(max(bottom, top + 1), picture.height)
    size = (right - left, bottom - top)
    values = (attribution / _end_of_colours(attribution)).clamp(max=1).mul(255).round()
    heat = Image.fromarray(values.to(torch.uint8).numpy()).resize(size, Image.Resampling.BILINEAR)
    heat.putpalette(_palette())
    opacity = Image.fromarray(kept.to(torch.uint8).mul(round(255 * OPACITY)).numpy()).resize(size)
    painted = picture.copy()
    for y in range(0, size[1], STRIP):
        strip = (0, y, size[0], min(y + STRIP, size[1]))
        painted.paste(heat.crop(strip).convert("RGB"), (left, top + y), opacity.crop(strip))
    return painted


def _end_of_colours(attribution: Tensor) -> float:
    """Return 1, or less where few pixels would take most colours, as in maps of gradients."""
    high = float(np.quantile(attribution.numpy(), 1 - OUTSHINING))
    return high if 0 < high < 0.5 else 1.0


def _palette() -> bytes:
    from matplotlib import colormaps

    return bytes((colormaps[COLOURS](np.arange(256))[:, :3] * 255).round().astype(np.uint8))


def seen_part(subject: Subject, shape: tuple[int, ...]) -> tuple[Image.Image, View]:
    """Cut out what the model sees of the picture, at a resolution for the eye."""
    high, wide = shape
    size = (round(PANEL * wide / max(shape)), round(PANEL * high / max(shape)))
    left, top, right, bottom = subject.view.box(subject.picture.size)
    box = (
        max(left, 0),
        max(top, 0),
        min(right, subject.picture.width),
        min(bottom, subject.picture.height),
    )
    seen = subject.picture.resize(size, Image.Resampling.BICUBIC, box=box)
    return seen, View(size, (0, 0, *size))


def cam_title(cam: str) -> str:
    """Return a method's name for people; maps of another tool have one name."""
    from aftcli.core.methods import METHODS

    return METHODS[cam].title if cam in METHODS else "given map"


def _best(explanation: Explanation) -> float:
    assert explanation.cut
    return float(explanation.cut.probabilities[0, explanation.cut.best])


def draw_rpi(ax: Axes, explanation: Explanation, colour: str = "tab:red") -> None:
    """Draw the RPI curve of an explanation with tau* marked."""
    assert explanation.tft
    rpi = explanation.tft.rpi[0].cpu().numpy()
    tried = ~np.isnan(rpi)
    best = int(explanation.tft.best)
    tau, top = explanation.thresholds[best], rpi[best]
    ax.plot(np.array(explanation.thresholds)[tried], rpi[tried], "o-", markersize=4)
    ax.axvline(tau, color=colour, linestyle="--", linewidth=1)
    ax.plot(tau, top, "o", color=colour, markersize=8)
    ax.set_title(f"RPI {top:.3f} at tau* = {tau:g}", fontsize=10)
    ax.set_xlabel("tau")
    ax.set_ylim(bottom=0, top=None if explanation.tft.helps.item() else 1)
