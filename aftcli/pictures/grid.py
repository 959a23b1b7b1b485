"""A grid of explanations of one image: a row a class, a column a method, plain above cut maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from aftcli.pictures.figure import DPI, FLIP, Shown, cam_title, caption
from aftcli.pictures.overlay import seen_part, shaded, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SIDE = 224  # pixels, the larger side of a picture

LETTERS = 15  # pixels

STEP = 20  # pixels from line to line

GAP = 12  # pixels between pictures


def grid(shown: Sequence[Shown]) -> Figure:
    """Draw explanations of one image: titles say method, class, probability and threshold.

    Args:
        shown: of several methods or classes, each pair of them once.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(each.explanation.cam for each in shown))
    classes = list(dict.fromkeys(each.explanation.class_index for each in shown))
    shape = shown[0].plain.shape
    wide, high = round(SIDE * shape[1] / max(shape)), round(SIDE * shape[0] / max(shape))
    is_cut = any(each.kept is not None for each in shown)
    across = wide + GAP
    down = (1 + is_cut) * (high + 2 * STEP + GAP)
    width, height = GAP + len(methods) * across, GAP + len(classes) * down
    drawn = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(drawn)

    def put(picture: Image.Image, x: int, y: int, lines: Sequence[str]) -> None:
        for row, text in enumerate(lines):
            drawn.text(
                x / width,
                1 - (y + row * STEP) / height,
                shortened(text, LETTERS, wide),
                fontsize=LETTERS * 72 / DPI,
                verticalalignment="top",
                parse_math=False,
            )
        y += 2 * STEP
        pixels = np.asarray(picture.resize((wide, high), Image.Resampling.BOX).transpose(FLIP))
        drawn.figimage(pixels, x, height - y - high, origin="lower")

    for each in shown:
        explanation = each.explanation
        x = GAP + methods.index(explanation.cam) * across
        y = GAP + classes.index(explanation.class_index) * down
        seen, view = seen_part(each.subject, shape)
        named, _, *cut = caption(each)
        title = cam_title(explanation.cam)
        painted, look = each.painted
        put(shaded(seen, view, painted, look=look), x, y, (title, named))
        if cut:
            picture = shaded(seen, view, each.plain, each.kept, each.look)
            put(picture, x, y + down // 2, cut)
    return drawn
