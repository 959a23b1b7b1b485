"""The frames of a picture: its pixels as stored, and as shown once EXIF has turned it upright."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from PIL import ExifTags, Image
from torch import Tensor

Size = tuple[int, int]  # width, height, pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels of the picture

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
