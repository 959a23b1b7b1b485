"""Ask which maps find the pixels that decide a class, and which measures notice, on drawn images.

    python -m benchmarks synthetic [--out DIR] [--page]

It draws images whose deciding pixels are known (synthetic_data.py), trains a small network on them,
makes maps of 200 other images by each method, and compares maps and measures with the truth. DIR
keeps the values of every image; a second run reuses them. --page makes the results the figures of
docs/results/synthetic.md and draws its picture. Needs the extra `attributions`, and no data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor, nn

from aftcli import Classifier, fine_tune_threshold
from aftcli.core.cam import normalise, scaled_map, upsample
from aftcli.core.outputs import class_score, probabilities
from aftcli.measures import metrics
from aftcli.tft.masking import cut_off
from aftcli.tft.threshold import mask_of, masked_image, threshold_map
from benchmarks import pages
from benchmarks.quality.synthetic_data import (
    PREPROCESSING,
    TEXTURES,
    Images,
    accuracy,
    classifier,
    images,
    network,
    trained,
)
from benchmarks.quality.synthetic_tables import (
    Table,
    control_lines,
    machine,
    map_lines,
    measure_lines,
)

ROOT = Path(__file__).parents[2]

TRAIN, EPOCHS = 4000, 10

CONTROL_IMAGES, ROAD_IMAGES = 2000, 40

BATCH = 50

SHIFT = 0.15  # of a map's maximum


class Way(NamedTuple):
    """A method and the size of its map.

    Attributes:
        method: a key of METHODS.
        cells: its map of pixels is averaged over the cells of A.
        again: its map of a masked image is made for coherency and ADCC; too slow for some.
    """

    method: str
    cells: bool = False
    again: bool = True


# The slow ones first, so that the processes end together. CAM needs another head.
WAYS = {
    "rise": Way("rise", again=False),
    "occlusion": Way("occlusion", again=False),
    "scorecam": Way("scorecam"),
    "integratedgradients": Way("integratedgradients", again=False),
    "integratedgradients, cells": Way("integratedgradients", True, again=False),
    "lrp": Way("lrp"),
    "lrp, cells": Way("lrp", cells=True),
    "gradcam": Way("gradcam"),
    "gradcam++": Way("gradcam++"),
    "layercam": Way("layercam"),
    "hirescam": Way("hirescam"),
    "xgradcam": Way("xgradcam"),
    "ablationcam": Way("ablationcam"),
    "eigencam": Way("eigencam"),
}


def views(
    f: Classifier,
    x: Tensor,
    class_index: Tensor,
    way: Way,
    tau: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make the maps of a method in all views.

    Args:
        f: the classifier.
        x: inputs, shape (N, 3, H, W).
        class_index: c, shape (N,).
        way: the method.
        tau: tau* where it is known, shape (N,).

    Returns:
        I_tau of each view, shape (N, H, W), and tau*.
    """
    with torch.no_grad():
        activation = f.activation(x)
    scaled = scaled_map(f, activation, class_index, x, way.method, way.cells)
    plain = upsample(scaled, x)
    if tau is None:
        tau = fine_tune_threshold(f, x, plain, class_index).tau
    found = {
        "plain": plain,
        "tft": threshold_map(plain, cut_off(plain, tau[:, None])[:, 0]),
        "shift": upsample(normalise((scaled - SHIFT).relu()), x),
    }
    return found, tau


@torch.no_grad()
def predicted(f: Classifier, x: Tensor) -> Tensor:
    """Return the class that f predicts, shape (N,)."""
    return f(x).argmax(1)


def auroc(attribution: Tensor, truth: Tensor) -> Tensor:
    """Return how often a deciding pixel scores above another one, shape (N,); equal counts half.

    Args:
        attribution: I, shape (N, H, W).
        truth: pixels that decide, shape (N, H, W), bool.
    """
    ranks = torch.from_numpy(rankdata(attribution.flatten(1).numpy(), axis=1))
    inside = truth.flatten(1)
    one = inside.sum(1).double()
    other = inside.shape[1] - one
    return ((ranks * inside).sum(1) - one * (one + 1) / 2) / (one * other)


