"""Evaluate studies block by block, on any number of processes; resume where a run stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from aftcli.core.methods import METHODS
from aftcli.core.networks import outside_inference_mode
from aftcli.data.blocks import (
    GONE,
    Processes,
    batches,
    content_hash,
    contents_of,
    load_blocks,
    spans_of,
)
from aftcli.data.objects import Objects
from aftcli.engine.accelerate import Accelerate, as_it_is
from aftcli.errors import AftError
from aftcli.evaluation import metrics
from aftcli.evaluation.batch import Images, Unit, Wanted, measure_batch, passes
from aftcli.evaluation.measures import BASELINES, MEASURES, QUANTUS
from aftcli.evaluation.metrics import NOISE
from aftcli.evaluation.results import Result, ResultFile
from aftcli.evaluation.study import Study, Variant
from aftcli.files import file_stem, locked, make_folder
from aftcli.tft.generate import BATCH
from aftcli.tft.threshold import MASKINGS

VERSION = 2  # of what is computed: results of another one are not used


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation.

    Attributes:
        maskings: keys of MASKINGS: the readings of the paper.
        extras: what is measured beyond what costs nothing (`aftcli.evaluation.measures.extras_of`).
        workers: processes that decode images.
        batch: images in one pass of the stem.
        overwrite: compute again.
        block: images stored at a time; default by the number of images.
        accelerate: makes classifiers fast (`aftcli.engine.accelerate`).
        note: is told what was assumed of the images' objects.
    """

    maskings: tuple[str, ...] = tuple(MASKINGS)
    extras: frozenset[str] = frozenset()
    workers: int = 1
    batch: int = BATCH
    overwrite: bool = False
    block: int | None = None
    accelerate: Accelerate = as_it_is
    note: Callable[[str], None] = warnings.warn


class Step(NamedTuple):
    """A step forward: some images of a classifier are done."""

    what: str
    images: int
    total: int


class Measured(NamedTuple):
    """The results of a study.

    Attributes:
        study: what was evaluated.
        results: columns of each variant's name, method and masking.
        reused: all were there already.
        seen: of each variant that says what it has learned from, by its name and the method
            that it was tuned for: how many of the images that it was evaluated on.
    """

    study: Study
    results: dict[tuple[str, Unit], Result]
    reused: bool
    seen: Mapping[tuple[str, str | None], int] = MappingProxyType({})


@outside_inference_mode
def evaluate_study(
    study: Study, run: Path, plan: Plan | None = None, processes: Processes | None = None
) -> Iterator[Step | Measured]:
    """Measure all variants of a study.

    Args:
        study: of `find_studies`.
        run: where it lives; results are kept in `<run>/results`.
        plan: how to do it.
        processes: that share the work.

    Yields:
        Steps, and at the end what was measured.

    Raises:
        AftError: another process works on the same results, or a file can't be written.
    """
    plan, processes = plan or Plan(), processes or Processes()
    folder = make_folder(run / "results")
    objects = Objects(study.data_set, study.f.preprocessing, plan.note)
    _check_segmentations(study, plan, objects)
    known_in = folder / f".contents-{processes.index}.json"

    def contents() -> str:
        return content_hash([*study.data_set.files(), *objects.files()], known_in)

    images = contents()
    found: dict[tuple[str, Unit], Result] = {}
    reused = True
    for variant in study.variants:
        files = _files(study, variant, folder, plan, images)
        # One look for all: another process may finish a file meanwhile.
        processes.wait()
        if plan.overwrite and processes.index == 0:
            for file in files.values():
                file.clear()
        processes.wait()
        lacking = {unit: file.lacking() for unit, file in files.items()}
        missing = {unit: file for unit, file in lacking.items() if file is not None}
        processes.wait()

        def check(missing: dict[Unit, ResultFile] = missing) -> None:
            if contents() != images:
                for file in missing.values():
                    file.clear_parts()
                raise AftError(
                    f"{study.data_set.root}: files changed while they were evaluated, so the "
                    "results were discarded; run the same command again"
                )

        if missing:
            reused = False
            yield from _measure(study, variant, missing, objects, plan, processes, check)
        for unit, file in files.items():
            result = file.read()
            if result is None:
                raise AftError(f"{file.path}: can't be read again; run the same command again")
            found[variant.name, unit] = result
    yield Measured(study, found, reused, _seen(study, known_in))


def _check_segmentations(study: Study, plan: Plan, objects: Objects) -> None:
    for name in sorted(plan.extras):
        if not name.startswith(QUANTUS) or "segmentation" in objects.kinds:
            continue
        if MEASURES[name].group == "localisation":
            raise AftError(
                f"{study.data_set.root}: has no segmentations, which --metrics {name} needs; "
                "evaluate on VOC images of SegmentationClass, or take energy, pointing or iou, "
                "which need boxes"
            )


