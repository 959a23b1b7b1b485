"""Measure the throughput of gen-masks against its floor, decoding included.

    python -m benchmarks gen_masks DATA/imagenet [--limit 96] [--models efficientnet_lite0 resnet50]

Passes run by ONNX Runtime, as the command's do on a CPU; --engine names another. The floor is (1 +
distinct masks of an image) x the model's best measured batch forward: what the network alone must
cost. Decoding, maps, masks, packing and storing come on top; the ratio floor / measured says how
little. ResNet-50 has random weights, which changes no cost but the number of distinct masks, and
that is counted. Processor time, of the processes that decode too, hardly depends on what else the
machine does.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from aftcli import load_classifier
from aftcli.cli.process import keep_freed_memory
from aftcli.core.classifier import Classifier
from aftcli.data.sets import DataSet, open_data_set
from aftcli.engine.accelerate import CHOICES, accelerated
from aftcli.masks.generate import generate_masks
from aftcli.settings import Search


class Counted:
    """Counter of the images that pass through a classifier's forward."""

    def __init__(self, f: Classifier) -> None:
        """Wrap the classifier's forward."""
        self.images = 0
        self.forward = f.forward
        f.forward = self.count  # type: ignore[method-assign]

    def count(self, x: torch.Tensor) -> torch.Tensor:
        """Pass x on."""
        self.images += len(x)
        return self.forward(x)


@torch.no_grad()
def best_forward(f: Classifier, runs: int) -> tuple[float, int]:
    """Measure the seconds an image in the best batch size, median of runs, and that size."""
    best = (float("inf"), 0)
    for size in (8, 16, 32, 64):
        x = torch.randn(size, 3, *f.preprocessing.size)
        f(x)
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            f(x)
            seconds.append((time.perf_counter() - start) / size)
        best = min(best, (statistics.median(seconds), size))
    return best


def processor_seconds() -> float:
    """Return what this process and those that it waited for took of the processors."""
    return sum(os.times()[:4])


def measure(f: Classifier, data: DataSet, workers: int) -> tuple[float, float]:
    """Measure the seconds of a run, and network passes an image."""
    counted = Counted(f)
    with tempfile.TemporaryDirectory() as run:
        start = time.perf_counter()
        for _ in generate_masks(f, data, ["gradcam"], Path(run), Search(), workers=workers):
            pass
        seconds = time.perf_counter() - start
    f.forward = counted.forward  # type: ignore[method-assign]
    return seconds, 1 + counted.images / len(data.samples)


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--engine", choices=CHOICES, default="onnxruntime")
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0", "resnet50"])
    args = parser.parse_args()
    keep_freed_memory()  # as the command does; the floor gains from it as well
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ")
    print(f"Python {platform.python_version()}, {args.limit} images\n")
    print(
        "| model | forward ms (batch) | passes an image | processor ms an image | images/s | "
        "floor images/s | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(0)
        f = accelerated(load_classifier(name, weights=name == "efficientnet_lite0"), args.engine)
        data = open_data_set(args.data, None, f.classes).limited(args.limit)
        measure(f, data.limited(8), args.workers)
        forwards, rows, busy = [best_forward(f, 2)], [], []
        for _ in range(args.runs):
            before = processor_seconds()
            rows.append(measure(f, data, args.workers))
            busy.append((processor_seconds() - before) / len(data.samples))
            forwards.append(best_forward(f, 2))
        # The machine's speed drifts: each run is held against the floors before and after it.
        ratios = sorted(
            passes * (earlier[0] + later[0]) / 2 * len(data.samples) / seconds
            for (seconds, passes), earlier, later in zip(rows, forwards, forwards[1:], strict=False)
        )
        forward, size = min(forwards)
        speed = statistics.median(len(data.samples) / seconds for seconds, _ in rows)
        print(
            f"| {name} | {forward * 1000:.1f} ({size}) | {rows[0][1]:.2f} | "
            f"{statistics.median(busy) * 1000:.1f} | {speed:.2f} | "
            f"{1 / (rows[0][1] * forward):.2f} | {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} .. {ratios[-1]:.3f}) |",
            flush=True,
        )
