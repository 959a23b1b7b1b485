"""Pictures as the network sees them: read safely, upright, scaled, cropped, normalised."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from aftcli.core.classes import Preprocessing
from aftcli.data.picture import Box, FilePicture, Picture, Size, picture_at
from aftcli.errors import AftError, reason

# EXIF's orientations, and what turns the stored picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

SIDEWAYS = (5, 6, 7, 8)  # width and height change places

# The shown picture's rows, and columns, run against those that they are stored as.
MIRRORED = ((3, 4, 7, 8), (2, 3, 6, 7))


class Turn(NamedTuple):
    """A stored picture and how it is turned upright.

    Attributes:
        stored: width and height of the pixels in the file.
        orientation: of EXIF, 1 to 8; 1 leaves them as they are.
    """

    stored: Size
    orientation: int = 1

    @property
    def shown(self) -> Size:
        """Width and height of the upright picture."""
        width, height = self.stored
        return (height, width) if self.orientation in SIDEWAYS else self.stored

    def frames_of(self, size: Size, same: bool) -> tuple[str, ...]:
        """Find the frames, "stored" and "shown", that a grid of `size` can be of.

        Args:
            size: width and height of the grid.
            same: a grid of another scale is of neither.
        """
        frames = {"stored": self.stored, "shown": self.shown}
        if same:
            return tuple(name for name, of in frames.items() if of == size)
        return fitting(size, frames)

    def box(self, box: Box) -> Box:
        """Turn a box in stored pixels into one in shown pixels."""
        left, top, right, bottom = box
        across, down = (left, right), (top, bottom)
        if self.orientation in SIDEWAYS:
            across, down = down, across
        width, height = self.shown
        if self.orientation in MIRRORED[1]:
            across = (width - across[1], width - across[0])
        if self.orientation in MIRRORED[0]:
            down = (height - down[1], height - down[0])
        return across[0], down[0], across[1], down[1]

    def upright(self, image: Image.Image) -> Image.Image:
        """Turn pixels that lie as the stored ones, at any scale."""
        turn = TURNS.get(self.orientation)
        return image if turn is None else image.transpose(turn)

    def upright_grid(self, values: Tensor) -> Tensor:
        """Turn values that lie as the stored pixels, shape (h, w), at any scale."""
        if self.orientation in SIDEWAYS:
            values = values.T
        mirrored = [axis for axis in (0, 1) if self.orientation in MIRRORED[axis]]
        return values.flip(mirrored)


def turn_of(image: Image.Image) -> Turn:
    """Find how an opened picture is turned, before its pixels are read."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    orientation = orientation if orientation in TURNS else 1
    # Pillow turns TIFF by itself: its size is that of the shown picture from the beginning.
    turned = image.format == "TIFF" and orientation in SIDEWAYS
    return Turn(image.size[::-1] if turned else image.size, orientation)


def fitting(size: Size, frames: Mapping[str, Size]) -> tuple[str, ...]:
    """Find the frames that a grid can be of.

    Args:
        size: width and height of the grid.
        frames: width and height of each frame, by its name.

    Returns:
        Names of those of the same size, otherwise of those nearest in aspect ratio, which one side
        of the grid may miss by one for rounding; none where all are further off.

    >>> fitting((240, 320), {"view": (224, 224), "shown": (480, 640), "stored": (640, 480)})
    ('shown',)
    """
    same = tuple(name for name, frame in frames.items() if frame == size)
    if same:
        return same
    width, height = size
    off = {
        name: abs(math.log(width * tall / (height * wide)))
        for name, (wide, tall) in frames.items()
        if abs(width - height * wide / tall) <= 1 or abs(height - width * tall / wide) <= 1
    }
    return tuple(name for name in off if off[name] <= min(off.values()) + 1e-9)


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

STDERR = 2

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

TILE = 1024  # pixels, the side of what is converted at a time: copies are large in memory

# A longer picture is cut to this many shorter sides before it is scaled: a 1 x 10000 one would
# otherwise become 256 x 2560000 for the sake of its centre.
LONGEST = 16


