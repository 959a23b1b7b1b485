"""Pictures that one file lists with their labels: names, classes and several labels a picture."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aftcli.core.classes import Classes
from aftcli.data.sets import DataSet, Format, Sample
from aftcli.errors import MOST_NAMED, AftError, listed

ODD = {"", ".", ".."}  # parts of a path that is not plain

NUMBER = re.compile(r"[0-9]{1,6}")


class Entry(NamedTuple):
    """A label of a picture, as a file lists it.

    Attributes:
        where: its place in the file, such as "line 3".
        name: path of the picture below the data set's root, with forward slashes.
        label: the text of the label.
        area: of the label's object, pixels of the picture; None where no object is listed.
    """

    where: str
    name: str
    label: str
    area: float | None = None


class Labels(NamedTuple):
    """Classes of the labels of a file.

    Attributes:
        names: of the classes: the model's, or the file's own.
        class_of: each label's class.
        mapped: the classes are the model's.
        notes: what was guessed or left out.
    """

    names: tuple[str, ...]
    class_of: Mapping[str, int]
    mapped: bool
    notes: tuple[str, ...] = ()


class ListFormat(Format):
    """A format whose data sets are a file that lists pictures, some with several labels."""

    @abstractmethod
    def opened(
        self, path: Path, split: str | None, classes: Classes, default: str, every: bool
    ) -> DataSet | None:
        """Open a file, or a folder of such; `every` gives a sample for each picture and label."""

    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet | None:
        """Open it with a sample for each picture; see `Format.open`."""
        return self.opened(path, split, classes, default, every=False)

    def open_every(
        self, path: Path, split: str | None, classes: Classes, default: str
    ) -> DataSet | None:
        """Open it with a sample for each picture and label; see `Format.open_every`."""
        return self.opened(path, split, classes, default, every=True)

    def is_there(self, root: Path) -> bool:
        """Tell if the file is still there."""
        return root.is_file()


def below(root: Path, text: str) -> str:
    """Return the path of a listed picture below the root, with forward slashes.

    Args:
        root: the folder that paths are relative to.
        text: the path, relative or absolute.

    Raises:
        AftError: it lies outside the root.
    """
    if ODD.isdisjoint(text.split("/")) and "\0" not in text:
        return text  # most are plain, and there may be millions
    path = Path(text)
    if path.is_absolute() and path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    if "\0" in text or path.is_absolute() or ".." in path.parts or not path.name:
        raise AftError(
            f"{text[:200]!r} is not a path below {root}, which paths are relative to; move the "
            "picture there, or correct the path"
        )
    return path.as_posix()


def map_to_model(names: Sequence[str], classes: Classes) -> list[int] | None:
    """Find the model's class of each name; None where not all of them are its classes."""
    found = [index for index in classes.match(names) if index is not None]
    return found if len(found) == len(names) else None


def label_classes(
    labels: Sequence[str], classes: Classes, refuse: Callable[[str, str], AftError]
) -> Labels:
    """Find the classes that labels mean: the model's where all are, otherwise their own.

    Args:
        labels: texts, in their order, each once.
        classes: the model's.
        refuse: makes the error of a label, given the label and what is wrong.

    Raises:
        AftError: only some of the labels are classes of the model.
    """
    labels = sorted(labels, key=lambda text: (not NUMBER.fullmatch(text), _number(text), text))
    found = map_to_model(labels, classes)
    if found is not None:
        return Labels(classes.names, dict(zip(labels, found, strict=True)), True)
    matched = classes.match(labels)
    strange = [name for name, index in zip(labels, matched, strict=True) if index is None]
    if len(strange) < len(labels):
        alike = "".join(f"; {note}" for note in _alike(labels))
        raise refuse(
            strange[0],
            f"{strange[0]!r} is not a class of the model ({len(strange)} of {len(labels)} labels "
            f"are not); correct them, or take these pictures out{alike}",
        )
    own = Labels(tuple(labels), {text: i for i, text in enumerate(labels)}, False, _alike(labels))
    if not all(map(NUMBER.fullmatch, labels)):
        return own
    numbers, count = list(map(int, labels)), len(classes)
    all_in_order = numbers == list(range(len(numbers)))
    if len(numbers) == count if all_in_order else numbers[-1] < count:
        shown = ", ".join(f"{i}: {classes.name(i)}" for i in numbers[:MOST_NAMED])
        note = f"the labels are taken as indices of the model's classes ({shown}, ...)"
        return Labels(classes.names, {text: int(text) for text in labels}, True, (note,))
    note = (
        f"the labels ({', '.join(labels[:MOST_NAMED])}, ...) are taken as names of classes of "
        "their own, not as indices of the model's; where they are indices, write names or wnids"
    )
    return own._replace(notes=(note,))


