"""Evaluate studies: block by block, on any number of processes, going on where a run stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from aftcli import metrics
from aftcli.contents import content_hash
from aftcli.core.networks import outside_inference_mode
from aftcli.core.registry import METHODS
from aftcli.engine import Accelerate, as_it_is
from aftcli.errors import AftError
from aftcli.evaluate import Columns, Images, Unit, Wanted, measure_batch, passes
from aftcli.evaluate_jobs import Study, Variant
from aftcli.evaluate_store import Result, ResultFile
from aftcli.files import file_stem, locked, make_folder
from aftcli.generate import BATCH, Processes, spans_of
from aftcli.loading import batches, load_blocks
from aftcli.metrics_road import NOISE
from aftcli.objects import Objects
from aftcli.tft import MASKINGS

VERSION = 1  # of what is computed: results of another one are not used


@dataclass(frozen=True)
class Plan:
    """How studies are evaluated.

    Attributes:
        maskings: keys of MASKINGS: the readings of the paper.
        extras: what is measured beyond what costs nothing (`aftcli.measures.extras_of`).
        workers: processes that decode images.
        batch: images in one pass of the stem.
        overwrite: compute anew.
        block: images stored at a time; default by the number of images.
        accelerate: makes classifiers fast (`aftcli.engine`).
    """

    maskings: tuple[str, ...] = tuple(MASKINGS)
    extras: frozenset[str] = frozenset()
    workers: int = 1
    batch: int = BATCH
    overwrite: bool = False
    block: int | None = None
    accelerate: Accelerate = as_it_is


class Step(NamedTuple):
    """Some images of a classifier are done; with `total` 0 the results were there already."""

    what: str
    images: int
    total: int


class Measured(NamedTuple):
    """The results of a study.

    Attributes:
        study: what was evaluated.
        results: columns of each variant's name, method and masking.
        reused: all were there already.
    """

    study: Study
    results: dict[tuple[str, Unit], Result]
    reused: bool


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
    objects = Objects(study.data_set, study.f.preprocessing)
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
        missing = {unit: file for unit, file in files.items() if file.read() is None}
        processes.wait()
        if missing:
            reused = False
            yield from _measure(study, variant, missing, objects, plan, processes)
            if contents() != images:
                for file in missing.values():
                    file.clear()
                raise AftError(
                    f"{study.data_set.root}: files changed while they were evaluated; what was "
                    "measured is thrown away, run the same command again"
                )
        for unit, file in files.items():
            result = file.read()
            if result is None:
                raise AftError(f"{file.path}: can't be read again; run the same command again")
            found[variant.name, unit] = result
    yield Measured(study, found, reused)


def _files(
    study: Study, variant: Variant, folder: Path, plan: Plan, images: str
) -> dict[Unit, ResultFile]:
    """Where the results of a variant are, named after all that decides them."""
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
            }
            stem = f"{file_stem(study.f.name, cam)}-{variant.name}-{masking}"
            extras = plan.extras if searched else plan.extras - {"baselines"}
            found[Unit(cam, masking)] = ResultFile(folder, stem, identity, extras)
    return found


def _measure(
    study: Study,
    variant: Variant,
    files: dict[Unit, ResultFile],
    objects: Objects,
    plan: Plan,
    processes: Processes,
) -> Iterator[Step]:
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
        plan.extras,
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
            columns = _joined([part[unit] for part in parts])
            files[unit].write_part(spans[loaded.block], columns, loaded.broken)
        yield Step(what, len(loaded.broken), total)


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]} if parts else {}


def _images(study: Study, x: torch.Tensor, index: torch.Tensor, objects: Objects) -> Images:
    label = torch.tensor([study.data_set.samples[int(i)].label for i in index])
    return Images(x, label, index, objects.regions)
