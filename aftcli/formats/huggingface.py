"""Hugging Face data sets on this disk: parquet files, and folders of `save_to_disk`.

They are read by pyarrow alone; nothing is asked of the hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from aftcli.core.classes import Classes
from aftcli.data.names import files_named, is_pattern
from aftcli.data.parts import Chosen, are_of_split, choose_files, split_kind
from aftcli.data.picture import FilePicture, Picture
from aftcli.data.sets import DataSet, Format, Sample
from aftcli.errors import AftError, listed, reason
from aftcli.files import inside, read_text
from aftcli.formats.folders import has_pictures, is_hidden
from aftcli.formats.listed import label_classes

PARQUET, ARROW = ".parquet", ".arrow"

STATE = "state.json"  # of save_to_disk, with the names of its files

# Columns that are labels where no feature says so; of several ClassLabels the first of these.
LABELS = ("label", "labels", "class", "class_name", "label_name", "cls", "target", "fine_label")

IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")  # of plain bytes

DEPTHS = ("", "*/", "*/*/")  # of parquet files, as the hub has them

GROUPS = 2  # row groups of parquet that a process keeps in memory


Read = TypeVar("Read")


class HuggingFace(Format):
    """A column of pictures and one of labels, in parquet or arrow files."""

    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet | None:
        """Open a folder, a parquet file, or those of a pattern; see `Format.open`."""
        found = _files(path)
        if not found:
            return None
        chosen = choose_files(path, found, split, default)
        _refuse_several(path, chosen.files)
        heads = [_head_of(inside(chosen.root, name)) for name in chosen.files]
        known = [head for head in heads if head]
        return _data_set(chosen, known, classes) if len(known) == len(heads) else None

    def suits(self, path: Path) -> bool:
        """Tell these files from tables that lie beside pictures."""
        return not path.is_dir() or not has_pictures(path)

    def picture(self, data_set: DataSet, name: str) -> Picture:
        """Return the picture of a row."""
        file, _, row = name.rpartition("/")
        if not (row.isdecimal() and file.endswith((PARQUET, ARROW))):
            raise AftError(f"{data_set.root / name}: is no row of a file of this data set")
        return Cell(data_set.beside(file), int(row), str(data_set.root / name))

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if names of files are of a split."""
        return are_of_split(root, _files(root), split)


class Cell(Picture):
    """A picture in a row of a file.

    Args:
        file: of parquet or arrow.
        row: its number, from 0.
        name: see `Picture`.
    """

    def __init__(self, file: Path, row: int, name: str) -> None:
        self.file, self.row, self.name = file, row, name
        self._read: bytes | None = None

    def open(self) -> BinaryIO:
        """Read it into memory, once."""
        if self._read is None:
            value = _value(self.file, FilePicture(self.file).stat(), self.row)
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise OSError("its row has no bytes of a picture, which must lie in the file")
            self._read = content
        return BytesIO(self._read)

    def stat(self) -> tuple[int, int]:
        """Return size and time of the last change of its file."""
        return FilePicture(self.file).stat()


class Head(NamedTuple):
    """The columns of a file.

    Attributes:
        image: the name of that with pictures.
        label: of that with labels.
        names: of the classes, if labels are their numbers.
        others: of further columns that could be labels.
    """

    image: str
    label: str
    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _data_set(chosen: Chosen, heads: Sequence[Head], classes: Classes) -> DataSet:
    """Join the rows of files, in their order."""
    (root, split, files, named), head = chosen, heads[0]
    for file, other in zip(files, heads, strict=True):
        if other != head:
            raise AftError(f"{root / file}: has other columns or classes than {files[0]}")
    if _are_of(head.names, classes):
        head = head._replace(names=classes.wnids)
    names: list[str] = []
    labels: list[str | None] = []
    for file in files:
        values = _values(root / file, head.label)
        if values and not names:
            _refuse_paths(root / file)
        for row, value in enumerate(values):
            names.append(f"{file}/{row}")
            labels.append(_text(root / names[-1], value, head.names))
    missing = [name for name, label in zip(names, labels, strict=True) if label is None]
    known = dict.fromkeys(label for label in labels if label is not None)
    if not known:
        raise AftError(f"{root}: no row of {listed(files)} has a label in {head.label!r}")

    def refuse(label: str, why: str) -> AftError:
        return AftError(f"{root / names[labels.index(label)]}: {why}")

    found = label_classes(list(known), classes, refuse)
    notes = [f"{root}: {note}" for note in found.notes]
    if missing:
        notes.append(f"{root}: skipped rows without a label: {listed(missing)}")
    if head.others:
        notes.append(f"{root}: took {head.label!r} as the label; so could {listed(head.others)} be")
    samples = [
        Sample(name, found.class_of[label])
        for name, label in zip(names, labels, strict=True)
        if label is not None
    ]
    of = ("huggingface", root, split, found.names, found.mapped, samples)
    return DataSet(*of, notes=tuple(notes), files=named)


