"""The images of a mask store as rows for other programs: JSON, CSV, parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from aftcli.errors import AftError
from aftcli.report.masks import classes_of
from aftcli.report.terminal import csv_cell
from aftcli.tft.masks import MaskStore
from aftcli.tft.threshold import first_maximum

AT_ONCE = 4096  # images that are read together


class ImageRow(NamedTuple):
    """The result of one image; the fields are the columns.

    Attributes:
        path: below the data set's root.
        label: the name of its label.
        label_index: of the label.
        class_name: the class that is explained, by name; None where the store has no names.
        class_index: of that class.
        probability: of that class.
        tau: tau*.
        rpi: RPI at tau*.
        area: the share of the layer's cells that the mask keeps.
    """

    path: str
    label: str
    label_index: int
    class_name: str | None
    class_index: int
    probability: float
    tau: float
    rpi: float
    area: float


def image_rows(store: MaskStore) -> Iterator[ImageRow]:
    """Read the images of a store, a piece at a time."""
    settings, labels = store.settings, classes_of(store)
    own = settings["labels"] == "model" or settings.get("class_names")
    known = settings.get("class_names") or (labels.names if own else ())
    for start in range(0, len(store), AT_ONCE):
        rows = store.rows(start, min(start + AT_ONCE, len(store)))
        rpi, y = torch.from_numpy(rows.rpi), torch.from_numpy(rows.probability)
        best = rpi.gather(1, first_maximum(rpi, y)[:, None])[:, 0].numpy()
        areas = rows.mask.reshape(len(rows.mask), -1).mean(1).tolist()
        indices = (column.tolist() for column in (rows.path, rows.label, rows.class_index))
        numbers = (_shortest(column) for column in (rows.probability, rows.tau, best))
        plain = zip(*indices, *numbers, areas, strict=True)
        for path, label, c, probability, tau, gain, area in plain:
            yield ImageRow(
                path.decode("utf-8", "replace"),
                _name(labels.names, label) or f"class {label}",
                label,
                _name(known, c),
                c,
                probability,
                tau,
                gain,
                area,
            )


def _shortest(values: np.ndarray) -> list[float]:
    """Return float32 values as the shortest decimals that give them back: 0.3, not 0.30000001."""
    return [float(str(value)) for value in values]


def _name(names: tuple[str, ...] | list[str], index: int) -> str | None:
    return names[index] if index < len(names) else None


def as_json(store: MaskStore) -> None:
    """Print a list of objects, one a line."""
    print("[")
    for number, row in enumerate(image_rows(store)):
        if number:
            print(",")
        print(json.dumps(row._asdict(), allow_nan=False), end="")
    print("\n]")


def as_csv(store: MaskStore) -> None:
    """Print a line for each image, below one of the columns' names."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(ImageRow._fields)
    writer.writerows(map(csv_cell, row) for row in image_rows(store))


def as_parquet(store: MaskStore) -> None:
    """Write a parquet file to stdout.

    Raises:
        AftError: pyarrow is not installed, or stdout is a terminal.
    """
    if sys.stdout.isatty():
        raise AftError("--format parquet writes no text; send it to a file: ... > masks.parquet")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise AftError(
            "--format parquet needs pyarrow, which is not installed; pip install "
            "'aftcli[parquet]', or use --format csv"
        ) from error
    text, index, number = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    kinds = (text, text, index, text, index, number, number, number, number)
    schema = pyarrow.schema(list(zip(ImageRow._fields, kinds, strict=True)))
    with parquet.ParquetWriter(sys.stdout.buffer, schema) as writer:
        rows = image_rows(store)
        while piece := list(islice(rows, AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist([r._asdict() for r in piece], schema))


FORMATS: dict[str, Callable[[MaskStore], None]] = {
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


def export_store(path: Path, words: str) -> None:
    """Print the images of a store, after checking its content against its digest.

    Args:
        path: of the store.
        words: a key of FORMATS.
    """
    with MaskStore(path) as store:
        store.verify()
        FORMATS[words](store)