class View(NamedTuple):
    """The part of a picture that the model sees: `crop` of the picture scaled to `scaled`."""

    scaled: tuple[int, int]
    crop: tuple[int, int, int, int]

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom of the view in pixels of a picture of `size` (w, h)."""
        across, down = size[0] / self.scaled[0], size[1] / self.scaled[1]
        left, top, right, bottom = self.crop
        return (left * across, top * down, right * across, bottom * down)


class _TooLargeError(Exception):
    pass


@contextmanager
def open_picture(place: str | Path | Picture) -> Iterator[Image.Image]:
    """Open a picture; what is wrong is an AftError, also while its pixels are read later."""
    path = picture_at(place)
    try:
        if path.stat()[0] == 0:
            raise AftError(f"{path}: the file is empty")
        # Pillow maps some files into memory, if it knows their paths.
        known = path.path if isinstance(path, FilePicture) else path.open()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _quiet(path), Image.open(known, formats=FORMATS) as image:
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
def _quiet(path: Picture) -> Iterator[None]:
    """Keep stderr from libtiff and its reader, which report as an error too."""
    with path.open() as file:
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


def _check_size(image: Image.Image, path: Picture) -> None:
    most = LARGEST_OF.get(image.format or "", LARGEST)
    if math.prod(image.size) > most or max(image.size) > LONGEST_SIDE:
        raise _TooLargeError(
            f"{image.width} x {image.height} pixels; of {image.format} at most {most} and "
            f"{LONGEST_SIDE} a side are read"
        )
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        scans = path.read().count(b"\xff\xda")
        if scans * math.prod(image.size) > SCANS:
            raise _TooLargeError(f"{image.width} x {image.height} pixels in {scans} scans")


def image_labels(segmentation: Image.Image, path: Path) -> Image.Image:
    """Return a segmentation after checking that its pixels are classes."""
    if segmentation.mode not in ("L", "P"):
        raise AftError(
            f"{path}: a segmentation has a class a pixel, this is {segmentation.mode}; save it "
            "with a palette"
        )
    return segmentation


def read_image(path: str | Path | Picture) -> Image.Image:
    """Read a picture as people see it: upright, 8 bits, RGB, transparency over white.

    Args:
        path: of a file in one of FORMATS and any mode of it; or a picture of a data set.

    Raises:
        AftError: the file is missing, empty, damaged, no picture, or larger than LARGEST.
    """
    with open_picture(path) as image:
        # In place: a copy of a large picture is hundreds of megabytes.
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened picture as `read_image` does: upright, 8 bits, RGB, over white."""
    return _rgb(ImageOps.exif_transpose(image))


def read_turn(path: Path) -> Turn:
    """Read how a picture is turned upright."""
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
    """Yield the left upper corner and the pixels of each tile of a picture."""
    width, height = image.size
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            box = (left, top, min(left + TILE, width), min(top + TILE, height))
            yield (left, top), image.crop(box)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Turn a picture of larger integers or floats, shape (H, W), into one of 8 bits."""
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
    """Find the part of a picture of `size` (width, height) that the model sees."""
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


def check_channels(preprocessing: Preprocessing) -> None:
    """Check that inputs can be made of pictures, which are grey or coloured."""
    depth = len(preprocessing.mean)
    if depth not in (1, 3):
        raise AftError(
            f"the network takes {depth} channels, a picture has 1 or 3; make x yourself, shape "
            f"{(1, *preprocessing.shape)}, and pass it to aftcli.explain or another function of "
            "the Python API"
        )


def to_input(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Turn a picture into x: scale, crop, normalise, as the model was trained.

    Args:
        image: RGB.
        preprocessing: of the model; one of a single channel turns the picture grey by ITU-R 601's
            luma, as Pillow's "L".

    Returns:
        x, shape (1, C, H, W).

    Raises:
        AftError: no picture has the channels that the model takes.
    """
    check_channels(preprocessing)
    mode = "L" if len(preprocessing.mean) == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if preprocessing.resize is not None:
        image = _centre(image)
    view = view_of(image.size, preprocessing)
    image = image.resize(view.scaled, INTERPOLATIONS[preprocessing.interpolation]).crop(view.crop)
    values = torch.from_numpy(np.array(image)).view(*preprocessing.size, -1)
    pixels = values.permute(2, 0, 1).float() / 255
    mean, std = preprocessing.channels(pixels)
    return ((pixels - mean) / std)[None]