def _refuse_paths(file: Path) -> None:
    """Refuse a file whose first picture is only named by its path, as to_parquet may write."""
    first = _checked(file, lambda: _value(file, FilePicture(file).stat(), 0))
    if isinstance(first, dict) and first.get("bytes") is None and first.get("path"):
        raise AftError(
            f"{file}: names files ({str(first['path'])[:200]}) and does not hold their pictures; "
            "write it by save_to_disk, which puts them in"
        )


def _are_of(names: Sequence[str], classes: Classes) -> bool:
    """Tell ImageNet's classes by their names in its order, which are not unique."""
    if not classes.wnids or len(names) != len(classes):
        return False
    first = [name.split(",")[0].strip().lower() for name in names]
    return all(own in map(str.lower, classes.synonyms(i)) for i, own in enumerate(first))


def _text(where: Path, value: object, names: Sequence[str]) -> str | None:
    """Return a label as its class's name; None where a row has none.

    Raises:
        AftError: it is none of the classes, or no single label.
    """
    if value is None or (value == -1 and names):  # as test splits have
        return None
    if not names and isinstance(value, str | int):
        return str(value).strip() or None
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if not names:
        raise AftError(f"{where}: its label {str(value)[:40]!r} is neither a name nor an integer")
    raise AftError(f"{where}: its label {str(value)[:40]!r} is none of {len(names)} classes")


def _files(path: Path) -> list[Path]:
    """Find the files that a name means: a folder's, one, or those of a pattern."""
    if path.is_dir():
        states = [path / STATE] if (path / STATE).is_file() else sorted(path.glob(f"*/{STATE}"))
        if states:
            return [file for state in states for file in _files_of(path, state)]
        found = [file for depth in DEPTHS for file in sorted(path.glob(f"{depth}*{PARQUET}"))]
        return [f for f in found if not any(map(is_hidden, f.relative_to(path).parts))]
    found = files_named(path) if is_pattern(path) else [path]
    return found if all(p.suffix in (PARQUET, ARROW) and p.is_file() for p in found) else []


