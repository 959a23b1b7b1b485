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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftcli.core.classifier import Classifier
from aftcli.cutting.networks import outside_inference_mode
from aftcli.data.blocks import Loaded, Processes, batches, load_blocks, spans_of
from aftcli.data.sets import DataSet, not_its_classes
from aftcli.errors import AftError
from aftcli.files import file_stem
from aftcli.masks.hdf5 import Rows, split_float
from aftcli.masks.parts import Making, join_parts, take, write_part
from aftcli.masks.settings import store_settings
from aftcli.settings import Search
from aftcli.tft.judges import Judge
from aftcli.tft.search import Tuned, check_judges, tune_batch

BATCH = 16  # images in one pass of the stem


class Done(NamedTuple):
    """Progress of a run: images that are done.

    Attributes:
        images: how many.
        tau: the sum of their tau*, over methods.
        raised: how many maps have a threshold with RPI > 0 (with judges: tau*), over methods.
        maps: how many maps.
        broken: how many of the images could not be read.
    """

    images: int
    tau: float = 0.0
    raised: int = 0
    maps: int = 0
    broken: int = 0


def store_path(run: Path, model: str, cam: str) -> Path:
    """Return the file of a run that keeps the masks of a model and a CAM method."""
    return run / "masks" / f"{file_stem(model, cam)}.h5"


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
        method: Making(store_path(run, f.name, method), {**common, "cam": method})
        for method in methods
    }
    columns = _Columns.of(f, data_set, settings)
    with ExitStack() as held:
        held.enter_context(_one_thread(f))
        if processes.index == 0:
            take(stores, data_set, held, overwrite)
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


def _progress(tuned: list[Tuned]) -> Done:
    tau = torch.cat([t.tft.tau for t in tuned])
    raised = torch.cat([t.tft.helps for t in tuned])
    return Done(len(tuned[0].class_index), float(tau.sum()), int(raised.sum()), len(tau))
