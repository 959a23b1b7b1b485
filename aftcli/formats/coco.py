"""COCO as a format of data sets: instances of a JSON file, their boxes and segmentations."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aftcli.core.classes import Classes
from aftcli.data.images import LARGEST
from aftcli.data.objects import from_rle, polygon_mask
from aftcli.data.parts import split_kind
from aftcli.data.picture import FilePicture, Listed, Marks, Picture
from aftcli.data.sets import Annotations, DataSet
from aftcli.errors import AftError, listed, reason
from aftcli.files import inside
from aftcli.formats.listed import (
    Entry,
    Labels,
    ListFormat,
    below,
    choose_labels,
    missing_note,
    samples_of,
    there,
)

INSTANCES = "instances_"

KEYS = ("images", "annotations", "categories")

OBJECT, VOID = 1, 255  # of a segmentation


class Object(NamedTuple):
    """An object of a picture, as the file has it.

    Attributes:
        where: its place in the file.
        label: the name of its category.
        area: that it covers, pixels.
        box: left, top, width, height, pixels; None where none is said.
        outline: polygons or a run-length encoding; None where none is said.
        crowd: a group whose objects are not told apart, which counts for nothing.
    """

    where: str
    label: str
    area: float
    box: tuple[float, ...] | None
    outline: Any
    crowd: bool


class Seen(NamedTuple):
    """A picture of the file: its place in it, name, width and height, and objects."""

    where: str
    name: str
    size: tuple[int, int]
    objects: list[Object]


class Instances(NamedTuple):
    """The content of a file: names of the categories, and the pictures by their names."""

    categories: tuple[str, ...]
    pictures: dict[str, Seen]


class Coco(ListFormat):
    """A JSON file of COCO's instances, or a folder with `annotations/instances_SPLIT.json`."""

    def opened(
        self, path: Path, split: str | None, classes: Classes, default: str, every: bool
    ) -> DataSet | None:
        """Open a JSON file, or a folder that has such files; see `ListFormat.opened`."""
        return _open(path, split, classes, default, every)

    def picture(self, data_set: DataSet, name: str) -> Picture:
        """Return a picture below the folder of the annotations; see `Format.picture`."""
        return FilePicture(inside(_folder(data_set.root), name))

    def name(self, root: Path, split: str) -> str:
        """Name a data set after its folder."""
        return _folder(root).name or str(root)

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if a file of this split is there."""
        return any(_kind(file) == split for file in _files(root))

    def annotations(self, data_set: DataSet) -> Annotations:
        """Return the boxes and segmentations of its objects."""
        return _Objects(data_set)


class _Objects(Annotations):
    """Boxes and segmentations of each picture's objects."""

    def __init__(self, data_set: DataSet) -> None:
        super().__init__(data_set)
        self.pictures = _placed(data_set.root)
        found = [each for seen in self.pictures.values() for each in seen.objects]
        known = {"boxes": any(o.box for o in found), "segmentation": any(o.outline for o in found)}
        self._kinds = frozenset(kind for kind, there in known.items() if there)

    @property
    def kinds(self) -> frozenset[str]:
        return self._kinds

    def files(self) -> Iterator[Path]:
        yield self.data_set.root

    def marks(self, index: int, class_index: int) -> Marks | None:
        seen = self.pictures[self.data_set.samples[index].name]
        class_of = self.data_set.class_of
        own = [o for o in seen.objects if class_of.get(o.label) == class_index]
        alone = [o for o in own if not o.crowd]
        if not alone:
            return None
        boxes = [_listed(o.box, seen.size) for o in alone if o.box]
        return Marks(boxes, self.data_set.root, _segmentation(own, seen.size), OBJECT, VOID)


def _listed(box: Sequence[float], size: tuple[int, int]) -> Listed:
    x, y, w, h = box
    return Listed((x, y, x + w, y + h), size)


def _segmentation(objects: Sequence[Object], size: tuple[int, int]) -> Image.Image | None:
    """Draw the objects of a class; None where one has no outline."""
    if any(o.outline is None for o in objects if not o.crowd):
        return None
    labels = np.zeros(size[::-1], np.uint8)
    # Crowds first: an object in front of one counts.
    for each in sorted(objects, key=lambda o: not o.crowd):
        try:
            labels[_mask(each.outline, size)] = VOID if each.crowd else OBJECT
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{each.where}: its segmentation is damaged: {error}") from error
    return Image.fromarray(labels)


