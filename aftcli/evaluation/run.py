"""Evaluate studies block by block, on any number of processes; resume where a run stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from aftcli.core.methods import METHODS
from aftcli.cutting.networks import outside_inference_mode
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
from aftcli.evaluation.batch import measure_batch, measure_controls, passes
from aftcli.evaluation.results import Result, ResultFile
from aftcli.evaluation.study import Study, Variant
from aftcli.files import file_stem, make_folder, tensors_hash
from aftcli.locks import locked
from aftcli.masks.generate import BATCH
from aftcli.measures import metrics
from aftcli.measures.controls import Controlled, equal_gamma, exchanged, nearest_shift
from aftcli.measures.metrics import NOISE
from aftcli.measures.registry import BASELINES, CONTROLLED, CONTROLS, MEASURES, QUANTUS, SOURCES
from aftcli.measures.values import Images, Unit, Wanted
from aftcli.settings import SOFTMAX
from aftcli.tft.masking import MASKINGS

VERSION = 2  # of what is computed: results of another one are not used


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation.

    Attributes:
        maskings: keys of MASKINGS: the readings of the paper.
        extras: what is measured beyond what costs nothing (`aftcli.measures.registry.extras_of`).
        workers: processes that decode images.
        batch: images in one pass of the stem.
        overwrite: compute again.
        block: images stored at a time; default by the number of images.
        accelerate: makes classifiers fast (`aftcli.engine.accelerate`).
        note: is told what was assumed of the images' objects.
        controls: measure the controls of TFT and AFT too (`aftcli.measures.controls`).
    """

    maskings: tuple[str, ...] = tuple(MASKINGS)
    extras: frozenset[str] = frozenset()
    workers: int = 1
    batch: int = BATCH
    overwrite: bool = False
    block: int | None = None
    accelerate: Accelerate = as_it_is
    note: Callable[[str], None] = warnings.warn
    controls: bool = False


class Step(NamedTuple):
    """A step forward: some images of a classifier are done."""

    what: str
    images: int
    total: int