def _seen(study: Study, known_in: Path) -> dict[tuple[str, str | None], int]:
    contents = [c for c in contents_of(study.data_set.files(), known_in) if c != GONE]
    return {
        (v.name, v.cams[0] if v.name == "aft" else None): sum(c in v.trained for c in contents)
        for v in study.variants
        if v.trained is not None
    }


def _files(
    study: Study, variant: Variant, folder: Path, plan: Plan, images: str
) -> dict[Unit, ResultFile]:
    """Name the result files of a variant after all that decides them."""
    searched = variant.name == "original"
    found = {}
    for cam in variant.cams:
        for masking in plan.maskings:
            identity = {
                "version": VERSION,
                "model": study.f.name,
                "layer": study.f.layer_name,
                "weights": variant.weights,
                "variant": variant.name,
                "cam": cam,
                "muted": METHODS[cam].muted if searched else None,
                "masking": masking,
                "fill": study.search.fill,
                "thresholds": list(study.search.thresholds) if searched else [],
                "threshold_mode": study.search.mode if searched else "",
                "preprocessing": study.f.preprocessing.as_dict(),
                "images": images,
                "labels": study.data_set.fingerprint(),
                "steps": metrics.STEPS,
                "road": [*metrics.ROAD_SHARES, NOISE],
                # Named where results without it were not made so.
                **({"cells": True} if study.cells else {}),
                **_library(plan),
            }
            stem = f"{file_stem(study.f.name, cam)}-{variant.name}-{masking}"
            extras = plan.extras if searched else plan.extras - {BASELINES}
            found[Unit(cam, masking)] = ResultFile(folder, stem, identity, extras)
    return found


def _library(plan: Plan) -> dict[str, str]:
    """Name Quantus by its version where it measures."""
    own = [name for name in plan.extras if name.startswith(QUANTUS)]
    return {"quantus": MEASURES[own[0]].source} if own else {}


def _measure(
    study: Study,
    variant: Variant,
    files: dict[Unit, ResultFile],
    objects: Objects,
    plan: Plan,
    processes: Processes,
    check: Callable[[], None],
) -> Iterator[Step]:
    """Measure what is missing; `check` refuses it before it becomes results."""
    spans = spans_of(len(study.data_set.samples), plan.block)
    with ExitStack() as held:
        if processes.index == 0:
            for file in files.values():
                held.enter_context(locked(file.path))
        processes.wait()
        own = [i for i in range(len(spans)) if i % processes.count == processes.index]
        lacking = {i: [u for u, file in files.items() if not file.has(spans[i])] for i in own}
        yield from _blocks(study, variant, files, lacking, spans, objects, plan)
        processes.wait()
        check()
        if processes.index == 0:
            for file in files.values():
                if not file.join(spans):
                    raise AftError(f"{file.parts}: is damaged; run the same command again")
        processes.wait()


def _blocks(
    study: Study,
    variant: Variant,
    files: dict[Unit, ResultFile],
    lacking: dict[int, list[Unit]],
    spans: Sequence[range],
    objects: Objects,
    plan: Plan,
) -> Iterator[Step]:
    todo = [i for i in lacking if lacking[i]]
    total = sum(len(spans[i]) for i in lacking)
    what = f"{study.f.name} {variant.name} {'+'.join(variant.cams)}"
    yield Step(what, sum(len(spans[i]) for i in lacking if not lacking[i]), total)
    if not todo:
        return
    f = variant.load()
    wanted = Wanted(
        study.search if variant.name == "original" else None,
        frozenset().union(*(file.extras for file in files.values())),
        study.search.fill,
        study.cells,
    )
    own = sum(METHODS[cam].passes or 0 for cam in variant.cams)
    # Of all images, so that neither interruptions nor the number of processes change a result.
    f = plan.accelerate(f, (passes(wanted, len(files)) + own) * len(study.data_set.samples))
    for loaded in load_blocks(f.preprocessing, study.data_set, spans, todo, plan.workers):
        units, parts = lacking[loaded.block], []
        places = torch.tensor(loaded.indices).split(plan.batch)
        for x, index in zip(batches(loaded, plan.batch, f.device), places, strict=False):
            parts.append(measure_batch(f, _images(study, x, index, objects), units, wanted))
            yield Step(what, len(x), total)
        for unit in units:
            columns = _joined([part[unit].columns() for part in parts])
            files[unit].write_part(spans[loaded.block], columns, loaded.broken)
        yield Step(what, len(loaded.broken), total)


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]} if parts else {}


def _images(study: Study, x: torch.Tensor, index: torch.Tensor, objects: Objects) -> Images:
    label = torch.tensor([study.data_set.samples[int(i)].label for i in index])
    return Images(x, label, index, objects.regions)
