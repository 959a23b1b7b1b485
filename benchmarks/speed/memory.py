"""Measure the peak memory of each command, and that gen-masks stays flat over many images.

    python -m benchmarks memory [--page]

Pictures are synthetic, resnet50 has random weights: memory depends on neither. Each command starts
with an empty cache, so that an export counts. Linux only:

- `peak` is the largest resident memory of the main process, libraries included (ru_maxrss).
- `together` adds what its workers hold: all processes' own pages, and the files that the main
  process maps, sampled twice a second.
- The growth of gen-masks is that of own pages alone. Those that processes share are divided between
  them (PSS of /proc), and no other program shares any, so a loaded machine gives the same figures.

What is in memory.json already is not measured again. This process imports no torch, which would
count in its children's memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from benchmarks import pages

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).with_suffix(".json")
PACKAGES = ("aftcli", "torch", "torchvision", "timm", "onnxruntime", "h5py", "numpy", "pillow")
KINDS = ("peak", "together")
BLOCK = 32  # images of a block of gen-masks, up to 128,000 images
EVERY = 0.5  # seconds between samples

NETWORKS = ("efficientnet_lite0", "resnet50")
TRAIN, VAL = 48, 16  # pictures of the commands' data set: enough for the engine and a full batch
SIZE = (500, 375)  # pixels: the usual size of ImageNet's
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
COMMANDS = {
    "explain": "explain PICTURE",
    "explain --tft": "explain PICTURE --tft",
    "explain --cam all": "explain PICTURE --cam all",
    "tft --map": "tft PICTURE --map MAP",
    "gen-masks": "gen-masks DATA --run RUN",
    "finetune": "finetune --run RUN --epochs 2",
    "evaluate --table": "evaluate --run RUN --table",
}
SAVES = ("explain", "tft")  # commands with --out

SIDE = 64  # pixels of the pictures and the input of the fast network
FAST = f"""
from torch import manual_seed, nn


def build():
    manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, {len(WNIDS)}),
    )
    net.preprocessing = {{"size": [{SIDE}, {SIDE}], "resize": {SIDE}}}
    return net
"""
SHARES = (0.1, 0.5, 1.0)  # of the images, at which memory is read
PLACES = 40  # points of the growth that are kept


class Sample(NamedTuple):
    """Memory that a command's processes hold at one moment, and the images done by then.

    Attributes:
        images: done.
        own: pages of the processes' own, MiB, each counted once.
        files: of the main process, libraries for the most part, MiB.
    """

    images: int
    own: float
    files: float


def kib(path: str, *names: str) -> int:
    """Sum what a file of /proc says of some names, KiB."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":") in names)


def sample(process: psutil.Process, images: int) -> Sample:
    """Read what a process and all its children hold now."""
    own = 0
    for each in (process, *process.children(recursive=True)):
        try:
            own += kib(f"/proc/{each.pid}/smaps_rollup", "Pss_Anon", "Pss_Shmem")
        except OSError:
            pass  # a worker that has just ended
    return Sample(images, own / 1024, kib(f"/proc/{process.pid}/status", "RssFile") / 1024)


def watch(
    words: Sequence[str], environment: dict[str, str], masks: Path | None = None
) -> tuple[int, list[Sample]]:
    """Run `aft` with these words; return its peak, MiB, and samples.

    Args:
        words: of the command line.
        environment: of the process, beside this one's.
        masks: where gen-masks keeps its finished blocks.
    """
    print("aft", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "aftcli", *words, "--quiet"]
    environment = {**os.environ, **environment}
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
    samples, done = [], 0
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        if masks:
            done = max(done, BLOCK * len(list(masks.glob(".*.parts/0*"))))
        try:
            samples.append(sample(process, done))
        except (OSError, psutil.Error):
            pass  # it has just ended
        time.sleep(EVERY)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"aft {' '.join(words)}: failed, {process.returncode}")
    return usage.ru_maxrss // 1024, samples


