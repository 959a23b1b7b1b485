"""The form of a mask store's HDF5 file: columns, attributes, what is checked."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from aftcli.core.classes import Preprocessing
from aftcli.data.blocks import Broken
from aftcli.data.parts import check_held
from aftcli.errors import AftError
from aftcli.files import values_hash
from aftcli.settings import JUDGES, OUTPUTS, SOFTMAX, Search

# The type of each column and its axes after the first, which is the image. Equal letters are
# equal lengths.
COLUMNS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "path": ("S", ()),
    "label": ("int32", ()),
    "class_index": ("int32", ()),
    "probability": ("float32", ()),
    "probabilities": ("float32", ("T",)),
    "rpi": ("float32", ("T",)),
    "tau": ("float32", ()),
    "attribution": ("float16", ("h", "w")),
    "correction": ("int32", ("h", "w")),
    "mask": ("bool", ("h", "w")),
    "areas": ("float32", ("classes",)),
    "content": ("int64", ()),
    "stamp": ("int64", (2,)),
}

BROKEN = ("broken_path", "broken_reason", "broken_content")

SETTINGS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "weights", "checkpoint", "layer", "cam"), str),
    **dict.fromkeys(("masking", "fill", "threshold_mode"), str),
    **dict.fromkeys(("data_set", "data_kind", "split", "labels", "digest"), str),
    **dict.fromkeys(("activation_shape", "thresholds", "classes"), list),
    "preprocessing": dict,
}

JUDGE = ("name", "weights", "key")  # of each judge of a search

# The types of attributes that are written only where they are not the default.
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "class_names": list,
    "output_key": str,
    "every": (bool, int),
    JUDGES: list,
}

FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}

LAYOUTS = {h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED}

DEFLATED = 1040  # times its size is the most that deflate makes of data

FEATURES = ("v110", "v110")  # of HDF5: compact, and readable since 1.10 (2016)

LONGEST = 2**20  # bytes of an attribute: the names of a thousand classes take 30,000

MOST_CLASSES = 2**20

SEAL = "seal"


def open_file(path: Path, mode: Literal["r", "w"]) -> h5py.File:
    """Open a store without HDF5's locks, which fail where the file system has none.

    They are not needed: a store is written under another name and renamed, and never changed.

    Args:
        path: of the file.
        mode: read or write.
    """
    return h5py.File(path, mode, libver=FEATURES if mode == "w" else None, locking=False)


def check_form(file: h5py.File) -> None:
    """Check that a file, whole or of one block, has a store's datasets and nothing more.

    Raises:
        ValueError: the form is wrong; the message says where.
    """
    strange = sorted({*file} - {*COLUMNS, *BROKEN})
    missing = sorted({*COLUMNS, *BROKEN} - {*file})
    if strange or missing:
        raise ValueError(f"it has {', '.join(strange) or 'no'} {', '.join(missing)}"[:120])
    lengths: dict[str | int, int] = {}
    for name, (kind, axes) in COLUMNS.items():
        column = _dataset(file, name)
        if column.dtype.kind != "S" if kind == "S" else column.dtype != np.dtype(kind):
            raise ValueError(f"{name} holds {column.dtype}")
        if len(column.shape) != 1 + len(axes):
            raise ValueError(f"{name} has shape {column.shape}")
        for axis, length in zip(("N", *axes), column.shape, strict=True):
            wanted = axis if isinstance(axis, int) else lengths.setdefault(axis, length)
            if length != wanted:
                raise ValueError(f"{name} has shape {column.shape}")
    columns = [_dataset(file, name) for name in BROKEN]
    text = [h5py.check_string_dtype(c.dtype) is not None for c in columns]
    if text != [True, True, False] or len({c.shape for c in columns}) != 1:
        raise ValueError("its broken images are not a list")


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset, checked to have all its numbers in this very file."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link")
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{name} is not a dataset")
    made = found.id.get_create_plist()
    filters = {made.get_filter(i)[0] for i in range(made.get_nfilters())}
    elsewhere = made.get_layout() not in LAYOUTS or made.get_external_count()
    if elsewhere or not filters <= FILTERS:
        raise ValueError(f"{name} is kept elsewhere, or packed in a way that stores are not")
    if found.nbytes > DEFLATED * found.id.get_storage_size():
        raise ValueError(f"{name} claims more than the file holds")
    return found


def check_store(file: h5py.File, settings: Mapping[str, Any]) -> None:
    """Check that a finished store's settings are there and fit its columns.

    Raises:
        ValueError: the settings are wrong; the message says which.
    """
    if settings.get(SEAL) != seal_of(settings):
        raise ValueError("its attributes are not what was written")
    given = {key: kind for key, kind in OPTIONAL.items() if key in settings}
    for key, kind in (SETTINGS | given).items():
        if not isinstance(settings.get(key), kind):
            raise ValueError(f"its attribute {key} is missing or of another type")
    thresholds, shape = settings["thresholds"], settings["activation_shape"]
    if not all(isinstance(tau, float | int) for tau in thresholds):
        raise ValueError("its thresholds are not numbers")
    check_held(settings.get("held"))
    names = settings.get("class_names", [])  # only where the network's user gave them
    if not all(isinstance(name, str) for name in (*settings["classes"], *names)):
        raise ValueError("its classes are not names")
    for judge in settings.get(JUDGES, ()):
        if not (isinstance(judge, dict) and all(isinstance(judge.get(k), str) for k in JUDGE)):
            raise ValueError(f"its {JUDGES} are not judges")
    if settings.get("output", SOFTMAX) not in OUTPUTS[1:]:
        raise ValueError("its output is not one that a network has")
    try:
        Preprocessing.from_dict(settings["preprocessing"])
        Search(tuple(thresholds), *(settings[k] for k in ("masking", "fill", "threshold_mode")))
    except AftError as error:
        raise ValueError(str(error)) from error
    if file["rpi"].shape[1] != len(thresholds) or list(file["mask"].shape[1:]) != shape[1:]:
        raise ValueError("its columns do not fit its thresholds or its activations")


def check_values(rows: Mapping[str, np.ndarray]) -> None:
    """Check that columns hold possible values: indices of classes, shares, finite maps.

    Raises:
        ValueError: a column does not.
    """
    for name in ("label", "class_index"):
        if len(rows[name]) and not 0 <= rows[name].min() <= rows[name].max() < MOST_CLASSES:
            raise ValueError(f"{name} has values that are not classes")
    for name in ("tau", "probability", "attribution"):
        if not ((rows[name] >= 0) & (rows[name] <= 1)).all():
            raise ValueError(f"{name} has values outside [0, 1]")


def seal_of(settings: Mapping[str, Any]) -> str:
    """Hash a store's settings, which HDF5 keeps without a checksum."""
    return values_hash({k: v for k, v in settings.items() if k != SEAL})


