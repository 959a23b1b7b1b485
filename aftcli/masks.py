"""The mask store: TFT's results for a data set, in HDF5 (docs/masks-format.md).

A store grows as a folder of small files, each written whole or not at all, and is joined into
one file at the end; so whatever stops a run, what is there is right.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aftcli.errors import AftError
from aftcli.files import durable
from aftcli.loading import Broken
from aftcli.tft import cut_off, mask_of, threshold_map

FORMAT_VERSION = 1
# Recorded, but a store may be continued by another version of aft or from a moved data set.
INFORMATION = frozenset({"aft_version", "checkpoint", "data_set", "complete", "digest"})
ROWS = 1024  # images a chunk
FEATURES = ("v110", "v110")  # of HDF5: compact, and readable since 1.10 (2016)


class Rows(NamedTuple):
    """Results for n images; the fields are the store's datasets.

    Attributes:
        path: relative to the data set's root, bytes.
        label: index into the data set's classes, int32.
        class_index: c, the class explained, int32.
        probability: y^c, float32.
        probabilities: y_hat^c of each threshold, (n, |T|) float32.
        rpi: RPI of each threshold, (n, |T|) float32.
        tau: tau*, float32.
        attribution: I at the activation's size, (n, h, w) float16.
        correction: what turns it into the exact float32, (n, h, w) int32: the difference of
            the bits of both.
        mask: M_tau* at the activation's size, (n, h, w) bool.
        areas: share of the picture that each class covers, (n, classes) float32; (n, 0) where
            pictures show one class.
    """

    path: np.ndarray
    label: np.ndarray
    class_index: np.ndarray
    probability: np.ndarray
    probabilities: np.ndarray
    rpi: np.ndarray
    tau: np.ndarray
    attribution: np.ndarray
    correction: np.ndarray
    mask: np.ndarray
    areas: np.ndarray


class MaskRecord(NamedTuple):
    """One image of a store; see `Rows`. `attribution` is exact float32, (h, w)."""

    path: str
    label: int
    class_index: int
    probability: float
    probabilities: Tensor
    rpi: Tensor
    tau: float
    attribution: Tensor
    mask: Tensor
    areas: Tensor


def split_float(exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split float32 into float16 and the correction that gives it back bit for bit.

    >>> join_float(*split_float(np.float32([0.1, 1e-7, 0.0]))).tolist()[2]
    0.0
    """
    exact = np.ascontiguousarray(exact, dtype=np.float32)
    half = exact.astype(np.float16)
    return half, exact.view(np.int32) - half.astype(np.float32).view(np.int32)


