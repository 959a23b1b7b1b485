"""Where the objects are: bounding boxes and segmentations of a data set's images."""

from __future__ import annotations

import csv
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.core.classifier import Preprocessing
from aftcli.data.images import Box, Size, Turn, View, open_picture, turn_of, view_of
from aftcli.data.sets import DataSet, image_labels, voc_class
from aftcli.data.text import read_xml, reason
from aftcli.errors import AftError
from aftcli.files import inside

EDGES = ("x1", "y1", "x2", "y2")

SIDES = ("width", "height")

VOID = 255  # the borders of objects in a segmentation of VOC


class Listed(NamedTuple):
    """A box, and the width and height of the picture that it was drawn in; None if not said."""

    box: Box
    size: Size | None


class Regions(NamedTuple):
    """Where the objects of one class are in an input.

    Attributes:
        boxes: what their boxes cover, shape (H, W), bool; None where none is known.
        segmentation: what they cover, shape (H, W), bool; None where it is not known.
        counted: pixels of the segmentation that are not void, shape (H, W), bool.
    """

    boxes: Tensor | None = None
    segmentation: Tensor | None = None
    counted: Tensor | None = None


class Objects:
    """The objects of a data set: VOC's annotations, or SPLIT_boxes.csv beside the split's folder.

    The csv has the columns `file,x1,y1,x2,y2`: the image below the split's folder, and a box of
    an object of its label in the picture's pixels, both ends included. Columns `width,height` say
    which picture these are pixels of, where EXIF turns it: the stored or the shown one.

    Args:
        data_set: the images.
        preprocessing: of the model, which sees a part of each.
        note: is told what was assumed.

    Raises:
        AftError: the csv can't be read.
    """

    def __init__(
        self,
        data_set: DataSet,
        preprocessing: Preprocessing,
        note: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.data_set, self.preprocessing, self.note = data_set, preprocessing, note
        self._listed = _read_boxes(self.table) if self.table else {}
        self._assumed: set[tuple[str, str]] = set()

    @cached_property
    def table(self) -> Path | None:
        """The csv of boxes; None where there is none."""
        root, split = self.data_set.root, self.data_set.split
        if self.data_set.kind != "folders" or not split:
            return None
        path = inside(root.parent, f"{split}_boxes.csv", self.data_set.named)
        return path if path.is_file() else None

    @property
    def kinds(self) -> frozenset[str]:
        """What is known of the objects: "boxes", "segmentation", both or neither."""
        if self.data_set.kind == "voc":
            return frozenset({"boxes", "segmentation"})
        return frozenset({"boxes"} if self._listed else ())

    def files(self) -> Iterator[Path]:
        """The files that say where the objects are."""
        if self.table:
            yield self.table
        if self.data_set.kind == "voc":
            for i in range(len(self.data_set.samples)):
                yield from (p for p in self._annotations(i) if p.is_file())

    def _annotations(self, index: int) -> tuple[Path, Path]:
        beside, stem = self.data_set.beside, Path(self.data_set.samples[index].name).stem
        return beside(f"Annotations/{stem}.xml"), beside(f"SegmentationClass/{stem}.png")

    def regions(self, index: int, class_index: int) -> Regions:
        """Where the objects of a class are in an input; nothing where none is known or seen.

        Args:
            index: of the image.
            class_index: c.

        Raises:
            AftError: a file can't be read.
        """
        if self.data_set.kind == "voc":
            return self._voc(index, class_index)
        sample = self.data_set.samples[index]
        boxes = self._listed.get(sample.name, []) if class_index == sample.label else []
        if not boxes:
            return Regions()
        with open_picture(self.data_set.path(index)) as image:
            turn = turn_of(image)
        assert self.table
        upright = self._upright(boxes, turn, self.table, index)
        return Regions(_covered(upright, turn.shown, view_of(turn.shown, self.preprocessing)))

    def _voc(self, index: int, class_index: int) -> Regions:
        names = self.data_set.classes
        wanted = voc_class(names[class_index].split(",")[0]) if class_index < len(names) else None
        if wanted is None:
            return Regions()
        annotation, segmentation = self._annotations(index)
        boxes, seen, counted = None, None, None
        try:
            with open_picture(self.data_set.path(index)) as image:
                turn = turn_of(image)
            view = view_of(turn.shown, self.preprocessing)
            if annotation.is_file():
                found = list(_voc_boxes(read_xml(annotation), wanted))
                upright = self._upright(found, turn, annotation, index)
                boxes = _covered(upright, turn.shown, view) if found else None
            if segmentation.is_file():
                with open_picture(segmentation) as image:
                    whole = self._shown(image, turn, segmentation, index)
                    scaled = whole.resize(view.scaled, Image.Resampling.NEAREST)
                    labels = np.asarray(scaled.crop(view.crop))
                region = torch.from_numpy(labels == 1 + wanted)
                if region.any():
                    seen, counted = region, torch.from_numpy(labels != VOID)
        except (OSError, ValueError) as error:
            raise AftError(
                f"{self.data_set.path(index)}: its boxes can't be read ({reason(error)})"
            ) from error
        return Regions(boxes, seen, counted)

    def _upright(self, boxes: list[Listed], turn: Turn, path: Path, index: int) -> list[Box]:
        """Boxes of a file in pixels of the shown picture."""
        return [
            turn.box(box) if self._is_stored(size, turn, path, index, "boxes") else box
            for box, size in boxes
        ]

    def _shown(self, image: Image.Image, turn: Turn, path: Path, index: int) -> Image.Image:
        """A segmentation that lies as the shown picture."""
        own = turn_of(image)
        labels = image_labels(image, path)
        if own.orientation != 1:
            return labels if image.format == "TIFF" else own.upright(labels)
        stored = self._is_stored(labels.size, turn, path, index, "segmentation")
        return turn.upright(labels) if stored else labels

    def _is_stored(self, size: Size | None, turn: Turn, path: Path, index: int, what: str) -> bool:
        """Decide by an annotation's own size whether it is of the stored picture."""
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


def _read_boxes(path: Path) -> dict[str, list[Listed]]:
    boxes: dict[str, list[Listed]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"file", *EDGES} - set(rows.fieldnames or ())
            if missing:
                raise KeyError(min(missing))
            for row in rows:
                left, top, right, bottom = _edges(row[k] for k in EDGES)
                size = _size(row.get(side) for side in SIDES)
                boxes[row["file"]].append(Listed((left, top, right + 1, bottom + 1), size))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise AftError(
            f"{path}: can't be read as boxes ({str(error)[:160]!r}); its columns are "
            "file,x1,y1,x2,y2"
        ) from error
    return boxes


def _edges(texts: Iterable[str]) -> tuple[float, ...]:
    edges = tuple(float(text) for text in texts)
    if not all(map(math.isfinite, edges)):
        raise ValueError(f"a box is {edges}")
    return edges


def _size(texts: Iterable[str | None]) -> Size | None:
    """A width and height; None where none is said, as by the zeros that some tools write."""
    try:
        width, height = _edges(text or "0" for text in texts)
    except ValueError:
        return None
    return (int(width), int(height)) if min(width, height) > 0 else None


def _voc_boxes(root: ElementTree.Element, wanted: int) -> Iterator[Listed]:
    size = _size(root.findtext(f"size/{side}") for side in SIDES)
    for item in root.iter("object"):
        box = item.find("bndbox")
        if voc_class(item.findtext("name", "")) == wanted and box is not None:
            edges = (box.findtext(k, "") for k in ("xmin", "ymin", "xmax", "ymax"))
            left, top, right, bottom = _edges(edges)
            # VOC counts pixels from 1.
            yield Listed((left - 1, top - 1, right, bottom), size)


def _covered(boxes: list[Box], size: tuple[int, int], view: View) -> Tensor | None:
    """What boxes cover of an input: pixels whose centre is inside; None if they are outside."""
    left, top, right, bottom = view.crop
    columns = (torch.arange(left, right) + 0.5) * size[0] / view.scaled[0]
    rows = (torch.arange(top, bottom) + 0.5) * size[1] / view.scaled[1]
    region = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for x1, y1, x2, y2 in boxes:
        inside = (rows >= y1) & (rows < y2), (columns >= x1) & (columns < x2)
        region |= inside[0][:, None] & inside[1][None]
    return region if region.any() else None
