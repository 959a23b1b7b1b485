"""Class folders as a format of data sets: tells classes, splits and other folders apart."""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from aftcli.core.classes import Classes
from aftcli.data.parts import choose_split, split_kind
from aftcli.data.picture import Listed, Marks, is_picture
from aftcli.data.sets import Annotations, DataSet, Format, Sample
from aftcli.errors import AftError, listed
from aftcli.files import inside
from aftcli.formats.listed import map_to_model

EDGES = ("x1", "y1", "x2", "y2")

# Names that only splits have, such as `train2017` and `my_test_set`, but that say not which.
SPLIT_LIKE = re.compile(
    r"(?:my|[\W_\d])*"
    r"(?:train(?:ing|val)?|trn|val(?:id(?:ation)?)?|test(?:ing)?|tst|dev|eval(?:uation)?"
    r"|hold[\W_]?out|held[\W_]?out|fold|split)"
    r"(?:set|data|images?|imgs|split|[\W_\d])*",
    re.IGNORECASE,
)

# What archives, file servers and file systems leave in folders.
CLUTTER = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"})


class ClassFolders(Format):
    """A folder of class folders, or one of splits of such, as ImageNet's."""

    named_by_folder = True

    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet | None:
        """Open any folder, or refuse it; see `Format.open`."""
        if not path.is_dir():
            return None
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


class Split(NamedTuple):
    """A split's folder, "" where folders are classes, and notes of what that is guessed by."""

    folder: str
    notes: tuple[str, ...] = ()


def find_split(path: Path, split: str | None, classes: Classes, default: str) -> Split:
    """Find the split that is asked for, or that the folders are classes."""
    folders, _ = folders_in(path)
    known = [name for name in folders if split_kind(name)]
    others = [name for name in folders if name not in known and has_pictures(path / name)]
    if not known:
        _refuse_unknown_splits(path, others, classes)
    splits = bool(known) and _are_splits(path, known, others)
    notes = _guess(path, known, others, splits) if known and others else ()
    if splits:
        return Split(choose_split(path, folders, known, split or default), notes)
    if split in folders:
        raise AftError(
            f"{path}: {split}/ is taken as a class, because it lies beside others "
            f"({listed(others)}); leave --split out, or name the folder of the split itself"
        )
    if split:
        raise AftError(
            f"{path}: has no folder {split}/; leave --split out to take its class folders as they "
            "are"
        )
    return Split("", notes)


def _are_splits(path: Path, known: list[str], others: list[str]) -> bool:
    """Tell if folders with names of splits are such: classes may have these names too."""
    if not others:
        return True
    holding = [name for name in known if _holds_folders(path / name)]
    if not holding or len(set(map(split_kind, holding))) > 1:
        return bool(holding)
    own = set(folders_in(path / holding[0])[0])
    shared = any(own & set(folders_in(path / name)[0]) for name in others)
    return shared or len(own) > len(others)


def _holds_folders(path: Path) -> bool:
    """Tell if a folder holds folders rather than pictures, as a split does."""
    pictures = sum(is_picture(p.name) and not is_hidden(p.name) for p in path.iterdir())
    return len(folders_in(path)[0]) > pictures


def _guess(path: Path, known: list[str], others: list[str], splits: bool) -> tuple[str, ...]:
    if not splits:
        return (f"{path}: took {listed(known)} as a class, like {listed(others)} beside it",)
    if len(set(map(split_kind, known))) > 1:
        return ()
    return (f"{path}: took {listed(known)} as a split; {listed(others)} beside it is none of it",)


def _refuse_unknown_splits(path: Path, folders: list[str], classes: Classes) -> None:
    """Refuse folders that hold the classes themselves, each of them, under unknown names."""
    named = [name for name in folders if SPLIT_LIKE.fullmatch(name)]
    inner = [folders_in(path / name)[0] for name in folders if _holds_folders(path / name)]
    by_name = named and (len(named) == len(folders) or len(inner) > 1)
    known = [_known(names, classes) for names in inner]
    by_class = len(inner) == len(folders) and all(known) and sum(known) > 1
    # Such as images_train and images_val, where no picture lies beside the folders in them.
    by_word = len(inner) == len(folders) > 1 and all(map(_has_word_of_split, folders))
    if by_name or ((by_class or by_word) and not _known(folders, classes)):
        raise AftError(
            f"{path}: its folders look like splits, not like classes ({listed(folders)}); call "
            "them train, val and test, or name one of them as the data set"
        )


def _has_word_of_split(name: str) -> bool:
    return any(split_kind(word) for word in re.split(r"[\W_\d]+", name) if word)


def _known(names: list[str], classes: Classes) -> int:
    """Count the names that are classes of the model."""
    return sum(found is not None for found in classes.match(names))


class Pictures(NamedTuple):
    """The pictures below class folders.

    Attributes:
        found: paths below each class folder, by its name, sorted.
        empty: class folders without a picture.
        skipped: notes of what was left out.
    """

    found: dict[str, list[str]]
    empty: list[str]
    skipped: tuple[str, ...]


def is_hidden(name: str) -> bool:
    """Tell if a file or folder is none of the data set's: hidden, or left by a system."""
    return name.startswith(".") or name in CLUTTER


def pictures_of(path: Path) -> Pictures:
    """Find the class folders of a folder and their pictures; hidden and empty ones are skipped."""
    folders, hidden = folders_in(path)
    found, below = {}, 0
    for folder in folders:
        found[folder], more = _pictures_below(path / folder)
        below += more
    empty = [folder for folder in folders if not found[folder]]
    skipped = []
    if hidden:
        skipped.append(f"{path}: skipped hidden folders: {listed(hidden)}")
    if empty:
        skipped.append(f"{path}: skipped folders without a picture: {listed(empty)}")
    if below:
        skipped.append(f"{path}: skipped {below} hidden pictures in class folders")
    filled = {name: names for name, names in found.items() if names}
    return Pictures(filled, empty, tuple(skipped))


def folders_in(path: Path) -> tuple[list[str], list[str]]:
    """List the folders in a folder, sorted: those of the data set, and hidden ones."""
    names = sorted(p.name for p in path.iterdir() if p.is_dir())
    return [n for n in names if not is_hidden(n)], [n for n in names if is_hidden(n)]


def _pictures_below(folder: Path) -> tuple[list[str], int]:
    """List the pictures below a folder, relative to it, sorted; count the hidden ones.

    Links to folders are not followed.
    """
    found, hidden = [], 0
    for relative, names in _walk(folder):
        out = any(map(is_hidden, relative.parts))
        shown = [] if out else [name for name in names if not is_hidden(name)]
        hidden += len(names) - len(shown)
        found += [(relative / name).as_posix() for name in shown]
    return sorted(found), hidden


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the pictures in a folder and each of its subfolders, by their path from it.

    Raises:
        OSError: one of them that is not hidden can't be read.
    """

    def refuse(error: OSError) -> None:
        parts = Path(error.filename).relative_to(folder.parent).parts
        if not any(map(is_hidden, parts)):
            raise error

    for where, _, files in os.walk(folder, onerror=refuse):
        names = [name for name in files if is_picture(name)]
        yield Path(where).relative_to(folder), names


def has_pictures(folder: Path) -> bool:
    """Tell if there is a picture in a folder or below it."""
    return any(names for _, names in _walk(folder))
