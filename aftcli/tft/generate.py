"""The auxiliary data of AFT: TFT's masks M_tau* for a whole data set (§4.1, §4.2).

Images are worked on in blocks of a fixed composition, so that results depend neither on
interruptions nor on the number of processes; each block is stored whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftcli.core.cam import class_score, scaled_map, upsample
from aftcli.core.classifier import Classifier
from aftcli.cutting.networks import outside_inference_mode
from aftcli.data.blocks import (
    Loaded,
    Processes,
    Used,
    batches,
    changed_images,
    load_blocks,
    spans_of,
)
from aftcli.data.sets import DataSet, not_its_classes
from aftcli.errors import AftError
from aftcli.files import file_stem, make_folder
from aftcli.locks import locked
from aftcli.networks.sources import imagenet_classes
from aftcli.settings import JUDGES, SOFTMAX, Search
from aftcli.tft.hdf5 import Rows, join_parts, read_part, split_float, write_part
from aftcli.tft.judges import Judge
from aftcli.tft.masks import FORMAT_VERSION, MaskStore, refuse_other_settings
from aftcli.tft.search import check_judges, search_threshold
from aftcli.tft.threshold import TftResult, cut_off, mask_of, threshold_map
from aftcli.version import __version__

BATCH = 16  # images in one pass of the stem


class Tuned(NamedTuple):
    """Result of TFT for one batch by one method, at both sizes.

    Attributes:
        class_index: the class c that is explained, shape (N,): by default the predicted one.
        tft: tau*, RPI and probabilities.
        attribution: I at the activation's size, shape (N, h, w).
        mask: M_tau* at the activation's size, shape (N, h, w), bool.
    """

    class_index: Tensor
    tft: TftResult
    attribution: Tensor
    mask: Tensor


class Done(NamedTuple):
    """Progress of a run: images that are done.

    Attributes:
        images: how many.
        tau: the sum of their tau*, over methods.
        raised: how many maps have a threshold with RPI > 0, over methods.
        maps: how many maps.
        broken: how many of the images could not be read.
    """

    images: int
    tau: float = 0.0
    raised: int = 0
    maps: int = 0
    broken: int = 0


@torch.no_grad()
def tune_batch(
    f: Classifier,
    x: Tensor,
    methods: Sequence[str],
    settings: Search,
    wanted: Tensor | None = None,
    judges: Sequence[Judge] = (),
) -> list[Tuned]:
    """Run TFT on a batch by several methods, with one stem pass.

    Args:
        f: the classifier.
        x: inputs, shape (N, 3, H, W).
        methods: keys of METHODS.
        settings: of the search.
        wanted: the classes that are explained, shape (N,); None for the predicted ones.
        judges: who else the search asks, see `fine_tune_threshold`.

    Returns:
        One result a method. Masks that methods share are scored once.
    """
    count = len(x)
    g, activation = f.at(x)
    p = f.probabilities(g.head(activation).float())
    y, class_index = p.max(1)
    if wanted is not None:
        class_index = wanted.to(x.device)
        y = class_score(p, class_index)
    # The stored map is the one that is searched: I by cells, also for a map of pixels.
    g = g.sharing(activation, class_index)
    maps = [scaled_map(g, activation, class_index, x, method, cells=True) for method in methods]
    low = torch.cat(maps)
    high = upsample(low, x)
    owner = torch.arange(count, device=x.device)
    class_indices, y, owner = (each.repeat(len(methods)) for each in (class_index, y, owner))
    result = search_threshold(f, x, high, class_indices, settings, y, owner, judges)
    cut = cut_off(high, result.tau[:, None], settings.mode)[:, 0]
    mask = mask_of(threshold_map(low, cut))
    return [
        Tuned(class_index, result.rows(part), low[part], mask[part])
        for part in (slice(i, i + count) for i in range(0, len(low), count))
    ]


def store_path(run: Path, model: str, cam: str) -> Path:
    """Return the file of a run that keeps the masks of a model and a CAM method."""
    return run / "masks" / f"{file_stem(model, cam)}.h5"


def store_settings(
    f: Classifier, data_set: DataSet, settings: Search, judges: Sequence[Judge] = ()
) -> dict[str, Any]:
    """Return a store's attributes but for the CAM: settings (docs/reference/files.md)."""
    return {
        "format_version": FORMAT_VERSION,
        "aft_version": __version__,
        "model": f.name,
        "weights": f.weights_hash(),
        "checkpoint": f.checkpoint,
        "layer": f.layer_name,
        "activation_shape": list(f.activation_shape),
        "thresholds": list(settings.thresholds),
        "masking": settings.masking,
        "fill": settings.fill,
        "threshold_mode": settings.mode,
        # Written only if not the default, so that older stores without them still match.
        **({"search": settings.search} if settings.search != "exact" else {}),
        **({JUDGES: [judge.recorded(f) for judge in judges]} if judges else {}),
        **({"precision": f.precision} if f.precision != "no" else {}),
        **({"output": f.output} if f.output != SOFTMAX else {}),
        **({"output_key": f.output_key} if f.output_key else {}),
        **({"class_names": list(f.classes.own)} if f.classes.own else {}),
        **({"imagenet": True} if _are_imagenets(f, data_set) else {}),
        "preprocessing": f.preprocessing.as_dict(),
        "data_set": str(data_set.root.resolve()),
        "data_kind": data_set.kind,
        **data_set.record,
        "labels": "model" if data_set.mapped else "data set",
        "classes": [] if data_set.mapped else list(data_set.classes),
        "images": len(data_set.samples),
        "images_hash": data_set.fingerprint(),
    }


