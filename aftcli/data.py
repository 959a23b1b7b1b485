"""Images and maps: from files to tensors."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib import format as npy
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from aftcli.core.cam import normalise, upsample
from aftcli.core.classifier import Preprocessing
from aftcli.data_files import reason
from aftcli.data_maps import already_scaled, place_of
from aftcli.errors import AftError
from aftcli.frames import Turn, turn_of

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# What Pillow decodes by itself and in compiled code; others run programs (EPS runs Ghostscript),
# or take minutes for a large picture.
FORMATS = (
    *("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF"),
    *("PCX", "SGI", "TGA"),
)
# Pixels: with up to 13 bytes each, beside the network, a process stays below 2 GB.
LARGEST = 105_000_000
# Their decoders hold several copies.
LARGEST_OF = {"WEBP": 60_000_000, "JPEG2000": 40_000_000, "AVIF": 60_000_000}
LONGEST_SIDE = 2**19  # pixels
SCANS = 4_000_000_000  # pixels of all scans of a progressive JPEG: each passes the whole picture
LARGEST_MAP = 25_000_000  # values
HEADER = 2**16  # bytes of a .npy file; a header of numbers takes 128
STDERR = 2
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TILE = 1024  # pixels, the side of what is converted at a time: copies are large in memory
# A longer picture is cut to this many shorter sides before it is scaled: a 1 x 10000 one would
# otherwise become 256 x 2560000 for the sake of its centre.
LONGEST = 16


class View(NamedTuple):
    """What of a picture the model sees: scale it to `scaled`, then crop `crop` of that."""

    scaled: tuple[int, int]
    crop: tuple[int, int, int, int]

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the view in pixels of a picture of `size` (w, h)."""
        across, down = size[0] / self.scaled[0], size[1] / self.scaled[1]
        left, top, right, bottom = self.crop
        return (left * across, top * down, right * across, bottom * down)


class _TooLargeError(Exception):
    pass


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture; its pixels are read by those who ask for them.

    Args:
        path: of the file.

    Raises:
        AftError: the file is missing, damaged, no picture of FORMATS, or too large; also where
            this is found out by those who read its pixels.
    """
    try:
        if path.stat().st_size == 0:
            raise AftError(f"{path}: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _quiet(path), Image.open(path, formats=FORMATS) as image:
                _check_size(image, path)
                yield image
    except AftError:
        raise
    except UnidentifiedImageError as error:
        raise AftError(f"{path}: is not a picture in a known format, or is damaged") from error
    except (Image.DecompressionBombError, _TooLargeError) as error:
        raise AftError(f"{path}: is too large ({error}); scale it down first") from error
    except Exception as error:
        damaged = "" if isinstance(error, OSError) and error.strerror else "; it may be damaged"
        raise AftError(f"{path}: can't be read as a picture ({reason(error)}){damaged}") from error


@contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Keep stderr from libtiff and its reader: what is wrong they say there and as an error too."""
    with path.open("rb") as file:
        start = file.read(4)
    if start not in TIFF or sys.stderr is None:
        yield
        return
    kept, nothing = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, STDERR)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nothing)


def _check_size(image: Image.Image, path: Path) -> None:
    most = LARGEST_OF.get(image.format or "", LARGEST)
    if math.prod(image.size) > most or max(image.size) > LONGEST_SIDE:
        raise _TooLargeError(
            f"{image.width} x {image.height} pixels; of {image.format} at most {most} and "
            f"{LONGEST_SIDE} a side are read"
        )
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        scans = path.read_bytes().count(b"\xff\xda")
        if scans * math.prod(image.size) > SCANS:
            raise _TooLargeError(f"{image.width} x {image.height} pixels in {scans} scans")


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as people see it: upright, 8 bits, RGB, transparency over white.

    Args:
        path: of a file in one of FORMATS and any mode of it.

    Raises:
        AftError: the file is missing, empty, damaged, no picture, or larger than LARGEST.
    """
    with open_picture(Path(path)) as image:
        # In place: a copy of a large picture is hundreds of megabytes.
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def read_turn(path: Path) -> Turn:
    """Read how a picture is turned upright.

    Raises:
        AftError: as `read_image`.
    """
    with open_picture(path) as image:
        return turn_of(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _over_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
        image.info.pop("icc_profile", None)  # of another colour space
    return image


def _tiles(image: Image.Image) -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """The left upper corners and the pixels of a picture's tiles."""
    width, height = image.size
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            box = (left, top, min(left + TILE, width), min(top + TILE, height))
            yield (left, top), image.crop(box)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of larger integers or floats, shape (H, W), as one of 8 bits."""
    top = np.float32(0)
    for _, tile in _tiles(image):
        values = np.asarray(tile, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        top = values.max(initial=top)
    scale = 1.0 if 1 < top <= 255 else 255 / (65535 if top > 1 else 1)
    if image.mode.startswith("I;16"):
        scale = 255 / 65535
    grey = Image.new("L", image.size)
    for corner, tile in _tiles(image):
        values = np.asarray(tile, dtype=np.float32) * scale
        grey.paste(Image.fromarray(values.round().clip(0, 255).astype(np.uint8)), corner)
    return grey


def _over_white(image: Image.Image) -> Image.Image:
    seen = Image.new("RGB", image.size)
    for corner, tile in _tiles(image):
        white = Image.new("RGBA", tile.size, "white")
        seen.paste(Image.alpha_composite(white, tile.convert("RGBA")).convert("RGB"), corner)
    return seen


def view_of(size: tuple[int, int], preprocessing: Preprocessing) -> View:
    """Find what of a picture of `size` (width, height) the model sees."""
    high, wide = preprocessing.size
    if preprocessing.resize is None:
        return View((wide, high), (0, 0, wide, high))
    width, height = size
    short = preprocessing.resize
    if width <= height:
        scaled = (short, max(int(short * height / width), 1))
    else:
        scaled = (max(int(short * width / height), 1), short)
    left, top = round((scaled[0] - wide) / 2), round((scaled[1] - high) / 2)
    return View(scaled, (left, top, left + wide, top + high))


def _centre(image: Image.Image) -> Image.Image:
    """Cut an extremely long picture to its middle."""
    width, height = image.size
    most = LONGEST * min(width, height)
    across, down = max(width - most, 0) // 2, max(height - most, 0) // 2
    return image.crop((across, down, width - across, height - down)) if across + down else image


def to_input(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Turn a picture into x: scale, crop, normalise, as the model was trained.

    Args:
        image: RGB.
        preprocessing: of the model.

    Returns:
        x, shape (1, 3, H, W).
    """
    if preprocessing.resize is not None:
        image = _centre(image)
    view = view_of(image.size, preprocessing)
    image = image.resize(view.scaled, INTERPOLATIONS[preprocessing.interpolation]).crop(view.crop)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = preprocessing.channels(pixels)
    return ((pixels - mean) / std)[None]


def read_map(path: Path) -> Tensor:
    """Read an attribution map from another tool.

    Args:
        path: `.npy`, `.npz` with one array, or a grey picture.

    Returns:
        The map, shape (h, w), float64, scaled to magnitudes of at most 1; one that is scaled and
        stretched already, as `--save map` writes it, is as it was.

    Raises:
        AftError: the file is missing, damaged or of another kind, or its array is not a
            finite, two-dimensional one of numbers.
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
            or aspect ratio says (`aftcli.data_maps.place_of`).
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
    """What the model sees of a map of the whole picture, which is upright."""
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
