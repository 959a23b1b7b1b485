"""Splits of a data set of class folders, told apart from classes by their names and folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from aftcli.core.classes import Classes
from aftcli.data.folders import folders_in, has_pictures, is_hidden, is_picture, listed
from aftcli.data.sets import split_kind
from aftcli.errors import AftError

# Names that only splits have, such as `train2017` and `my_test_set`, but that say not which.
SPLIT_LIKE = re.compile(
    r"(?:my|[\W_\d])*"
    r"(?:train(?:ing|val)?|trn|val(?:id(?:ation)?)?|test(?:ing)?|tst|dev|eval(?:uation)?"
    r"|hold[\W_]?out|held[\W_]?out|fold|split)"
    r"(?:set|data|images?|imgs|split|[\W_\d])*",
    re.IGNORECASE,
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
        return Split(_choose(path, folders, known, split or default), notes)
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
