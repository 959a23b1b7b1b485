"""Jobs of fine-tuning: classifiers with the masks, or the data set, to tune them with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aftcli.aft.features import Masks
from aftcli.aft.tail import Earlier, earlier_layers
from aftcli.core.cam import upsample
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.core.zero_level import check_learnable, no_softmax
from aftcli.cutting.networks import outside_inference_mode
from aftcli.data.parts import AS_FOUND, Reading
from aftcli.data.sets import DataSet, format_of, not_its_classes, open_data_set, refuse_one_class
from aftcli.errors import AftError
from aftcli.files import file_stem
from aftcli.masks.hdf5 import Rows, join_float
from aftcli.masks.images import StoredImages, choose_held, chunks_of, stored_images
from aftcli.masks.store import MaskStore
from aftcli.masks.stores import check_made_for, find_stores, open_stores, with_names_of_run
from aftcli.models.load import advice, with_new_head
from aftcli.models.source import Source
from aftcli.settings import JUDGES
from aftcli.tft.judges import judges_of
from aftcli.tft.masking import FILLS, cut_off
from aftcli.tft.threshold import masked_image, threshold_map


@dataclass(frozen=True)
class Job:
    """A classifier, and the images and masks to tune it with.

    Attributes:
        f: the classifier.
        data_set: the training images; labels are f's classes.
        masks: of these images; None for a control.
        cam: the method that they were made with; None for a control.
        made: settings of the masks, plain values.
        new_head: f has a new last layer for the classes of the data set.
        earlier: layers before f's that are tuned with it.
        contents: of the images' files (`content_of`) where a mask store has them, and
            all images must be readable; None for a data set as it is found.
    """

    f: Classifier
    data_set: DataSet
    masks: Masks | None = None
    cam: str | None = None
    made: dict[str, Any] | None = None
    new_head: bool = False
    earlier: Earlier | None = None
    contents: Sequence[int] | None = None

    @property
    def stem(self) -> nn.Module:
        """Return w0, the modules before the first layer that is tuned."""
        return self.earlier.stem if self.earlier else self.f.stem

    @property
    def no_zero_level(self) -> str:
        """Say why no zero level can be learned from the masks; "" where one can."""
        if self.cam is None:
            return "there are no masks"
        if not METHODS[self.cam].signed:
            return "the masks' method has no sign"
        if why := no_softmax(self.f):
            return why
        return "the masks are soft" if (self.made or {}).get("masking") == "soft" else ""

    @property
    def name(self) -> str:
        """Base name of the checkpoint file."""
        return file_stem(self.f.name, self.cam or "control")


def mask_jobs(
    run: Path,
    source: Source,
    cams: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    reading: Reading = AS_FOUND,
) -> list[Job]:
    """Make jobs of a run's mask stores, each with the classifier that it was made with.

    Args as of `find_stores` and `mask_job`; `source` gives the classifiers.
    """
    loaded: dict[Source, Classifier] = {}
    jobs = []
    stores = find_stores(run, source.model, cams)
    for model in dict.fromkeys(store.settings["model"] for store in stores):
        judges_of(run, [s.settings for s in stores if s.settings["model"] == model])
    for store in stores:
        own = source.of_masks(store.settings)
        if own not in loaded:
            loaded[own] = with_names_of_run(own.load(), run, source.note)
        jobs.append(mask_job(store, loaded[own], data, limit, source.earlier, reading))
    return jobs


def control_jobs(
    run: Path,
    source: Source,
    data: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    reading: Reading = AS_FOUND,
    val_share: float | None = 0,
) -> list[Job]:
    """Make jobs without masks: of the images of a run's masks, or of another data set.

    Args as of `control_job`, but for:
        run: where the study lives.
        source: of the classifiers.
        data: default the data sets of the masks, with their classifiers.
        val_share: what is held out if there is no val split (`choose_held`).
    """
    models: dict[str, list[MaskStore]] = {}
    stores = (find_stores if data is None else open_stores)(run, source.model, [])
    for store in stores:
        models.setdefault(store.settings["model"], []).append(store)
    jobs = []
    for own in models.values():
        made = own[0].settings
        f = source.of_masks(made).load()
        masked = [s for s in own if _has_control(s, f)]
        if masked and (data is None or _holds(data, reading, masked[0], f)):
            given = (data, split, limit, source.earlier, reading)
            jobs.append(_control_of_masks(masked, f, *given))
        elif data is None:
            root, part = Path(made["data_set"]), split or made["split"]
            above = format_of(made["data_kind"]).above(root, part)
            same = (seed, source.earlier, Reading.of(made))
            jobs.append(control_job(f, above, part or None, limit, *same))
    if data is None or jobs:
        return jobs
    f = with_names_of_run(source.load(), run, source.note)
    if val_share != 0:
        reading = reading._replace(held=choose_held(run, f, data, val_share, seed))
    job = control_job(f, data, split, limit, seed, source.earlier, reading)
    for store in stores:
        if not job.new_head and _has_control(store, job.f):
            raise AftError(
                f"{data}: does not hold the images of {store.path}, so a network tuned on it is no "
                "control of one tuned with these masks; leave DATASET out to use theirs, or give "
                "another --run"
            )
    return [job]


def _has_control(store: MaskStore, f: Classifier) -> bool:
    """Tell if a classifier tuned without masks is the control of one tuned with these."""
    made = store.settings
    known = made["labels"] == "model" or None not in f.classes.match(made["classes"])
    return known and made["weights"] == f.weights_hash()


def _holds(data: Path, reading: Reading, store: MaskStore, f: Classifier) -> bool:
    """Tell if a data set has the images of a mask store, wherever it is now."""
    try:
        whole = reading._replace(held=None)
        given = open_data_set(data, store.settings["split"] or None, f.classes, reading=whole)
    except AftError:
        return False
    names = {sample.name for sample in given.samples}
    return all(
        os.fsdecode(bytes(path)) in names for chunk in chunks_of(store) for path in chunk.path
    )


def _control_of_masks(
    stores: Sequence[MaskStore],
    f: Classifier,
    data: Path | None,
    split: str | None,
    limit: int | None,
    earlier: Sequence[str],
    reading: Reading,
) -> Job:
    """Make the control's job of the images that masks were made of; they must all have the same."""
    first = stores[0]
    if split not in (None, first.settings["split"]):
        raise AftError(
            f"{first.path}: the masks are of {first.settings['split'] or 'no split'}, so a network "
            f"tuned on {split} is no control; leave --split out, or give another --run"
        )
    for store in stores[1:]:
        if _images_of(store) != _images_of(first):
            both = " and ".join(
                f"{s.path.name} {s.settings['images']} of {s.settings['data_set']}"
                for s in (first, store)
            )
            raise AftError(
                f"{first.path.parent}: the masks are of different images ({both}), so there is no "
                "control of both; make them of the same ones, or move one to another --run"
            )
    found = stored_images(first, f, data, limit, reading)
    return Job(f, found.data_set, earlier=_earlier(f, earlier), contents=found.contents)


