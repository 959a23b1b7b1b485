"""Which folders of a data set are its classes, which its splits, and which neither."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aftcli.core.classifier import Classes
from aftcli.data.text import SUFFIXES
from aftcli.errors import AftError

# Usual names of splits, whatever the case; the first is what `--split` and defaults are named by.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

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

MOST_NAMED = 5  # folders in a message


class Pictures(NamedTuple):
    """Pictures below folders.

    Attributes:
        found: paths below each class folder, by its name, sorted.
        empty: class folders without a picture.
        skipped: notes of what was left out.
    """

    found: dict[str, list[str]]
    empty: list[str]
    skipped: tuple[str, ...]


class Split(NamedTuple):
    """A split's folder, "" where folders are classes, and notes of what that is guessed by."""

    folder: str
    notes: tuple[str, ...] = ()


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is none of the data set's: hidden, or left by a system."""
    return name.startswith(".") or name in CLUTTER


def split_kind(name: str) -> str:
    """Name the kind of a split: a key of SPLITS, "" for another name.

    >>> split_kind("Validation")
    'val'
    """
    return next((kind for kind, names in SPLITS.items() if name.lower() in names), "")


def pictures_of(path: Path) -> Pictures:
    """Find the class folders of a folder and their pictures; hidden and empty ones are skipped."""
    folders, hidden = _folders(path)
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


def _folders(path: Path) -> tuple[list[str], list[str]]:
    """Folders in a folder, sorted: those of the data set, hidden ones."""
    names = sorted(p.name for p in path.iterdir() if p.is_dir())
    return [n for n in names if not is_hidden(n)], [n for n in names if is_hidden(n)]


def _pictures_below(folder: Path) -> tuple[list[str], int]:
    """Pictures in a folder and its subfolders, relative to it, sorted; how many are hidden.

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
    """The pictures in a folder and each of its subfolders, by their path from it."""
    for where, _, files in os.walk(folder):
        names = [name for name in files if _is_picture(name)]
        yield Path(where).relative_to(folder), names


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _has_pictures(folder: Path) -> bool:
    return any(names for _, names in _walk(folder))


def listed(names: Sequence[str]) -> str:
    """Name some folders in a message.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def find_split(path: Path, split: str | None, classes: Classes, default: str) -> Split:
    """Find the split that is asked for, or that the folders are classes.

    Args:
        path: of the data set.
        split: its name, or a usual one of its kind; default `default`, where there are splits.
        classes: the model's.
        default: the kind that is taken where none is asked for.

    Raises:
        AftError: the folders look like splits under unknown names, or have not this one.
    """
    folders, _ = _folders(path)
    known = [name for name in folders if split_kind(name)]
    others = [name for name in folders if name not in known and _has_pictures(path / name)]
    if not known:
        _refuse_unknown_splits(path, others, classes)
    splits = bool(known) and _are_splits(path, known, others)
    notes = _guess(path, known, others, splits) if known and others else ()
    if splits:
        return Split(_choose(path, folders, known, split or default), notes)
    if split in folders:
        raise AftError(
            f"{path}: {split}/ is taken as a class, for it lies beside others "
            f"({listed(others)}); leave --split out, or name the folder of the split itself"
        )
    if split:
        raise AftError(
            f"{path}: has no folder {split}/; leave --split out to take its class folders as they "
            "are"
        )
    return Split("", notes)


def has_split(path: Path, kind: str) -> bool:
    """Tell whether a folder holds a split of a kind, a key of SPLITS."""
    return any(split_kind(name) == kind for name in _folders(path)[0])


def _are_splits(path: Path, known: list[str], others: list[str]) -> bool:
    """Tell whether folders with names of splits are such: classes may have these names too."""
    if not others:
        return True
    holding = [name for name in known if _holds_folders(path / name)]
    if not holding or len(set(map(split_kind, holding))) > 1:
        return bool(holding)
    own = set(_folders(path / holding[0])[0])
    shared = any(own & set(_folders(path / name)[0]) for name in others)
    return shared or len(own) > len(others)


def _holds_folders(path: Path) -> bool:
    """Tell whether a folder holds folders rather than pictures, as a split does."""
    pictures = sum(_is_picture(p.name) and not is_hidden(p.name) for p in path.iterdir())
    return len(_folders(path)[0]) > pictures


def _guess(path: Path, known: list[str], others: list[str], splits: bool) -> tuple[str, ...]:
    if not splits:
        return (f"{path}: took {listed(known)} as a class, like {listed(others)} beside it",)
    if len(set(map(split_kind, known))) > 1:
        return ()
    return (f"{path}: took {listed(known)} as a split; {listed(others)} beside it is none of it",)


def _choose(path: Path, folders: list[str], known: list[str], wanted: str) -> str:
    if wanted in folders:
        return wanted
    same = [name for name in known if split_kind(name) == (split_kind(wanted) or None)]
    if len(same) == 1:
        return same[0]
    what = f"has several folders for the split {wanted!r}" if same else f"has no split {wanted!r}"
    raise AftError(f"{path}: {what}; there are {', '.join(same or folders)}; name one by --split")


def _refuse_unknown_splits(path: Path, folders: list[str], classes: Classes) -> None:
    """Refuse folders that hold the classes themselves, each of them, under unknown names."""
    named = [name for name in folders if SPLIT_LIKE.fullmatch(name)]
    inner = [_folders(path / name)[0] for name in folders if _holds_folders(path / name)]
    by_name = named and (len(named) == len(folders) or len(inner) > 1)
    known = [_known(names, classes) for names in inner]
    by_class = len(inner) == len(folders) and all(known) and sum(known) > 1
    if by_name or (by_class and not _known(folders, classes)):
        raise AftError(
            f"{path}: its folders look like splits, not like classes ({listed(folders)}); call "
            "them train, val and test, or name one of them as the data set"
        )


def _known(names: list[str], classes: Classes) -> int:
    """Count the names that are classes of the model."""
    return sum(found is not None for found in classes.match(names))
