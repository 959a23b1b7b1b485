"""Where the objects are: bounding boxes and segmentations of a data set's images."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.core.classifier import Preprocessing
from aftcli.data import View, open_picture, view_of
from aftcli.data_files import read_xml, reason
from aftcli.datasets import DataSet, image_labels, voc_class
from aftcli.errors import AftError
from aftcli.files import inside

EDGES = ("x1", "y1", "x2", "y2")
VOID = 255  # the borders of objects in a segmentation of VOC

Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels of the picture


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
    an object of its label in the picture's pixels, both ends included.

    Args:
        data_set: the images.
        preprocessing: of the model, which sees a part of each.

    Raises:
        AftError: the csv can't be read.
    """

    def __init__(self, data_set: DataSet, preprocessing: Preprocessing) -> None:
        self.data_set, self.preprocessing = data_set, preprocessing
        self._listed = _read_boxes(self.table) if self.table else {}

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
            view = view_of(image.size, self.preprocessing)
            return Regions(_covered(boxes, image.size, view))

    def _voc(self, index: int, class_index: int) -> Regions:
        names = self.data_set.classes
        wanted = voc_class(names[class_index].split(",")[0]) if class_index < len(names) else None
        if wanted is None:
            return Regions()
        annotation, segmentation = self._annotations(index)
        boxes, seen, counted = None, None, None
        try:
            with open_picture(self.data_set.path(index)) as image:
                size = image.size
            view = view_of(size, self.preprocessing)
            if annotation.is_file():
                found = list(_voc_boxes(read_xml(annotation), wanted))
                boxes = _covered(found, size, view) if found else None
            if segmentation.is_file():
                with open_picture(segmentation) as image:
                    whole = image_labels(image, segmentation)
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


def _read_boxes(path: Path) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"file", *EDGES} - set(rows.fieldnames or ())
            if missing:
                raise KeyError(min(missing))
            for row in rows:
                left, top, right, bottom = _edges(row[k] for k in EDGES)
                boxes[row["file"]].append((left, top, right + 1, bottom + 1))
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


def _voc_boxes(root: ElementTree.Element, wanted: int) -> Iterator[Box]:
    for item in root.iter("object"):
        box = item.find("bndbox")
        if voc_class(item.findtext("name", "")) == wanted and box is not None:
            edges = (box.findtext(k, "") for k in ("xmin", "ymin", "xmax", "ymax"))
            left, top, right, bottom = _edges(edges)
            yield left - 1, top - 1, right, bottom  # VOC counts pixels from 1


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