def join_float(half: np.ndarray, correction: np.ndarray) -> np.ndarray:
    """The float32 that `split_float` was given."""
    bits: np.ndarray = half.astype(np.float32).view(np.int32) + correction
    return bits.view(np.float32)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name the settings in which a store differs from what is asked for."""
    named = []
    for key in sorted({*found, *wanted} - INFORMATION):
        if found.get(key) != wanted.get(key):
            named.append(f"{key} is {_short(found.get(key))}, asked for {_short(wanted.get(key))}")
    return named


def refuse_other_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a file that was begun with other settings.

    Raises:
        AftError: they differ; the message names where.
    """
    other = differences(found, wanted)
    if other:
        raise AftError(
            f"{path}: was begun with other settings: {'; '.join(other)}; use the same ones, "
            "another --run, or --overwrite"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


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


def _write_settings(group: h5py.Group, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        group.attrs[key] = json.dumps(value) if isinstance(value, list | dict) else value


def _read_settings(group: h5py.Group) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in group.attrs.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if isinstance(plain, str) and plain.startswith(("[", "{")):
            plain = json.loads(plain)
        settings[key] = plain
    return settings


def write_part(path: Path, rows: Rows, broken: list[Broken], settings: Mapping[str, Any]) -> None:
    """Write the results of one block of images.

    HDF5 builds the file in memory: a full disk then meets an ordinary write, which fails
    cleanly.
    """
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver=FEATURES) as file:
        _write_columns(file, rows)
        _write_broken(file, broken)
        _write_settings(file, settings)
        file.flush()
        content = file.id.get_file_image()
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
    with h5py.File(io.BytesIO(content), "r") as file:
        return _columns(file, slice(None)), _broken(file), _read_settings(file)


def _columns(group: h5py.Group, where: slice) -> Rows:
    return Rows(*(group[name][where] for name in Rows._fields))


def _broken(group: h5py.Group) -> list[Broken]:
    paths, reasons = (group[f"broken_{name}"].asstr()[:] for name in ("path", "reason"))
    return [Broken(path, reason) for path, reason in zip(paths, reasons, strict=True)]


def join_parts(path: Path, parts: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Join the blocks of a store, in their order, into one file; memory stays flat."""
    parts = list(parts)
    with durable(path) as temporary:
        # HDF5 crashes where the disk is full; parts together are larger than the whole.
        _require_space(temporary, 2**16 + sum(p.stat().st_size for p in parts if p.exists()))
        broken: list[Broken] = []
        running = hashlib.sha256()
        with h5py.File(temporary, "w", libver=FEATURES) as file:
            for part in parts:
                read = read_part(part)
                if read is None:
                    raise AftError(f"{part}: is damaged; run the same command again")
                rows, more, _ = read
                broken += more
                _append(file, rows)
                _digest(running, rows)
            _write_broken(file, broken)
            _write_settings(file, {**settings, "digest": running.hexdigest(), "complete": True})


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


def _digest(running: Any, rows: Rows) -> None:  # noqa: ANN401 - hashlib's objects have no name
    """Fold rows into a digest, row by row: the same whatever the blocks were."""
    for row in zip(*rows, strict=True):
        for value in row:
            running.update(value.tobytes() if hasattr(value, "tobytes") else bytes(value))


class MaskStore(torch.utils.data.Dataset[MaskRecord]):
    """TFT's masks of a data set: a sequence of records, and a torch Dataset.

    Opens at once and reads what is asked for: memory does not grow with the number of images.
    Safe in DataLoader workers.

    Args:
        path: an `.h5` file of `aft gen-masks`.

    Raises:
        AftError: the file is missing, damaged, unfinished, or no mask store.

    Attributes:
        path: of the file.
        settings: what the masks were made with (docs/masks-format.md).
        broken: images that could not be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[int, h5py.File] = {}
        self._columns: dict[str, h5py.Dataset] = {}
        try:
            self.settings = _read_settings(self._file)
            if self.settings.get("format_version") != FORMAT_VERSION:
                raise AftError(
                    f"{self.path}: is no mask store of format {FORMAT_VERSION}; make it again "
                    "with aft gen-masks"
                )
            self._length = len(self._columns["path"])
            lengths = {len(self._columns[name]) for name in Rows._fields}
            if lengths != {self._length} or not self.settings.get("complete"):
                raise AftError(f"{self.path}: is not complete; run aft gen-masks again")
            self.broken = _broken(self._file)
        except AftError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise AftError(
                f"{self.path}: can't be read as a mask store ({_line(error)}); make it again "
                "with aft gen-masks --overwrite"
            ) from error

    @property
    def _file(self) -> h5py.File:
        # One handle a process: HDF5 handles do not survive a fork.
        if os.getpid() not in self._files:
            if not self.path.is_file():
                raise AftError(f"{self.path}: there is no such mask file; run aft gen-masks")
            self._files[os.getpid()] = file = h5py.File(self.path, "r")
            # Kept open: HDF5 caches the chunks of open datasets.
            self._columns = {name: file[name] for name in Rows._fields if name in file}
        return self._files[os.getpid()]

    def __len__(self) -> int:
        return self._length

    def rows(self, start: int, stop: int) -> Rows:
        """Results of the images start..stop, as stored.

        Raises:
            AftError: the file is damaged there.
        """
        try:
            _ = self._file
            return Rows(*(self._columns[name][start:stop] for name in Rows._fields))
        except (OSError, KeyError) as error:
            raise AftError(
                f"{self.path}: is damaged ({_line(error)}); make it again with aft gen-masks "
                "--overwrite"
            ) from error

    def __getitem__(self, index: int) -> MaskRecord:
        """The record of one image."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} images, asked for {index}")
        index %= len(self)
        row = Rows(*(column[0] for column in self.rows(index, index + 1)))
        return MaskRecord(
            os.fsdecode(bytes(row.path)),
            int(row.label),
            int(row.class_index),
            float(row.probability),
            torch.from_numpy(row.probabilities),
            torch.from_numpy(row.rpi),
            float(row.tau),
            torch.from_numpy(join_float(row.attribution, row.correction)),
            torch.from_numpy(row.mask),
            torch.from_numpy(row.areas),
        )

    def __iter__(self) -> Iterator[MaskRecord]:
        return (self[index] for index in range(len(self)))

    def full_attribution(self, index: int) -> Tensor:
        """I of one image at the model's input size, shape (H, W), exactly as it was searched."""
        size = tuple(self.settings["preprocessing"]["size"])
        attribution = self[index].attribution[None, None]
        return F.interpolate(attribution, size, mode="bilinear", align_corners=False)[0, 0]

    def full_mask(self, index: int) -> Tensor:
        """M_tau* of one image at the model's input size, shape (H, W), bool, rebuilt exactly."""
        attribution = self.full_attribution(index)[None]
        tau = attribution.new_tensor([self[index].tau])
        cut = cut_off(attribution, tau, self.settings["threshold_mode"])
        return mask_of(threshold_map(attribution, cut[:, 0]))[0]

    def verify(self) -> None:
        """Read everything and compare with the digest that was stored with it.

        Raises:
            AftError: the content is not what was written.
        """
        running = hashlib.sha256()
        for start in range(0, len(self), ROWS):
            _digest(running, self.rows(start, min(start + ROWS, len(self))))
        if running.hexdigest() != self.settings["digest"]:
            raise AftError(
                f"{self.path}: the content is not what was written; make it again with "
                "aft gen-masks --overwrite"
            )

    def close(self) -> None:
        """Close the file."""
        for process, file in self._files.items():
            if process == os.getpid():
                file.close()
        self._files.clear()
        self._columns = {}

    def __enter__(self) -> MaskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_columns": {}}


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
