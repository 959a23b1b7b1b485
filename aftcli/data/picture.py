"""Pictures of a data set, in files of their own or in archives, and what is marked in them.

Imports neither torch nor Pillow.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .jfif".split())

Size = tuple[int, int]  # width, height, pixels

Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels of the picture


def is_picture(name: str) -> bool:
    """Tell a picture by its file's name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


class Picture(ABC):
    """A picture as a format of data sets delivers it.

    Attributes:
        name: the path that messages call it by: the data set's root and its name below that, such
            as an archive and a place in it. Nothing is opened by it.
    """

    name: str

    @abstractmethod
    def open(self) -> BinaryIO:
        """Open what Pillow can read, from the beginning.

        Raises:
            OSError: it can't be read.
        """

    @abstractmethod
    def stat(self) -> tuple[int, int]:
        """Return its size in bytes, and the time in ns when its file, or archive, last changed.

        Raises:
            OSError: it can't be read.
        """

    def read(self) -> bytes:
        """Read all of it."""
        with self.open() as file:
            return file.read()

    def sha256(self) -> str:
        """Compute the SHA-256 of its bytes.

        Raises:
            OSError: it can't be read.
        """
        with self.open() as file:
            return hashlib.file_digest(cast("BytesIO", file), "sha256").hexdigest()

    def __str__(self) -> str:
        return self.name


class FilePicture(Picture):
    """A picture in a file of its own.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def open(self) -> BinaryIO:
        """Open the file."""
        return self.path.open("rb")

    def stat(self) -> tuple[int, int]:
        """Return the file's size and time of the last change; see `Picture.stat`."""
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns


def picture_at(place: str | Path | Picture) -> Picture:
    """Take a path as the picture in its file."""
    return place if isinstance(place, Picture) else FilePicture(Path(place))


class Listed(NamedTuple):
    """A box, and the width and height of the picture that it was drawn in; None if not said."""

    box: Box
    size: Size | None

    @classmethod
    def read(cls, edges: Iterable[str], size: Iterable[str | None], first: int) -> Listed:
        """Read a box from texts.

        Args:
            edges: left, top, right, bottom, both ends in the box.
            size: width and height, which some tools leave out or write as zeros.
            first: the number of the first pixel.

        Raises:
            ValueError: an edge is no finite number.
        """
        left, top, right, bottom = _finite(edges)
        last = 1 - first
        return cls((left - first, top - first, right + last, bottom + last), _size(size))


def _finite(texts: Iterable[str]) -> tuple[float, ...]:
    edges = tuple(float(text) for text in texts)
    if not all(map(math.isfinite, edges)):
        raise ValueError(f"a box is {edges}")
    return edges


def _size(texts: Iterable[str | None]) -> Size | None:
    try:
        width, height = _finite(text or "0" for text in texts)
    except ValueError:
        return None
    return (int(width), int(height)) if min(width, height) > 0 else None


class Marks(NamedTuple):
    """Objects of one class in a picture, as the files of a data set have them.

    Attributes:
        boxes: of the objects.
        boxes_file: the file that lists them.
        segmentation: a picture whose pixels are labels, in a file or in memory (Pillow's Image);
            None where there is none.
        label: the label of the class's pixels.
        void: the label of pixels that do not count; None where all count.
    """

    boxes: list[Listed]
    boxes_file: Path
    segmentation: Path | Image | None = None
    label: int = 1
    void: int | None = None
