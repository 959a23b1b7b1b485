"""How the cost grows, measured points and a fitted line, and what full ImageNet would take.

    python benchmarks/growth.py --images DATA/imagenet --out growth.json --page growth.md

Axes: images of gen-masks, thresholds |T|, channels K of A for Ablation-CAM, classes of the head,
pixels of the input, processes with half the threads each. The points of an axis take turns; tables
show medians. What the file has is not measured again; without --images the page is made anew from
it. The model is efficientnet_lite0; heads of any K and number of classes have random weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from peers import machine_lines, provenance, table
from peers_calls import Timed, inputs, load, predicted, seconds_of, take_turns, whole_network
from torch import Tensor, nn

from aftcli import Search, attribution_map, explain, fine_tune_threshold, generate_masks
from aftcli.cli.process import keep_freed_memory
from aftcli.core.cam import scaled_map
from aftcli.core.classifier import Classifier, cut_classifier
from aftcli.data.blocks import Processes
from aftcli.data.sets import DataSet, open_data_set
from aftcli.engine.accelerate import accelerated

MODEL = "efficientnet_lite0"
IMAGENET = 1_281_167  # training images
BATCH = 16  # activations of a synthetic head
REPEATS = 5  # calls that are timed together where one is short
PROCESS_IMAGES = 64


class Setting(NamedTuple):
    """What all axes measure with."""

    f: Classifier
    engine: str
    data: Path

    def images(self, count: int) -> DataSet:
        """Images, spread over the data set."""
        return open_data_set(self.data, None, self.f.classes).limited(count)


def masks_of_images(setting: Setting, count: int) -> Timed:
    """gen-masks of so many images."""
    return lambda _: seconds_of(lambda: gen_masks(setting.f, setting.images(count)))


def gen_masks(f: Classifier, data_set: DataSet) -> None:
    """Masks of a data set, in a run of its own."""
    with tempfile.TemporaryDirectory() as run:
        for _ in generate_masks(f, data_set, ["gradcam"], Path(run), Search()):
            pass


def tft_of_thresholds(setting: Setting, count: int) -> Timed:
    """The search of one image among so many thresholds; runs take other images."""
    x = inputs(setting.f, str(setting.data), 8)
    c = predicted(setting.f, x)
    maps = attribution_map(setting.f, x, c, "gradcam")
    thresholds = [i / (count - 1) for i in range(count)]

    def timed(_: int) -> float:
        return seconds_of(lambda: fine_tune_threshold(setting.f, x, maps, c, thresholds)) / len(x)

    return timed


def synthetic(channels: int, classes: int) -> Classifier:
    """A network with a head of average pooling and one linear layer, random weights."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {
        "layer": nn.Conv2d(3, channels, 32, stride=32),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "linear": nn.Linear(channels, classes),
    }
    model = nn.Sequential()
    for name, module in parts.items():
        model.add_module(name, module)
    return cut_classifier(model, "layer", own=True)


def _timed_head(f: Classifier, call: Callable[[Tensor, Tensor, Tensor], object]) -> Timed:
    activation, x = torch.rand(BATCH, *f.activation_shape), torch.zeros(BATCH, 3, 224, 224)
    c = torch.arange(BATCH) % len(f.classes)

    def timed(_: int) -> float:
        with torch.no_grad():
            seconds = seconds_of(lambda: [call(activation, c, x) for _ in range(REPEATS)])
        return seconds / REPEATS / BATCH

    return timed


def ablation_of_channels(setting: Setting, channels: int) -> Timed:
    """Ablation-CAM of A with so many channels."""
    f = synthetic(channels, 1000)
    return _timed_head(f, lambda a, c, x: scaled_map(f, a, c, x, "ablationcam"))


def head_of_classes(setting: Setting, classes: int) -> Timed:
    """The head and Grad-CAM with so many classes."""
    f = synthetic(1280, classes)

    def call(a: Tensor, c: Tensor, x: Tensor) -> None:
        f.head(a).softmax(1)
        scaled_map(f, a, c, x, "gradcam")

    return _timed_head(f, call)


def tft_of_size(setting: Setting, size: int) -> Timed:
    """Grad-CAM and the search of one image of so many pixels a side; runs take other images."""
    old = setting.f.preprocessing
    resize = round((old.resize or size) * size / old.size[0])
    preprocessing = replace(old, size=(size, size), resize=resize)
    plain = load(MODEL)
    whole = whole_network(MODEL, plain)
    f = cut_classifier(
        whole,
        plain.layer_name,
        name=MODEL,
        preprocessing=preprocessing,
        classes=plain.classes,
        own=True,
    )
    x = inputs(f, str(setting.data), 8).split(1)
    f = accelerated(f, setting.engine)
    settings = Search()

    def timed(_: int) -> float:
        calls = lambda: [explain(f, x_n, ["gradcam"], settings=settings) for x_n in x]  # noqa: E731
        return seconds_of(calls) / len(x)

    return timed


def processes_share(setting: Setting, count: int) -> Timed:
    """gen-masks by so many processes of one thread each, without their start."""
    context = multiprocessing.get_context("spawn")

    def timed(_: int) -> float:
        barrier, results = context.Barrier(count), context.Queue()
        with tempfile.TemporaryDirectory() as run:
            started = [
                context.Process(target=_share, args=(i, barrier, results, run, *setting[1:]))
                for i in range(count)
            ]
            for process in started:
                process.start()
            seconds = results.get(timeout=300)
            for process in started:
                process.join()
        return float(seconds)

    return timed


