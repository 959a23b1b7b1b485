"""Names that users give data sets: formats, folders, files and patterns of them; without torch."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from aftcli.errors import AftError
from aftcli.files import check_folder

# Where each Format of data sets is, by the name that files keep it under. The last is tried first;
# class folders take what is left.
FORMATS = {
    "folders": "aftcli.formats.folders:ClassFolders",
    "shards": "aftcli.formats.shards:Shards",
    "voc": "aftcli.formats.voc:Voc",
    "coco": "aftcli.formats.coco:Coco",
    "manifest": "aftcli.formats.manifest:Manifest",
    "huggingface": "aftcli.formats.huggingface:HuggingFace",
    "torchvision": "aftcli.formats.builtin:Builtin",
}

# Endings of files that are data sets; others are folders.
DATA_FILES = (".csv", ".json", ".parquet", ".tsv", ".arrow", ".tar")

BUILTIN = "torchvision:"  # begins the name of a data set that torchvision reads

PATTERN = frozenset("{*?[")  # in the names of several files

BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")

RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")

MOST_FILES = 10**6  # that one pattern names


def check_data_set(path: Path) -> None:
    """Check that a folder, or files that may be a data set, are there."""
    name, _, folder = str(path).partition("=")
    if name.startswith(BUILTIN):
        check_folder(Path(folder).expanduser())
    elif is_pattern(path):
        files_named(path)
    elif not path.is_file():
        check_folder(path)
    elif path.suffix.lower() not in DATA_FILES:
        raise AftError(
            f"{path}: there is no such folder; a data set is one, or a file that ends in "
            f"{', '.join(DATA_FILES)}"
        )


def is_pattern(path: Path) -> bool:
    """Tell if a name means several files, by braces or wildcards."""
    return bool(PATTERN & set(str(path))) and not os.path.lexists(path)


def files_named(pattern: Path) -> list[Path]:
    """Return the files that a pattern with braces or wildcards means, in its order.

    Args:
        pattern: such as `shard-{000..127}.tar` or `*.tar`; braces hold a range or words.

    Raises:
        AftError: one that the braces name is not there, or none fits.
    """
    found: dict[str, None] = {}
    for name in unbraced(str(pattern)):
        wild = PATTERN & set(name) and not os.path.lexists(name)
        names = sorted(glob.glob(name, recursive=True)) if wild else [name]
        found.update(dict.fromkeys(names))
        if not names or not os.path.lexists(names[0]):
            raise AftError(f"{name}: there is no such file, which {pattern} names")
    return [Path(name) for name in found]


def unbraced(text: str) -> Iterator[str]:
    """Write out braces, as shells do.

    Raises:
        AftError: these are too many names.

    >>> list(unbraced("{train,val}-{08..10}.tar"))[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    places = BRACES.search(text)
    if not places:
        yield text
        return
    before, inner, after = text[: places.start()], places[1], text[places.end() :]
    ends = RANGE.fullmatch(inner)
    words: Iterable[str] = inner.split(",")
    if ends:
        first, last = map(int, ends.groups())
        width = max(map(len, ends.groups())) if inner.startswith("0") else 0
        if abs(last - first) >= MOST_FILES:
            raise AftError(f"{text}: names more than {MOST_FILES} files")
        step = 1 if last >= first else -1
        words = (f"{number:0{width}}" for number in range(first, last + step, step))
    for word in words:
        yield from unbraced(f"{before}{word}{after}")


def check_format(kind: str) -> None:
    """Check the name of a format of data sets."""
    if kind not in FORMATS:
        raise AftError(f"unknown format of data sets {kind!r}; there are {', '.join(FORMATS)}")