def _are_imagenets(f: Classifier, data_set: DataSet) -> bool:
    """Tell if labels are ImageNet's classes, where the names of images do not say so."""
    named = data_set.format.named_by_folder or not data_set.mapped
    return not named and f.classes == imagenet_classes()


class _Store:
    """One store in the making: its finished file, its parts, its lock."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.parts = path.with_name(f".{path.stem}.parts")

    def part(self, span: range) -> Path:
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
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)


class _Columns(NamedTuple):
    """Widths of a store's columns, needed also for a block without a readable image."""

    path: int
    steps: int
    cells: tuple[int, int]
    areas: int

    @classmethod
    def of(cls, f: Classifier, data_set: DataSet, settings: Search) -> _Columns:
        longest = max(len(os.fsencode(sample.name)) for sample in data_set.samples)
        _, h, w = f.activation_shape
        return cls(longest, len(settings.thresholds), (h, w), len(data_set.areas(0)))


def _rows(data_set: DataSet, loaded: Loaded, tuned: list[Tuned], size: _Columns) -> Rows:
    """Return the results of one block by one method, as the store's columns."""

    def column(values: list[Tensor], *shape: int) -> np.ndarray:
        return torch.cat([torch.empty(0, *shape), *(v.cpu() for v in values)]).numpy()

    indices = loaded.indices
    half, correction = split_float(column([t.attribution for t in tuned], *size.cells))
    areas = np.array([data_set.areas(i) for i in indices], dtype=np.float32)
    return Rows(
        np.array([os.fsencode(data_set.samples[i].name) for i in indices], f"S{size.path}"),
        np.array([data_set.samples[i].label for i in indices], np.int32),
        column([t.class_index for t in tuned]).astype(np.int32),
        column([t.tft.probability for t in tuned]),
        column([t.tft.probabilities for t in tuned], size.steps),
        column([t.tft.rpi for t in tuned], size.steps),
        column([t.tft.tau for t in tuned]),
        half,
        correction,
        column([t.mask for t in tuned], *size.cells).astype(bool),
        areas.reshape(len(indices), size.areas),
        loaded.contents,
        loaded.stamps,
    )


@contextmanager
def _one_thread(f: Classifier) -> Iterator[None]:
    """Let PyTorch use one thread where ONNX Runtime runs the passes.

    PyTorch's threads spin after each operation, and take the processors from the engine's.
    """
    threads = torch.get_num_threads()
    if f.engine and f.engine.name == "onnxruntime":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@outside_inference_mode
