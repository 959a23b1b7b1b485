"""Measure a whole run on a GPU: Table 5, engines, batch sizes, masks and fine-tuning.

    python -m benchmarks gpu DATA/imagenet --page

- Table 5: seconds an image of each CAM, with and without TFT, of vgg16 as in the paper.
- Engines and precisions: images/s of TFT by Grad-CAM, first passes and later ones, and tau*
  against the CPU's.
- Batch sizes: images/s of plain passes.
- gen-masks: images/s from files to the store. Fine-tuning: seconds of an epoch by eq. 8.

--page makes the tables those of docs/results/speed.md. Without a GPU, --device cpu --limit 2
--largest 4 --cams gradcam tries the script.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from aftcli import load_classifier
from aftcli.core.classifier import Classifier
from aftcli.core.methods import CAMS
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import DataSet, open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.errors import AftError
from aftcli.evaluation.trials import device_name, time_map
from aftcli.settings import Search
from aftcli.tft.explain import fits
from aftcli.tft.generate import tune_batch
from benchmarks import pages
from benchmarks.speed import finetune
from benchmarks.speed.gen_masks import measure

CONTESTANTS = {
    "as it is": None,
    "torch": ("torch", "no"),
    "torch, bf16": ("torch", "bf16"),
    "torch, fp16": ("torch", "fp16"),
    "compile": ("compile", "no"),
    "compile, bf16": ("compile", "bf16"),
}
SIZES = (1, 4, 16, 64, 256)  # images in a pass
BATCH = 16  # images of TFT at a time
RUNS = 5
EPOCHS = 3


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column has words, the others numbers."""
    rule = "|---|" + "--:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def inputs(f: Classifier, data: DataSet) -> Tensor:
    """Return all images of a data set, shape (N, 3, H, W), on the CPU."""
    images = (read_image(data.picture(i)) for i in range(len(data.samples)))
    return torch.cat([to_input(image, f.preprocessing) for image in images])


def table5(f: Classifier, x: Tensor, cams: Sequence[str]) -> Iterator[list[str]]:
    """Measure the seconds of a map of one image by each CAM, without TFT and with it."""
    single = list(x.to(f.device).split(1))
    for cam in (cam for cam in cams if fits(f, cam)):
        try:
            row = time_map(f, single, cam, Search(), RUNS)
        except AftError as error:
            yield [cam, "-", "-", str(error)[:60].replace("|", "/")]
            continue
        yield [cam, f"{row.without:.4f}", f"{row.with_tft:.4f}", f"{row.delta:.4f}"]


def tuned(f: Classifier, x: Tensor) -> tuple[float, Tensor, Tensor]:
    """Measure the seconds, tau* and probabilities of TFT by Grad-CAM of all images."""
    batches, settings = x.split(BATCH), Search()
    wait(f)
    start = time.perf_counter()
    found = [tune_batch(f, b.to(f.device), ["gradcam"], settings)[0].tft for b in batches]
    wait(f)
    seconds = time.perf_counter() - start
    tau, y_hat = (torch.cat([getattr(t, n).cpu() for t in found]) for n in ("tau", "probabilities"))
    return seconds, tau, y_hat


def engines(
    f: Classifier, plain: Classifier, x: Tensor, names: Sequence[str]
) -> Iterator[list[str]]:
    """Measure TFT by each engine and precision, against the plain network on the CPU."""
    _, tau, y_hat = tuned(plain, x)
    for name, how in ((name, CONTESTANTS[name]) for name in names):
        notes: list[str] = []
        fast = accelerated(f, how[0], note=notes.append, precision=how[1]) if how else f
        if how and fast is f:
            yield [name, "-", "-", "-", notes[-1].replace("|", "/")]
            continue
        first, *_ = tuned(fast, x)  # each number of images in a pass is planned once
        seconds, own_tau, own_y = tuned(fast, x)
        same = float((own_tau == tau).float().mean())
        error = float((own_y - y_hat).abs().max())
        speeds = [f"{len(x) / each:.1f}" for each in (first, seconds)]
        yield [name, *speeds, f"{same:.1%}", f"{error:.1e}"]


def sizes(f: Classifier, x: Tensor, largest: int) -> Iterator[list[str]]:
    """Measure images/s of plain passes by the number of images in one."""
    fast = accelerated(f, "torch", note=warnings.warn)
    lower = accelerated(f, "torch", note=warnings.warn, precision="bf16")
    for size in (size for size in SIZES if size <= largest):
        batch = x[:1].to(f.device).repeat(size, 1, 1, 1)
        yield [str(size), *(f"{size / forward(g, batch):.1f}" for g in (f, fast, lower))]


@torch.no_grad()
def forward(f: Classifier, x: Tensor) -> float:
    """Measure the seconds of a pass, the median of RUNS."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        f(x)
        wait(f)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def wait(f: Classifier) -> None:
    """Wait for the device."""
    if f.device.type == "cuda":
        torch.cuda.synchronize(f.device)
    elif f.device.type == "mps":
        torch.mps.synchronize()


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and return the section of the page line by line."""
    torch.manual_seed(0)
    # Random weights change the masks, not the seconds.
    paper = load_classifier(args.paper, weights=False, device=args.device)
    f = load_classifier(args.model, device=args.device)
    data = open_data_set(args.data, None, f.classes).limited(args.limit)
    x = inputs(f, data)
    yield from ("## On a GPU", "", f"{device_name(f.device)}; torch {torch.__version__};")
    yield from (f"{len(x)} images. Made by `python -m benchmarks gpu DATA --page`.", "")
    head = [f"{args.paper}, s an image", "plain", "with TFT", "difference"]
    yield from table(head, table5(paper, inputs(paper, data.limited(RUNS)), args.cams))
    head = [f"{args.model}, engine", "images/s of TFT, the first time", "then"]
    head += ["tau* as on the CPU", "largest change"]
    yield from table(head, engines(f, load_classifier(args.model), x, args.engines))
    head = [f"{args.model}, images in a pass", "as it is, images/s", "torch", "torch, bf16"]
    yield from table(head, sizes(f, x, args.largest))
    seconds, passes = measure(accelerated(f, note=warnings.warn), data, args.workers)
    speed = f"{len(data.samples) / seconds:.1f} images/s, {passes:.1f} passes an image"
    yield from (f"gen-masks, {args.model}: {speed}.", "")
    done = finetune.ours(args.data, max(args.limit, finetune.BATCH), EPOCHS, args.device)
    first, later = done["fill"], median(done["epochs"])
    yield f"Fine-tuning, {done['images']} images: {first:.2f} s to fill the cache of features,"
    yield f"{later:.2f} s an epoch."
    if f.device.type == "cuda":
        yield f"Peak GPU memory: {torch.cuda.max_memory_allocated(f.device) / 2**20:,.0f} MiB."


def main() -> None:
    """Print the section, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a data set with ImageNet's classes")
    parser.add_argument("--paper", default="vgg16", help="the network of Table 5")
    parser.add_argument("--model", default="efficientnet_lite0", help="the network of the others")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cams", nargs="+", choices=CAMS, default=list(CAMS))
    parser.add_argument("--engines", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--limit", type=int, default=64, help="images")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="images in a pass")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode")
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # as the commands do
    section = []
    for line in lines(args):
        print(line, flush=True)
        section.append(line)
    if args.page:
        pages.keep("results/speed", "gpu", "\n".join(section).strip())