def write_pictures(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    """Write different JPEGs of smooth noise, in class folders that take turns."""
    random = np.random.default_rng(seed)
    for i in range(count):
        path = folder / WNIDS[i % len(WNIDS)] / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def with_random_weights(model: str, folder: Path) -> list[str]:
    """Write random weights of a network of torchvision; the options that name both."""
    path = folder / f"{model}.pth"
    code = (
        "import sys, torch, torchvision; torch.manual_seed(0); "
        "torch.save(torchvision.models.get_model(sys.argv[1]).state_dict(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, model, str(path)], check=True)
    return ["--model", model, "--checkpoint", str(path)]


def measure_commands(model: str, scratch: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Run each command with a network; its name and its memory, MiB."""
    own = ["--model", model] if model == NETWORKS[0] else with_random_weights(model, scratch)
    data, run, attribution = scratch / "data", scratch / "run", scratch / "map.npy"
    for split, count, seed in (("train", TRAIN, 0), ("val", VAL, 1)):
        write_pictures(data / split, count, SIZE, seed)
    np.save(attribution, np.random.default_rng(2).random((224, 224), dtype=np.float32))
    picture = next((data / "val").rglob("*.jpg"))
    places = {"PICTURE": picture, "MAP": attribution, "DATA": data, "RUN": run}
    for i, (name, line) in enumerate(COMMANDS.items()):
        words = [str(places.get(word, word)) for word in line.split()] + own
        if words[0] in SAVES:
            words += ["--out", str(scratch / f"out-{i}")]
        peak, samples = watch(words, {"AFT_CACHE": str(scratch / f"cache-{i}")})
        sampled = (round(s.own + s.files) for s in samples)
        yield name, {"peak": peak, "together": max(peak, *sampled)}


def measure_growth(images: int, scratch: Path) -> dict[str, Any]:
    """Run gen-masks with eleven thresholds and a fast network over many pictures."""
    network, classes = scratch / "fast.py", scratch / "classes.txt"
    network.write_text(FAST)
    classes.write_text("\n".join(WNIDS))
    data, run = scratch / "data", scratch / "run"
    write_pictures(data, images, (SIDE, SIDE), 3)
    words = ["gen-masks", str(data), "--run", str(run), "--model", f"{network}:build"]
    words += ["--classes", str(classes)]
    # Threads only wait for each other in a network as small as this.
    environment = {"AFT_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    peak, samples = watch(words, environment, run / "masks")
    return {"images": images, "peak": peak, **growth(samples, images)}


def growth(samples: Sequence[Sample], images: int) -> dict[str, Any]:
    """Return the memory at some shares of the images, and its slope after the first tenth.

    Args:
        samples: in the order of time.
        images: how many there are.

    Returns:
        `at`: MiB at each of SHARES, the mean over the 5 % of the images before it; `slope`: KiB
        for 1,000 images, by least squares, before blocks are joined; `samples`: some of them.
    """
    most = min(images, max(s.images for s in samples))  # reached when blocks are joined
    at_work = [s for s in samples if 0 < s.images < most]
    later = [s for s in at_work if s.images >= SHARES[0] * images]
    line = linear_regression([s.images for s in later], [s.own for s in later])
    at = {}
    for share in SHARES:
        near = (s.own for s in at_work if share - 0.05 <= s.images / images < share)
        at[f"{share:.0%}"] = round(mean(near), 1)
    kept = at_work[:: -(-len(at_work) // PLACES)]
    return {
        "at": at,
        "slope": round(line.slope * 1024 * 1000, 1),
        "samples": [[s.images, round(s.own, 1)] for s in kept],
    }


def provenance(command: str) -> dict[str, Any]:
    """Return machine, versions, command and date."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next(line.partition(": ")[2] for line in info if line.startswith("model name")),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "versions": {"Python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


def page(record: dict[str, Any]) -> str:
    """Return the section of the page."""
    found, grown = record["commands"], record["growth"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    head = ["command", *(f"{model}: {what}" for model in found for what in KINDS)]
    lines = [
        f"Machine: {record['cpu']}, {record['cores']} cores, {record['memory']}, no GPU; "
        f"{record['system']}; {record['date']}.",
        f"Versions: {versions}.",
        f"Made by `{record['command']}`.",
        "",
        f"| {' | '.join(head)} |",
        "|---" + "|--:" * (len(head) - 1) + "|",
    ]
    for name in COMMANDS:
        of_models = [found[model].get(name, {}) for model in found]
        held = [str(each.get(what, "-")) for each in of_models for what in KINDS]
        lines.append(f"| {' | '.join([name, *held])} |")
    at = {f"at {share}": f"{mib:.0f} MiB" for share, mib in grown["at"].items()}
    row = {"images": f"{grown['images']:,}", **at}
    row["slope"] = f"{grown['slope']:+.0f} KiB for 1,000 images"
    rule = "|---" + "|--:" * (len(row) - 1) + "|"
    lines += ["", f"| {' | '.join(row)} |", rule, f"| {' | '.join(row.values())} |"]
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=20_000, help="of the long gen-masks; 0: none")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is there")
    args = parser.parse_args()
    fresh = args.overwrite or not args.out.exists()
    record = {"commands": {}} if fresh else json.loads(args.out.read_text())

    def keep() -> None:
        images = record.get("growth", {}).get("images", args.images)
        record.update(provenance(f"python -m benchmarks memory --images {images} --page"))
        args.out.write_text(pages.laid_out(record) + "\n")

    for model in args.networks:
        if len(record["commands"].get(model, ())) < len(COMMANDS):
            with tempfile.TemporaryDirectory() as scratch:
                found = record["commands"][model] = {}
                for name, held in measure_commands(model, Path(scratch)):
                    found[name] = held
                    keep()
    if args.images and "growth" not in record:
        with tempfile.TemporaryDirectory() as scratch:
            record["growth"] = measure_growth(args.images, Path(scratch))
        keep()
    if args.page:
        pages.keep("results/speed", "memory", page(record))