def _mask(outline: Any, size: tuple[int, int]) -> np.ndarray:  # noqa: ANN401 - JSON
    """Return the pixels of polygons or of a run-length encoding, shape (height, width), bool."""
    if isinstance(outline, Mapping):
        mask = from_rle(outline)
        if mask.shape != size[::-1]:
            raise ValueError(f"it is of {mask.shape[1]} x {mask.shape[0]} pixels")
        return mask
    mask = np.zeros(size[::-1], bool)
    for polygon in outline or []:
        corners = np.array(polygon, float).reshape(-1, 2)
        if not np.isfinite(corners).all():
            raise ValueError("it has corners that are not finite")
        mask |= polygon_mask(corners, size)
    return mask


def _open(
    path: Path, split: str | None, classes: Classes, default: str, every: bool
) -> DataSet | None:
    files = _files(path)
    if not files:
        return None
    file = _choose(path, files, split, default)
    labels = _labels(file, read_instances(file).categories, classes)
    pictures = _placed(file)
    entries = [
        Entry(o.where, name, o.label, o.area)
        for name, seen in pictures.items()
        for o in seen.objects
        if not o.crowd and o.label in labels.class_of
    ]
    found, missing = there(_folder(file), entries)

    def refuse(entry: Entry, why: str) -> AftError:
        return AftError(f"{file}: {entry.where}: {why}")

    chosen = choose_labels(found, every, refuse)
    plain = len(pictures) - len({entry.name for entry in entries})
    notes = [*labels.notes, *([missing_note(file, missing)] if missing else [])]
    if plain:
        notes.append(f"{file}: skipped {plain} pictures without an object of a class")
    return DataSet(
        "coco",
        file,
        _kind(file) or _split(file),
        labels.names,
        labels.mapped,
        samples_of(chosen, labels),
        notes=tuple(notes),
        class_of=labels.class_of,
        every=every,
    )


def _files(path: Path) -> list[Path]:
    """Find the instances of a folder; a JSON file is found by itself, or with other splits."""
    if path.is_file():
        if path.suffix.lower() != ".json":
            return []
        beside = path.parent.glob(f"{INSTANCES}*.json") if path.name.startswith(INSTANCES) else []
        return [path, *sorted(other for other in beside if other.name != path.name)]
    found = [f for sub in ("annotations", ".") for f in (path / sub).glob(f"{INSTANCES}*.json")]
    return sorted(found)


def _split(file: Path) -> str:
    """Return the split of a file: train2017 of instances_train2017.json; "" of other names."""
    return file.stem.removeprefix(INSTANCES) if file.stem.startswith(INSTANCES) else ""


def _kind(file: Path) -> str:
    return split_kind(re.sub(r"[\W_\d]+$", "", _split(file)))


def _choose(path: Path, files: Sequence[Path], split: str | None, default: str) -> Path:
    if path.is_file() and split in (None, _split(path), _kind(path) or None):
        return path
    wanted = split or default
    same = [f for f in files if _split(f) == wanted] or [f for f in files if _kind(f) == wanted]
    if len(same) == 1:
        return same[0]
    what = f"has several files of the split {wanted!r}" if same else f"has no split {wanted!r}"
    raise AftError(
        f"{path}: {what}; there are {', '.join(f.name for f in same or files)}; name one of them"
    )


def _labels(file: Path, categories: Sequence[str], classes: Classes) -> Labels:
    """Map categories to the model's classes by name; others of them count for nothing."""
    names = sorted(categories)
    found = dict(zip(names, classes.match(names), strict=True))
    known = {name: index for name, index in found.items() if index is not None}
    if not known:
        return Labels(tuple(names), {name: i for i, name in enumerate(names)}, False)
    others = [name for name in names if name not in known]
    notes = (
        (
            f"{file}: {len(others)} of {len(names)} categories are not classes of the model and "
            f"count for nothing: {listed(others)}",
        )
        if others
        else ()
    )
    return Labels(classes.names, known, True, notes)


