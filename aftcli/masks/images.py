"""The images of a mask store: found in their data set, checked; parts that are held out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.data.blocks import content_of
from aftcli.data.parts import AS_FOUND, Held, Reading, spread
from aftcli.data.sets import DataSet, Sample, format_of, open_data_set
from aftcli.errors import AftError
from aftcli.masks.hdf5 import Rows
from aftcli.masks.store import MaskStore
from aftcli.models.checkpoint import read_card
from aftcli.models.load import advice


def stored_contents(store: MaskStore) -> list[int]:
    """Read the content of each image of a store (`content_of`)."""
    found: list[int] = np.concatenate([c.content for c in chunks_of(store)]).tolist()
    return found


def chunks_of(store: MaskStore) -> list[Rows]:
    """Read a store, some thousand rows at a time."""
    return [store.rows(i, min(i + 4096, len(store))) for i in range(0, len(store), 4096)]


class StoredImages(NamedTuple):
    """The images of a mask store, or some of them.

    Attributes:
        data_set: the images.
        picked: their places in the store.
        chunks: the whole store.
    """

    data_set: DataSet
    picked: list[int]
    chunks: list[Rows]

    @property
    def contents(self) -> list[int]:
        """Return the contents of the images' files (`content_of`)."""
        found: list[int] = np.concatenate([c.content for c in self.chunks])[self.picked].tolist()
        return found


def stored_images(
    store: MaskStore,
    f: Classifier,
    data: Path | None,
    limit: int | None,
    reading: Reading = AS_FOUND,
) -> StoredImages:
    """Find a store's images in their data set, checked.

    Args:
        store: of `aft gen-masks`.
        f: the classifier.
        data: where the data set is now; default where it was.
        limit: take so many images, spread over the store.
        reading: of `data`.

    Raises:
        AftError: the store is damaged, has labels of other classes, its data set is gone, or
            images have changed.
    """
    _labels(store, f)  # known without reading the whole store
    store.verify()
    if not len(store):
        raise AftError(f"{store.path}: holds no image that could be read")
    chunks, picked = chunks_of(store), spread(len(store), limit)
    samples = _samples(store, f, chunks, picked)
    data_set = _data_set(store, f, data, reading, samples)
    different = store.changed(data_set, picked)
    if different:
        raise AftError(
            f"{store.path}: {len(different)} images have changed since the masks were made (first: "
            f"{different[0]}); make them again with aft gen-masks --overwrite"
        )
    return StoredImages(data_set, picked, chunks)


def _samples(
    store: MaskStore, f: Classifier, chunks: list[Rows], picked: list[int]
) -> list[Sample]:
    """Return some of a store's images with their classes of f; check that f has these."""
    paths = np.concatenate([c.path for c in chunks])
    labels = np.concatenate([c.label for c in chunks])
    index = _labels(store, f)
    if index is not None:
        if labels.max() >= len(index):
            raise AftError(f"{store.path}: has labels beyond its {len(index)} classes")
        labels = index[labels]
    samples = [Sample(os.fsdecode(bytes(paths[i])), int(labels[i])) for i in picked]
    used = [*(sample.label for sample in samples), *(c.class_index.max() for c in chunks)]
    if max(used) >= len(f.classes):
        raise AftError(f"{store.path}: has labels beyond the {len(f.classes)} classes of {f.name}")
    return samples


def _data_set(
    store: MaskStore,
    f: Classifier,
    data: Path | None,
    reading: Reading,
    samples: Sequence[Sample],
) -> DataSet:
    """Return a store's data set with these images, where it is now."""
    made = store.settings
    given = None
    if data is not None:
        given = open_data_set(data, made["split"] or None, f.classes, reading=reading)
    root = given.root if given else Path(made["data_set"])
    if not format_of(made["data_kind"]).is_there(root):
        raise AftError(
            f"{root}: the data set of {store.path} is no longer there; say where it is: "
            "aft finetune DATASET"
        )
    named, notes = (given.named, given.notes) if given else (None, ())
    kind, split = made["data_kind"], made["split"]
    held = Held(**made["held"]) if made.get("held") else None
    of = (kind, root, split, f.classes.names, True, samples, named, notes)
    files = given.files if given else Reading.of(made).files
    return DataSet(*of, every=bool(made.get("every")), files=files, held=held)


