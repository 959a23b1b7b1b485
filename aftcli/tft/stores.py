"""The mask stores of a run, the classifiers that they were made with, and their images."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.core.inputs import check_images
from aftcli.core.methods import METHODS
from aftcli.data.blocks import content_of
from aftcli.data.parts import AS_FOUND, Held, Reading, spread
from aftcli.data.sets import DataSet, Sample, format_of, open_data_set
from aftcli.errors import AftError
from aftcli.models.checkpoint import card_classes, read_card
from aftcli.models.load import advice, load_classifier
from aftcli.networks.sources import is_model, refuse_unnamed
from aftcli.settings import AUTO, SOFTMAX
from aftcli.tft.hdf5 import Rows
from aftcli.tft.masks import MaskStore, differences


class Source(NamedTuple):
    """Source of classifiers: arguments of `load_classifier`; None takes what the masks say.

    `earlier` are layers before `layer` that are tuned with it; `known` are class names from
    earlier commands, such as a mask store's.
    """

    model: str | None = None
    checkpoint: Path | None = None
    layer: str | None = None
    classes: tuple[str, ...] | None = None
    device: torch.device | str = "cpu"
    earlier: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    output_key: str | None = None
    note: Callable[[str], None] = warnings.warn
    output: str = AUTO

    def load(self) -> Classifier:
        """Load the classifier.

        Raises:
            AftError: it takes volumes, which no file that is read here holds, or see
                `load_classifier`.
        """
        f = load_classifier(
            self.model,
            self.checkpoint,
            self.layer,
            classes=self.classes,
            device=self.device,
            output=self.output,
            output_key=self.output_key,
            note=self.note,
        )
        check_images(f)
        if self.classes is None and len(self.known) == len(f.classes):
            f.classes = Classes(self.known)
        return f

    def takes(self, name: str) -> bool:
        """Tell if a model that a file names is one that is asked for."""
        return is_model(self.model, name)

    def of_model(self, name: str, of: str | Path) -> Source:
        """Fill in the model that a file names, where none was asked for.

        Raises:
            AftError: that is somebody's own code, or on a hub.
        """
        if self.model is None:
            refuse_unnamed(name, of)
        return self._replace(model=self.model or name)

    def of_masks(self, made: dict[str, Any]) -> Source:
        """Fill in the classifier that masks were made with where nothing else was asked for.

        Raises:
            AftError: that is somebody's own code, or on a hub.
        """
        recorded = made.get("checkpoint")  # "" for published weights
        return self.of_model(made["model"], "the masks")._replace(
            checkpoint=self.checkpoint or (Path(recorded) if recorded else None),
            layer=self.layer or made["layer"],
            output=made.get("output", SOFTMAX) if self.output == AUTO else self.output,
            known=tuple(made.get("class_names", ())) or self.known,
            output_key=self.output_key or made.get("output_key"),
        )

    def named_by(
        self, stores: Sequence[Mapping[str, Any]], cards: Sequence[Mapping[str, Any]]
    ) -> Source:
        """Take the first class names that settings of stores or cards of checkpoints hold."""
        found = [tuple(made.get("class_names", ())) for made in stores]
        names = next(filter(None, [*found, *(card_classes(card).own for card in cards)]), ())
        return self._replace(known=names)


def with_names_of_run(f: Classifier, run: Path, note: Callable[[str], None]) -> Classifier:
    """Name a network's classes as a run's masks and checkpoints do, where nobody else has."""
    if f.classes != Classes.numbered(len(f.classes)):
        return f
    weights, paths = f.weights_hash(), sorted((run / "tuned").glob("[!.]*.safetensors"))
    stores = [s.settings for s in open_stores(run, f.name, []) if s.settings["weights"] == weights]
    cards = [c for c in map(read_card, paths) if c and c["start"] == weights]
    names = Source().named_by(stores, cards).known
    if len(names) == len(f.classes):
        note(f"{run}: class names are taken from its masks or checkpoints: {', '.join(names)}")
        f.classes = Classes(names)
    return f


def open_stores(run: Path, model: str | None, cams: Sequence[str]) -> list[MaskStore]:
    """Open the mask stores that a run has, perhaps none; arguments as of `find_stores`."""
    paths = sorted((run / "masks").glob("*.h5"))
    stores = [MaskStore(path) for path in paths if not path.name.startswith(".")]
    for store in stores:
        if store.settings["cam"] not in METHODS:
            raise AftError(
                f"{store.path}: its masks are of a method that this aft does not know "
                f"({store.settings['cam']}); take the file out of the folder"
            )
    return [
        s
        for s in stores
        if is_model(model, s.settings["model"]) and (not cams or s.settings["cam"] in cams)
    ]


def find_stores(run: Path, model: str | None, cams: Sequence[str]) -> list[MaskStore]:
    """Open the mask stores of a run.

    Args:
        run: where the study lives.
        model: only those of this model; None for all.
        cams: only those of these methods; empty for all.
    """
    found = open_stores(run, model, cams)
    missing = set(cams) - {s.settings["cam"] for s in found}
    if not found or missing:
        whose = f" of {model}" if model else ""
        which = f" by {', '.join(sorted(missing))}" if missing else ""
        paths = sorted((run / "masks").glob("*.h5"))
        there = ", ".join(path.name for path in paths) or "nothing"
        raise AftError(
            f"{run / 'masks'}: there are no masks{whose}{which} (there is {there}); make them with "
            "aft gen-masks DATASET, or pass the --run that has them"
        )
    return found


def check_made_for(store: MaskStore, f: Classifier) -> None:
    """Check that masks were made for a classifier."""
    made = store.settings
    asked = {
        "model": made["model"] if is_model(f.name, made["model"]) else f.name,
        "layer": f.layer_name,
        "weights": f.weights_hash(),
        "activation_shape": list(f.activation_shape),
        "preprocessing": f.preprocessing.as_dict(),
        "output": f.output,
    }
    asked["output_key"] = f.output_key
    unwritten = {"output": SOFTMAX, "output_key": ""}
    other = differences({key: made.get(key, unwritten.get(key)) for key in asked}, asked)
    if other:
        raise AftError(
            f"{store.path}: the masks were made for another classifier: {'; '.join(other)}; pass "
            "the --model, --checkpoint, --layer and --output that they were made with, or make "
            "them again with aft gen-masks"
        )


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


COMPARED = 32  # images of a data set that may be that of masks

VAL_SHARE = 0.2  # of a data set without a val split


def choose_held(
    run: Path, f: Classifier, data: Path, share: float | None, seed: int | None
) -> Held | None:
    """Choose what is held out of a data set, if it has no val split.

    Args:
        run: whose masks of the same data set, and
        f: the classifier, whose checkpoint say what was held out before.
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
