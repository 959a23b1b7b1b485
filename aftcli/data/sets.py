"""Data sets: labelled images of one of the FORMATS, each of which is one file."""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

from aftcli.core.classes import Classes
from aftcli.data.names import FORMATS, check_data_set, check_format
from aftcli.data.parts import (
    AS_FOUND,
    Held,
    Reading,
    held_names,
    held_note,
    split_kind,
    spread,
)
from aftcli.data.picture import FilePicture, Marks, Picture
from aftcli.errors import AftError, reason
from aftcli.files import inside


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
        root: the folder that names are relative to, or the file that lists the images.
        split: "train", "val", …; "" for a data set without splits.
        classes: names of the labels: the model's where they could be mapped to it, otherwise the
            data set's own.
        mapped: the labels are the model's classes.
        samples: the images.
        named: the folder that the user named, which nothing leads out of; None is the root.
        notes: what was skipped or guessed when it was opened, for its user to know.
        class_of: the class of each label, where a file lists labels.
        every: there is a sample for each image and class that it shows.
        files: names of its files below the root, where the user named some that say no split.
        held: what is held out of a data set without a val split; None where nothing is.
        held_out: names of the images that are held out.
    """

    kind: str
    root: Path
    split: str
    classes: tuple[str, ...]
    mapped: bool
    samples: Sequence[Sample]
    named: Path | None = None
    notes: tuple[str, ...] = ()
    class_of: Mapping[str, int] = field(default_factory=dict)
    every: bool = False
    files: tuple[str, ...] = ()
    held: Held | None = None
    held_out: frozenset[str] = frozenset()

    @property
    def part(self) -> str:
        """The split, or the part that is held out of a data set without one, or the others."""
        return self.held.part if self.held else self.split

    @property
    def record(self) -> dict[str, Any]:
        """Plain values that a store or checkpoint records of how it was read."""
        held = {"held": self.held._asdict()} if self.held else {}
        files = {"files": [*self.files]} if self.files else {}
        return {"split": self.split, **held, **files, **({"every": True} if self.every else {})}

    @property
    def format(self) -> Format:
        """The format that it has."""
        return format_of(self.kind)

    def picture(self, index: int) -> Picture:
        """Return an image, unopened.

        Raises:
            AftError: it lies outside the data set.
        """
        return self.format.picture(self, self.samples[index].name)

    def beside(self, name: str) -> Path:
        """Return a file below the root.

        Raises:
            AftError: it lies outside the data set.
        """
        return inside(self.root, name, self.named)

    def pictures(self) -> Iterator[Picture]:
        """Return the images, but for those outside the data set."""
        form = self.format
        for sample in self.samples:
            with contextlib.suppress(AftError):
                yield form.picture(self, sample.name)

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

    def suits(self, path: Path) -> bool:
        """Tell if a data set is taken as of this format where nobody says of which it is."""
        return True

    def open_every(
        self, path: Path, split: str | None, classes: Classes, default: str
    ) -> DataSet | None:
        """Open it with a sample for each image and class; `open` does where each shows one."""
        return self.open(path, split, classes, default)

    def picture(self, data_set: DataSet, name: str) -> Picture:
        """Return the picture of a name: by default the file below the root.

        Args:
            data_set: of this format.
            name: of a sample, also of one that a mask store names.

        Raises:
            AftError: it lies outside the data set, or there is none.
        """
        return FilePicture(data_set.beside(name))

    def is_there(self, root: Path) -> bool:
        """Tell if a data set, of which a file kept the root, is still there."""
        return root.is_dir()

    def above(self, root: Path, split: str) -> Path:
        """Return the folder that the splits of a data set lie in.

        Args:
            root: of the data set.
            split: that it is, or that is wanted; "" for a data set without splits.
        """
        return root

    def name(self, root: Path, split: str) -> str:
        """Name a data set in tables; arguments as for `above`."""
        return self.above(root, split).name or str(root)

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
    check_format(kind)
    module, _, name = FORMATS[kind].partition(":")
    return cast("Format", getattr(import_module(module), name)())


def open_data_set(
    path: str | Path,
    split: str | None,
    classes: Classes,
    default: str = "train",
    reading: Reading = AS_FOUND,
) -> DataSet:
    """Find the images and labels of a data set.

    Args:
        path: a folder of class folders (those named by wnid are mapped to the model's classes by
            wnid); one with `train/` and `val/` of such, or other usual names of splits; a
            VOCdevkit, or a folder above or below it; or another of the FORMATS.
        split: which part; default `default`, where there are parts.
        classes: the model's.
        default: the part that is taken where none is asked for.
        reading: choices, such as its format where that is not to be guessed.

    Raises:
        AftError: there is no such folder, no data set or split in it, or no image; or only
            some of its class folders are the model's.
    """
    path = reading.place(Path(path))
    if reading.kind is None or not format_of(reading.kind).is_there(path):
        check_data_set(path)
    if reading.held is None:
        return _open(path, split, classes, default, reading)
    kind = split_kind(split or default)
    try:
        found = _open(path, split, classes, default, reading)
    except AftError:
        # The val split that is not there may be the part that is held out of train.
        whole = _without_val(path, classes, reading) if kind in ("train", "val") else None
        if whole is None:
            raise
        found = whole
    return _part_of(found, reading.held._replace(part=kind or "train"), reading.trained)


def _open(
    path: Path, split: str | None, classes: Classes, default: str, reading: Reading
) -> DataSet:
    forms = map(format_of, [reading.kind] if reading.kind else reversed(FORMATS))
    opening = (
        form.open_every if reading.every else form.open
        for form in forms
        if reading.kind or form.suits(path)
    )
    tried = (open_(path, split, classes, default) for open_ in opening)
    try:
        found = next(filter(None, tried), None)
    except OSError as error:
        where = error.filename or path
        raise AftError(f"{where}: can't be read ({reason(error)}); make it readable") from error
    if found is None:
        what = f"no data set of the format {reading.kind}" if reading.kind else "no data set"
        raise AftError(f"{path}: is {what}; --data-format takes {', '.join(FORMATS)}")
    data_set = replace(found, named=path if path.is_dir() else found.root)
    if not data_set.samples:
        raise AftError(f"{data_set.root}: there is no image of a class in it")
    return data_set


def _without_val(path: Path, classes: Classes, reading: Reading) -> DataSet | None:
    """Open the whole of a data set without splits, or its train split; None where val is there."""
    try:
        found = _open(path, None, classes, "train", reading)
    except AftError:
        return None
    return found if _lacks_val(found) else None


def _lacks_val(data_set: DataSet) -> bool:
    """Tell if a data set is all there is, or a train split without a val split beside it."""
    form, root = data_set.format, data_set.root
    if data_set.split:
        above = form.above(root, data_set.split)
        return split_kind(data_set.split) == "train" and not form.has_split(above, "val")
    kind = split_kind(root.stem)
    return not kind or (kind == "train" and not form.has_split(root.parent, "val"))


def _part_of(data_set: DataSet, held: Held, trained: frozenset[str]) -> DataSet:
    """Take a part of a data set without a val split; one with a val split stays as it is."""
    out = held_names(data_set.samples, held, trained) if _lacks_val(data_set) else frozenset()
    if not out:
        return data_set
    samples = [s for s in data_set.samples if (s.name in out) == (held.part == "val")]
    named = [sample.name for sample in data_set.samples]
    notes = (*data_set.notes, held_note(data_set.root, out, named, held, trained))
    return replace(data_set, samples=samples, notes=notes, held=held, held_out=out)


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
    there = bool(data_set.held) or data_set.format.has_split(root, "val")
    if split_kind(data_set.part) != "train" or not there:
        return Validation()
    try:
        same = Reading(data_set.kind, data_set.every, data_set.held, files=data_set.files)
        found = open_data_set(root, "val", classes, reading=same)
    except AftError as error:
        return Validation(reason=str(error))
    if not found.mapped:
        return Validation(reason=not_its_classes(found, classes))
    return Validation(replace(found, named=data_set.named or found.named))


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


def data_name(root: Path, kind: str, split: str) -> str:
    """Name a data set after its folder.

    >>> data_name(Path("/data/imagenet/val"), "folders", "val")
    'imagenet'
    """
    return format_of(kind).name(root, split)
