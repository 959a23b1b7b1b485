"""The mask store: TFT's results for a data set, in HDF5 (docs/reference/files.md).

A store grows as a folder of small files, each written whole or not at all, and is joined into
one file at the end; so whatever stops a run, the files on disk are right.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from aftcli.core.cam import stretch
from aftcli.core.classes import Preprocessing
from aftcli.data.blocks import Used, changed_images
from aftcli.data.images import view_of
from aftcli.data.objects import to_rle
from aftcli.data.picture import Size
from aftcli.data.sets import DataSet
from aftcli.errors import AftError, first_line
from aftcli.settings import JUDGES, SOFTMAX
from aftcli.tft.hdf5 import (
    APPENDED,
    ROWS,
    Rows,
    check_form,
    check_store,
    check_values,
    fold_rows,
    join_float,
    open_file,
    read_broken,
    read_settings,
)
from aftcli.tft.judges import judges_named
from aftcli.tft.threshold import cut_off, mask_of, threshold_map

FORMAT_VERSION = 2

# Recorded, but not compared: a store may be resumed by another version of aft or from a moved
# data set, and class names, which older stores lack, change no number.
INFORMATION = frozenset(
    {
        *("aft_version", "checkpoint", "class_names", "complete", "data_set"),
        *("digest", "files", "imagenet", "seal"),
    }
)

# Settings that are written only where they are not the default.
UNWRITTEN = {
    **{"search": "exact", "precision": "no", "output": SOFTMAX, "output_key": ""},
    **{"held": {}, "every": False, JUDGES: []},
}

# Settings that users know by other words.
WORDS = {"every": "--labels", "held": "what is held out"}

# Settings whose values, hashes, say nothing to users.
HASHES = {
    "contents": "contents of images differ",
    "images_hash": "names or labels of images differ",
    "start": "weights that the training starts from differ",
}

# Settings that class names change, and nothing else of a store.
NAMING = frozenset({"classes", "images_hash", "labels"})


class MaskRecord(NamedTuple):
    """Record of one image of a store; see `Rows`. `attribution` is exact float32, (h, w)."""

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


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name the settings in which a store differs from what is asked for."""
    found, wanted = UNWRITTEN | dict(found), UNWRITTEN | dict(wanted)
    told = []
    for key in _differing(found, wanted):
        before, now = found.get(key), wanted.get(key)
        if key == "masks" and before and now:
            told += [f"masks: {each}" for each in _of_masks(before, now)]
        elif key in HASHES:
            told.append(HASHES[key])
        else:
            word = WORDS.get(key, key)
            told.append(f"{word} is {_short(key, before)}, asked for {_short(key, now)}")
    return told


