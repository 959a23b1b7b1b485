"""Class folders as a format of data sets: tells classes, splits and other folders apart."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from aftcli.core.classes import Classes
from aftcli.data.folders import folders_in, listed, pictures_of
from aftcli.data.sets import (
    Annotations,
    DataSet,
    Format,
    Listed,
    Marks,
    Sample,
    map_to_model,
    split_kind,
)
from aftcli.errors import AftError
from aftcli.files import inside
from aftcli.formats.splits import find_split

EDGES = ("x1", "y1", "x2", "y2")


class ClassFolders(Format):
    """A folder of class folders, or one of splits of such, as ImageNet's."""

    named_by_folder = True

    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet:
        """Open any folder, or refuse it; see `Format.open`."""
        part = find_split(path, split, classes, default)
        path = path / part.folder
        below = pictures_of(path)
        if not below.found and not below.empty:
            raise AftError(
                f"{path}: is no data set: it has no class folders, no train/ and val/, and no "
                "VOC2012/ImageSets/Segmentation"
            )
        folders = list(below.found)
        labels = map_to_model(folders, classes)
        if labels is None:
            _refuse_strange(path, folders, classes)
        samples = [
            Sample(f"{folder}/{name}", index if labels is None else labels[index])
            for index, folder in enumerate(folders)
            for name in below.found[folder]
        ]
        names = tuple(folders) if labels is None else classes.names
        notes = (*part.notes, *below.skipped)
        return DataSet(
            "folders", path, part.folder, names, labels is not None, samples, notes=notes
        )

    def above(self, root: Path, split: str) -> Path:
        """Return the folder of the splits' folders."""
        return root.parent if split else root

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if there is a folder with a usual name of a split."""
        return root.is_dir() and any(split_kind(name) == split for name in folders_in(root)[0])

    def annotations(self, data_set: DataSet) -> Annotations:
        """Return the boxes of SPLIT_boxes.csv."""
        return _Boxes(data_set)


class _Boxes(Annotations):
    """Boxes of SPLIT_boxes.csv beside the split's folder.

    The csv has the columns `file,x1,y1,x2,y2`: the image below the split's folder, and a box of
    an object of its label in the picture's pixels, both ends included. Columns `width,height` say
    which picture these are pixels of, where EXIF turns it: the stored or the shown one.
    """

    def __init__(self, data_set: DataSet) -> None:
        super().__init__(data_set)
        self.listed = _read_boxes(self.table) if self.table else {}

    @cached_property
    def table(self) -> Path | None:
        root, split = self.data_set.root, self.data_set.split
        if not split:
            return None
        path = inside(root.parent, f"{split}_boxes.csv", self.data_set.named)
        return path if path.is_file() else None

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({"boxes"} if self.listed else ())

    def files(self) -> Iterator[Path]:
        if self.table:
            yield self.table

    def marks(self, index: int, class_index: int) -> Marks | None:
        sample = self.data_set.samples[index]
        boxes = self.listed.get(sample.name, []) if class_index == sample.label else []
        return Marks(boxes, self.table) if boxes and self.table else None


def _read_boxes(path: Path) -> dict[str, list[Listed]]:
    boxes: dict[str, list[Listed]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"file", *EDGES} - set(rows.fieldnames or ())
            if missing:
                raise KeyError(min(missing))
            for row in rows:
                size = (row.get(side) for side in ("width", "height"))
                boxes[row["file"]].append(Listed.read((row[k] for k in EDGES), size, first=0))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise AftError(
            f"{path}: can't be read as boxes ({str(error)[:160]!r}); its columns are "
            "file,x1,y1,x2,y2"
        ) from error
    return boxes


def _refuse_strange(path: Path, folders: list[str], classes: Classes) -> None:
    """Refuse folders of which only some are the model's classes."""
    found = classes.match(folders)
    strange = [name for name, index in zip(folders, found, strict=True) if index is None]
    if strange and len(strange) < len(folders):
        one = len(strange) == 1
        raise AftError(
            f"{path}: {len(strange)} of {len(folders)} class folders "
            f"{'is no class' if one else 'are no classes'} of the model: {listed(strange)}; to "
            f"leave {'it' if one else 'them'} out, move {'it' if one else 'them'} elsewhere or "
            f"put a dot before {'its name' if one else 'their names'}"
        )
