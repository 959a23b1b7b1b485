"""Compare the engines and precisions on a GPU, and with a CPU's results.

    python -m benchmarks gpu DATA/imagenet [--model efficientnet_lite0] [--device cuda] [--limit 64]

Prints images/s of TFT by Grad-CAM for each engine and precision, the share of images whose tau* is
that of the plain network on the CPU, and the largest difference of a probability. `--device cpu`
tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from aftcli import load_classifier
from aftcli.core.classifier import Classifier
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.settings import Search
from aftcli.tft.generate import tune_batch

CONTESTANTS = {
    "as it is": None,
    "torch": ("torch", "no"),
    "torch, bf16": ("torch", "bf16"),
    "torch, fp16": ("torch", "fp16"),
    "compile": ("compile", "no"),
    "compile, bf16": ("compile", "bf16"),
}


def run(f: Classifier, batches: list[Tensor]) -> tuple[float, Tensor, Tensor]:
    """Measure the seconds, tau* and probabilities of TFT by Grad-CAM of all batches."""
    settings = Search()
    tune_batch(f, batches[0].to(f.device), ["gradcam"], settings)
    _wait(f)
    start = time.perf_counter()
    found = [tune_batch(f, x.to(f.device), ["gradcam"], settings)[0].tft for x in batches]
    _wait(f)
    seconds = time.perf_counter() - start
    tau, y_hat = (torch.cat([getattr(t, n).cpu() for t in found]) for n in ("tau", "probabilities"))
    return seconds, tau, y_hat


def _wait(f: Classifier) -> None:
    if f.device.type == "cuda":
        torch.cuda.synchronize(f.device)


def main() -> None:
    """Print a row a contestant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # as the commands do
    f = load_classifier(args.model, device=args.device)
    data = open_data_set(args.data, None, f.classes).limited(args.limit)
    images = [read_image(data.picture(i)) for i in range(len(data.samples))]
    x = torch.cat([to_input(image, f.preprocessing) for image in images])
    batches = list(x.split(args.batch))
    _, tau, y_hat = run(load_classifier(args.model), batches)
    print("| engine | images/s | same tau* | largest difference of y_hat |")
    print("|---|---|---|---|")
    for name, how in CONTESTANTS.items():
        fast = accelerated(f, how[0], note=print, precision=how[1]) if how else f
        seconds, own_tau, own_y = run(fast, batches)
        same = float((own_tau == tau).float().mean())
        error = float((own_y - y_hat).abs().max())
        print(f"| {name} | {len(x) / seconds:.1f} | {same:.1%} | {error:.1e} |", flush=True)