def generate_masks(
    f: Classifier,
    data_set: DataSet,
    methods: Sequence[str] | str,
    run: str | Path,
    settings: Search,
    *,
    workers: int = 1,
    batch: int = BATCH,
    strict: bool = False,
    overwrite: bool = False,
    processes: Processes | None = None,
    block: int | None = None,
    judges: Sequence[Judge] = (),
) -> Iterator[Done]:
    """Fine-tune the thresholds of a data set and store the masks, resuming a run that stopped.

    Args:
        f: the classifier.
        data_set: the images.
        methods: one or several of METHODS; their stem passes and equal masks are shared.
        run: where the study lives; stores are `<run>/masks/<model>-<cam>.h5`.
        settings: of the search.
        workers: processes that decode images; 0 decodes in this one.
        batch: images in one pass of the stem.
        strict: stop at the first image that can't be read, instead of recording it.
        overwrite: start again and replace what is there.
        processes: the processes that share the run; default this one alone.
        block: images stored at a time; default by the number of images.
        judges: who else the search asks, see `fine_tune_threshold`; their order changes nothing.

    Yields:
        Progress, batch by batch; the first reports what earlier calls did.

    Raises:
        AftError: the stores are of other settings or in use, an image is broken and strict is
            set, or a file can't be written.
    """
    processes = processes or Processes()
    if data_set.every and not data_set.mapped:
        raise AftError(
            f"{not_its_classes(data_set, f.classes, f.name)}; --labels all explains the class of "
            "each label, so name the model's classes by --classes FILE, or leave it out"
        )
    methods, run = [methods] if isinstance(methods, str) else methods, Path(run)
    check_judges(judges, f)
    judges = sorted(judges, key=lambda judge: judge.name)
    common = store_settings(f, data_set, settings, judges)
    stores = {
        method: _Store(store_path(run, f.name, method), {**common, "cam": method})
        for method in methods
    }
    columns = _Columns.of(f, data_set, settings)
    with ExitStack() as held:
        held.enter_context(_one_thread(f))
        if processes.index == 0:
            _take(stores, data_set, held, overwrite)
        processes.wait()
        open_stores = {m: s for m, s in stores.items() if not s.finished()}
        if not open_stores:
            yield Done(len(data_set.samples))
            return
        spans = spans_of(len(data_set.samples), block)
        missing = {
            i: [m for m, s in open_stores.items() if not s.has(span, data_set)]
            for i, span in enumerate(spans)
            if i % processes.count == processes.index
        }
        todo = [i for i, lacking in missing.items() if lacking]
        yield Done(sum(len(spans[i]) for i in missing if not missing[i]))
        for loaded in load_blocks(f.preprocessing, data_set, spans, todo, workers):
            if strict and loaded.broken:
                first = loaded.broken[0]
                raise AftError(f"{data_set.root / first.path}: {first.reason} (--strict)")
            lacking = missing[loaded.block]
            results: list[list[Tuned]] = []
            labels = torch.tensor([data_set.samples[i].label for i in loaded.indices])
            moved = batches(loaded, batch, next(f.parameters()))
            for x, label in zip(moved, labels.split(batch), strict=False):
                wanted = label if data_set.every else None
                results.append(tune_batch(f, x, lacking, settings, wanted, judges))
                yield _progress(results[-1])
            for i, method in enumerate(lacking):
                store = open_stores[method]
                rows = _rows(data_set, loaded, [tuned[i] for tuned in results], columns)
                write_part(store.part(spans[loaded.block]), rows, loaded.broken, store.settings)
            yield Done(len(loaded.broken), broken=len(loaded.broken))
        processes.wait()
        if processes.index == 0:
            for store in open_stores.values():
                join_parts(store.path, map(store.part, spans), store.settings)
                shutil.rmtree(store.parts, ignore_errors=True)
        processes.wait()


def _take(stores: dict[str, _Store], data_set: DataSet, held: ExitStack, overwrite: bool) -> None:
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


def _progress(tuned: list[Tuned]) -> Done:
    tau = torch.cat([t.tft.tau for t in tuned])
    raised = torch.cat([t.tft.helps for t in tuned])
    return Done(len(tuned[0].class_index), float(tau.sum()), int(raised.sum()), len(tau))
