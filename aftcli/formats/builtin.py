"""torchvision's own data sets as a format: `torchvision:CIFAR10=DIR`, read where they lie.

Nothing is downloaded unless that is asked for (`download`); torchvision then does it, once.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from aftcli.core.classes import Classes
from aftcli.data.names import BUILTIN
from aftcli.data.parts import split_kind, spread
from aftcli.data.picture import Picture
from aftcli.data.sets import DataSet, Format, Sample
from aftcli.errors import AftError, nearest, reason
from aftcli.formats.listed import label_classes

Options = Mapping[str, Mapping[str, object]]  # of a constructor, by the split

FLAG: Options = {"train": {"train": True}, "test": {"train": False}}


def _named(*splits: str, **others: str) -> Options:
    own = {split: {"split": split} for split in splits}
    return own | {split: {"split": name} for split, name in others.items()}


# Data sets of one label a picture; those that torchvision reads from class folders are such.
SETS: Mapping[str, Options] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), FLAG),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN", "StanfordCars"), _named("train", "test")),
    **dict.fromkeys(("DTD", "Flowers102", "PCAM", "RenderedSST2"), _named("train", "val", "test")),
    "Country211": _named("train", "test", val="valid"),
    "FGVCAircraft": _named("train", "val", "test"),
    "Imagenette": _named("train", "val"),
    "OxfordIIITPet": _named("test", train="trainval"),
}

# Where data sets keep the labels of all pictures; the first that fits is taken.
COLUMNS = ("targets", "_labels", "labels", "_samples")

DEPTHS = ("*", "*/*", "*/*/*")

PATIENCE = 30.0  # seconds without a byte after which a download has failed

CHECKED = 3  # pictures whose label is compared with that of such a column


class Builtin(Format):
    """A data set of torchvision that lies in a folder on this disk."""

    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet | None:
        """Open `torchvision:NAME=DIR`; see `Format.open`. Files keep it as DIR/NAME."""
        root = _root_of(path)
        if root is None:
            return None
        chosen, notes = _choose(root.name, split, default)
        whole = _load(root, chosen)
        names = _class_names(whole)
        labels = [_label(names, number) for number in _numbers(whole)]

        def refuse(label: str, why: str) -> AftError:
            return AftError(f"{root / chosen}/{labels.index(label)}: {why}")

        found = label_classes(list(dict.fromkeys(labels)), classes, refuse)
        samples = [Sample(f"{chosen}/{i}", found.class_of[label]) for i, label in enumerate(labels)]
        notes += tuple(f"{root}: {note}" for note in found.notes)
        return DataSet("torchvision", root, chosen, found.names, found.mapped, samples, notes=notes)

    def suits(self, path: Path) -> bool:
        """Tell a name of torchvision from a folder."""
        return str(path).startswith(BUILTIN)

    def is_there(self, root: Path) -> bool:
        """Tell if the folder with the data set is there."""
        return root.name in SETS and root.parent.is_dir()

    def picture(self, data_set: DataSet, name: str) -> Picture:
        """Return a picture by its split and number."""
        split, _, number = name.partition("/")
        if split not in SETS[data_set.root.name] or not number.isdecimal():
            raise AftError(f"{data_set.root / name}: is no picture of this data set")
        return Item(data_set.root, split, int(number))

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if the data set has a split, or for val one to test on."""
        return root.name in SETS and _of_kind(root.name, split) is not None


class Item(Picture):
    """A picture of a data set of torchvision.

    Args:
        root: folder and name of the data set.
        split: of SETS.
        number: its place in it.
    """

    def __init__(self, root: Path, split: str, number: int) -> None:
        self.root, self.split, self.number = root, split, number
        self.name = str(root / split / str(number))
        self._read: bytes | None = None

    def open(self) -> BinaryIO:
        """Let torchvision read it, and write its pixels as a file in memory, once."""
        if self._read is None:
            self._read = _pixels(_load(self.root, self.split), self.number)
        return BytesIO(self._read)

    def stat(self) -> tuple[int, int]:
        """Return the number of pictures, and when a file of the data set changed last."""
        return len(_load(self.root, self.split)), _last_change(self.root.parent)


def _root_of(path: Path) -> Path | None:
    """Return folder and name of the data set that is meant, as one path; None if none is."""
    text = str(path)
    if not text.startswith(BUILTIN):
        return path if path.name in SETS else None
    name, given, folder = text.removeprefix(BUILTIN).partition("=")
    if name not in SETS:
        raise AftError(f"{text}: torchvision has no such data set; nearest: {nearest(name, SETS)}")
    if not given:
        raise AftError(f"{text}: say in which folder it lies: {BUILTIN}{name}=DIR")
    return Path(folder).expanduser() / name


