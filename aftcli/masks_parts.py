"""A mask store in the making: blocks of images as files of their own, joined at the end."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from aftcli.errors import AftError
from aftcli.files import durable
from aftcli.loading import Broken
from aftcli.masks import ROWS, Rows, fold_rows, read_broken
from aftcli.masks_form import FEATURES, SEAL, check_form, open_file, read_settings, seal_of


def _write_columns(group: h5py.Group, rows: Rows) -> None:
    for name, values in rows._asdict().items():
        chunks = (ROWS, *(max(n, 1) for n in values.shape[1:]))
        group.create_dataset(
            name,
            data=values,
            maxshape=(None, *(n or None for n in values.shape[1:])),
            chunks=chunks,
            compression="gzip",
            compression_opts=6,
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

    HDF5 builds the file in memory: a full disk then meets an ordinary write, which fails
    cleanly.
    """
    # The image that HDF5 1.14.4 gives of an open file has a checksum of its flags while open.
    image = io.BytesIO()
    with h5py.File(image, "w", libver=FEATURES) as file:
        _write_columns(file, rows)
        _write_broken(file, broken)
        _write_settings(file, settings)
    content = image.getvalue()
    # A torn write leaves a file that HDF5 might still open; its own digest tells.
    digest = hashlib.sha256(content).digest()
    with durable(path) as temporary:
        temporary.write_bytes(content + digest)


def read_part(path: Path) -> tuple[Rows, list[Broken], dict[str, Any]] | None:
    """Read the results of one block; None if the file is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content, digest = data[:-32], data[-32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            check_form(file)
            rows = Rows(*(file[name][:] for name in Rows._fields))
            return rows, read_broken(file), read_settings(file)
    except (OSError, ValueError, KeyError):  # written by another version of aft
        return None


def join_parts(path: Path, parts: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Join the blocks of a store, in their order, into one file; memory stays flat."""
    parts = list(parts)
    with durable(path) as temporary:
        # HDF5 crashes where the disk is full; parts together are larger than the whole.
        _require_space(temporary, 2**16 + sum(p.stat().st_size for p in parts if p.exists()))
        broken: list[Broken] = []
        running = hashlib.sha256()
        with open_file(temporary, "w") as file:
            for part in parts:
                read = read_part(part)
                if read is None:
                    raise AftError(f"{part}: is damaged; run the same command again")
                rows, more, _ = read
                broken += more
                _append(file, rows)
                fold_rows(running, rows)
            _write_broken(file, broken)
            whole = {**settings, "digest": running.hexdigest(), "complete": True}
            _write_settings(file, {**whole, SEAL: seal_of(whole)})


def _require_space(path: Path, size: int) -> None:
    """Fail cleanly, with OSError, if a file of that size can't be written."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _append(file: h5py.File, rows: Rows) -> None:
    if "path" not in file:
        _write_columns(file, rows)
        return
    for name, values in rows._asdict().items():
        column = file[name]
        start = len(column)
        column.resize(start + len(values), axis=0)
        column[start:] = values
