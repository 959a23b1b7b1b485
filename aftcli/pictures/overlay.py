"""Maps over pictures: painted, what is muted or not seen dimmed, what is kept outlined."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from aftcli.data.images import View
from aftcli.pictures.colours import LOOK, Look, bar, heat

PANEL = 448  # pixels, the side of a figure's picture

STRIP = 512  # pixels, rows that are coloured at a time: a large picture is large in memory

DIMMED = 0.45  # brightness of what is muted, and of what the network does not see

WHITE, LIGHT, DARK = (255, 255, 255), (250, 250, 250), (20, 20, 20)

SPECKLED = 1.5  # edges a pixel that is kept, or muted: more are scattered pixels

NOISY = 0.4  # edges a pixel: more are scattered pixels too, of which some touch

CAPTIONED = 160  # pixels, the narrowest picture that a caption can be read under


class Subject(NamedTuple):
    """The picture that is explained, and the part that the model sees."""

    path: Path
    stem: str
    picture: Image.Image
    view: View


Box = tuple[int, int, int, int]  # left, top, right, bottom


def seen_box(size: tuple[int, int], view: View) -> Box:
    """Return the pixels of a picture of `size` (width, height) that the model sees, not none."""
    left, top, right, bottom = (round(edge) for edge in view.box(size))
    left, right = max(left, 0), min(max(right, left + 1), size[0])
    top, bottom = max(top, 0), min(max(bottom, top + 1), size[1])
    return left, top, right, bottom


def overlay(
    picture: Image.Image, view: View, attribution: Tensor, kept: Tensor, look: Look = LOOK
) -> Image.Image:
    """Lay a map on the picture where the model looked; muted cells show the picture.

    Args:
        picture: RGB, any size.
        view: what of it the model saw.
        attribution: I, shape (H, W), in [0, 1].
        kept: what is not muted, shape (H, W), bool.
        look: colours and their opacity.
    """
    painted = picture.copy()
    _paint(painted, seen_box(picture.size, view), attribution, kept, look)
    return painted


def _paint(painted: Image.Image, box: Box, attribution: Tensor, kept: Tensor, look: Look) -> None:
    left, top, right, bottom = box
    size = (right - left, bottom - top)
    colours = heat(attribution, size, look)
    opacity = Image.fromarray(kept.to(torch.uint8).mul(round(255 * look.alpha)).numpy())
    opacity = opacity.resize(size)
    for y in range(0, size[1], STRIP):
        strip = (0, y, size[0], min(y + STRIP, size[1]))
        painted.paste(colours.crop(strip).convert("RGB"), (left, top + y), opacity.crop(strip))


def shaded(
    picture: Image.Image,
    view: View,
    attribution: Tensor,
    kept: Tensor | None = None,
    look: Look = LOOK,
    below: int = 0,
) -> Image.Image:
    """Lay a map on the picture; dim what is muted and what the model does not see.

    What is kept is outlined, unless it is scattered pixels; so is what the model sees of the
    picture, unless it is all.

    Args:
        picture: RGB, any size.
        view: what of it the model saw.
        attribution: I, shape (H, W), in [0, 1].
        kept: what is not muted, shape (H, W), bool; None for a plain map.
        look: colours and their opacity.
        below: height of the white under the picture, pixels.
    """
    width, height = picture.size
    painted = Image.new("RGB", (width, height + below), WHITE)
    painted.paste(picture, (0, 0))
    box = seen_box(picture.size, view)
    everywhere = torch.ones(attribution.shape, dtype=torch.bool)
    _paint(painted, box, attribution, everywhere if kept is None else kept, look)
    thin = max(1, round(max(width, height) / 700))
    if kept is not None:
        dark = (~kept).to(torch.uint8).mul(round(255 * (1 - DIMMED))).numpy()
        size = (box[2] - box[0], box[3] - box[1])
        painted.paste((0, 0, 0), box, Image.fromarray(dark).resize(size))
        _outline(painted, box, kept.numpy(), thin)
    margins = list(unseen(picture.size, box))
    for margin in margins:
        grey = painted.crop(margin).convert("L").point(lambda value: value * DIMMED)
        painted.paste(grey.convert("RGB"), margin)
    if margins:
        ImageDraw.Draw(painted).rectangle(
            (box[0], box[1], box[2] - 1, box[3] - 1), outline=LIGHT, width=thin
        )
    return painted


def unseen(size: tuple[int, int], box: Box) -> Iterator[Box]:
    """Yield the margins of a picture around what the model sees; lines of a pixel are rounding."""
    left, top, right, bottom = box
    width, height = size
    margins = (
        (0, 0, width, top),
        (0, bottom, width, height),
        (0, top, left, bottom),
        (right, top, width, bottom),
    )
    for margin in margins:
        if margin[2] - margin[0] > 1 and margin[3] - margin[1] > 1:
            yield margin


def _outline(painted: Image.Image, box: Box, kept: np.ndarray, thin: int) -> None:
    """Draw along the edges between what is kept and what is not, light with a dark rim."""
    padded = np.pad(kept, 1)
    level, upright = padded[1:] != padded[:-1], (padded[:, 1:] != padded[:, :-1]).T
    edges = (kept[1:] != kept[:-1]).sum() + (kept[:, 1:] != kept[:, :-1]).sum()
    if edges > min(SPECKLED * kept.sum(), SPECKLED * (~kept).sum(), NOISY * kept.size):
        return
    left, top, right, bottom = box
    across, down = (right - left) / kept.shape[1], (bottom - top) / kept.shape[0]
    lines = [(start - 1, row, end - 1, row) for row, start, end in _runs(level)]
    lines += [(column, start - 1, column, end - 1) for column, start, end in _runs(upright)]
    draw = ImageDraw.Draw(painted)
    for colour, reach in ((DARK, thin + max(1, thin // 2)), (LIGHT, thin)):
        for x0, y0, x1, y1 in lines:
            draw.rectangle(
                (
                    max(left + round(x0 * across) - reach, left),
                    max(top + round(y0 * down) - reach, top),
                    min(left + round(x1 * across) + reach, right) - 1,
                    min(top + round(y1 * down) + reach, bottom) - 1,
                ),
                fill=colour,
            )


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield row, start and end of each run of set flags in the rows."""
    steps = np.diff(flags.astype(np.int8), axis=1, prepend=0, append=0)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    for (row, start), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True):
        yield row, start, end


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


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def captioned(
    subject: Subject,
    attribution: Tensor,
    kept: Tensor | None,
    parts: Sequence[str],
    look: Look = LOOK,
) -> Image.Image:
    """Return a picture under its map, with a caption and a colour bar below.

    A picture narrower than CAPTIONED has neither.

    Args:
        subject: the picture.
        attribution: I, shape (H, W), in [0, 1], or signed.
        kept: see `shaded`.
        parts: of the caption, each on one line.
        look: colours and their opacity.
    """
    picture = subject.picture
    width, height = picture.size
    if width < CAPTIONED:
        return shaded(picture, subject.view, attribution, kept, look)
    size = max(12, round(width / 32))
    if any(unseen(picture.size, seen_box(picture.size, subject.view))):
        parts = [*parts, "grey margin: not seen by the network"]
    margin = size // 2
    lines = wrapped(parts, size, width - 2 * margin)
    step = round(1.4 * size)
    below = (len(lines) + 1) * step + 2 * margin
    painted = shaded(picture, subject.view, attribution, kept, look, below)
    draw, font, y = ImageDraw.Draw(painted), _font(size), height + margin
    for line in lines:
        draw.text((margin, y), line, DARK, font)
        y += step
    lowest, last = look.ends(attribution)
    first = f"score {lowest}"
    x0 = margin + round(font.getlength(first)) + margin
    x1 = width - 2 * margin - round(font.getlength(last))
    draw.text((margin, y), first, DARK, font)
    draw.text((x1 + margin, y), last, DARK, font)
    painted.paste(bar((x1 - x0, size), look), (x0, y + size // 8))
    if look.signed:
        draw.text(((x0 + x1) // 2, y), "0", DARK, font, anchor="ma")
    return painted


def wrapped(parts: Sequence[str], size: int, width: float) -> list[str]:
    """Join parts of a caption by dots into lines; what is longer than a line ends in an ellipsis.

    Args:
        parts: each stays on one line.
        size: of the letters, pixels.
        width: of the lines, pixels.
    """
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]} · {part}" if lines else part
        if lines and _font(size).getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(shortened(part, size, width))
    return lines


def shortened(text: str, size: int, width: float) -> str:
    """Cut a text in its middle so that it fits a width, both in pixels."""
    text = " ".join(text.split())[:400]
    font, found, left = _font(size), text, len(text)
    while font.getlength(found) > width and left > 2:
        left -= 1
        found = f"{text[: (left + 1) // 2]}…{text[len(text) - left // 2 :]}"
    return found
