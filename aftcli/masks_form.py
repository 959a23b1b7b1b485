"""The form of a mask store's file (docs/masks-format.md): whatever else is in a file is refused.

HDF5 can name other files, load filters from the system and claim more than it holds; a store
that someone else has made is read without any of this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from aftcli.core.classifier import Preprocessing
from aftcli.errors import AftError
from aftcli.tft import check_settings

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
        ValueError: it has not; the message names what is wrong.
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
        raise ValueError("its broken images are no list")


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose numbers are in this very file, all of them."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link")
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{name} is no dataset")
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
        ValueError: they are not; the message names what is wrong.
    """
    if settings.get(SEAL) != seal_of(settings):
        raise ValueError("its attributes are not what was written")
    for key, kind in SETTINGS.items():
        if not isinstance(settings.get(key), kind):
            raise ValueError(f"its attribute {key} is missing or of another type")
    thresholds, shape = settings["thresholds"], settings["activation_shape"]
    if not all(isinstance(tau, float | int) for tau in thresholds):
        raise ValueError("its thresholds are no numbers")
    names = settings.get("class_names", [])  # only where the network's user gave them
    if not isinstance(names, list):
        raise ValueError("its class_names are no list")
    if not all(isinstance(name, str) for name in (*settings["classes"], *names)):
        raise ValueError("its classes are no names")
    try:
        Preprocessing.from_dict(settings["preprocessing"])
        check_settings(thresholds, *(settings[k] for k in ("masking", "fill", "threshold_mode")))
    except AftError as error:
        raise ValueError(str(error)) from error
    if file["rpi"].shape[1] != len(thresholds) or list(file["mask"].shape[1:]) != shape[1:]:
        raise ValueError("its columns do not fit its thresholds or its activations")


def check_values(rows: Mapping[str, np.ndarray]) -> None:
    """Check that columns hold what they can: indices of classes, shares, finite maps.

    Raises:
        ValueError: one does not.
    """
    for name in ("label", "class_index"):
        if len(rows[name]) and not 0 <= rows[name].min() <= rows[name].max() < MOST_CLASSES:
            raise ValueError(f"{name} has values that are no class")
    for name in ("tau", "probability", "attribution"):
        if not ((rows[name] >= 0) & (rows[name] <= 1)).all():
            raise ValueError(f"{name} has values outside [0, 1]")


def seal_of(settings: Mapping[str, Any]) -> str:
    """A hash of a store's settings, which HDF5 keeps without a checksum."""
    text = json.dumps({k: v for k, v in settings.items() if k != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_settings(group: h5py.Group) -> dict[str, Any]:
    """The attributes of a store, lists and dictionaries as such.

    Raises:
        ValueError: one is no single value, or too long; the message names it.
    """
    settings: dict[str, Any] = {}
    for key in group.attrs:
        found = group.attrs.get_id(key)
        if found.shape != () or found.get_storage_size() > LONGEST:
            raise ValueError(f"its attribute {key} is no single value")
        value = group.attrs[key]
        plain = value.item() if isinstance(value, np.generic) else value
        if isinstance(plain, str) and plain.startswith(("[", "{")):
            plain = json.loads(plain)
        settings[key] = plain
    return settings