def _files_of(path: Path, state: Path) -> Iterator[Path]:
    """Yield the files that `save_to_disk` lists; others there are of its caches."""
    try:
        names = [str(each["filename"]) for each in json.loads(read_text(state))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AftError(
            f"{state}: can't be read as what save_to_disk writes ({reason(error)})"
        ) from error
    folder = state.parent.relative_to(path)
    yield from (inside(path, (folder / name).as_posix()) for name in names)


def _refuse_several(path: Path, files: Sequence[str]) -> None:
    """Refuse files of several data sets, which lie in folders whose names say no split."""
    folders = {
        "/".join(part for part in file.split("/")[:-1] if not split_kind(part.rpartition("-")[2]))
        for file in files
    }
    if len(folders) > 1:
        raise AftError(f"{path}: holds several data sets ({listed(sorted(folders))}); name one")


def _head_of(file: Path) -> Head | None:
    """Find the columns of a file; None where it has no pictures.

    Raises:
        AftError: it can't be read, or has no labels.
    """
    return _checked(file, lambda: _head(file, FilePicture(file).stat()))


def _values(file: Path, label: str) -> list[Any]:
    """Read the labels of a file."""

    def read() -> list[Any]:
        table = _table(file, FilePicture(file).stat(), os.getpid())
        is_parquet = file.suffix == PARQUET
        column = table.read([label], use_threads=False) if is_parquet else table.select([label])
        found: list[Any] = column.column(label).to_pylist()
        return found

    return _checked(file, read)


def _checked(file: Path, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except AftError:
        raise
    except Exception as error:
        kind = "a parquet file" if file.suffix == PARQUET else "an arrow file"
        raise AftError(
            f"{file}: can't be read as {kind} ({reason(error)}); copy it again"
        ) from error


@lru_cache(maxsize=1024)
def _head(file: Path, stamp: tuple[int, int]) -> Head | None:
    """Find a file's columns by its features, otherwise by their types and usual names."""
    table = _table(file, stamp, os.getpid())
    schema = table.schema_arrow if file.suffix == PARQUET else table.schema
    features = _features(schema)
    images = [name for name in schema.names if _is_image(name, schema.field(name).type)]
    stated = [name for name, each in features.items() if each.get("_type") == "Image"]
    image = next((name for name in (*stated, *images) if name in images), None)
    if image is None:
        return None
    numbers = [name for name, each in features.items() if each.get("_type") == "ClassLabel"]
    numbers.sort(key=lambda name: LABELS.index(name) if name in LABELS else len(LABELS))
    known = [name for name in LABELS if name in schema.names]
    if not numbers + known:
        raise AftError(
            f"{file}: has pictures in {image!r}, but no column of labels (there are "
            f"{', '.join(schema.names)}); call it label"
        )
    label, *others = numbers or known[:1]
    names = features.get(label, {}).get("names") or ()
    return Head(image, label, tuple(map(str, names)), tuple(others))


def _features(schema: Any) -> Mapping[str, Mapping[str, Any]]:  # noqa: ANN401 - of pyarrow
    """Return the features that `datasets` writes into a file; none of other writers' files."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in found.items() if isinstance(each, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_image(name: str, kind: Any) -> bool:  # noqa: ANN401 - of pyarrow
    """Tell a column of pictures: bytes with the path of a file, or bytes under a usual name."""
    types = _pyarrow().types
    if types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    elif name.lower() not in IMAGES:
        kind = None
    return kind is not None and bool(types.is_binary(kind) or types.is_large_binary(kind))


@lru_cache(maxsize=64)
def _table(file: Path, stamp: tuple[int, int], process: int) -> Any:  # noqa: ANN401 - of pyarrow
    """Open a file: of arrow as a table in mapped memory, of parquet as what reads its parts."""
    pa = _pyarrow()
    if file.suffix == PARQUET:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(file, pre_buffer=False)
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _value(file: Path, stamp: tuple[int, int], row: int) -> object:
    """Read what the column of pictures holds in a row.

    Raises:
        OSError: it can't be read.
    """
    try:
        head, table = _head(file, stamp), _table(file, stamp, os.getpid())
        if head is None:
            raise OSError("its file has no pictures")
        if file.suffix == ARROW:
            return table.column(head.image)[row].as_py()
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row < count:
                return _group(file, stamp, os.getpid(), group, head.image)[row].as_py()
            row -= count
    except (ValueError, IndexError, KeyError) as error:
        raise OSError(f"its row can't be read: {reason(error)}") from error
    raise OSError("its file has no such row")


@lru_cache(maxsize=GROUPS)
def _group(file: Path, stamp: tuple[int, int], process: int, group: int, column: str) -> Any:  # noqa: ANN401
    table = _table(file, stamp, process).read_row_group(group, [column], use_threads=False)
    return table.column(column)


def _pyarrow() -> Any:  # noqa: ANN401 - a module without types
    try:
        import pyarrow as pa
        import pyarrow.ipc
    except ImportError as error:
        raise AftError(
            "data sets of Hugging Face are read by pyarrow, which is not installed: pip install "
            "'aftcli[hf]'"
        ) from error
    return pa
