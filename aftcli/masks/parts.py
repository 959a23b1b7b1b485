"""Stores in the making: a part for each block of images, joined into one file at the end.

Parts are small files in a folder, each written whole or not at all; so whatever stops a run, the
files on disk are right.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from aftcli.data.blocks import Broken, Used, changed_images
from aftcli.data.sets import DataSet
from aftcli.errors import AftError
from aftcli.files import durable, make_folder, require_space
from aftcli.locks import locked
from aftcli.masks.hdf5 import (
    APPENDED,
    FEATURES,
    ROWS,
    SEAL,
    Rows,
    check_form,
    fold_rows,
    open_file,
    read_broken,
    read_settings,
    seal_of,
)
from aftcli.masks.settings import refuse_other_settings
from aftcli.masks.store import MaskStore

LEVEL = 1  # of deflate: 6 takes three times as long and saves 4 % of the file


def _write_columns(group: h5py.Group, rows: Rows) -> None:
    for name, values in rows._asdict().items():
        group.create_dataset(
            name,
            data=values,
            maxshape=(None, *(n or None for n in values.shape[1:])),
            chunks=(ROWS, *(max(n, 1) for n in values.shape[1:])),
            compression="gzip",
            compression_opts=LEVEL,
            shuffle=True,
            fletcher32=True,
        )


def _write_broken(group: h5py.Group, broken: list[Broken]) -> None:
    text = h5py.string_dtype()
    for name, values in (
        ("path", [b.path for b in broken]),
        ("reason", [b.reason for b in broken]),
    ):
        clean = [v.encode("utf-8", "replace") for v in values]
        group.create_dataset(f"broken_{name}", data=clean, dtype=text)
    group.create_dataset("broken_content", data=np.array([b.content for b in broken], np.int64))


def _write_settings(group: h5py.Group, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        group.attrs[key] = json.dumps(value) if isinstance(value, list | dict) else value


def write_part(path: Path, rows: Rows, broken: list[Broken], settings: Mapping[str, Any]) -> None:
    """Write the results of one block of images.

    HDF5 builds the file in memory: a full disk then meets an ordinary write, which fails well.
    """
    # The image that HDF5 1.14.4 gives of an open file has a checksum of its flags while open.
    image = io.BytesIO()
    with h5py.File(image, "w", libver=FEATURES) as file:
        for name, values in rows._asdict().items():
            file.create_dataset(name, data=values)
        _write_broken(file, broken)
        _write_settings(file, settings)
    content = image.getvalue()
    # HDF5 might still open a file whose write was torn; the digest detects it.
    digest = hashlib.sha256(content).digest()
    with durable(path) as temporary:
        temporary.write_bytes(content + digest)


def read_part(path: Path, own: bool = False) -> tuple[Rows, list[Broken], dict[str, Any]] | None:
    """Read the results of one block; None if the file is missing or damaged.

    One that this run has written or checked is read without its settings.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content, digest = data[:-32], data[-32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    try:
        with h5py.File.in_memory(content) as file:
            if not own:
                check_form(file)
            rows = Rows(*(file[name][:] for name in Rows._fields))
            return rows, read_broken(file), {} if own else read_settings(file)
    except (OSError, ValueError, KeyError):  # written by another version of aft
        return None


def join_parts(path: Path, parts: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Join the blocks of a store, in their order, into one file; memory stays flat."""
    parts = list(parts)
    with durable(path) as temporary:
        # HDF5 crashes where the disk is full; parts together are larger than the whole.
        require_space(temporary, 2**16 + sum(p.stat().st_size for p in parts if p.exists()))
        broken: list[Broken] = []
        running = hashlib.sha256()
        with open_file(temporary, "w") as file:
            for rows in _gathered(_rows_of(parts, broken)):
                _append(file, rows)
                fold_rows(running, rows)
            _write_broken(file, broken)
            whole = {**settings, "digest": running.hexdigest(), "complete": True}
            _write_settings(file, {**whole, SEAL: seal_of(whole)})


def _rows_of(parts: Iterable[Path], broken: list[Broken]) -> Iterator[Rows]:
    """Yield the rows of each block, and add its broken images to a list."""
    for part in parts:
        read = read_part(part, own=True)
        if read is None:
            raise AftError(f"{part}: is damaged; run the same command again")
        rows, more, _ = read
        broken += more
        yield rows


def _gathered(blocks: Iterable[Rows]) -> Iterator[Rows]:
    """Yield the rows of blocks, whole chunks at a time: HDF5 packs each of these once."""
    held: list[Rows] = []
    for rows in blocks:
        held.append(rows)
        full = sum(len(each.path) for each in held) // APPENDED * APPENDED
        if full:
            columns = [np.concatenate(column) for column in zip(*held, strict=True)]
            yield Rows(*(column[:full] for column in columns))
            held = [Rows(*(column[full:] for column in columns))]
    yield Rows(*(np.concatenate(column) for column in zip(*held, strict=True)))


def _append(file: h5py.File, rows: Rows) -> None:
    if "path" not in file:
        _write_columns(file, rows)
        return
    for name, values in rows._asdict().items():
        column = file[name]
        start = len(column)
        column.resize(start + len(values), axis=0)
        column[start:] = values


class Making:
    """One store in the making: its finished file, its parts, its lock."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.parts = path.with_name(f".{path.stem}.parts")

    def part(self, span: range) -> Path:
        """Return the file of a block."""
        return self.parts / f"{span.start:09d}-{span.stop:09d}"

    def finished(self) -> bool:
        """Check that the finished file exists; refuse one made with other settings."""
        if not self.path.exists():
            return False
        with MaskStore(self.path) as store:
            refuse_other_settings(self.path, store.settings, self.settings)
        return True

    def check_unchanged(self, data_set: DataSet) -> None:
        """Refuse a finished file that was changed, or whose images have changed since."""
        with MaskStore(self.path) as store:
            store.verify()
            different = store.changed(data_set, range(len(store)))
        if different:
            raise AftError(
                f"{self.path}: {len(different)} images have changed since it was made (first: "
                f"{different[0]}); --overwrite makes it again"
            )

    def has(self, span: range, data_set: DataSet) -> bool:
        """Check that a block is stored whole and its images are unchanged.

        A block of other settings is refused.
        """
        read = read_part(self.part(span))
        if read is None:
            return False
        rows, broken, settings = read
        refuse_other_settings(self.path, settings, self.settings)
        used = Used(rows.path, rows.content, rows.stamp)
        return not changed_images(data_set, used, broken)

    def clear(self) -> None:
        """Delete the finished file and the parts."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)


def take(stores: dict[str, Making], data_set: DataSet, held: ExitStack, overwrite: bool) -> None:
    """Lock stores; make folders for the parts of those that are not finished.

    Args:
        stores: by method.
        data_set: the images, which must be those of stores that are finished.
        held: keeps the locks.
        overwrite: delete what is there.

    Raises:
        AftError: a store is in use, of other settings, or was changed, or its images were.
    """
    for store in stores.values():
        make_folder(store.path.parent)
        held.enter_context(locked(store.path))
        if overwrite:
            store.clear()
        if store.finished():
            store.check_unchanged(data_set)
            # A kill may come between joining the parts and deleting them.
            shutil.rmtree(store.parts, ignore_errors=True)
        else:
            store.parts.mkdir(exist_ok=True)