@torch.no_grad()
def measured(
    f: Classifier,
    x: Tensor,
    class_index: Tensor,
    attribution: Tensor,
    truth: Tensor,
    first: int,
    again: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Measure maps with the truth and without.

    Args:
        f: the classifier.
        x: inputs, shape (N, 3, H, W).
        class_index: c, shape (N,).
        attribution: I_tau, shape (N, H, W).
        truth: pixels that decide, shape (N, H, W), bool.
        first: number of the first image, for ROAD's noise.
        again: makes the maps of x * I_tau; None leaves coherency and ADCC out.

    Returns:
        One value an image of each measure, shape (N,); NaN where it was left out.
    """

    def probability_of(inputs: Tensor) -> Tensor:
        return class_score(probabilities(f(inputs)), class_index)

    nothing, mask = torch.zeros_like(x), mask_of(attribution)
    y = probability_of(x)
    binary = probability_of(masked_image(x, mask.float(), nothing))
    product = masked_image(x, attribution, nothing)
    soft = probability_of(product)
    complexity, unknown = metrics.complexity(attribution), torch.full_like(y, torch.nan)
    coherency = metrics.coherency(attribution, again(product)) if again else unknown
    road, some = unknown.clone(), max(min(ROAD_IMAGES - first, len(x)), 0)
    if some:
        at, seeds = class_index[:some], range(first, first + some)
        road[:some] = metrics.road(
            x[:some],
            attribution[:some],
            lambda inputs: class_score(probabilities(f(inputs)), at),
            list(seeds),
        )
    adcc = metrics.adcc(coherency, complexity, metrics.drop(soft, y)) if again else unknown
    return {
        "iou": metrics.iou(mask, truth),
        "auroc": auroc(attribution, truth),
        "energy": metrics.energy(attribution, truth),
        "pointing": metrics.pointing(attribution, truth),
        "increase, binary": metrics.increase(binary, y),
        "drop, binary": metrics.drop(binary, y),
        "gain, binary": metrics.gain(binary, y),
        "increase, soft": metrics.increase(soft, y),
        "drop, soft": metrics.drop(soft, y),
        "gain, soft": metrics.gain(soft, y),
        "insertion": metrics.insertion(x, attribution, probability_of),
        "deletion": metrics.deletion(x, attribution, probability_of),
        "ROAD": road,
        "coherency": coherency,
        "ADCC": adcc,
        "complexity": complexity,
        "kept area": metrics.area(mask),
    }


Values = dict[str, Tensor]


def one_method(name: str, model: nn.Sequential, drawn: Images) -> dict[str, Values]:
    """Measure all views of one method's maps.

    Args:
        name: a key of WAYS.
        model: the trained network.
        drawn: the images that are explained.
    """
    torch.set_num_threads(1)
    f, way = classifier(model), WAYS[name]
    parts: list[dict[str, Values]] = []
    for first in range(0, len(drawn.x), BATCH):
        x, truth = drawn.x[first : first + BATCH], drawn.truth[first : first + BATCH]
        c = predicted(f, x)
        maps, tau = views(f, x, c, way)
        found = {}
        for view, attribution in maps.items():

            def again(product: Tensor, view: str = view) -> Tensor:
                return views(f, product, c, way, tau)[0][view]  # noqa: B023

            once_more = again if way.again else None
            found[view] = measured(f, x, c, attribution, truth, first, once_more)
        parts.append(found)
    return joined(parts)


def references(model: nn.Sequential, drawn: Images) -> dict[str, Values]:
    """Measure the truth itself as a map, and two maps that know nothing."""
    f, side = classifier(model), drawn.x.shape[-1]
    centres = torch.linspace(-1, 1, side)
    disc = (1 - torch.hypot(centres[:, None], centres)).relu()
    random = torch.rand(len(drawn.x), 8, 8, generator=torch.Generator().manual_seed(0))
    maps = {
        "the truth": drawn.truth.float(),
        "centre": normalise(disc[None]).expand(len(drawn.x), -1, -1),
        "random cells": upsample(normalise(random), drawn.x),
    }
    parts = []
    for first in range(0, len(drawn.x), BATCH):
        rows = slice(first, first + BATCH)
        x, truth, c = drawn.x[rows], drawn.truth[rows], predicted(f, drawn.x[rows])
        found = {}
        for name, attribution in maps.items():
            own = attribution[rows].contiguous()
            found[name] = measured(f, x, c, own, truth, first, lambda _, own=own: own)
        parts.append(found)
    return joined(parts)


def joined(parts: list[dict[str, Values]]) -> dict[str, Values]:
    """Put the values of batches behind each other."""
    return {
        row: {name: torch.cat([part[row][name].double() for part in parts]) for name in values}
        for row, values in parts[0].items()
    }


def controls(f: Classifier, drawn: Images) -> dict[str, Tensor]:
    """Return 1 for each image whose class is found: whole, object alone, object hidden."""
    inside = drawn.truth[:, None]
    shown = {
        "the whole image": drawn.x,
        "the object alone, the rest hidden": drawn.x * inside,
        "the object hidden": drawn.x * ~inside,
        "the second object hidden": drawn.x * ~drawn.distractor[:, None],
    }
    return {name: accuracy(f, x, drawn.label) for name, x in shown.items()}


def picture(model: nn.Sequential, drawn: Images) -> None:
    """Draw six images with the truth and maps; outlines are the regions kept."""
    f, shown = classifier(model), ("gradcam", "layercam", "scorecam", "lrp, cells", "rise")
    rows = torch.arange(6) * 9  # classes that differ, chosen by number alone
    x = drawn.x[rows]
    c = predicted(f, x)
    mean, std = PREPROCESSING.channels(x)
    figure, axes = plt.subplots(6, 2 + len(shown), figsize=(7.2, 6.4), dpi=80)
    for axis in axes.flat:
        axis.axis("off")
    for row, image in enumerate((x * std + mean).permute(0, 2, 3, 1)):
        axes[row, 0].imshow(image)
        axes[row, 0].set_title(list(TEXTURES)[int(c[row])], fontsize=7, pad=2)
        axes[row, 1].imshow(drawn.truth[rows[row]], cmap="gray")
    axes[0, 1].set_title("truth", fontsize=7, pad=2)
    for column, name in enumerate(shown, 2):
        maps, _ = views(f, x, c, WAYS[name])
        axes[0, column].set_title(name, fontsize=7, pad=2)
        for row in range(len(x)):
            axes[row, column].imshow(maps["plain"][row], cmap="inferno", vmin=0, vmax=1)
            for view, colour in (("tft", "cyan"), ("shift", "lime")):
                kept = mask_of(maps[view][row]).float()
                if 0 < kept.mean() < 1:
                    axes[row, column].contour(kept, [0.5], colors=colour, linewidths=0.8)
    figure.tight_layout(pad=0.3, h_pad=0.3, w_pad=0.2)
    path = ROOT / "docs" / "images" / "synthetic.png"
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as canvas:
        canvas.convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    """Draw, train, explain, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("synthetic-run"))
    parser.add_argument("--images", type=int, default=200, help="that are explained")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, weights = arguments.out / "values.json", arguments.out / "network.pt"
    if not kept.exists():
        torch.set_num_threads(1)
        measure_all(arguments.images, arguments.processes, kept, weights)
    table = Table.from_json(json.loads(kept.read_text("utf-8")))
    parts = {
        "synthetic_machine": machine(table.seconds),
        "control": "\n".join(control_lines(table)),
        "maps": "\n".join(map_lines(table)),
        "measures": "\n".join(measure_lines(table)),
    }
    print("\n\n".join(parts.values()))
    if arguments.page:
        for part, text in parts.items():
            pages.keep("results/synthetic", part, text)
        model = network()
        model.load_state_dict(torch.load(weights, weights_only=True))
        picture(model.eval(), images("test", arguments.images))


def measure_all(count: int, processes: int, kept: Path, weights: Path) -> None:
    """Train, explain and measure; keep the values of images and the network.

    Args:
        count: images that are explained.
        processes: how many methods are measured at a time.
        kept: where the values go, JSON.
        weights: where the network goes.
    """
    begun = time.monotonic()
    model = trained(images("train", TRAIN), EPOCHS)
    torch.save(model.state_dict(), weights)
    seconds = {"training": time.monotonic() - begun}
    control = controls(classifier(model), images("test", CONTROL_IMAGES))
    print({name: float(v.mean()) for name, v in control.items()}, file=sys.stderr, flush=True)
    drawn = images("test", count)
    values: dict[str, dict[str, Values]] = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = {name: pool.submit(one_method, name, model, drawn) for name in WAYS}
        for name, job in jobs.items():
            values[name] = job.result()
            print(f"{time.monotonic() - begun:5.0f} s  {name}", file=sys.stderr, flush=True)
    table = Table(values, references(model, drawn), control, seconds)
    seconds["all"] = time.monotonic() - begun
    kept.write_text(json.dumps(table.as_json()), "utf-8")