def _of_masks(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings in which masks that a network was tuned with differ."""
    other = differences(before, now)
    same = not other and before.get("digest") != now.get("digest")
    return [*other, *(["they were made again, of other content"] if same else [])]


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    keys = sorted({*found, *wanted} - INFORMATION)
    return [key for key in keys if found.get(key) != wanted.get(key)]


def refuse_other_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a file that was begun with other settings."""
    named_since = (found.get("labels"), wanted.get("labels")) == ("data set", "model")
    if named_since and NAMING.issuperset(_differing(found, wanted)):
        raise AftError(
            f"{path}: was begun without class names, which change no mask; leave --classes out "
            "here and pass it to aft finetune and aft evaluate, or use --overwrite"
        )
    other = differences(found, wanted)
    if other:
        raise AftError(
            f"{path}: was begun with other settings: {'; '.join(other)}; use the same ones, "
            "another --run, or --overwrite"
        )


def _short(key: str, value: Any) -> str:  # noqa: ANN401 - of any setting
    if key == JUDGES:
        return judges_named(value)
    if key == "every":
        return "all" if value else "largest"
    if key == "held":
        return f"{value['share']:g} of each class by seed {value['seed']}" if value else "nothing"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _unreadable(path: Path, what: str, error: Exception) -> AftError:
    """Return the error that says why a store can't be read; the system may refuse a whole one."""
    if isinstance(error, OSError) and error.errno:
        locks = "unset HDF5_USE_FILE_LOCKING" if "lock file" in str(error) else "look at its disk"
        return AftError(
            f"{path}: can't be read ({os.strerror(error.errno)}), but may be undamaged; make it "
            f"readable or {locks}, then try again"
        )
    return AftError(
        f"{path}: {what} ({first_line(error)[:120]}); make it again with aft gen-masks --overwrite"
    )


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
        settings: what the masks were made with (docs/reference/files.md).
        broken: images that could not be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[int, h5py.File] = {}
        self._columns: dict[str, h5py.Dataset] = {}
        try:
            check_heaps(self.path)
            self.settings = read_settings(self._file)
            if self.settings.get("format_version") != FORMAT_VERSION:
                raise AftError(
                    f"{self.path}: is not a mask store of format {FORMAT_VERSION}; make it again "
                    "with aft gen-masks"
                )
            if not self.settings.get("complete"):
                raise AftError(f"{self.path}: is not complete; run aft gen-masks again")
            check_form(self._file)
            check_store(self._file, self.settings)
            self._length = len(self._file["path"])
            self.broken = read_broken(self._file)
        except AftError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise _unreadable(self.path, "can't be read as a mask store", error) from error

    @property
    def _file(self) -> h5py.File:
        # One handle a process: HDF5 handles do not survive a fork.
        if os.getpid() not in self._files:
            if not self.path.is_file():
                raise AftError(f"{self.path}: there is no such mask file; run aft gen-masks")
            self._files[os.getpid()] = open_file(self.path, "r")
            self._columns = {}
        return self._files[os.getpid()]

    def __len__(self) -> int:
        return self._length

    def rows(self, start: int, stop: int) -> Rows:
        """Results of the images start..stop, as stored.

        Raises:
            AftError: the file is damaged there.
        """
        rows = Rows(*self.columns(Rows._fields, start, stop))
        try:
            check_values(rows._asdict())
        except ValueError as error:
            raise _unreadable(self.path, "is damaged", error) from error
        return rows

    def columns(self, names: Sequence[str], start: int, stop: int) -> list[np.ndarray]:
        """Return some fields of `rows`, which costs less than all, unchecked.

        Raises:
            AftError: the file is damaged there.
        """
        try:
            file = self._file
            # Kept open: HDF5 caches the chunks of open datasets.
            self._columns = self._columns or {name: file[name] for name in Rows._fields}
            return [self._columns[name][start:stop] for name in names]
        except (OSError, KeyError, ValueError) as error:
            raise _unreadable(self.path, "is damaged", error) from error

    def __getitem__(self, index: int) -> MaskRecord:
        """Return the record of one image."""
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
        """Return I of one image at the model's input size, (H, W), exactly as it was searched."""
        size = tuple(self.settings["preprocessing"]["size"])
        return stretch(self[index].attribution[None], size)[0]

    def full_mask(self, index: int) -> Tensor:
        """Return M_tau* of one image at the model's input size, (H, W), bool, rebuilt exactly."""
        attribution = self.full_attribution(index)[None]
        tau = attribution.new_tensor([self[index].tau])
        cut = cut_off(attribution, tau, self.settings["threshold_mode"])
        return mask_of(threshold_map(attribution, cut[:, 0]))[0]

    def picture_mask(self, index: int, size: Size) -> np.ndarray:
        """Return M_tau* of one image in its picture's pixels, (height, width), bool.

        What the network does not see, as beside a centre crop, is False.

        Args:
            index: of the image.
            size: width and height of the picture as it is shown: EXIF's turn is applied.
        """
        mask = self.full_mask(index).numpy()
        view = view_of(size, Preprocessing.from_dict(self.settings["preprocessing"]))
        left, top, right, bottom = view.crop
        places = []
        for length, scaled, start, count in (
            (size[1], view.scaled[1], top, bottom - top),
            (size[0], view.scaled[0], left, right - left),
        ):
            place = np.floor((np.arange(length) + 0.5) * scaled / length).astype(int) - start
            places.append(np.where((place >= 0) & (place < count), place, count))
        seen: np.ndarray = np.pad(mask, ((0, 1), (0, 1)))[np.ix_(*places)]
        return seen

    def rle(self, index: int, size: Size | None = None) -> dict[str, Any]:
        """Return M_tau* of one image in COCO's run-length encoding, as pycocotools reads it.

        Args:
            index: of the image.
            size: as for `picture_mask`; None for a mask of the model's input.
        """
        if size is None:
            return to_rle(self.full_mask(index).numpy())
        return to_rle(self.picture_mask(index, size))

    def changed(self, data_set: DataSet, indices: Sequence[int]) -> list[str]:
        """Name the images of a data set that have changed since their masks were made.

        Args:
            data_set: the store's.
            indices: images of the store to look at.

        Raises:
            AftError: the store is damaged.
        """
        named, places = [], np.array(indices, np.int64)
        for start in range(0, len(self), ROWS):
            own = places[(places >= start) & (places < start + ROWS)] - start
            if len(own):
                used = self.columns(Used._fields, start, start + ROWS)
                named += changed_images(data_set, Used(*(column[own] for column in used)), [])
        return named + changed_images(data_set, None, self.broken)

    def verify(self) -> None:
        """Read everything and compare with the digest that was stored with it.

        Raises:
            AftError: the content has changed since it was written.
        """
        for _ in self.verified():
            pass

    def verified(self) -> Iterator[Rows]:
        """Yield all rows, some thousand at a time, and at the end do what `verify` does."""
        running = hashlib.sha256()
        for start in range(0, len(self), APPENDED):
            rows = self.rows(start, start + APPENDED)
            fold_rows(running, rows)
            yield rows
        if running.hexdigest() != self.settings["digest"]:
            raise AftError(
                f"{self.path}: its content has changed since it was written; make it again with "
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
