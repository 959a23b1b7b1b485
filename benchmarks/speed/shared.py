"""Time methods together against alone, and seconds an image of a folder, as whole commands.

    python -m benchmarks shared PHOTOS [--count 50] [--runs 3] [--only together folder]

- together: `aft explain --cam all --tft` of one photograph against the sum of a process a method.
  The start, a process that explains without a search, is taken off each. Goal: at most 1.3.
- folder: `aft explain` of COUNT photographs against one: seconds of each beyond the first. Goal: at
  most .25.

Wall and processor seconds, both of whole processes; efficientnet_lite0. Methods whose package is
not installed are left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

from aftcli.core.methods import METHODS
from aftcli.errors import AftError

PICTURES = (".jpg", ".jpeg", ".png")
Seconds = tuple[float, float]  # of wall, of all processors


def seconds_of(words: list[str]) -> Seconds:
    """Run `aft` with these words in a folder of its own."""
    with tempfile.TemporaryDirectory() as out:
        before, start = os.times(), time.perf_counter()
        command = [sys.executable, "-m", "aftcli", *words, "--quiet", "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, os.times()
    user, system = (after[i] - before[i] for i in (2, 3))
    return wall, user + system


def installed() -> Iterator[str]:
    """Yield the methods whose packages are there."""
    for name, entry in METHODS.items():
        with suppress(AftError):
            entry.check_installed()
            yield name


def middle(times: list[Seconds]) -> Seconds:
    """Return the medians of runs."""
    wall, busy = (median(column) for column in zip(*times, strict=True))
    return wall, busy


def together(photo: Path, runs: int, methods: list[str]) -> None:
    """Print what all methods cost in one process, and one by one."""
    one, times = ["explain", str(photo), "--tft"], []
    for _ in range(runs):
        start = seconds_of(["explain", str(photo), "--cam", "gradcam"])
        whole = seconds_of([*one, "--cam", ",".join(methods)])
        each = [seconds_of([*one, "--cam", method]) for method in methods]
        times.append((start, whole, each))
    print(f"{len(methods)} methods with their searches, one photograph, {runs} runs\n")
    print("| seconds beyond the start | together | one by one | ratio |")
    print("|---|--:|--:|--:|")
    for i, name in enumerate(("wall", "processors")):
        alone = [sum(e[i] - start[i] for e in each) for start, _, each in times]
        whole_s = [whole[i] - start[i] for start, whole, _ in times]
        ratio = median(w / a for w, a in zip(whole_s, alone, strict=True))
        print(f"| {name} | {median(whole_s):.2f} | {median(alone):.2f} | {ratio:.2f} |")


def folder(photos: list[Path], runs: int) -> None:
    """Print the seconds of each photograph beyond the first."""
    words = [["explain", *map(str, part)] for part in (photos[:1], photos)]
    for line in words:  # what the disk has to give is in memory then
        seconds_of(line)
    first, all_ = (middle([seconds_of(line) for _ in range(runs)]) for line in words)
    print(f"\n{len(photos)} photographs, the default method, {runs} runs\n")
    print("| seconds | one photograph | all | each beyond the first |")
    print("|---|--:|--:|--:|")
    for name, a, b in zip(("wall", "processors"), first, all_, strict=True):
        print(f"| {name} | {a:.2f} | {b:.2f} | {(b - a) / (len(photos) - 1):.3f} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cam", nargs="+", help="methods; default all that are installed")
    parser.add_argument("--only", nargs="+", choices=("together", "folder"))
    args = parser.parse_args()
    found = sorted(p for p in args.photos.rglob("*") if p.suffix.lower() in PICTURES)
    if not found:
        parser.error(f"no photographs in {args.photos}: name a folder that has some")
    photos = found[:: max(len(found) // args.count, 1)][: args.count]
    if not args.only or "folder" in args.only:
        folder(photos, args.runs)
    if not args.only or "together" in args.only:
        together(photos[0], args.runs, args.cam or [*installed()])


if __name__ == "__main__":
    main()