@outside_inference_mode
def mask_job(
    store: MaskStore,
    f: Classifier,
    data: str | Path | None = None,
    limit: int | None = None,
    earlier: Sequence[str] = (),
    reading: Reading = AS_FOUND,
) -> Job:
    """Make a job of a mask store.

    Args:
        store: of `aft gen-masks`.
        f: the classifier.
        data: where the data set is now; default where it was.
        limit: take so many images, spread over the store.
        earlier: layers before f's that are tuned with it.
        reading: of `data`.

    Raises:
        AftError: the store is damaged, was made for another classifier, has labels of other
            classes, or its data set is gone.
    """
    made = store.settings
    check_made_for(store, f)
    found = stored_images(store, f, None if data is None else Path(data), limit, reading)
    searched = {k: made[k] for k in ("thresholds", "masking", "fill", "threshold_mode", "digest")}
    searched |= {JUDGES: made[JUDGES]} if JUDGES in made else {}
    return Job(
        f,
        found.data_set,
        _masks(store, f, found),
        made["cam"],
        searched,
        earlier=_earlier(f, earlier),
        contents=found.contents,
    )


def _masks(store: MaskStore, f: Classifier, images: StoredImages) -> Masks:
    """Take the masks of some of a store's images."""
    made, picked = store.settings, images.picked
    kept = zip(*map(_kept, images.chunks), strict=True)
    columns = [torch.from_numpy(np.concatenate(column))[picked] for column in kept]
    low, class_index, attribution, tau = columns

    def hide(x: Tensor, indices: Sequence[int]) -> Tensor:
        i = torch.tensor(indices)
        return kept_image(f, x, attribution[i], tau[i], made["fill"], made["threshold_mode"])

    def full(i: int) -> Tensor:
        return store.full_mask(picked[i])

    return Masks(low, full, class_index.long(), hide, made["digest"])


