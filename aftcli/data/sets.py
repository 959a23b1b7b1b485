"""Data sets: class folders, the ImageNet layout, Pascal VOC."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from aftcli.core.classifier import Classes
from aftcli.data.folders import find_split, has_split, listed, pictures_of, split_kind
from aftcli.data.images import open_picture
from aftcli.data.text import read_text, read_xml, reason
from aftcli.errors import AftError
from aftcli.files import check_folder, inside

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)

YEAR = re.compile(r"VOC\d{4}", re.IGNORECASE)

MOST_SAID = 20  # images that are left out are named, of more only their number

LONGEST = 200  # bytes of a name in a list of VOC; systems allow 255 with the ending


class Sample(NamedTuple):
    """One image of a data set.

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
        kind: "folders" or "voc".
        root: the folder that names are relative to.
        split: "train", "val", …; "" for a data set without splits.
        classes: names of the labels: the model's where they could be mapped to it, else the
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

    def path(self, index: int) -> Path:
        """The file of an image.

        Raises:
            AftError: it lies outside the data set.
        """
        return self.beside(self.samples[index].name)

    def beside(self, name: str) -> Path:
        """A file below the root.

        Raises:
            AftError: it lies outside the data set.
        """
        return inside(self.root, name, self.named)

    def files(self) -> Iterator[Path]:
        """The files of the images, but for those outside the data set."""
        for sample in self.samples:
            with contextlib.suppress(AftError):
                yield self.beside(sample.name)

    def areas(self, index: int) -> list[float]:
        """Share of the picture that each class covers; only VOC pictures show several."""
        if self.kind == "voc":
            return _voc_areas(self.root, Path(self.samples[index].name).stem, self.named)[0]
        return []

    def limited(self, count: int | None) -> DataSet:
        """Keep `count` images, evenly spread over the classes' order; None keeps all."""
        if count is None or count >= len(self.samples):
            return self
        return replace(self, samples=[self.samples[i] for i in spread(len(self.samples), count)])

    def fingerprint(self) -> str:
        """A hash of the images' names and labels, in their order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(os.fsencode(f"{sample.name}\0{sample.label}\n"))
        return digest.hexdigest()[:16]


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
    voc = _voc_root(path)
    data_set = replace(
        _open_voc(voc, split or default, classes, path)
        if voc
        else _open_folders(path, split, classes, default),
        named=path,
    )
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
    """Open the val split beside a train split.

    Args:
        data_set: opened by `open_data_set`, or made of a mask store.
        classes: the model's.
    """
    if split_kind(data_set.split) != "train":
        return Validation()
    root = data_set.root if data_set.kind == "voc" else data_set.root.parent
    if not _has_split(root, data_set.kind, "val"):
        return Validation()
    try:
        found = open_data_set(root, "val", classes)
    except AftError as error:
        return Validation(reason=str(error))
    if not found.mapped:
        return Validation(reason=not_its_classes(found, classes))
    return Validation(replace(found, named=data_set.named or root))


def _has_split(root: Path, kind: str, split: str) -> bool:
    if kind == "voc":
        return (root / "ImageSets" / "Segmentation" / f"{split}.txt").is_file()
    return root.is_dir() and has_split(root, split)


def not_its_classes(data_set: DataSet, classes: Classes, name: str = "the model") -> str:
    """Say which names of a data set are none of the classes of a model."""
    return (
        f"{data_set.root}: the labels of these images are not among the classes of {name} "
        f"(first: {data_set.classes[0]!r}, the model's first: {classes.name(0)!r})"
    )


def _open_folders(path: Path, split: str | None, classes: Classes, default: str) -> DataSet:
    part = find_split(path, split, classes, default)
    path = path / part.folder
    below = pictures_of(path)
    if not below.found and not below.empty:
        raise AftError(
            f"{path}: is no data set: it has no class folders, no train/ and val/, and no "
            "VOC2012/ImageSets/Segmentation"
        )
    folders = list(below.found)
    labels = _map_to_model(folders, classes)
    if labels is None:
        _refuse_strange(path, folders, classes)
    samples = [
        Sample(f"{folder}/{name}", index if labels is None else labels[index])
        for index, folder in enumerate(folders)
        for name in below.found[folder]
    ]
    names = tuple(folders) if labels is None else classes.names
    notes = (*part.notes, *below.skipped)
    return DataSet("folders", path, part.folder, names, labels is not None, samples, notes=notes)


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


def _map_to_model(names: Sequence[str], classes: Classes) -> list[int] | None:
    """The model's class of each name, or None where not all of them are its classes."""
    found = [index for index in classes.match(names) if index is not None]
    return found if len(found) == len(names) else None


def _voc_root(path: Path) -> Path | None:
    """The folder of Pascal VOC, which is, or lies below, the one that was named; None if none is.

    Raises:
        AftError: there are several, or one without lists of segmentations.
    """
    for below in ("", "VOC2012", "VOCdevkit/VOC2012"):
        if _has_lists(path / below):
            return path / below
    above = [folder for folder in (path, path / "VOCdevkit") if folder.is_dir()]
    years = sorted(p for folder in above for p in folder.iterdir() if YEAR.fullmatch(p.name))
    found = [p for p in [path, *years] if (p / "JPEGImages").is_dir()]
    found = [p for p in found if (p / "Annotations").is_dir() or (p / "ImageSets").is_dir()]
    listed = [p for p in found if _has_lists(p)]
    if len(listed) > 1:
        names = ", ".join(p.name for p in listed)
        raise AftError(f"{path}: holds several data sets of VOC ({names}); name one of them")
    if found and not listed:
        raise AftError(
            f"{found[0]}: is Pascal VOC without ImageSets/Segmentation; put train.txt and val.txt "
            "there, with the name of a picture without its ending on each line"
        )
    return listed[0] if listed else None


