"""Watch memory and open files over a long gen-masks, from the first images to the last.

    python -m benchmarks long_run DATA/imagenet/val [--images 20000] [--json FILE]

The real images are repeated under other names (hard links, else copies) in class folders of
their own until there are as many as asked for. While `aft gen-masks` runs, what its processes
hold is read from /proc at regular intervals. At the end the rows of one image under its many
names are compared.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

import aftcli
from aftcli import MaskStore

SUFFIXES = {".jpg", ".jpeg", ".png"}


def repeat(data: Path, folder: Path, count: int) -> None:
    """Fill a folder with class folders of `count` names for the images of another."""
    images = sorted(p for p in data.rglob("*") if p.suffix.lower() in SUFFIXES)
    for i in range(count):
        source = images[i % len(images)]
        target = folder / source.parent.name / f"{i // len(images):04d}-{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy(source, target)


def held(process: psutil.Process, parts: Path) -> dict[str, float]:
    """Return what a process and its children hold now, and how many blocks are done."""
    own, *children = [process, *process.children(recursive=True)]
    return {
        "blocks": len(list(parts.glob("0*"))) if parts.is_dir() else 0,
        "main_mb": own.memory_info().rss / 2**20,
        "workers_mb": sum(child.memory_info().rss for child in children) / 2**20,
        "files": own.num_fds() + sum(child.num_fds() for child in children),
        "processes": 1 + len(children),
        "threads": own.num_threads(),
    }


def watch(command: list[str], parts: Path, every: float) -> tuple[list[dict[str, float]], float]:
    """Run a command; what it held at intervals, and its seconds."""
    start = time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    samples = []
    while process.poll() is None:
        try:
            samples.append({"seconds": time.monotonic() - start, **held(process, parts)})
        except psutil.Error:
            pass  # a process that has just ended
        time.sleep(every)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return samples, time.monotonic() - start


def mean(samples: list[dict[str, float]], key: str) -> float:
    """Return the mean of some samples."""
    return float(np.mean([sample[key] for sample in samples]))


def equal_rows(path: Path) -> dict[str, int]:
    """Return whether all names of an image have the same row."""
    with MaskStore(path) as store:
        store.verify()
        rows = store.rows(0, len(store))
        broken = len(store.broken)
    names = [bytes(name).decode().split("/")[-1].split("-", 1)[1] for name in rows.path]
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).append(i)
    differing = sum(
        any((rows.tau[i] != rows.tau[g[0]]) or (rows.mask[i] != rows.mask[g[0]]).any() for i in g)
        for g in groups.values()
    )
    return {"rows": len(names), "images": len(groups), "differing": differing, "broken": broken}


def main() -> None:
    """Run, print a table, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--thresholds", default="0.3,0.6")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, run = Path(scratch) / "many", Path(scratch) / "run"
        repeat(args.data, folder, args.images)
        options = ["--thresholds", args.thresholds, "--run", str(run), "--quiet"]
        command = [sys.executable, "-m", "aftcli", "gen-masks", str(folder), *options]
        parts = run / "masks/.efficientnet_lite0-gradcam.parts"
        samples, seconds = watch(command, parts, args.every)
        rows = equal_rows(run / "masks/efficientnet_lite0-gradcam.h5")
        size = (run / "masks/efficientnet_lite0-gradcam.h5").stat().st_size
    most = max(sample["blocks"] for sample in samples)
    # Without the start, and the end when blocks are joined.
    at_work = [s for s in samples if s["blocks"] >= 0.05 * most and s["processes"] > 1]
    tenth = max(len(at_work) // 10, 1)
    first, last = at_work[:tenth], at_work[-tenth:]
    print(f"{args.images} images, {seconds / 60:.1f} min, {args.images / seconds:.1f} images/s")
    print(f"rows {rows}; {size / args.images:.0f} bytes an image")
    print(f"{'':12} {'first tenth':>12} {'last tenth':>12} {'largest':>9}")
    keys = ("main_mb", "workers_mb", "files", "processes", "threads")
    for key in keys:
        largest = max(s[key] for s in samples)
        print(f"{key:12} {mean(first, key):12.1f} {mean(last, key):12.1f} {largest:9.1f}")
    if args.json:
        found = {
            "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
            "versions": {"aft": aftcli.__version__, "python": platform.python_version()},
            "images": args.images,
            "thresholds": args.thresholds,
            "seconds": seconds,
            "store": {**rows, "bytes_per_image": size / args.images},
            "first": {key: mean(first, key) for key in keys},
            "last": {key: mean(last, key) for key in keys},
            "largest": {key: max(s[key] for s in samples) for key in keys},
            "samples": samples,
        }
        args.json.write_text(json.dumps(found, indent=1))