def _alike(labels: Sequence[str]) -> tuple[str, ...]:
    """Say which labels are classes of their own, though they seem to be one."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(label.casefold(), []).append(label)
    found = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    if not found:
        return ()
    shown = "; ".join(found[:MOST_NAMED])
    return (f"labels that differ in case alone are taken as several classes: {shown}",)


def _number(text: str) -> int:
    return int(text) if NUMBER.fullmatch(text) else 0


def choose_labels(
    entries: Iterable[Entry], every: bool, refuse: Callable[[Entry, str], AftError]
) -> list[Entry]:
    """Choose what the labels of each picture are.

    Args:
        entries: labels of pictures.
        every: all labels of a picture; otherwise the one whose objects cover most.
        refuse: makes the error of an entry, given what is wrong.

    Returns:
        An entry for each picture, or each picture and label, ordered by label and name.

    Raises:
        AftError: a picture has several labels, and neither are all taken nor are objects listed.
    """
    areas: dict[str, dict[str, tuple[Entry, float | None]]] = {}
    for entry in entries:
        own = areas.setdefault(entry.name, {})
        first, area = own.get(entry.label, (entry, None))
        more = (area or 0) + entry.area if entry.area is not None else area
        own[entry.label] = first, more
    chosen = []
    for own in areas.values():
        found = list(own.values())
        if len(found) > 1 and not every:
            if any(area is None for _, area in found):
                before, later = found[0][0], found[1][0]
                raise refuse(
                    later,
                    f"{later.name} has the label {later.label!r} here, but {before.label!r} at "
                    f"{before.where}; keep one of them, or pass --labels all to take each",
                )
            found = [max(found, key=lambda each: each[1] or 0)]
        chosen += [entry for entry, _ in found]
    return chosen


def samples_of(entries: Iterable[Entry], labels: Labels) -> list[Sample]:
    """Return the samples of entries, class by class in the order of the labels' names."""
    order = {text: place for place, text in enumerate(labels.class_of)}
    ordered = sorted(entries, key=lambda entry: (order[entry.label], entry.name))
    return [Sample(entry.name, labels.class_of[entry.label]) for entry in ordered]


def there(root: Path, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Divide entries into those whose picture is there and those whose picture is missing."""
    known: dict[str, bool] = {}
    for entry in entries:
        if entry.name not in known:
            known[entry.name] = os.path.lexists(os.path.join(root, entry.name))
    found = [entry for entry in entries if known[entry.name]]
    return found, [entry for entry in entries if not known[entry.name]]


def missing_note(file: Path, missing: Sequence[Entry]) -> str:
    """Say which listed pictures are missing."""
    named = listed([f"{entry.name[:200]} ({entry.where})" for entry in missing])
    return f"{file}: skipped entries whose picture is missing: {named}{slash_hint(missing)}"


def slash_hint(missing: Iterable[Entry]) -> str:
    """Return what to do about paths of Windows among those that are missing."""
    found = any("\\" in entry.name for entry in missing)
    return "; write paths with / in place of \\" if found else ""
