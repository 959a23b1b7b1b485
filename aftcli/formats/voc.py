"""Pascal VOC as a format of data sets: lists of pictures, boxes and segmentations."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from xml.etree import ElementTree
from xml.parsers import expat

from aftcli.core.classes import Classes
from aftcli.data.images import image_labels, open_picture
from aftcli.data.picture import Listed, Marks
from aftcli.data.sets import Annotations, DataSet, Format, Sample
from aftcli.errors import AftError, reason
from aftcli.files import inside, read_bounded, read_text
from aftcli.formats.listed import map_to_model

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)

YEAR = re.compile(r"VOC\d{4}", re.IGNORECASE)

MOST_SAID = 20  # images that are left out are named, of more only their number

LONGEST = 200  # bytes of a name in a list of VOC; systems allow 255 with the ending

VOID = 255  # the borders of objects in a segmentation

LISTS = "ImageSets/Segmentation"


class Voc(Format):
    """Pascal VOC: the format of a VOCdevkit."""

    paper = "VOC"

    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet | None:
        """Open the data set at or below a folder; see `Format.open`."""
        root = _root_of(path)
        return _open(root, split or default, classes, path, every=False) if root else None

    def open_every(
        self, path: Path, split: str | None, classes: Classes, default: str
    ) -> DataSet | None:
        """Open it with a sample for each picture and class; see `Format.open_every`."""
        root = _root_of(path)
        return _open(root, split or default, classes, path, every=True) if root else None

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if there is a list of this name."""
        return (root / LISTS / f"{split}.txt").is_file()

    def areas(self, data_set: DataSet, index: int) -> list[float]:
        """Return the share of a picture that each of the 20 classes covers."""
        stem = Path(data_set.samples[index].name).stem
        return _areas(data_set.root, stem, data_set.named)[0]

    def annotations(self, data_set: DataSet) -> Annotations:
        """Return what is known of the objects, by XML files and segmentations."""
        return _VocAnnotations(data_set)


class _VocAnnotations(Annotations):
    """Boxes and segmentations of each picture."""

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({"boxes", "segmentation"})

    def files(self) -> Iterator[Path]:
        for i in range(len(self.data_set.samples)):
            yield from (p for p in self._files(i) if p.is_file())

    def _files(self, index: int) -> tuple[Path, Path]:
        beside, stem = self.data_set.beside, Path(self.data_set.samples[index].name).stem
        return beside(f"Annotations/{stem}.xml"), beside(f"SegmentationClass/{stem}.png")

    def marks(self, index: int, class_index: int) -> Marks | None:
        names = self.data_set.classes
        wanted = voc_class(names[class_index].split(",")[0]) if class_index < len(names) else None
        if wanted is None:
            return None
        annotation, segmentation = self._files(index)
        boxes = list(_boxes(read_xml(annotation), wanted)) if annotation.is_file() else []
        seen = segmentation if segmentation.is_file() else None
        return Marks(boxes, annotation, seen, 1 + wanted, VOID)


def _boxes(root: ElementTree.Element, wanted: int) -> Iterator[Listed]:
    size = [root.findtext(f"size/{side}") for side in ("width", "height")]
    for item in root.iter("object"):
        box = item.find("bndbox")
        if voc_class(item.findtext("name", "")) == wanted and box is not None:
            edges = (box.findtext(k, "") for k in ("xmin", "ymin", "xmax", "ymax"))
            yield Listed.read(edges, size, first=1)


def _root_of(path: Path) -> Path | None:
    """Find the folder of Pascal VOC at or below the named one; None where there is none."""
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
    return (root / LISTS).is_dir()


def _open(root: Path, split: str, classes: Classes, named: Path, every: bool) -> DataSet:
    lists = root / LISTS
    listed = inside(root, f"{LISTS}/{split}.txt", named)
    if not listed.is_file():
        known = ", ".join(sorted(p.stem for p in lists.glob("*.txt")))
        raise AftError(f"{root}: has no segmentation list {split!r}; there are {known}")
    labels = map_to_model(list(VOC_CLASSES), classes)
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
            areas, others = _areas(root, stem, named)
            own = _largest(areas, others, stem)
        except AftError as error:
            left_out[name] = str(error).removeprefix(f"{root}: ")
        else:
            present = [c for c, area in enumerate(areas) if area] if every else [own]
            samples += [Sample(name, labels[c] if labels else c) for c in present]
            mixed += [f"{_listed(others)} in {stem}"] if others else []
    if left_out and not samples:
        first = next(iter(left_out.values()))
        raise AftError(f"{listed}: lists no picture that can be used; {first}")
    names = classes.names if labels else VOC_CLASSES
    twice = len(stems) - len({sample.name for sample in samples}) - len(left_out)
    notes = tuple(_notes(listed, twice, mixed, left_out))
    of = ("voc", root, split, names, labels is not None, samples)
    return DataSet(*of, notes=notes, every=every)


def _notes(
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
    """Find the class that covers most of a picture."""
    if not any(areas):
        shown = f", only {_listed(others)}; give it one of them, or make class folders"
        raise AftError(f"{stem} shows none of VOC's 20 classes{shown if others else ''}")
    return max(range(len(areas)), key=areas.__getitem__)


def _listed(names: set[str]) -> str:
    return shorten(", ".join(sorted(names)), 80, placeholder=" ...")


def _areas(root: Path, stem: str, named: Path | None) -> tuple[list[float], set[str]]:
    """Measure the share of a picture that each of the 20 classes covers, and name other classes.

    By the segmentation, otherwise by boxes.
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
    """Find the place of a class in VOC_CLASSES; None for another class.

    >>> voc_class("Dining table")
    10
    """
    plain = re.sub(r"[\s_-]", "", name).lower()
    return VOC_CLASSES.index(plain) if plain in VOC_CLASSES else None


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


def read_xml(path: Path) -> ElementTree.Element:
    """Read an XML file that declares no entities: some expand to more than any memory holds.

    Raises:
        OSError: it can't be read.
        ValueError: it is no regular file, larger than LARGEST_TEXT, not XML, or has a DOCTYPE.
    """

    def refuse(*_: object) -> None:
        raise ValueError("it has a DOCTYPE, which annotations do without")

    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(read_bounded(path), True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"it is not XML: {error}") from error
    return builder.close()
