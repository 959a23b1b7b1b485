"""Maps of other tools, and our own read back: what they cover, and whether they are scaled."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib import format as npy
from torch import Tensor

from aftcli.core.cam import normalise, stretch, upsample
from aftcli.data.images import Turn, View, fitting, open_picture
from aftcli.data.picture import Size
from aftcli.errors import AftError, reason

MOST_CELLS = 128  # a side, of activations that a map is looked for to be stretched from

TALLEST = 2048  # pixels a side, of networks' inputs

SOME = 32  # columns that are looked at before all are

ROUNDING = 1e-5  # of a stretched map in float32

SPAN = 1e-3  # how far from 0 and 1 the smallest and largest cell may be computed to be


class Place(NamedTuple):
    """The part of a picture that a map is taken to cover.

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
    """Tell if a map, shape (h, w), was scaled to [0, 1] by cells and then stretched.

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
    """Find the rows, shape (n, w), that a map's, shape (h, w), are stretched from, if they are."""
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
    """Tell if columns, shape (h, w), are combinations of an orthonormal basis's, shape (h, n)."""
    return bool((columns - basis @ (basis.T @ columns)).abs().max() < ROUNDING)


LARGEST_MAP = 25_000_000  # values

HEADER = 2**16  # bytes of a .npy file; a header of numbers takes 128


def read_map(path: Path) -> Tensor:
    """Read an attribution map from another tool.

    Args:
        path: `.npy`, `.npz` with one array, or a grey picture.

    Returns:
        The map, shape (h, w), float64, scaled to magnitudes of at most 1; one that is scaled and
        stretched already, as `--save map` writes it, is as it was.
    """
    if not path.is_file():
        raise AftError(f"{path}: there is no such map file")
    try:
        array = _array(path)
    except AftError:
        raise
    except Exception as error:
        raise AftError(
            f"{path}: can't be read as a map ({reason(error)}); give .npy, .npz or a grey picture"
        ) from error
    values = array.astype(np.float64, copy=False)
    if not np.isfinite(values).all():
        raise AftError(f"{path}: the map has values that are NaN or infinite")
    if already_scaled(torch.from_numpy(values)):
        return torch.from_numpy(values)
    # To [-1, 1]: the span of finite float64 values may not be finite, nor they in float32.
    return torch.from_numpy(values / max(values.max(), -values.min(), np.finfo(float).tiny))


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() in (".npy", ".npz"):
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _zipped_array(file, path)
            _check_array(file, path)
            return npy.read_array(file, allow_pickle=False)
    with open_picture(path) as image:
        _check_shape(image.size[::-1], path)
        if image.mode.startswith("I") or image.mode in ("F", "L"):
            return np.asarray(image)
        pixels = np.asarray(image.convert("RGB"))
    if (pixels != pixels[..., :1]).any():
        raise AftError(f"{path}: is a coloured picture; a map's picture is grey")
    return pixels[..., 0]


def _zipped_array(file: IO[bytes], path: Path) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(names) != 1:
            listed = ", ".join(name.removesuffix(".npy") for name in names)[:100]
            raise AftError(
                f"{path}: a map file holds one array, this has {len(names)}"
                f"{': ' if names else ''}{listed}; save one map"
            )
        with archive.open(names[0]) as member:
            _check_array(member, path)
            array = npy.read_array(member, allow_pickle=False)
            member.read(1)  # only at its end zipfile looks at the checksum
    return array


def _check_array(file: IO[bytes], path: Path) -> None:
    """Check what an array claims to be before it gets its memory."""
    file.seek(0)
    start = io.BytesIO(file.read(HEADER))
    file.seek(0)
    versions = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if (
        start.getvalue()[:6] != npy.MAGIC_PREFIX
        or (version := npy.read_magic(start)) not in versions
    ):
        raise ValueError("it holds no plain array of numbers")
    shape, _, dtype = versions[version](start)
    if dtype.hasobject:
        raise ValueError("it holds no plain array of numbers")
    _check_shape(shape, path)
    if dtype.kind not in "fiub":
        raise AftError(f"{path}: a map holds numbers, this holds {dtype}")


def _check_shape(shape: tuple[int, ...], path: Path) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise AftError(
            f"{path}: a map has two dimensions (height, width), this has shape "
            f"{str(shape)[:100]}; save the map of one image and one class"
        )
    if math.prod(shape) > LARGEST_MAP:
        raise AftError(
            f"{path}: is too large ({shape[0]} x {shape[1]} values, at most {LARGEST_MAP} are "
            "read); scale it down first"
        )


def nothing_in(fitted: Tensor, values: Tensor, absolute: bool) -> str:
    """Say that a map keeps nothing, and why; "" where it keeps something.

    Args:
        fitted: from `fit_map`.
        values: the map as it was given.
        absolute: see `fit_map`.
    """
    if fitted.any():
        return ""
    if (values < 0).any() and not absolute:
        return "it keeps nothing: none of its scores is positive; --absolute takes magnitudes"
    return "it keeps nothing: it has no score but 0"


def fit_map(
    values: Tensor,
    x: Tensor,
    size: tuple[int, int],
    view: View,
    absolute: bool = False,
    turn: Turn | None = None,
) -> Tensor:
    """Turn a map of any size and scale into I at the input's size.

    Args:
        values: the map, shape (h, w), of what the model sees or of the whole picture, as its size
            or aspect ratio says (`aftcli.data.maps.place_of`).
        x: inputs, shape (1, 3, H, W).
        size: width and height of the picture, upright.
        view: what of the picture the model sees.
        absolute: take magnitudes; by default negatives become zero.
        turn: the stored picture; default one that EXIF does not turn.

    Returns:
        I, shape (1, H, W), in [0, 1].
    """
    turn = turn or Turn(size)
    values = values.abs() if absolute else values.relu()
    high, wide = x.shape[2:]
    frame = place_of((values.shape[1], values.shape[0]), (wide, high), turn).frame
    if frame in ("shown", "stored"):
        values = turn.upright_grid(values) if frame == "stored" else values
        values = _seen(values, size, view)
    elif values.shape == x.shape[2:] and already_scaled(values):
        return values[None].to(x)
    attribution = normalise(values[None])
    if attribution.shape[1] > high or attribution.shape[2] > wide:
        shrunk = F.interpolate(
            attribution[None], (high, wide), mode="bilinear", align_corners=False, antialias=True
        )
        return shrunk[0].clamp(0, 1).to(x)
    return upsample(attribution, x).to(x)


def _seen(values: Tensor, size: tuple[int, int], view: View) -> Tensor:
    """Cut what the model sees out of a map of the whole upright picture."""
    high, wide = values.shape
    left, top, right, bottom = view.crop
    if (wide, high) != size and (wide < view.scaled[0] or high < view.scaled[1]):
        # Cropped to whole cells, a coarse map would not lie where the picture does.
        across = (torch.arange(left, right) + 0.5) * 2 / view.scaled[0] - 1
        down = (torch.arange(top, bottom) + 0.5) * 2 / view.scaled[1] - 1
        places = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1).to(values)
        sampled = F.grid_sample(
            values[None, None], places[None], padding_mode="border", align_corners=False
        )
        return sampled[0, 0]
    left, top, right, bottom = (round(edge) for edge in view.box((wide, high)))
    return values[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)]