def _labels(store: MaskStore, f: Classifier) -> np.ndarray | None:
    """Find the classifier's class of each label of a store; None where labels are its classes."""
    made = store.settings
    if made["labels"] == "model":
        return None
    # Masks may have been made before anyone named the network's classes.
    found = f.classes.match(made["classes"])
    if None in found:
        raise AftError(
            f"{store.path}: the labels of these images are no classes of {f.name}{advice(f)}"
        )
    return np.array(found)


COMPARED = 32  # images of a data set that may be that of masks

VAL_SHARE = 0.2  # of a data set without a val split


def choose_held(
    run: Path, f: Classifier, data: Path, share: float | None, seed: int | None
) -> Held | None:
    """Choose what is held out of a data set, if it has no val split.

    Args:
        run: its masks of the same data set say what was held out before.
        f: the classifier; its checkpoint says so too.
        data: the data set.
        share: of the images; None for as before, otherwise VAL_SHARE; 0 holds out nothing.
        seed: chooses which; None for as before, otherwise 0.
    """
    if share is None:
        for made in _made(run, f):
            reading = Reading.of(made)
            if reading.is_named(data, _above(made)):
                before = reading.held
                return before and before._replace(seed=before.seed if seed is None else seed)
    share = VAL_SHARE if share is None else share
    return Held(share, seed or 0) if share else None


def _made(run: Path, f: Classifier) -> Iterator[Mapping[str, Any]]:
    card = read_card(Path(f.checkpoint)) if f.checkpoint else None
    if card:
        yield card
    for path in sorted((run / "masks").glob("[!.]*.h5")):
        with contextlib.suppress(AftError), MaskStore(path) as store:
            yield store.settings


def _above(made: Mapping[str, Any]) -> Path | None:
    """Return the path that opens a recorded data set; None where its format is not known."""
    with contextlib.suppress(AftError, KeyError):
        return format_of(made["data_kind"]).above(Path(made["data_set"]), made["split"])
    return None


def reread(
    data: Path | None,
    reading: Reading,
    made: Mapping[str, Any],
    classes: Classes,
    stores: Sequence[MaskStore] = (),
) -> Reading:
    """Read a data set that is named as that of masks was read, where it is the same.

    Args:
        data: the data set, which may have been moved or changed; None for that of the masks.
        reading: what was asked for.
        made: settings of the masks; empty without masks.
        classes: the model's.
        stores: the masks.
    """
    if not made:
        return reading
    before = Reading.of(made)
    every = before.every if reading.every is None else reading.every
    reading = (before if data is None else reading)._replace(every=every)
    place, other = data or _above(made), reading._replace(held=before.held)
    if before.held is None or place is None:
        return reading
    same = data is None or before.is_named(data, _above(made))
    with contextlib.suppress(AftError):
        part = open_data_set(place, made["held"]["part"], classes, reading=other)
        if part.limited(int(made["images"])).fingerprint() == made["images_hash"]:
            return other
        own = [s for s in stores if s.settings.get("images_hash") == made["images_hash"]]
        if own and made["held"]["part"] == "train" and (same or _holds_most(part, own[0])):
            paths = (path for chunk in chunks_of(own[0]) for path in chunk.path)
            names = {
                *(os.fsdecode(bytes(path)) for path in paths),
                *(b.path for b in own[0].broken),
            }
            return other._replace(trained=frozenset(names))
    return other if same else reading


def _holds_most(data_set: DataSet, store: MaskStore) -> bool:
    """Tell if a data set, under their names, has most of a store's images: of some of them."""
    some = [store.rows(i, i + 1) for i in spread(len(store), COMPARED)]
    names = [os.fsdecode(bytes(row.path[0])) for row in some]
    there = 0
    for name, row in zip(names, some, strict=True):
        with contextlib.suppress(AftError):
            there += content_of(data_set.format.picture(data_set, name)) == int(row.content[0])
    return 2 * there > len(some)