class Measured(NamedTuple):
    """The results of a study.

    Attributes:
        study: what was evaluated.
        results: columns of each variant's name, or of CONTROLS, by method and masking.
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
    study: Study, run: str | Path, plan: Plan | None = None, processes: Processes | None = None
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
    folder = make_folder(Path(run) / "results")
    objects = Objects(study.data_set, study.f.preprocessing, plan.note)
    _check_segmentations(study, plan, objects)
    known_in = folder / f".contents-{processes.index}.json"

    def contents() -> str:
        return content_hash([*study.data_set.pictures(), *objects.files()], known_in)

    images = contents()
    found: dict[tuple[str, Unit], Result] = {}
    reused = True

    def made(
        variant: Variant, controlled: Mapping[Unit, Controlled] | None = None
    ) -> Iterator[Step]:
        nonlocal reused
        files = _files(study, variant, folder, plan, images, controlled)
        # One look for all: another process may finish a file meanwhile.
        processes.wait()
        if plan.overwrite and processes.index == 0:
            for file in files.values():
                file.clear()
        processes.wait()
        lacking = {unit: file.lacking() for unit, file in files.items()}
        missing = {unit: file for unit, file in lacking.items() if file is not None}
        processes.wait()

        def check() -> None:
            if contents() != images:
                for file in missing.values():
                    file.clear_parts()
                raise AftError(
                    f"{study.data_set.root}: files changed while they were evaluated, so the "
                    "results were discarded; run the same command again"
                )

        if missing:
            reused = False
            yield from _measure(
                study, variant, missing, objects, plan, processes, check, controlled
            )
        for unit, file in files.items():
            result = file.read()
            if result is None:
                raise AftError(f"{file.path}: can't be read again; run the same command again")
            found[variant.name, unit] = result

    for variant in study.variants:
        yield from made(variant)
    if plan.controls:
        # They are set by the results of all images.
        for variant in [v for v in study.variants if v.name == "original"]:
            controlled = {
                unit: own
                for name, unit in list(found)
                if name == "original" and (own := _controlled(study, unit, found))
            }
            yield from made(variant._replace(name=CONTROLS), controlled)
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
    contents = [c for c in contents_of(study.data_set.pictures(), known_in) if c != GONE]
    return {
        (v.name, v.cams[0] if v.name == "aft" else None): sum(c in v.trained for c in contents)
        for v in study.variants
        if v.trained is not None
    }


def _controlled(
    study: Study, unit: Unit, found: Mapping[tuple[str, Unit], Result]
) -> Controlled | None:
    """Set the controls of a method's rows by their results; None where no image was measured."""
    plain = found["original", unit].values
    if plain is None or plain.amounts is None:
        return None

    def by_place(index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        every = torch.full((len(study.data_set.samples),), torch.nan, dtype=torch.double)
        every[index] = values.double()
        return every

    soft = unit.masking == "soft"
    setting, amount = {}, {}
    for row in CONTROLLED:
        source, view = SOURCES[row]
        result = found.get((source, unit))
        values = result.values if result else None
        if values is None or view not in values.views:
            continue
        measured = values.views[view].measures["complexity" if soft else "area"]
        own = by_place(values.index, measured)[plain.index]
        known = ~own.isnan()
        if known.any():
            find = equal_gamma if soft else nearest_shift
            setting[row] = find(plain.amounts[known], float(own[known].mean()))
            amount[row] = by_place(plain.index, own)
    tau = None if plain.tau is None else exchanged(plain.tau)
    return Controlled(setting, amount, None if tau is None else by_place(plain.index, tau))


def _files(
    study: Study,
    variant: Variant,
    folder: Path,
    plan: Plan,
    images: str,
    controlled: Mapping[Unit, Controlled] | None = None,
) -> dict[Unit, ResultFile]:
    """Name the result files of a variant, or of controls, after all that decides them."""
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
                **({"every": True} if study.data_set.every else {}),
                **({"output": study.f.output} if study.f.output != SOFTMAX else {}),
                **_library(plan),
            }
            if controlled is not None:
                if Unit(cam, masking) not in controlled:
                    continue
                own = controlled[Unit(cam, masking)]
                tensors = own.amount | ({} if own.tau is None else {"tau": own.tau})
                identity |= {"setting": own.setting, "rows": tensors_hash(tensors)}
                identity["threshold_mode"] = study.search.mode
            stem = f"{file_stem(study.f.name, cam)}-{variant.name}-{masking}"
            extras = set(study.judge_keys.values())
            if controlled is None:
                extras |= plan.extras if searched else plan.extras - {BASELINES}
            if searched and plan.controls:
                extras.add(CONTROLS)
            file = ResultFile(folder, stem, identity, frozenset(extras), study.f.classes.own)
            found[Unit(cam, masking)] = file
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
    controlled: Mapping[Unit, Controlled] | None,
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
        yield from _blocks(study, variant, files, lacking, spans, objects, plan, controlled)
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
    controlled: Mapping[Unit, Controlled] | None,
) -> Iterator[Step]:
    todo = [i for i in lacking if lacking[i]]
    total = sum(len(spans[i]) for i in lacking)
    what = f"{study.f.name} {variant.name} {'+'.join(variant.cams)}"
    yield Step(what, sum(len(spans[i]) for i in lacking if not lacking[i]), total)
    if not todo:
        return
    f = variant.load()
    extras = frozenset().union(*(file.extras for file in files.values()))
    judges = {key: judge for judge in study.judges if (key := judge.key(study.f)) in extras}
    searched = study.search if variant.name in ("original", CONTROLS) else None
    wanted = Wanted(searched, extras, study.search.fill, study.cells, judges)
    own = sum(METHODS[cam].passes or 0 for cam in variant.cams)
    # Of all images, so that neither interruptions nor the number of processes change a result.
    images = len(study.data_set.samples)
    if controlled is None:
        measure, by_judge = measure_batch, wanted.asked(len(files))
        by_network = passes(wanted, len(files))
    else:
        measure = partial(measure_controls, controlled=controlled)
        by_judge = 1 + sum(controlled[unit].masks for unit in files)
        by_network = by_judge * (1 + sum(judge.classifier is None for judge in judges.values()))
    f = plan.accelerate(f, (by_network + own) * images)
    for key, judge in judges.items():
        if judge.classifier:
            judges[key] = replace(
                judge, classifier=plan.accelerate(judge.classifier, by_judge * images)
            )
    weight = next(f.parameters())
    for loaded in load_blocks(f.preprocessing, study.data_set, spans, todo, plan.workers):
        units, parts = lacking[loaded.block], []
        places = torch.tensor(loaded.indices).split(plan.batch)
        for x, index in zip(batches(loaded, plan.batch, weight), places, strict=False):
            parts.append(measure(f, _images(study, x, index, objects), units, wanted))
            yield Step(what, len(x), total)
        for unit in units:
            columns = _joined([part[unit].columns() for part in parts])
            files[unit].write_part(spans[loaded.block], columns, loaded.broken)
        yield Step(what, len(loaded.broken), total)


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]} if parts else {}


def _images(study: Study, x: torch.Tensor, index: torch.Tensor, objects: Objects) -> Images:
    label = torch.tensor([study.data_set.samples[int(i)].label for i in index])
    return Images(x, label, index, objects.regions, study.data_set.every)
