"""Objects of a data set: their boxes and segmentations as regions of an input."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.core.classes import Preprocessing
from aftcli.data.images import LARGEST, Turn, View, image_labels, open_picture, turn_of, view_of
from aftcli.data.picture import Box, Listed, Marks, Size
from aftcli.data.sets import DataSet
from aftcli.errors import AftError, reason


class Regions(NamedTuple):
    """The regions of one class's objects in an input.

    Attributes:
        boxes: what their boxes cover, shape (H, W), bool; None where none is known.
        segmentation: what they cover, shape (H, W), bool; None where it is not known.
        counted: pixels of the segmentation that are not void, shape (H, W), bool.
    """

    boxes: Tensor | None = None
    segmentation: Tensor | None = None
    counted: Tensor | None = None


class Objects:
    """The objects of a data set, as its format's annotations say.

    Args:
        data_set: the images.
        preprocessing: of the model, which sees a part of each.
        note: is told what was assumed.

    Raises:
        AftError: a list of boxes can't be read.
    """

    def __init__(
        self,
        data_set: DataSet,
        preprocessing: Preprocessing,
        note: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.data_set, self.preprocessing, self.note = data_set, preprocessing, note
        self._annotations = data_set.format.annotations(data_set)
        self._assumed: set[tuple[str, str]] = set()

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that are known: "boxes", "segmentation", both or neither."""
        return self._annotations.kinds

    def files(self) -> Iterator[Path]:
        """Return the files that say where the objects are."""
        return self._annotations.files()

    def regions(self, index: int, class_index: int) -> Regions:
        """Find the objects of a class in an input; nothing where none is known or seen.

        Args:
            index: of the image.
            class_index: c.
        """
        boxes, seen, counted = None, None, None
        try:
            marks = self._annotations.marks(index, class_index)
            if marks is None:
                return Regions()
            with open_picture(self.data_set.picture(index)) as image:
                turn = turn_of(image)
            view = view_of(turn.shown, self.preprocessing)
            if marks.boxes:
                upright = self._upright(marks.boxes, turn, marks.boxes_file, index)
                boxes = _covered(upright, turn.shown, view)
            if marks.segmentation:
                with _opened(marks.segmentation) as image:
                    whole = self._shown(image, turn, marks, index)
                    scaled = whole.resize(view.scaled, Image.Resampling.NEAREST)
                    labels = np.asarray(scaled.crop(view.crop))
                region = torch.from_numpy(labels == marks.label)
                if region.any():
                    seen = region
                    counted = torch.from_numpy(np.asarray(labels != marks.void))
        except (OSError, ValueError) as error:
            raise AftError(
                f"{self.data_set.picture(index)}: its boxes can't be read ({reason(error)})"
            ) from error
        return Regions(boxes, seen, counted)

    def _upright(self, boxes: list[Listed], turn: Turn, path: Path, index: int) -> list[Box]:
        """Turn boxes of a file into pixels of the shown picture."""
        return [
            turn.box(box) if self._is_stored(size, turn, path, index, "boxes") else box
            for box, size in boxes
        ]

    def _shown(self, image: Image.Image, turn: Turn, marks: Marks, index: int) -> Image.Image:
        """Turn a segmentation so that it lies as the shown picture."""
        own = turn_of(image)
        path = marks.segmentation if isinstance(marks.segmentation, Path) else marks.boxes_file
        labels = image_labels(image, path)
        if own.orientation != 1:
            return labels if image.format == "TIFF" else own.upright(labels)
        stored = self._is_stored(labels.size, turn, path, index, "segmentation")
        return turn.upright(labels) if stored else labels

    def _is_stored(self, size: Size | None, turn: Turn, path: Path, index: int, what: str) -> bool:
        """Tell by an annotation's own size if it is of the stored picture."""
        if turn.orientation == 1:
            return True
        name, boxes = self.data_set.samples[index].name, what == "boxes"
        frames = turn.frames_of(size, same=boxes) if size else ("stored", "shown")
        if size and not frames:
            stored, shown = (f"{w} x {h}" for w, h in (turn.stored, turn.shown))
            raise AftError(
                f"{path}: its {what} {'are' if boxes else 'is'} of {size[0]} x {size[1]} pixels, "
                f"but {name} has {stored} as stored and {shown} as EXIF turns it; make it fit one "
                "of them"
            )
        why = "of a size that fits both ways" if size else "without a width and height"
        if len(frames) == 2 and (what, why) not in self._assumed:
            self._assumed.add((what, why))
            self.note(
                f"{path}: the {what} of {name}, which EXIF turns, {'are' if boxes else 'is'} {why} "
                "and taken as of its stored pixels; so are others like it"
            )
        return "stored" in frames


