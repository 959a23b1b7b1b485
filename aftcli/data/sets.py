"""Data sets: labelled images of one of the FORMATS, each of which is one file."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, cast

from aftcli.core.classes import Classes
from aftcli.data.images import Box, Size
from aftcli.errors import AftError
from aftcli.files import check_folder, inside

# Where each Format is, by the name that files keep it under. The last is tried first; class
# folders take what is left.
FORMATS = {
    "folders": "aftcli.formats.folders:ClassFolders",
    "voc": "aftcli.formats.voc:Voc",
}

# Usual names of splits, whatever the case; the first is what `--split` and defaults are named by.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


class Sample(NamedTuple):
    """An image of a data set.

    Attributes:
        name: path below the data set's root, with forward slashes.
        label: index into the data set's classes.
    """

    name: str
    label: int


@dataclass(frozen=True)
class DataSet:
    """Labelled images in a fixed order.

    Attributes:
        kind: the name of its format, a key of FORMATS.
        root: the folder that names are relative to.
        split: "train", "val", …; "" for a data set without splits.
        classes: names of the labels: the model's where they could be mapped to it, otherwise the
            data set's own.
        mapped: the labels are the model's classes.
        samples: the images.
        named: the folder that the user named, which nothing leads out of; None is the root.
        notes: what was skipped or guessed when it was opened, for its user to know.
    """

    kind: str
    root: Path
    split: str
    classes: tuple[str, ...]
    mapped: bool
    samples: Sequence[Sample]
    named: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def format(self) -> Format:
        """The format that it has."""
        return format_of(self.kind)

    def path(self, index: int) -> Path:
        """Return the file of an image.

        Raises:
            AftError: it lies outside the data set.
        """
        return self.beside(self.samples[index].name)

    def beside(self, name: str) -> Path:
        """Return a file below the root.

        Raises:
            AftError: it lies outside the data set.
        """
        return inside(self.root, name, self.named)

    def files(self) -> Iterator[Path]:
        """Return the files of the images, but for those outside the data set."""
        for sample in self.samples:
            with contextlib.suppress(AftError):
                yield self.beside(sample.name)

    def areas(self, index: int) -> list[float]:
        """Return the share of a picture that each class covers, where its format says so."""
        return self.format.areas(self, index)

    def limited(self, count: int | None) -> DataSet:
        """Keep `count` images, evenly spread over the classes' order; None keeps all."""
        if count is None or count >= len(self.samples):
            return self
        return replace(self, samples=[self.samples[i] for i in spread(len(self.samples), count)])

    def fingerprint(self) -> str:
        """Hash the images' names and labels, in their order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(os.fsencode(f"{sample.name}\0{sample.label}\n"))
        return digest.hexdigest()[:16]


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
        segmentation: a picture whose pixels are labels; None where there is none.
        label: the label of the class's pixels.
        void: the label of pixels that do not count; None where all count.
    """

    boxes: list[Listed]
    boxes_file: Path
    segmentation: Path | None = None
    label: int = 1
    void: int | None = None


class Annotations:
    """The objects of a data set, as its files have them: none, unless a format says more.

    Args:
        data_set: the images.
    """

    def __init__(self, data_set: DataSet) -> None:
        self.data_set = data_set

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that are known: "boxes", "segmentation", both or neither."""
        return frozenset()

    def files(self) -> Iterator[Path]:
        """Return the files that say where the objects are."""
        return iter(())

    def marks(self, index: int, class_index: int) -> Marks | None:
        """Find the objects of a class in a picture; None where nothing is known of them.

        Args:
            index: of the image.
            class_index: c, a class of the data set.

        Raises:
            OSError: a file can't be read.
            ValueError: a file is damaged.
        """
        return None


class Format(ABC):
    """A format of data sets.

    To add one, put a subclass into a file and a line into FORMATS. Only `open` must be written;
    the other methods suit a data set without splits, areas and objects.

    Attributes:
        paper: the paper's data set whose published numbers stand beside those of this format.
        named_by_folder: names of samples begin with the folder of their class.
    """

    paper = "ImageNet"
    named_by_folder = False

    @abstractmethod
    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet | None:
        """Open the data set at a folder; None where it has another format.

        Arguments are those of `open_data_set`.

        Raises:
            AftError: the data set has this format, but can't be used.
        """

    def above(self, root: Path, split: str) -> Path:
        """Return the folder that the splits of a data set lie in.

        Args:
            root: of the data set.
            split: that it is, or that is wanted; "" for a data set without splits.
        """
        return root

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if a split is there; `split` is a key of SPLITS, `root` the folder above it."""
        return False

    def areas(self, data_set: DataSet, index: int) -> list[float]:
        """Return the share of a picture that each class covers; none where nothing says so."""
        return []

    def annotations(self, data_set: DataSet) -> Annotations:
        """Return what the data set's files say of its objects."""
        return Annotations(data_set)


