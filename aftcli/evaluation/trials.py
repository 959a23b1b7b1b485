"""Trials of maps beside their measures: dependence on the weights, seconds a map (Table 5).

The sanity check of Adebayo et al. (NeurIPS 2018) replaces weights by random ones from the output
towards the input: maps of a network that knows nothing must not look like those of the trained
one.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.functional.regression import spearman_corrcoef

from aftcli.attributions.maps import attribution_map
from aftcli.core.cam import scaled_map, upsample
from aftcli.core.classifier import Classifier
from aftcli.cutting.networks import copied
from aftcli.data.blocks import Processes, content_hash
from aftcli.data.images import read_image, to_input
from aftcli.engine.accelerate import Accelerate, as_it_is
from aftcli.errors import AftError
from aftcli.evaluation.results import ResultFile
from aftcli.evaluation.study import Study, Variant
from aftcli.files import durable, file_stem, make_folder
from aftcli.measures.intervals import estimate
from aftcli.models.load import device_name
from aftcli.settings import Search
from aftcli.tft.masking import cut_off
from aftcli.tft.search import search_threshold
from aftcli.tft.threshold import threshold_map
from aftcli.version import __version__

COMPARED = 32  # images of the sanity check, spread over the data set

SEED = 0

STEM_PARTS = 4  # in which w0 is randomised

TIMED = 8  # images that take turns

RUNS = 20  # timed, of each

WARM_UP = 2

BUDGET = 20.0  # seconds a method: fewer runs are made of one that takes longer

LEAST = 3  # runs that are timed however long they take


class _Some(NamedTuple):
    """Inputs of some images, shape (N, 3, H, W), and labels to explain, shape (N,), or None."""

    x: Tensor
    labels: Tensor | None


def _some_of(study: Study, count: int) -> _Some:
    """Read so many images, spread over a study's data set."""
    few = study.data_set.limited(count)
    inputs, labels = [], []
    for i, sample in enumerate(few.samples):
        with contextlib.suppress(AftError):
            inputs.append(to_input(read_image(few.picture(i)), study.f.preprocessing))
            labels.append(sample.label)
    if not inputs:
        raise AftError(f"{few.root}: holds no image that could be read")
    x = torch.cat(inputs).to(next(study.f.parameters()))
    return _Some(x, torch.tensor(labels, device=x.device) if few.every else None)


@dataclass(frozen=True)
class SanityRow:
    """The likeness of a trained network's maps to those of a partly random one.

    Attributes:
        variant: original, tft or aft.
        stage: what is random: w2; w1 and w2; these and a part of w0; all.
        measure: spearman, the rank correlation of the maps' cells, or ssim, the structural
            similarity of the maps at the input's size; 1 is equal, near 0 is as it should be.
    """

    dataset: str
    model: str
    cam: str
    variant: str
    stage: str
    measure: str
    value: float
    ci: tuple[float, float] | None
    n: int


class Stage(NamedTuple):
    """A network of which a part is random."""

    name: str
    f: Classifier