def read_settings(group: h5py.Group) -> dict[str, Any]:
    """Read the attributes of a store, with lists and dictionaries decoded.

    Raises:
        ValueError: an attribute is not a single value, or is too long; the message names it.
    """
    settings: dict[str, Any] = {}
    for key in group.attrs:
        found = group.attrs.get_id(key)
        if found.shape != () or found.get_storage_size() > LONGEST:
            raise ValueError(f"its attribute {key} is not a single value")
        value = group.attrs[key]
        plain = value.item() if isinstance(value, np.generic) else value
        if isinstance(plain, str) and plain.startswith(("[", "{")):
            plain = json.loads(plain)
        settings[key] = plain
    return settings


ROWS = 1024  # images a chunk

APPENDED = 4 * ROWS  # images that are added to a store at a time


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
        correction: difference to the bits of the exact float32, (n, h, w) int32.
        mask: M_tau* at the activation's size, (n, h, w) bool.
        areas: share of the picture that each class covers, (n, classes) float32; (n, 0) where
            pictures show one class.
        content: of the image's file (`content_of`), int64.
        stamp: of the image's file (`stamp_of`), (n, 2) int64.
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
    content: np.ndarray
    stamp: np.ndarray


def split_float(exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split float32 into float16 and the correction that gives it back bit for bit.

    >>> join_float(*split_float(np.float32([0.1, 1e-7, 0.0]))).tolist()[2]
    0.0
    """
    exact = np.ascontiguousarray(exact, dtype=np.float32)
    half = exact.astype(np.float16)
    return half, exact.view(np.int32) - half.astype(np.float32).view(np.int32)


def join_float(half: np.ndarray, correction: np.ndarray) -> np.ndarray:
    """Return the float32 that `split_float` was given."""
    bits: np.ndarray = half.astype(np.float32).view(np.int32) + correction
    return bits.view(np.float32)


def read_broken(group: h5py.Group) -> list[Broken]:
    """Read the list of images that could not be read."""
    paths, reasons = (group[f"broken_{name}"].asstr()[:] for name in ("path", "reason"))
    contents = group["broken_content"][:].tolist()
    return [Broken(*each) for each in zip(paths, reasons, contents, strict=True)]


def fold_rows(running: Any, rows: Rows) -> None:  # noqa: ANN401 - hashlib's objects have no name
    """Fold rows into a digest, row by row: the same whatever the blocks were.

    Without the stamps: a data set may be copied.
    """
    columns = [values for name, values in rows._asdict().items() if name != "stamp"]
    count = len(rows.path)
    # A column without width, as areas may be, has no bytes to view.
    flat = [np.ascontiguousarray(c).reshape(count, -1) for c in columns if c.size]
    if flat:
        running.update(np.concatenate([c.view(np.uint8) for c in flat], axis=1).tobytes())


HEAP = b"GCOL\x01\0\0\0"  # begins a heap of texts in an HDF5 file, format 1

HEAD = 16  # bytes before the objects of a heap, and before the data of each


def check_heaps(path: Path) -> None:
    """Refuse, by ValueError, damaged heaps of texts: HDF5 walks some of them for ever."""
    if not path.is_file() or not path.stat().st_size:
        return  # whoever opens it says so
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(HEAP)
        while start >= 0:
            end = start + int.from_bytes(data[start + 8 : start + HEAD], "little")
            place = start + HEAD
            while place + HEAD <= end:
                kind, size = data[place : place + 2], data[place + 8 : place + HEAD]
                length = int.from_bytes(size, "little")
                # Free space counts its own head; data is padded to 8 bytes.
                length = HEAD + -(-length // 8) * 8 if any(kind) else length
                if not HEAD <= length <= end - place or end > len(data):
                    raise ValueError("its heap of texts is damaged")
                place += length
            start = data.find(HEAP, start + 1)
