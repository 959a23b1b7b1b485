"""Folders of pictures, and what in them is none of a data set's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aftcli.data.text import SUFFIXES

# What archives, file servers and file systems leave in folders.
CLUTTER = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"})

MOST_NAMED = 5  # folders in a message


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
    """Yield the pictures in a folder and each of its subfolders, by their path from it."""
    for where, _, files in os.walk(folder):
        names = [name for name in files if is_picture(name)]
        yield Path(where).relative_to(folder), names


def is_picture(name: str) -> bool:
    """Tell a picture by its file's name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def has_pictures(folder: Path) -> bool:
    """Tell if there is a picture in a folder or below it."""
    return any(names for _, names in _walk(folder))


def listed(names: Sequence[str]) -> str:
    """Name some folders in a message.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"