def format_of(kind: str) -> Format:
    """Load a format by its name, a key of FORMATS."""
    if kind not in FORMATS:
        raise AftError(f"unknown format of data sets {kind!r}; there are {', '.join(FORMATS)}")
    module, _, name = FORMATS[kind].partition(":")
    return cast("Format", getattr(import_module(module), name)())


def spread(total: int, count: int | None) -> list[int]:
    """Pick `count` of `total` places, evenly spread; None, or too many, picks all.

    >>> spread(10, 3)
    [0, 3, 6]
    """
    count = min(total if count is None else count, total)
    return [i * total // count for i in range(count)]


def open_data_set(
    path: Path, split: str | None, classes: Classes, default: str = "train"
) -> DataSet:
    """Find the images and labels of a data set.

    Args:
        path: a folder of class folders (those named by wnid are mapped to the model's classes by
            wnid); one with `train/` and `val/` of such, or other usual names of splits; or a
            VOCdevkit, or a folder above or below it.
        split: which part; default `default`, where there are parts.
        classes: the model's.
        default: the part that is taken where none is asked for.

    Raises:
        AftError: there is no such folder, no data set or split in it, or no image; or only
            some of its class folders are the model's.
    """
    check_folder(path)
    tried = (format_of(kind).open(path, split, classes, default) for kind in reversed(FORMATS))
    data_set = replace(next(filter(None, tried)), named=path)
    if not data_set.samples:
        raise AftError(f"{data_set.root}: there is no image in its class folders")
    return data_set


class Validation(NamedTuple):
    """The val split beside a train split.

    Attributes:
        data_set: its images; None where there is no such split, or it can't be used.
        reason: why it can't be used; "" where it can, or there is none.
    """

    data_set: DataSet | None = None
    reason: str = ""


def validation_of(data_set: DataSet, classes: Classes) -> Validation:
    """Open the val split beside a train split."""
    root = data_set.format.above(data_set.root, data_set.split)
    if split_kind(data_set.split) != "train" or not data_set.format.has_split(root, "val"):
        return Validation()
    try:
        found = open_data_set(root, "val", classes)
    except AftError as error:
        return Validation(reason=str(error))
    if not found.mapped:
        return Validation(reason=not_its_classes(found, classes))
    return Validation(replace(found, named=data_set.named or root))


def split_kind(name: str) -> str:
    """Name the kind of a split: a key of SPLITS, "" for another name.

    >>> split_kind("Validation")
    'val'
    """
    return next((kind for kind, names in SPLITS.items() if name.lower() in names), "")


def not_its_classes(data_set: DataSet, classes: Classes, name: str = "the model") -> str:
    """Say which names of a data set are none of the classes of a model."""
    return (
        f"{data_set.root}: the labels of these images are not among the classes of {name} "
        f"(first: {data_set.classes[0]!r}, the model's first: {classes.name(0)!r})"
    )


def refuse_one_class(data_set: DataSet) -> None:
    """Refuse a data set of one class that is none of the model's.

    Raises:
        AftError: it is.
    """
    if not data_set.mapped and len(data_set.classes) == 1:
        raise AftError(
            f"{data_set.root}: has one class folder, {data_set.classes[0]}, and one class alone "
            "can't be trained or evaluated; put the folders of other classes beside it"
        )


def map_to_model(names: Sequence[str], classes: Classes) -> list[int] | None:
    """Find the model's class of each name; None where not all of them are its classes."""
    found = [index for index in classes.match(names) if index is not None]
    return found if len(found) == len(names) else None


def data_name(root: Path, kind: str, split: str) -> str:
    """Name a data set after its folder.

    >>> data_name(Path("/data/imagenet/val"), "folders", "val")
    'imagenet'
    """
    return format_of(kind).above(root, split).name or str(root)