def _share(index: int, barrier: Barrier, results: Queue, run: str, engine: str, data: Path) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    f = accelerated(load(MODEL), engine)
    images = open_data_set(data, None, f.classes).limited(PROCESS_IMAGES)
    gen_masks(f, images.limited(4))

    def wait() -> None:
        barrier.wait()

    wait()
    start = time.perf_counter()
    shared = Processes(index, barrier.parties, wait)
    for _ in generate_masks(
        f, images, ["gradcam"], Path(run), Search(), workers=0, processes=shared, block=16
    ):
        pass
    if index == 0:
        results.put(time.perf_counter() - start)


class Axis(NamedTuple):
    """What grows, and how its cost is measured.

    Attributes:
        title: of the page's table.
        what: the seconds are of this.
        points: where it is measured.
        prepare: gives the function that is timed at a point.
        runs: of each point, after one for warming up.
        power: the line is fitted against the point to this power.
    """

    title: str
    what: str
    points: tuple[int, ...]
    prepare: Callable[[Setting, int], Timed]
    runs: int = 3
    power: int = 1


AXES = {
    "images": Axis("images", "gen-masks", (16, 32, 64, 128), masks_of_images, runs=2),
    "thresholds": Axis("thresholds", "search of an image", (3, 6, 11, 21, 41), tft_of_thresholds),
    "channels": Axis(
        "channels K", "Ablation-CAM from A", (256, 512, 1024, 2048, 4096), ablation_of_channels, 7
    ),
    "classes": Axis(
        "classes",
        "head and Grad-CAM from A",
        (10, 100, 1000, 5000, 20000),
        head_of_classes,
        7,
    ),
    "size": Axis(
        "pixels a side",
        "map and search of an image",
        (160, 224, 288, 352),
        tft_of_size,
        power=2,
    ),
    "processes": Axis(
        "one-thread processes",
        f"gen-masks, {PROCESS_IMAGES} images",
        (1, 2),
        processes_share,
        1,
    ),
}


def measure(axis: Axis, setting: Setting) -> dict[str, Any]:
    """Medians at each point, and the line through them."""
    timed = {str(point): axis.prepare(setting, point) for point in axis.points}
    seconds = [median(values) for values in take_turns(timed, axis.runs).values()]
    return {"points": list(axis.points), "seconds": seconds, "line": fitted(axis, seconds)}


def fitted(axis: Axis, seconds: list[float]) -> dict[str, float]:
    """The least-squares line against the points to the axis's power, and its R^2."""
    x, y = np.array(axis.points, dtype=float) ** axis.power, np.array(seconds)
    slope, intercept = np.polyfit(x, y, 1)
    rest = ((y - intercept - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - rest)}


def page(record: dict[str, Any]) -> str:
    """The section of a markdown page."""
    results = record["results"]
    lines = [
        "## How the cost grows",
        "",
        *machine_lines(record),
        f"Engine: {record['engine']}.",
        "",
    ]
    for name, axis in AXES.items():
        if name in results:
            lines += axis_lines(axis, results[name])
    return "\n".join([*lines, *imagenet_lines(results)])


def axis_lines(axis: Axis, found: dict[str, Any]) -> Iterator[str]:
    """The table of one axis and the line."""
    line = found["line"]
    yield from (f"### {axis.title[0].upper() + axis.title[1:]}", "")
    rows = (
        [
            str(point),
            f"{seconds:.4g}",
            f"{line['intercept'] + line['slope'] * point**axis.power:.4g}",
        ]
        for point, seconds in zip(found["points"], found["seconds"], strict=True)
    )
    yield from table([axis.title, f"{axis.what}, s", "line"], rows)
    if len(found["points"]) > 2:
        of = axis.title + (f"^{axis.power}" if axis.power > 1 else "")
        yield f"Seconds = {line['intercept']:.3g} + {line['slope']:.4g} {of}; R^2 {line['r2']:.4f}."
        yield ""


def imagenet_lines(results: dict[str, Any]) -> Iterator[str]:
    """Hours for ImageNet's training images, from what was measured."""
    yield from (f"### ImageNet, {IMAGENET:,} images", "")
    if "images" in results:
        line = results["images"]["line"]
        hours = (line["intercept"] + line["slope"] * IMAGENET) / 3600
        yield f"By the line, gen-masks by one CAM takes {hours:.1f} hours on this machine."
    if "processes" in results:
        one, two = results["processes"]["seconds"]
        hours = IMAGENET * two / PROCESS_IMAGES / 3600
        yield f"Two processes of one thread: {one / two:.2f} times one's speed, {hours:.1f} hours."
    yield ""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="a data set with ImageNet's classes")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--engine", choices=("torch", "onnxruntime"), default="onnxruntime")
    parser.add_argument("--out", type=Path, default=Path("growth.json"))
    parser.add_argument("--page", type=Path, help="write the markdown section")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is there")
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.images:
        measure_all(record, args)
    if args.page:
        args.page.write_text(page(record))


def measure_all(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Measure what is missing; the file is written after each axis."""
    keep_freed_memory()
    setting = Setting(accelerated(load(MODEL), args.engine), args.engine, args.images.resolve())
    results = record.setdefault("results", {})
    for name in args.axes:
        if name not in results or args.overwrite:
            print(name, flush=True)
            # For the processes that are started; this one has its threads already.
            os.environ["OMP_NUM_THREADS"] = "1" if name == "processes" else str(_threads())
            results[name] = measure(AXES[name], setting)
            os.environ["OMP_NUM_THREADS"] = str(_threads())
            record.update(provenance(args), engine=args.engine)
            args.out.write_text(json.dumps(record, indent=1))


def _threads() -> int:
    return torch.get_num_threads()


if __name__ == "__main__":
    main()
