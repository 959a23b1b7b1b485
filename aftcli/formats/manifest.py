"""Manifests as a format of data sets: a CSV, TSV or parquet file that lists pictures and labels."""

from __future__ import annotations

import csv
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from aftcli.core.classes import Classes
from aftcli.data.parts import split_kind
from aftcli.data.picture import FilePicture, Listed, Marks, Picture
from aftcli.data.sets import Annotations, DataSet
from aftcli.errors import AftError, reason
from aftcli.files import inside
from aftcli.formats.listed import (
    Entry,
    ListFormat,
    below,
    choose_labels,
    label_classes,
    missing_note,
    samples_of,
    slash_hint,
    there,
)

Note = Callable[[str], None]

DELIMITERS = {".csv": ",", ".tsv": "\t"}

EXCEL = re.compile('"?sep=([,;\t|])"?')  # a first line that names the delimiter

PARQUET = ".parquet"

# The name of each column, and others that are taken for it.
COLUMNS = {
    "path": ("file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("class", "category", "class_name", "label_name", "wnid", "target"),
    "split": ("subset", "partition"),
}

BOX = ("x", "y", "w", "h")

SIZE = ("width", "height")


class Row(NamedTuple):
    """A line of a manifest.

    Attributes:
        where: its place in the file.
        name: path of the picture below the file's folder.
        label: the text of the label.
        split: that it belongs to; "" where the file has no such column.
        box: of the label's object; None where none is said.
    """

    where: str
    name: str
    label: str
    split: str
    box: Listed | None


class Manifest(ListFormat):
    """A file with a picture, its label and perhaps split and box on each line."""

    def opened(
        self, path: Path, split: str | None, classes: Classes, default: str, every: bool
    ) -> DataSet | None:
        """Open a file with the ending of a manifest; see `ListFormat.opened`."""
        return _open(path, split, classes, default, every)

    def picture(self, data_set: DataSet, name: str) -> Picture:
        """Return a picture below the file's folder; see `Format.picture`."""
        return FilePicture(inside(data_set.root.parent, name))

    def name(self, root: Path, split: str) -> str:
        """Name a data set after the file's folder."""
        return root.parent.name or str(root)

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if the file has lines of a split, or a file beside it is this split."""
        if not is_manifest(root):
            return False
        own = split_kind(root.stem)
        if own:
            return _beside(root, split) is not None
        return any(split_kind(row.split) == split for row in read_rows(root))

    def annotations(self, data_set: DataSet) -> Annotations:
        """Return the boxes of its lines."""
        return _Boxes(data_set)


class _Boxes(Annotations):
    """Boxes of a manifest, in pixels from the left upper corner of the picture."""

    @cached_property
    def boxes(self) -> dict[tuple[str, int], list[Listed]]:
        found: dict[tuple[str, int], list[Listed]] = defaultdict(list)
        index = self.data_set.class_of
        for row in read_rows(self.data_set.root):
            if row.box and row.label in index:
                found[row.name, index[row.label]].append(row.box)
        return found

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({"boxes"} if self.boxes else ())

    def files(self) -> Iterator[Path]:
        if self.boxes:
            yield self.data_set.root

    def marks(self, index: int, class_index: int) -> Marks | None:
        boxes = self.boxes.get((self.data_set.samples[index].name, class_index))
        return Marks(boxes, self.data_set.root) if boxes else None


def is_manifest(path: Path) -> bool:
    """Tell a manifest by its ending; a folder is not one."""
    return path.suffix.lower() in (*DELIMITERS, PARQUET) and path.is_file()


def _open(
    path: Path, split: str | None, classes: Classes, default: str, every: bool
) -> DataSet | None:
    if not is_manifest(path):
        return None
    path, own = _file_of(path, split)
    guessed: list[str] = []
    rows = list(read_rows(path, guessed.append))
    if not rows:
        raise AftError(f"{path}: lists no picture")
    lines: dict[str, str] = {}
    for row in rows:
        lines.setdefault(row.label, row.where)

    def refuse(label: str, why: str) -> AftError:
        return AftError(f"{path}: {lines[label]}: {why}")

    labels = label_classes(list(lines), classes, refuse)
    if any(row.split for row in rows):
        spelled: dict[str, str] = {}
        for row in rows:
            spelled.setdefault(row.split.lower(), row.split)
        own = _choose(path, spelled, split or default)
        guessed += _alike(own, spelled, rows)
        rows = [row for row in rows if row.split.lower() == own.lower()]
    elif split and not own:
        raise AftError(
            f"{path}: has no column split, so there is no split {split!r}; leave --split out, or "
            "add the column"
        )
    entries = [Entry(row.where, row.name, row.label, _area(row.box)) for row in rows]
    found, missing = there(path.parent, entries)
    if missing and not found:
        first = missing[0]
        raise AftError(
            f"{path}: {first.where}: there is no {path.parent / first.name}, nor any other picture "
            f"that it lists; paths are relative to the folder of this file{slash_hint(missing)}"
        )
    chosen = choose_labels(
        found, every, lambda entry, why: AftError(f"{path}: {entry.where}: {why}")
    )
    repeated = sum(entry.area is None for entry in found) - sum(e.area is None for e in chosen)
    notes = [f"{path}: {note}" for note in (*guessed, *labels.notes)]
    notes += [missing_note(path, missing)] if missing else []
    if repeated > 0:
        notes.append(f"{path}: {repeated} lines repeat a picture and label; each counts once")
    return DataSet(
        "manifest",
        path,
        own,
        labels.names,
        labels.mapped,
        samples_of(chosen, labels),
        notes=tuple(notes),
        class_of=labels.class_of,
        every=every,
    )


def _alike(own: str, spelled: Mapping[str, str], rows: Iterable[Row]) -> list[str]:
    """Say which other splits have a name of the same meaning, such as training beside train."""
    found = []
    for lower, name in spelled.items():
        if lower != own.lower() and split_kind(lower) and split_kind(lower) == split_kind(own):
            count = sum(row.split.lower() == lower for row in rows)
            found.append(
                f"took the split {own!r}; {count} lines of {name!r} are another one: give both "
                "one name if they belong together"
            )
    return found


def _area(box: Listed | None) -> float | None:
    return None if box is None else (box.box[2] - box.box[0]) * (box.box[3] - box.box[1])


def _file_of(path: Path, split: str | None) -> tuple[Path, str]:
    """Find the file of a split: train.csv and val.csv are splits of one data set."""
    own = split_kind(path.stem)
    if not own:
        return path, ""
    if split is None or path.stem == split or split_kind(split) == own:
        return path, path.stem
    other = _beside(path, split)
    if other is None:
        raise AftError(
            f"{path}: is the split {path.stem}, and there is no file of the split {split!r} beside "
            "it; name that file"
        )
    return other, other.stem


def _beside(path: Path, split: str) -> Path | None:
    """Find the file of another split beside a file that is a split."""
    kind = split_kind(split)
    found = [
        other
        for other in sorted(path.parent.iterdir())
        if is_manifest(other)
        and other.suffix.lower() == path.suffix.lower()
        and (other.stem == split or (kind and split_kind(other.stem) == kind))
    ]
    return found[0] if found else None


def _choose(path: Path, spelled: Mapping[str, str], wanted: str) -> str:
    """Choose a split whatever its case, which often changes within a column."""
    if wanted.lower() in spelled:
        return spelled[wanted.lower()]
    known = list(spelled.values())
    same = [name for name in known if split_kind(name) == (split_kind(wanted) or None)]
    if len(same) == 1:
        return same[0]
    what = "has several splits like" if same else "has no split"
    raise AftError(f"{path}: {what} {wanted!r}; there are {', '.join(same or known)}")


def read_rows(path: Path, note: Note = lambda text: None) -> Iterator[Row]:
    """Read the lines of a manifest.

    Args:
        path: of the file.
        note: is told what was guessed of its columns.

    Raises:
        AftError: the file or a line can't be read; the message names the line.
    """
    columns: dict[str, str] = {}
    root = path.parent
    try:
        for where, values in _parquet(path) if _is_parquet(path) else _text(path, note):
            columns = columns or _columns(path, values, note)
            try:
                yield _row(root, where, values, columns)
            except (AftError, ValueError) as error:
                raise AftError(f"{path}: {where}: {error}") from error
    except (OSError, csv.Error) as error:
        raise AftError(f"{path}: can't be read as a list of pictures ({reason(error)})") from error


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == PARQUET


def _text(path: Path, note: Note) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the values of each line of a CSV or TSV file."""
    with path.open("rb") as file:
        lines = _decoded(path, file)
        first = next(lines, "")
        delimiter, above = DELIMITERS[path.suffix.lower()], 0
        if said := EXCEL.fullmatch(first.rstrip("\r\n")):
            delimiter, first, above = said[1], next(lines, ""), 1
        elif delimiter not in first:
            other = next((each for each in ",\t;" if each in first), delimiter)
            if other != delimiter:
                note(f"its columns are taken as separated by {other!r}")
            delimiter = other
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        _refuse_twice(path, header)
        number = reader.line_num + above + 1
        for values in reader:
            if len(values) not in (0, len(header)):
                raise AftError(
                    f"{path}: line {number}: has {len(values)} values, but the first line names "
                    f"{len(header)} columns; quote values that hold {delimiter!r}"
                )
            if any(map(str.strip, values)):  # spreadsheets write empty rows
                yield f"line {number}", dict(zip(header, values, strict=True))
            number = reader.line_num + above + 1


def _decoded(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise AftError(
                f"{path}: line {number}: is not in UTF-8; save the file in UTF-8"
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the values of each row of a parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise AftError(
            f"{path}: parquet files are read by pyarrow, which is not installed; pip install "
            "'aftcli[parquet]', or save the file as CSV"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = {*COLUMNS, *itertools.chain(*COLUMNS.values()), *BOX, *SIZE}
            names = [name for name in file.schema_arrow.names if name.lower() in known]
            _refuse_twice(path, names)
            for batch in file.iter_batches(columns=names):
                for values in batch.to_pylist():
                    number += 1
                    # NaN, which no value equals, is how some writers leave one out.
                    plain = {k: "" if v is None or v != v else str(v) for k, v in values.items()}
                    yield f"row {number}", plain
    except ArrowException as error:
        raise AftError(f"{path}: can't be read as a parquet file ({reason(error)})") from error


def _refuse_twice(path: Path, names: Iterable[str]) -> None:
    """Refuse a column that is there twice, in any case: which is meant can't be told."""
    seen: dict[str, str] = {}
    for name in filter(None, names):
        if name.lower() in seen:
            raise AftError(
                f"{path}: has the columns {seen[name.lower()]!r} and {name!r}; rename one of them"
            )
        seen[name.lower()] = name


def _columns(path: Path, names: Iterable[str], note: Note) -> dict[str, str]:
    """Find the columns of a manifest by their usual names; those of a box where all are there."""
    known = {name.lower(): name for name in names}
    found = {}
    for column, others in COLUMNS.items():
        usual = [each for each in (column, *others) if each in known]
        if usual:
            found[column] = known[usual[0]]
        if usual and usual[0] != column:
            note(f"the column {known[usual[0]]!r} is taken as {column}")
    if not {"path", "label"} <= set(found):
        raise AftError(
            f"{path}: is not a list of pictures: path and label must be among its columns, which "
            f"are {', '.join(known.values())[:200]}"
        )
    for group in (BOX, SIZE):
        if set(group) <= set(known):
            found |= {column: known[column] for column in group}
    return found


def _row(root: Path, where: str, values: Mapping[str, str], columns: Mapping[str, str]) -> Row:
    """Check one line. What is wrong is said without its place."""
    text = {column: (values[name] or "").strip() for column, name in columns.items()}
    for column in COLUMNS:
        if column in text and not text[column]:
            raise AftError(f"has no {column}; write one, or take the line out")
    edges = [text.get(column, "") for column in BOX]
    box = None
    if any(edges):
        x, y, w, h = (float(edge or "nan") for edge in edges)
        size = (text.get(side) for side in SIZE)
        if not (w > 0 and h > 0):
            raise AftError(f"its box has a width of {w:g} and a height of {h:g}")
        box = Listed.read(map(str, (x, y, x + w - 1, y + h - 1)), size, first=0)
    name = below(root, text["path"])
    return Row(where, name, text["label"], text.get("split", ""), box)