def _folder(file: Path) -> Path:
    """Return the folder that names of pictures are relative to."""
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _placed(file: Path) -> dict[str, Seen]:
    """Read the pictures of a file by their paths below its folder, by the first that is there."""
    split, folder, found = _split(file), _folder(file), read_instances(file).pictures
    places = [f"{split}/", f"images/{split}/", "images/", ""] if split else ["", "images/"]
    for seen in found.values():
        for place in places:
            if os.path.lexists(folder / place / seen.name):
                return {f"{place}{name}": each for name, each in found.items()}
    shown = ", ".join(str(folder / place) for place in places)
    if not found:
        raise AftError(f"{file}: lists no picture")
    raise AftError(f"{file}: none of its pictures is in {shown}; put them there")


def read_instances(file: Path) -> Instances:
    """Read a file of instances; the last ones stay in memory.

    Raises:
        AftError: it is not one, or damaged; the message names the entry.
    """
    try:
        stat = file.stat()
        return _read(file, stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AftError(f"{file}: can't be read as COCO's instances ({reason(error)})") from error


@lru_cache(maxsize=2)
def _read(file: Path, size: int, changed: int) -> Instances:
    """Read a file of this size and time of the last change."""
    with file.open(encoding="utf-8-sig") as text:
        content = json.load(text)
    lists: list[Any] = [content.get(key) for key in KEYS] if isinstance(content, dict) else []
    if not lists or not all(isinstance(each, list) for each in lists):
        raise ValueError(f"it has no lists {', '.join(KEYS)}")
    images, annotations, categories = lists
    names = {
        number: _text(each, "name", where)
        for number, (where, each) in _by_id(categories, "categories").items()
    }
    by_image: dict[Any, list[Object]] = defaultdict(list)
    known = _by_id(images, "images", "width", "height")
    for where, each in _entries(annotations, "annotations", "category_id", "image_id"):
        if each["category_id"] not in names or each["image_id"] not in known:
            raise ValueError(f"{where} is of a category or image that is not listed")
        by_image[each["image_id"]].append(_object(where, each, names))
    pictures: dict[str, Seen] = {}
    for where, each in known.values():
        try:
            name = below(_folder(file), _text(each, "file_name", where))
            shape = int(each["width"]), int(each["height"])
        except (AftError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {error}") from error
        if name in pictures:
            first = pictures[name].where
            raise ValueError(f"{where} has the file_name {name!r}, as another has ({first})")
        if min(shape) < 1 or math.prod(shape) > LARGEST:
            raise ValueError(f"{where} is of {shape[0]} x {shape[1]} pixels")
        pictures[name] = Seen(where, name, shape, by_image.get(each["id"], []))
    return Instances(tuple(dict.fromkeys(names.values())), pictures)


def _by_id(entries: Sequence[Any], what: str, *numbers: str) -> dict[Any, tuple[str, Any]]:
    """Return the place of each entry and the entry, by its id; refuse an id that is there twice."""
    found: dict[Any, tuple[str, Any]] = {}
    for where, each in _entries(entries, what, "id", *numbers):
        first, _ = found.setdefault(each["id"], (where, each))
        if first != where:
            raise ValueError(f"{where} has the id {each['id']!r}, as another has ({first})")
    return found


def _entries(
    entries: Sequence[Any], what: str, *numbers: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each entry of a list, and the entry with these keys as numbers."""
    for place, each in enumerate(entries):
        for key in numbers:
            if not isinstance(each, dict) or not isinstance(each.get(key), int | float | str):
                raise ValueError(f"{what}[{place}] has no {key}")
        yield f"{what}[{place}]", each


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no {key}")
    return text.strip()


def _object(where: str, entry: Mapping[str, Any], names: Mapping[Any, str]) -> Object:
    box = entry.get("bbox")
    if box is not None:
        box = _floats(box)
        if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            raise ValueError(
                f"{where} has the box {str(entry['bbox'])[:80]}, not left, top, width and height"
            )
    area = entry.get("area")
    if area is None:
        area = box[2] * box[3] if box else 0
    if not _floats([area]):
        raise ValueError(f"{where} has the area {str(area)[:80]}, not a number of pixels")
    crowd = bool(entry.get("iscrowd"))
    outline = entry.get("segmentation") or None
    label = names[entry["category_id"]]
    return Object(where, label, float(area), box, outline, crowd)


def _floats(values: Any) -> tuple[float, ...]:  # noqa: ANN401 - JSON
    """Return a list of JSON as floats; none where it is no list of numbers."""
    try:
        return tuple(map(float, values))
    except (ValueError, TypeError, OverflowError):
        return ()
