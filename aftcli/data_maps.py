"""Maps of other tools, and our own read back: what they cover, and whether they are scaled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.core.cam import stretch
from aftcli.frames import Size, Turn, fitting

MOST_CELLS = 128  # a side, of activations that a map is looked for to be stretched from
TALLEST = 2048  # pixels a side, of networks' inputs
SOME = 32  # columns that are looked at before all are
ROUNDING = 1e-5  # of a stretched map in float32
SPAN = 1e-3  # how far from 0 and 1 the smallest and largest cell may be computed to be


class Place(NamedTuple):
    """What a map is taken to cover.

    Attributes:
        frame: "view", what the network sees; "shown" or "stored", the whole picture as EXIF turns
            it or as its file has it; "" for what fits none of them and is taken as a view.
        others: further frames that it fits as well.
        sure: it has the very size of its frame, fits no other and needs no turning.
    """

    frame: str
    others: tuple[str, ...] = ()
    sure: bool = False


def place_of(size: Size, seen: Size, turn: Turn) -> Place:
    """Find what a map covers, by its size or otherwise its aspect ratio.

    Args:
        size: width and height of the map.
        seen: width and height of the network's input.
        turn: the picture.

    >>> place_of((320, 240), (224, 224), Turn((480, 640), 6))
    Place(frame='shown', others=(), sure=False)
    """
    # The first counts where a map fits several.
    frames = {"view": seen, "shown": turn.shown}
    if turn.orientation != 1:
        frames["stored"] = turn.stored
    found = fitting(size, frames)
    if not found:
        return Place("")
    sure = len(found) == 1 and frames[found[0]] == size and found[0] != "stored"
    return Place(found[0], found[1:], sure)


def assumed(size: Size, place: Place, turn: Turn) -> str:
    """Say what a map was taken to cover; "" where nothing else is possible.

    Args:
        size: width and height of the map.
        place: of `place_of`.
        turn: the picture.
    """
    if place.sure:
        return ""
    own, shown, stored = (f"{w} x {h}" for w, h in (size, turn.shown, turn.stored))
    if not place.frame:
        return (
            f"its {own} values have neither the picture's aspect ratio nor the network's; they are "
            "taken as a map of what the network sees, stretched"
        )
    names = {
        "view": "what the network sees",
        "shown": f"the whole picture ({shown})",
        "stored": f"the whole picture as stored ({stored}), before EXIF turns it",
    }
    also = " or ".join(names[frame] for frame in place.others)
    what = f"{names[place.frame]}, not of {also}" if also else names[place.frame]
    return f"its {own} values are taken as a map of {what}"


def already_scaled(values: Tensor) -> bool:
    """Find whether a map, shape (h, w), was scaled to [0, 1] by cells and then stretched.

    So are those that `--save map` writes: their largest value is below 1 where no pixel's centre
    falls on that of the largest cell. Scaled again they would be other maps.
    """
    low, high = float(values.min()), float(values.max())
    if low < 0 or not 0 < high <= 1 or (low, high) == (0, 1):
        return False
    cells = _cells(values.double())
    cells = None if cells is None else _cells(cells.T)
    return cells is not None and bool(cells.min().abs() < SPAN and (cells.max() - 1).abs() < SPAN)


def _cells(values: Tensor) -> Tensor | None:
    """The rows, shape (n, w), that a map's, shape (h, w), are stretched from; None of others."""
    height, width = values.shape
    some = values[:, :: -(-width // SOME)]
    for count in range(1, min(height, MOST_CELLS + 1)) if height <= TALLEST else ():
        eye = torch.eye(count, dtype=values.dtype)
        basis, triangle = torch.linalg.qr(stretch(eye[None], (height, count))[0])
        if _lie_in(basis, some) and _lie_in(basis, values):
            cells: Tensor = torch.linalg.solve_triangular(triangle, basis.T @ values, upper=True)
            return cells
    return None


def _lie_in(basis: Tensor, columns: Tensor) -> bool:
    """Whether columns, shape (h, w), are combinations of an orthonormal basis's, shape (h, n)."""
    return bool((columns - basis @ (basis.T @ columns)).abs().max() < ROUNDING)
