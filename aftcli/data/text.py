"""Files that users name: images by names, folders and globs; class names; without torch."""

from __future__ import annotations

import glob
import os
import textwrap
from collections.abc import Callable, Container, Iterable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from aftcli.errors import AftError
from aftcli.files import inside

SUFFIXES = frozenset(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .jfif".split())

Written = Callable[[Path], Container[str]]

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
            missing = "image in this folder" if names else "such file or folder"
            problems.append(f"{argument or repr(argument)}: there is no {missing}")
        found.update(dict.fromkeys(images))
    return list(found), problems


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
