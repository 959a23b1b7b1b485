"""Grids of explanations: a row a class or image, a column a method, plain above cut maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from aftcli.pictures.colours import Look
from aftcli.pictures.figure import DPI, FLIP, Shown, cam_title, caption
from aftcli.pictures.overlay import seen_part, shaded, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SIDE = 224  # pixels, the larger side of a picture

LETTERS = 15  # pixels

STEP = 20  # pixels from line to line

GAP = 12  # pixels between pictures


BOLD = 0.88  # width of other letters, of bold ones

MOST = 120  # pictures of a grid, plain and cut ones of a place together: what memory bears


class Tile(NamedTuple):
    """A place of a grid: a map on the picture, and below it the same map cut at a threshold.

    Attributes:
        lines: over the picture.
        picture: with the plain map.
        cut_lines: over the picture below.
        cut: with the cut map; None where nothing cuts it.
    """

    lines: tuple[str, ...]
    picture: Image.Image
    cut_lines: tuple[str, ...] = ()
    cut: Image.Image | None = None


class Row(NamedTuple):
    """Tiles side by side, some of them missing, and a line over all of them."""

    title: str
    tiles: Sequence[Tile | None]


def tile(shown: Shown, network: str = "") -> Tile:
    """Paint an explanation small, as a place of a grid.

    Args:
        shown: the explanation.
        network: its name, where a grid has several.
    """
    shape = shown.plain.shape
    size = round(SIDE * shape[1] / max(shape)), round(SIDE * shape[0] / max(shape))
    seen, view = seen_part(shown.subject, shape)
    _, _, *cut = caption(shown)

    def painted(attribution: Tensor, kept: Tensor | None, look: Look) -> Image.Image:
        picture = shaded(seen, view, attribution, kept, look)
        return picture.resize(size, Image.Resampling.BOX)

    lines = (*filter(None, [network]), cam_title(shown.explanation.cam), *shown.named)
    plain, look = shown.painted
    below = painted(shown.plain, shown.kept, shown.look) if cut else None
    return Tile(lines, painted(plain, None, look), tuple(cut), below)


def drawn(rows: Sequence[Row]) -> Figure:
    """Draw tiles in rows, as wide as the widest and as high as the highest of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tiles = [each for row in rows for each in row.tiles if each]
    wide, high = (max(each.picture.size[i] for each in tiles) for i in (0, 1))
    lines = max(len(each.lines) for each in tiles)
    cut_lines = max(len(each.cut_lines) for each in tiles)
    is_titled = any(row.title for row in rows)
    plain_down = lines * STEP + high + GAP
    down = is_titled * (GAP + STEP) + plain_down
    down += cut_lines * STEP + high + GAP if cut_lines else 0
    width = GAP + max(len(row.tiles) for row in rows) * (wide + GAP)
    height = GAP + len(rows) * down - is_titled * GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)

    def say(x: int, y: int, text: str, room: int, **more: object) -> None:
        figure.text(
            x / width,
            1 - y / height,
            shortened(text, LETTERS, room),
            fontsize=LETTERS * 72 / DPI,
            verticalalignment="top",
            parse_math=False,
            **more,  # type: ignore[arg-type]
        )

    def put(picture: Image.Image, x: int, y: int, texts: Sequence[str], count: int) -> None:
        for i, text in enumerate(texts):
            say(x, y + i * STEP, text, wide)
        pixels = np.asarray(picture.transpose(FLIP))
        y += count * STEP
        figure.figimage(pixels, x, height - y - picture.height, origin="lower")

    for i, row in enumerate(rows):
        y = GAP + i * down
        if row.title:
            say(GAP, y, row.title, round(BOLD * (width - 2 * GAP)), fontweight="bold")
        y += is_titled * STEP
        for j, each in enumerate(row.tiles):
            x = GAP + j * (wide + GAP)
            if each:
                put(each.picture, x, y, each.lines, lines)
            if each and each.cut:
                put(each.cut, x, y + plain_down, each.cut_lines, cut_lines)
    return figure