def _has_lists(root: Path) -> bool:
    return (root / "ImageSets" / "Segmentation").is_dir()


def _open_voc(root: Path, split: str, classes: Classes, named: Path) -> DataSet:
    lists = root / "ImageSets" / "Segmentation"
    listed = inside(root, f"ImageSets/Segmentation/{split}.txt", named)
    if not listed.is_file():
        known = ", ".join(sorted(p.stem for p in lists.glob("*.txt")))
        raise AftError(f"{root}: has no segmentation list {split!r}; there are {known}")
    labels = _map_to_model(list(VOC_CLASSES), classes)
    samples: list[Sample] = []
    left_out: dict[str, str] = {}
    mixed: list[str] = []
    try:
        stems = sorted(read_text(listed).split())
    except (OSError, ValueError) as error:
        raise AftError(f"{listed}: can't be read as a list ({reason(error)})") from error
    for stem in dict.fromkeys(stems):
        if Path(stem).name != stem or len(os.fsencode(stem)) > LONGEST or "\0" in stem:
            raise AftError(f"{listed}: {stem[:80]!r} is not the name of a picture")
        name = f"JPEGImages/{stem}.jpg"
        try:
            areas, others = _voc_areas(root, stem, named)
            own = _largest(areas, others, stem)
        except AftError as error:
            left_out[name] = str(error).removeprefix(f"{root}: ")
        else:
            samples.append(Sample(name, labels[own] if labels else own))
            mixed += [f"{_listed(others)} in {stem}"] if others else []
    if left_out and not samples:
        first = next(iter(left_out.values()))
        raise AftError(f"{listed}: lists no picture that can be used; {first}")
    names = classes.names if labels else VOC_CLASSES
    twice = len(stems) - len(samples) - len(left_out)
    notes = tuple(_voc_notes(listed, twice, mixed, left_out))
    return DataSet("voc", root, split, names, labels is not None, samples, notes=notes)


def _voc_notes(
    listed: Path, twice: int, mixed: Sequence[str], left_out: Mapping[str, str]
) -> Iterator[str]:
    if twice:
        yield f"{listed}: {twice} lines repeat a picture; each picture counts once"
    if mixed:
        yield (
            f"{listed}: {len(mixed)} pictures also show classes that are none of VOC's 20 (first: "
            f"{mixed[0]}), which count for nothing"
        )
    for name, why in list(left_out.items())[:MOST_SAID]:
        yield f"left out {name}: {why}"
    if len(left_out) > MOST_SAID:
        yield f"left out {len(left_out) - MOST_SAID} more"


def _largest(areas: list[float], others: set[str], stem: str) -> int:
    """The class of VOC that covers most of a picture.

    Raises:
        AftError: none covers any of it.
    """
    if not any(areas):
        shown = f", only {_listed(others)}; give it one of them, or make class folders"
        raise AftError(f"{stem} shows none of VOC's 20 classes{shown if others else ''}")
    return max(range(len(areas)), key=areas.__getitem__)


def _listed(names: set[str]) -> str:
    return shorten(", ".join(sorted(names)), 80, placeholder=" ...")


def _voc_areas(root: Path, stem: str, named: Path | None) -> tuple[list[float], set[str]]:
    """Share of the picture that each of the 20 classes covers, by segmentation, else by boxes.

    Also the names of other classes that it shows.
    """
    segmentation = inside(root, f"SegmentationClass/{stem}.png", named)
    annotation = inside(root, f"Annotations/{stem}.xml", named)
    try:
        if segmentation.is_file():
            with open_picture(segmentation) as image:
                counts = image_labels(image, segmentation).histogram()
            others = {f"class {i}" for i, count in enumerate(counts[21:255], 21) if count}
            return [count / sum(counts) for count in counts[1:21]], others
        return _box_areas(read_xml(annotation))
    except (OSError, ValueError) as error:
        raise AftError(
            f"{root}: {stem} has neither a readable segmentation nor readable boxes "
            f"({reason(error)})"
        ) from error


def voc_class(name: str) -> int | None:
    """The place of a class in VOC_CLASSES; None of another one.

    >>> voc_class("Dining table")
    10
    """
    plain = re.sub(r"[\s_-]", "", name).lower()
    return VOC_CLASSES.index(plain) if plain in VOC_CLASSES else None


def image_labels(segmentation: Image.Image, path: Path) -> Image.Image:
    """A segmentation of VOC, whose pixels are classes.

    Raises:
        AftError: its pixels are colours or larger numbers.
    """
    if segmentation.mode not in ("L", "P"):
        raise AftError(
            f"{path}: a segmentation has a class a pixel, this is {segmentation.mode}; save it "
            "with a palette"
        )
    return segmentation


def _box_areas(root: ElementTree.Element) -> tuple[list[float], set[str]]:
    def number(node: ElementTree.Element, name: str) -> float:
        value = float(node.findtext(name, ""))
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
        return value

    areas, others = [0.0] * len(VOC_CLASSES), set()
    size = root.find("size")
    whole = number(size, "width") * number(size, "height") if size is not None else 0
    for item in root.iter("object"):
        name, box = item.findtext("name", ""), item.find("bndbox")
        place = voc_class(name)
        if place is None:
            others.add(repr(name))
        elif box is not None:
            wide = number(box, "xmax") - number(box, "xmin")
            high = number(box, "ymax") - number(box, "ymin")
            if min(wide, high) < 0:
                raise ValueError(f"a box of {name} ends before it begins")
            areas[place] += wide * high / max(whole, 1)
    return areas, others
