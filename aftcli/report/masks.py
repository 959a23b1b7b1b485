"""Mask stores for people, as progress and tables, and for programs: JSON, CSV, parquet."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from aftcli.core.classes import Classes
from aftcli.data.blocks import Broken, Processes
from aftcli.data.sets import format_of
from aftcli.errors import AftError
from aftcli.masks.generate import Done
from aftcli.masks.hdf5 import Rows
from aftcli.masks.store import MaskStore
from aftcli.report.terminal import cell, csv_cell, progress_bar, say, say_left_out, stdout_console
from aftcli.settings import JUDGES
from aftcli.tft.judges import judges_named
from aftcli.tft.threshold import raised


@dataclass(frozen=True)
class StoreSummary:
    """The content of a store in figures.

    Attributes:
        path: of the file.
        cam: the method.
        images: how many.
        broken: those that could not be read.
        tau: mean tau*.
        raised: share of images with a threshold whose RPI > 0; with --tft-judges at tau*.
        rpi: mean RPI at tau*.
        probability: mean y^c.
        bytes_per_image: of the file.
        labels: how many images have each label, by name.
        synonyms: names are ImageNet's, several a class.
    """

    path: Path
    cam: str
    images: int
    broken: list[Broken]
    tau: float
    raised: float
    rpi: float
    probability: float
    bytes_per_image: float
    labels: dict[str, int]
    synonyms: bool


def summarise(store: MaskStore, verify: bool = False) -> StoreSummary:
    """Sum up a store, a piece at a time.

    Args:
        store: of `aft gen-masks`.
        verify: also do what `MaskStore.verify` does, in the same pass.
    """
    classes = _classes_of(store)
    names = classes.names
    totals = np.zeros(4)
    labels = np.zeros(max(len(names), 1), dtype=np.int64)
    pieces = (store.rows(start, start + 4096) for start in range(0, len(store), 4096))
    for rows in store.verified() if verify else pieces:
        best, helped = _gained(store, rows)
        totals += [rows.tau.sum(), int(helped.sum()), float(best.sum()), rows.probability.sum()]
        counted = np.bincount(rows.label, minlength=len(labels))
        if len(counted) > len(labels):
            raise _damaged(store.path, f"it has labels beyond its {len(names)} classes")
        labels += counted
    count = max(len(store), 1)
    tau, share, rpi, probability = (totals / count).tolist()
    return StoreSummary(
        store.path,
        store.settings["cam"],
        len(store),
        store.broken,
        tau,
        share,
        rpi,
        probability,
        store.path.stat().st_size / count,
        {
            # Two of ImageNet's classes share a name with another (crane, maillot).
            name if names.count(name) == 1 else f"{name} ({i})": int(n)
            for i, (name, n) in enumerate(zip(names, labels, strict=False))
            if n
        },
        bool(classes.wnids),
    )


def _gained(store: MaskStore, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return RPI at tau*, and if a threshold (with judges: tau*) raises the probability, (N,)."""
    rpi, tau = torch.from_numpy(rows.rpi), torch.from_numpy(rows.tau)
    thresholds = tau.new_tensor(store.settings["thresholds"])
    best = (tau[:, None] - thresholds).abs().argmin(1, keepdim=True)
    helped = raised(rpi, torch.from_numpy(rows.probability))
    judged = store.settings.get(JUDGES)
    return rpi.gather(1, best)[:, 0], helped.gather(1, best)[:, 0] if judged else helped.any(1)


class Watched(NamedTuple):
    """The course of a run: images done now, seconds, images done before."""

    images: int
    seconds: float
    before: int


def watch(steps: Iterator[Done], total: int, processes: Processes, quiet: bool) -> Watched:
    """Run to the end, showing images/s, the time left, mean tau* and the share of RPI > 0."""
    share = -(-total // processes.count)
    speed, means = TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[means]}")
    columns = (BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn(), means)
    before = next(steps, None)
    known = before.images if before else 0
    start, images, tau, raised, maps = time.monotonic(), 0, 0.0, 0, 0
    with progress_bar(*columns, quiet=quiet or processes.index > 0) as bar:
        task = bar.add_task("masks", total=share, completed=known, speed="", means="")
        for done in steps:
            images, tau = images + done.images, tau + done.tau
            raised, maps = raised + done.raised, maps + done.maps
            said = f"tau* {tau / maps:.2f}, RPI > 0 in {raised / maps:.0%}" if maps else ""
            each = f"{images / max(time.monotonic() - start, 1e-9):.1f} images/s"
            bar.update(task, completed=known + images, speed=each, means=said)
    return Watched(images, time.monotonic() - start, known)