@torch.no_grad()
def randomised(f: Classifier, seed: int = SEED) -> Iterator[Stage]:
    """Randomise weights from the output down, stage by stage.

    Random weights are drawn from a normal distribution with the mean and the standard deviation
    of the tensor that they replace; a batch norm's statistics stay, so that signals keep their
    scale.

    Args:
        f: the classifier; it is copied, not changed.
        seed: of the weights.

    Yields:
        The stages; the same network, more of it random each time.
    """
    generator = torch.Generator().manual_seed(seed)
    f = copied(f)
    stem = list(f.stem.parameters())[::-1]
    size = -(-len(stem) // STEM_PARTS) or 1
    parts = [stem[i : i + size] for i in range(0, len(stem), size)]
    names = [f"w1, w2 and {i}/{len(parts)} of w0" for i in range(1, len(parts))] + ["all"]
    # A layer without weights, a ReLU say, is no stage of its own.
    layer = list(f.layer.parameters())
    stages = [
        ("w2", list(f.head.parameters())),
        ("w1 and w2", layer),
        *zip(names, parts, strict=True),
    ]
    for name, parameters in stages:
        for p in parameters:
            spread = float(p.std()) if p.numel() > 1 else 0.0
            drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(float(p.mean()) + spread * drawn)
        if parameters:
            yield Stage(name, f)


def similarity(one: Tensor, two: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Compare maps at the size that their method gives, shape (N, h, w) each, in [0, 1].

    Returns:
        Spearman's rank correlation and SSIM, shape (N,) each; of a constant map, which has no
        ranks, correlation 0.
    """
    cells = [m.flatten(1).double().T for m in (one, two)]
    ranks = torch.atleast_1d(spearman_corrcoef(*cells)).nan_to_num()
    first, second = (upsample(m, x)[:, None] for m in (one, two))
    ssim = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return {"spearman": ranks.float(), "ssim": torch.atleast_1d(ssim).float()}


def _maps(
    f: Classifier, x: Tensor, class_index: Tensor, cam: str, search: Search | None, cells: bool
) -> Tensor:
    """Make plain maps, or those of TFT, at the size that the method gives."""
    with torch.no_grad():
        low = scaled_map(*f.at(x), class_index, x, cam, cells)
    if search is None:
        return low
    high = upsample(low, x)
    tau = search_threshold(f, x, high, class_index, search).tau
    return threshold_map(low, cut_off(high, tau[:, None], search.mode)[:, 0])


def sanity(
    f: Classifier,
    x: Tensor,
    cam: str,
    search: Search | None,
    seed: int = SEED,
    cells: bool = False,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare the maps of a classifier with those of its random copies, for the same classes.

    Maps of inputs x, shape (N, 3, H, W), are plain, or, with a search, those of TFT, which is made
    on each network. They explain the labels, shape (N,), or without the predicted classes.

    Returns:
        `STAGE/MEASURE`, shape (N,) each, in the order of the stages.
    """
    with torch.no_grad():
        class_index = f(x).argmax(1) if labels is None else labels
    trained = _maps(f, x, class_index, cam, search, cells)
    found = {}
    for stage in randomised(f, seed):
        other = _maps(stage.f, x, class_index, cam, search, cells)
        for name, values in similarity(trained, other, x).items():
            found[f"{stage.name}/{name}"] = values
    return found


def sanity_rows(
    study: Study, run: Path, masking: str, overwrite: bool, processes: Processes
) -> Iterator[SanityRow]:
    """Test the maps of a study, or reuse the results of an earlier call.

    Yields:
        Rows of plain maps, of TFT and of AFT.
    """
    if processes.index:
        return
    few = study.data_set.limited(COMPARED)
    folder = make_folder(run / "results")
    images = content_hash(few.pictures(), folder / ".contents-0.json")
    search = study.searched(masking)
    some: _Some | None = None
    for variant in study.variants:
        kinds = (("original", None), ("tft", search)) if variant.name == "original" else ()
        for name, own in kinds or ((variant.name, None),):
            for cam in variant.cams if variant.name != "control" else ():
                file = _sanity_file(study, variant, name, cam, own, folder, images)
                if overwrite:
                    file.clear()
                if file.read() is None:
                    some = some or _some_of(study, COMPARED)
                    asked = (cam, own, SEED, study.cells, some.labels)
                    found = sanity(variant.load(), some.x, *asked)
                    # A file's tensors come back in another order than the stages'.
                    numbered = {f"{i:03d}/{key}": v for i, (key, v) in enumerate(found.items())}
                    file.write(numbered)
                result = file.read()
                assert result
                for key, values in sorted(result.columns.items()):
                    stage, measure = key.split("/", 1)[1].rsplit("/", 1)
                    e = estimate(values)
                    where = (study.data_name, study.f.name, cam, name, stage, measure)
                    yield SanityRow(*where, e.value, e.interval, e.n)


def _sanity_file(
    study: Study,
    variant: Variant,
    name: str,
    cam: str,
    search: Search | None,
    folder: Path,
    images: str,
) -> ResultFile:
    identity = {
        "sanity": 2,
        "weights": variant.weights,
        "layer": study.f.layer_name,
        "cam": cam,
        "search": [list(search.thresholds), search.masking, search.fill, search.mode]
        if search
        else None,
        "preprocessing": study.f.preprocessing.as_dict(),
        "images": images,
        "seed": SEED,
        **({"cells": True} if study.cells else {}),
        **({"every": True} if study.data_set.every else {}),
    }
    stem = f"{file_stem(study.f.name, cam)}-{name}-sanity"
    return ResultFile(folder, stem, identity, frozenset())


@dataclass(frozen=True)
class Table5Row:
    """Seconds a map of one image: medians of `runs`.

    Attributes:
        without: of a plain map.
        with_tft: of a map and the search of its threshold.
        masking: of the search.
        device: where it was measured.
        runs: how many of each were timed.
    """

    model: str
    cam: str
    without: float
    with_tft: float
    masking: str
    device: str
    runs: int

    @property
    def delta(self) -> float:
        """Seconds that TFT takes."""
        return self.with_tft - self.without

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON holds it."""
        seconds = {"without": self.without, "with": self.with_tft, "delta": self.delta}
        how = {"device": self.device, "masking": self.masking, "runs": self.runs}
        return {"model": self.model, "cam": self.cam, **seconds, **how}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _seconds(run: Callable[[int], object], image: int, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    run(image)
    _synchronise(device)
    return time.perf_counter() - start


def time_map(
    f: Classifier, inputs: list[Tensor], cam: str, search: Search, runs: int = RUNS
) -> Table5Row:
    """Time a method on single inputs, shape (1, 3, H, W) each, from the input to the map.

    Plain maps and maps with TFT are timed in turns, so that a machine that slows down slows both.
    """
    classes = [f(x).argmax(1) for x in inputs]

    def plain(i: int) -> Tensor:
        return attribution_map(f, inputs[i], classes[i], cam)

    def with_tft(i: int) -> object:
        return search_threshold(f, inputs[i], plain(i), classes[i], search)

    for i in range(WARM_UP):
        with_tft(i % len(inputs))
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for i in range(runs):
        if i >= LEAST and time.perf_counter() - begun > BUDGET:
            break
        for kept, run in zip(times, (plain, with_tft), strict=True):
            kept.append(_seconds(run, i % len(inputs), f.device))
    medians = [statistics.median(each) for each in times]
    where = (search.masking, device_name(f.device), len(times[0]))
    return Table5Row(f.name, cam, medians[0], medians[1], *where)


def table5(
    study: Study,
    run: Path,
    masking: str,
    overwrite: bool = False,
    accelerate: Accelerate = as_it_is,
) -> Iterator[Table5Row]:
    """Time each method of a study on its first images, or reuse the figures of an earlier call."""
    f, folder = accelerate(study.f, None), make_folder(run / "results")
    search = study.searched(masking)
    inputs: list[Tensor] = []
    for cam in study.cams:
        identity = {
            "table": 5,
            "aft": __version__,
            "torch": torch.__version__,
            "weights": study.variants[0].weights,
            "device": device_name(f.device),
            "engine": f.engine.name if f.engine else "",
            "cam": cam,
            **asdict(search),
        }
        # Only its name is used: figures of other settings are in another file.
        stem = f"{file_stem(f.name, cam)}-seconds"
        path = ResultFile(folder, stem, identity, frozenset()).path.with_suffix(".json")
        row = None if overwrite else _known(path)
        if row is None:
            inputs = inputs or list(_some_of(study, TIMED).x.split(1))
            row = time_map(f, inputs, cam, search)
            with durable(path) as temporary:
                temporary.write_text(json.dumps(asdict(row)), encoding="utf-8")
        yield row


def _known(path: Path) -> Table5Row | None:
    try:
        return Table5Row(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
