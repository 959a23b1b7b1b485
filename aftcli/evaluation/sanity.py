"""The sanity check: dependence of maps on the weights.

The sanity check of Adebayo et al. (NeurIPS 2018) replaces weights by random ones from the output
towards the input: maps of a network that knows nothing must not look like those of the trained
one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.functional.regression import spearman_corrcoef

from aftcli.core.cam import scaled_map, upsample
from aftcli.core.classifier import Classifier
from aftcli.cutting.networks import copied
from aftcli.data.blocks import Processes, content_hash
from aftcli.data.images import read_image, to_input
from aftcli.errors import AftError
from aftcli.evaluation.results import ResultFile
from aftcli.evaluation.study import Study, Variant
from aftcli.files import file_stem, make_folder
from aftcli.measures.intervals import estimate
from aftcli.settings import Search
from aftcli.tft.masking import cut_off
from aftcli.tft.search import search_threshold
from aftcli.tft.threshold import threshold_map

COMPARED = 32  # images of the sanity check, spread over the data set

SEED = 0

STEM_PARTS = 4  # in which w0 is randomised


class Some(NamedTuple):
    """Inputs of some images, shape (N, 3, H, W), and labels to explain, shape (N,), or None."""

    x: Tensor
    labels: Tensor | None


def some_of(study: Study, count: int) -> Some:
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
    return Some(x, torch.tensor(labels, device=x.device) if few.every else None)


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
    some: Some | None = None
    for variant in study.variants:
        kinds = (("original", None), ("tft", search)) if variant.name == "original" else ()
        for name, own in kinds or ((variant.name, None),):
            for cam in variant.cams if variant.name != "control" else ():
                file = _sanity_file(study, variant, name, cam, own, folder, images)
                if overwrite:
                    file.clear()
                if file.read() is None:
                    some = some or some_of(study, COMPARED)
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