def _earlier(f: Classifier, names: Sequence[str]) -> Earlier | None:
    return earlier_layers(f, names) if names else None


def _images_of(store: MaskStore) -> list[tuple[Any, ...]]:
    """Return name, label and content of each image."""
    columns = [(c.path, c.label, c.content) for c in chunks_of(store)]
    return [row for each in columns for row in zip(*(c.tolist() for c in each), strict=True)]


def _kept(rows: Rows) -> tuple[np.ndarray, ...]:
    exact = join_float(rows.attribution, rows.correction)
    return rows.mask, rows.class_index, exact, rows.tau


def kept_image(
    f: Classifier, x: Tensor, attribution: Tensor, tau: Tensor, fill: str, mode: str
) -> Tensor:
    """Return x_hat_tau* = I_tau* * x, shape (N, 3, H, W), the inputs masked by the best map.

    I is the attribution at the activation's size, shape (N, h, w); tau* has shape (N,); fill and
    mode are those of the search.
    """
    full = upsample(attribution.to(x), x)
    muted = threshold_map(full, cut_off(full, tau[:, None], mode)[:, 0])
    return masked_image(x, muted, FILLS[fill](f, x))


@outside_inference_mode
def control_job(
    f: Classifier,
    data: str | Path,
    split: str | None,
    limit: int | None,
    seed: int = 0,
    earlier: Sequence[str] = (),
    reading: Reading = AS_FOUND,
) -> Job:
    """Make a job without masks; a data set of other classes than f's gets a new head.

    Args:
        f: the classifier.
        data: the data set.
        split: part of it; default train.
        limit: take so many images, spread over the classes.
        seed: of a new head.
        earlier: layers before f's that are tuned with it.
        reading: of `data`.

    Raises:
        AftError: there is no such data set or split, or it has one class alone.
    """
    data_set = open_data_set(data, split, f.classes, reading=reading).limited(limit)
    refuse_one_class(data_set)
    before = _earlier(f, earlier)
    if data_set.mapped:
        return Job(f, data_set, earlier=before)
    # The data set's classes are the new head's, in their order.
    new = with_new_head(f, data_set.classes, seed)
    notes = data_set.notes
    if f.checkpoint:
        notes += (f"{not_its_classes(data_set, f.classes, f.name)}; its last layer is replaced",)
        if not f.classes.own and not f.classes.wnids:
            notes += (f"to keep the last layer{advice(f)}",)
    data_set = replace(data_set, mapped=True, notes=notes)
    return Job(new, data_set, new_head=True, earlier=before)


def check_zero_level(job: Job, augment: bool) -> None:
    """Check that a zero level can be learned from a job's masks.

    Raises:
        AftError: it can't.
    """
    check_learnable(job.f)
    if (job.made or {}).get("masking") == "soft":
        raise AftError(
            f"{job.name}: a zero level needs binary masks, and these are soft, which rewards high "
            "scores, not the kept region (on ImageNet the average increase fell from .337 to "
            ".270); make masks with aft gen-masks --masking binary"
        )
    if job.earlier:
        raise AftError("--objective zero-level tunes one layer, the masks'; give --layer once")
    if augment:
        raise AftError("--objective zero-level trains on maps of whole images; leave --augment out")