def _opened(segmentation: Path | Image.Image) -> AbstractContextManager[Image.Image]:
    if isinstance(segmentation, Path):
        return open_picture(segmentation)
    return nullcontext(segmentation)


def _covered(boxes: list[Box], size: tuple[int, int], view: View) -> Tensor | None:
    """Find the pixels of an input whose centre is in a box; None where there is none."""
    left, top, right, bottom = view.crop
    columns = (torch.arange(left, right) + 0.5) * size[0] / view.scaled[0]
    rows = (torch.arange(top, bottom) + 0.5) * size[1] / view.scaled[1]
    region = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for x1, y1, x2, y2 in boxes:
        inside = (rows >= y1) & (rows < y2), (columns >= x1) & (columns < x2)
        region |= inside[0][:, None] & inside[1][None]
    return region if region.any() else None


EDGES = 2**22  # of a polygon, times the picture's rows, that are looked at together


def polygon_mask(corners: np.ndarray, size: Size) -> np.ndarray:
    """Find the pixels whose centre lies in a polygon, by the even-odd rule.

    Args:
        corners: x and y of each, shape (n, 2), pixels from the left upper corner of the picture.
        size: width and height of the picture, pixels.

    Returns:
        Shape (height, width), bool.
    """
    width, height = size
    centres = np.arange(height)[:, None] + 0.5
    turns = np.zeros((height, width + 1), np.uint8)
    starts, ends = corners, np.roll(corners, -1, axis=0)
    step = max(EDGES // height, 1)
    for i in range(0, len(corners), step):
        (x1, y1), (x2, y2) = starts[i : i + step].T, ends[i : i + step].T
        rows, edges = np.nonzero((y1 <= centres) != (y2 <= centres))
        along = (rows + 0.5 - y1[edges]) / (y2 - y1)[edges]
        across = x1[edges] + along * (x2 - x1)[edges]
        # Each crossing of a row turns the pixels right of it from outside to inside, or back.
        columns = np.ceil(across - 0.5).clip(0, width).astype(int)
        np.bitwise_xor.at(turns, (rows, columns), 1)
    inside: np.ndarray = np.bitwise_xor.accumulate(turns[:, :width], axis=1).astype(bool)
    return inside


def to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Turn a mask into COCO's compressed run-length encoding, as pycocotools reads it.

    The runs go down the columns, beginning with zeros. From the fourth on, each is the difference
    to the one before the last, in groups of 5 bits as characters
    (https://github.com/cocodataset/cocoapi, common/maskApi.c).

    Args:
        mask: shape (height, width), bool.

    Returns:
        `size`, [height, width], and `counts`, ASCII text.

    >>> to_rle(np.array([[False, True], [False, True]]))
    {'size': [2, 2], 'counts': '22'}
    """
    flat = np.asarray(mask, bool).ravel(order="F")
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, len(flat))
    runs = np.diff(ends, prepend=0).tolist()
    runs = [0, *runs] if len(flat) and flat[0] else runs
    text = []
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text.append(chr(48 + (group | 32 if more else group)))
    return {"size": [int(n) for n in np.shape(mask)], "counts": "".join(text)}


def from_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Return the mask of COCO's run-length encoding, compressed or a list; see `to_rle`.

    Returns:
        Shape (height, width), bool.

    Raises:
        ValueError: the runs do not fill the mask.
    """
    height, width = (int(n) for n in rle["size"])
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    runs = np.array(_runs(counts) if isinstance(counts, str) else counts, np.int64)
    if not 0 < height * width <= LARGEST or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its runs do not fill {height} x {width} pixels")
    mask: np.ndarray = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return mask.reshape((height, width), order="F")


def _runs(text: str) -> list[int]:
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = ord(character) - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs
