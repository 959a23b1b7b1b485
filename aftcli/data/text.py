"""Names that users give: images, folders and globs, data sets, class names; without torch."""

from __future__ import annotations

import glob
import os
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from aftcli.errors import AftError
from aftcli.files import check_folder, inside

SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .jfif".split())

Written = Callable[[Path], Container[str]]

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

# What archives, file servers and file systems leave in folders.
CLUTTER = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"})

MOST_NAMED = 5  # folders, pictures or labels in a message

LARGEST_TEXT = 2**24  # bytes of class names, of a list, of an annotation


def find_images(
    arguments: Iterable[str],
    out: Path | None = None,
    written: Written = lambda folder: (),
) -> tuple[list[Path], list[str]]:
    """Turn files, folders and globs into image files.

    Args:
        arguments: names as the user gave them.
        out: where results go; a folder that holds it does not give them back as images.
        written: gives the names of results in a folder; folders do not give them back either.

    Returns:
        The files, each once, those of a folder sorted; and what was wrong with arguments.
    """
    found: dict[Path, None] = {}
    problems = []
    for argument in arguments:
        names = [argument] if os.path.lexists(argument) else glob.glob(argument, recursive=True)
        images, leading_out = [], []
        for path in sorted(map(Path, names)):
            if not path.is_dir():
                images.append(path)
                continue
            for image in _images_in(path, out, written):
                try:
                    images.append(inside(path, str(image.relative_to(path))))
                except AftError as error:
                    leading_out.append(str(error))
        problems += leading_out
        if not images and not leading_out:
            problems.append(f"{argument or repr(argument)}: {_missing(names)}")
        found.update(dict.fromkeys(images))
    return list(found), problems


def _missing(names: Sequence[str]) -> str:
    """Say what is missing where names of folders, or none, have led to no image."""
    if any(_images_in(Path(name), None, lambda folder: ()) for name in names):
        return "holds only pictures that aft has written; name your own"
    return f"there is no {'image in this folder' if names else 'such file or folder'}"


def _images_in(folder: Path, out: Path | None, written: Written) -> list[Path]:
    """List the images below a folder, sorted; none that is hidden, below `out` or a result."""
    results = None
    written = cache(written)
    if out and folder.resolve() in out.resolve().parents:
        results = folder / out.resolve().relative_to(folder.resolve())
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (results and path.is_relative_to(results))
        and path.name not in written(path.parent)
    )


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


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names, one a line."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise AftError(
            f"{path}: can't be read as class names, one a line in UTF-8 ({reason(error)})"
        ) from error
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    if not names or not all(names):
        what = f"an empty line, number {names.index('') + 1}" if names else "no class names"
        raise AftError(f"{path}: holds {what}; write one class name a line")
    return names


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        OSError: it can't be read.
        ValueError: it is no regular file, larger than LARGEST_TEXT, or not in UTF-8.
    """
    return _content(path).decode("utf-8-sig")


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
        parser.Parse(_content(path), True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"it is not XML: {error}") from error
    return builder.close()


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"it is larger than {LARGEST_TEXT} bytes")
    return content


def reason(error: Exception) -> str:
    """Say in one line why a file can't be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "pickle" in str(error):  # numpy's message tells how to run the file's code
        return "it holds no plain array of numbers"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return textwrap.shorten(text, 160, placeholder="...")


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
    """Name the first of some folders, pictures or labels in a message.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"