def download(path: Path, quiet: bool = False) -> None:
    """Let torchvision download all splits of a data set, and check those that are there.

    Args:
        path: `torchvision:NAME=DIR`; the folder is made.
        quiet: show no progress.

    Raises:
        AftError: path names no data set of torchvision, or it can't be downloaded.
    """
    root = _root_of(path)
    if root is None:
        raise AftError(f"{path}: --download takes {BUILTIN}NAME=DIR")
    from torchvision import datasets

    name, folder = root.name, root.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _aside(quiet):
            for options in SETS[name].values():
                getattr(datasets, name)(str(folder), **options, download=True)
    except Exception as error:
        raise AftError(
            f"{folder}: {name} of torchvision can't be downloaded ({reason(error)}); look at the "
            "network and the disk, then try again, or copy the data set there"
        ) from error
    _load.cache_clear()


@contextlib.contextmanager
def _aside(quiet: bool) -> Iterator[None]:
    """Let what libraries print go to stderr, or nowhere, and no server keep them waiting."""
    where, before = io.StringIO() if quiet else sys.stderr, socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(where), contextlib.redirect_stderr(where):
            yield
    finally:
        socket.setdefaulttimeout(before)


class Part(NamedTuple):
    """A split of a data set, and notes of how it was found."""

    split: str
    notes: tuple[str, ...] = ()


def _choose(name: str, split: str | None, default: str) -> Part:
    found = _of_kind(name, split or default)
    if found is None:
        raise AftError(
            f"{BUILTIN}{name}: has no split {split or default!r}; there are {', '.join(SETS[name])}"
        )
    if found == split_kind(split or default):
        return Part(found)
    return Part(found, (f"{BUILTIN}{name}: has no split val; took {found}",))


def _of_kind(name: str, split: str) -> str | None:
    kind = split_kind(split)
    if kind in SETS[name]:
        return kind
    return "test" if kind == "val" and "test" in SETS[name] else None


@lru_cache(maxsize=2)
def _load(root: Path, split: str) -> Any:  # noqa: ANN401 - any data set
    from torchvision import datasets

    name, folder = root.name, root.parent
    try:
        return getattr(datasets, name)(str(folder), **SETS[name][split], download=False)
    except Exception as error:
        raise AftError(
            f"{folder}: {name} of torchvision can't be read there ({reason(error)}); pass "
            f"--download, or in Python torchvision.datasets.{name}({str(folder)!r}, download=True)"
        ) from error


def _numbers(whole: Any) -> list[int]:  # noqa: ANN401 - any data set
    """Return the label of each picture, without decoding all of them where that can be told."""
    count = len(whole)
    some = {i: int(whole[i][1]) for i in spread(count, CHECKED)}
    for column in COLUMNS:
        found = getattr(whole, column, None)
        if found is None or len(found) != count:
            continue
        numbers = [int(each[1] if isinstance(each, tuple) else each) for each in found]
        if all(numbers[i] == label for i, label in some.items()):
            return numbers
    return [int(whole[i][1]) for i in range(count)]


def _class_names(whole: Any) -> Sequence[str]:  # noqa: ANN401 - any data set
    """Return the names of the classes, wnids where there are such; none where labels are all."""
    names = getattr(whole, "wnids", None) or getattr(whole, "classes", None) or ()
    return [str(name) for name in names]


def _label(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)


def _pixels(whole: Any, number: int) -> bytes:  # noqa: ANN401 - any data set
    """Return a picture without loss, in a form that is quick to read.

    Raises:
        OSError: torchvision can't read it.
    """
    try:
        image = whole[number][0]
        kind = "PPM" if image.mode in ("L", "RGB") else "PNG"
        file = BytesIO()
        Image.Image.save(image, file, kind)
    except Exception as error:
        raise OSError(f"torchvision can't read it: {reason(error)}") from error
    return file.getvalue()


@lru_cache(maxsize=2)
def _last_change(folder: Path) -> int:
    """Return when a file in a folder, up to three levels down, changed last, in ns."""
    entries = [folder, *(entry for depth in DEPTHS for entry in folder.glob(depth))]
    return max(os.stat(entry).st_mtime_ns for entry in entries if entry.exists())