def print_stores(paths: list[Path], watched: Watched, json_: bool) -> None:
    """Print what a run of gen-masks has made: a table, the class counts, the broken images.

    Raises:
        AftError: no image could be read.
    """
    summaries = []
    for path in paths:
        with MaskStore(path) as store:
            summaries.append(summarise(store))
    speed = watched.images / watched.seconds if watched.images else None
    if json_:
        stores = [_summary_dict(s) for s in summaries]
        result = {"stores": stores, "seconds": watched.seconds, "images_per_second": speed}
        print(json.dumps(result, indent=2))
    else:
        _print_summaries(summaries)
        if speed:
            say(f"{watched.images} images in {watched.seconds:.0f} s, {speed:.2f} images/s")
    say_left_out(summaries[0].broken)
    if not any(summary.images for summary in summaries):
        raise AftError(
            f"{paths[0]}: holds no image, for none could be read; mend or replace them, then run "
            "the same command with --overwrite"
        )


def show_store(path: Path, json_: bool) -> None:
    """Print what a mask store holds, after checking its content against its digest."""
    with MaskStore(path) as store:
        settings = store.settings
        missing = {"classes", "cam"} - set(settings)
        if missing or not isinstance(settings["classes"], list):
            raise _damaged(path, f"its settings have no {min(missing, default='classes')}")
        summary = summarise(store, verify=True)
    if json_:
        result = {"settings": settings, **_summary_dict(summary)}
        try:
            print(json.dumps(result, indent=2, allow_nan=False))
        except ValueError as error:
            raise _damaged(path, "its settings or figures hold NaN") from error
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in settings.items():
        shown = judges_named(value) if key == JUDGES else _shown(value)
        table.add_row(cell(key), cell(shown))
    stdout_console(200).print(table)
    _print_summaries([summary])
    for broken in summary.broken:
        say(f"left out {broken.path}: {broken.reason}")


def _damaged(path: Path, what: str) -> AftError:
    return AftError(f"{path}: {what}; make it again with aft gen-masks --overwrite")


def _classes_of(store: MaskStore) -> Classes:
    """Name the classes of a store's labels as it does, otherwise after their folders."""
    from aftcli.networks.sources import imagenet_classes

    settings = store.settings
    names = settings["classes"] or settings.get("class_names")
    if names:
        return Classes(tuple(names))
    folders: dict[int, str] = {}
    for start in range(0, len(store), 4096):
        paths, column = store.columns(("path", "label"), start, start + 4096)
        labels, places = np.unique(column, return_index=True)
        for label, place in zip(labels.tolist(), places.tolist(), strict=True):
            folders[label] = os.fsdecode(bytes(paths[place])).partition("/")[0]
    known = imagenet_classes()
    count = max(folders, default=0) + 1
    if settings.get("imagenet") is True and count <= len(known):
        return known
    # Labels are ImageNet's classes by wnid only.
    if all(known.wnids[i : i + 1] == (name,) for i, name in folders.items()):
        return known
    if not format_of(settings["data_kind"]).named_by_folder:
        folders = {}
    return Classes(tuple(folders.get(i, f"class {i}") for i in range(count)))


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _summary_dict(summary: StoreSummary) -> dict[str, Any]:
    broken = [b._asdict() for b in summary.broken]
    values = {key: value for key, value in asdict(summary).items() if key != "synonyms"}
    return {**values, "path": str(summary.path), "broken": broken}


def _print_summaries(summaries: list[StoreSummary]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cam")
    for name in ("images", "broken", "tau*", "RPI > 0", "RPI", "prob.", "bytes/image"):
        table.add_column(name, justify="right")
    table.add_column("file", overflow="fold")
    for s in summaries:
        figures = (f"{s.tau:.3f}", f"{s.raised:.1%}", f"{s.rpi:.4f}", f"{s.probability:.4f}")
        counts = (str(s.images), str(len(s.broken)))
        row = (s.cam, *counts, *figures, f"{s.bytes_per_image:.0f}", s.path)
        table.add_row(*map(cell, row))
    stdout_console(200).print(table)
    labels = summaries[0].labels
    if len(labels) <= 30:
        synonyms = summaries[0].synonyms
        counted = ", ".join(
            f"{name.split(',')[0] if synonyms else name} {n}" for name, n in labels.items()
        )
    else:
        counted = f"{len(labels)} with {min(labels.values())} to {max(labels.values())} images each"
    say(f"classes: {counted}")


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
    settings, labels = store.settings, _classes_of(store)
    own = settings["labels"] == "model" or settings.get("class_names")
    known = settings.get("class_names") or (labels.names if own else ())
    for start in range(0, len(store), AT_ONCE):
        rows = store.rows(start, min(start + AT_ONCE, len(store)))
        best = _gained(store, rows)[0].numpy()
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


EXPORTS: dict[str, Callable[[MaskStore], None]] = {
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


def export_store(path: Path, words: str) -> None:
    """Print the images of a store, after checking its content against its digest.

    Args:
        path: of the store.
        words: a key of EXPORTS.
    """
    with MaskStore(path) as store:
        store.verify()
        EXPORTS[words](store)
