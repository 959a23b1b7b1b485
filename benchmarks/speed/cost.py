"""Compute the hours and the disk that ImageNet-1k costs, from measured images a second.

    python -m benchmarks cost DATA/imagenette [--images 64]

Runs gen-masks, finetune and evaluate on a quarter of the images and on all, so that what a command
takes to start is left out. DATA has train and val. Machines share gen-masks and evaluate;
finetune, by default the zero level, takes some hundred images of any number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aftcli.aft.zero_level import ASKED
from aftcli.models.load import device_name, find_device

TRAIN, VAL = 1_281_167, 50_000  # images of ImageNet-1k

COMMANDS = {
    "gen-masks": (TRAIN, ("--cam", "gradcam")),
    "finetune": (ASKED, ()),
    "evaluate": (VAL, ("--masking", "binary")),
}


def seconds(command: str, words: list[str]) -> float:
    """Time a command of `aft`."""
    start = time.monotonic()
    given = [sys.executable, "-m", "aftcli", command, *words, "--quiet"]
    subprocess.run(given, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def measure(data: Path, images: int, work: Path) -> dict[str, dict[str, float]]:
    """Measure each command on few and on many images; what one more image costs."""
    took: dict[str, list[float]] = {command: [] for command in COMMANDS}
    sizes = []
    counts = (images // 4, images)
    for count in counts:
        run = ["--run", str(work / str(count))]
        for command, (_, options) in COMMANDS.items():
            named = [str(data)] if command == "gen-masks" else []
            limit = [] if command == "finetune" else ["--limit", str(count)]
            took[command].append(seconds(command, [*named, *options, *limit, *run]))
        sizes.append(sum(p.stat().st_size for p in (work / str(count) / "masks").glob("[!.]*.h5")))
    more = counts[1] - counts[0]
    found = {}
    for command, (total, _) in COMMANDS.items():
        each = (took[command][1] - took[command][0]) / more
        found[command] = {"images/s": round(1 / each, 2), "hours": round(each * total / 3600, 2)}
    found["gen-masks"]["GB of masks"] = round((sizes[1] - sizes[0]) / more * TRAIN / 1e9, 2)
    return found


def main() -> None:
    """Print images a second, hours and disk of each command, and the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args.data.resolve(), args.images, Path(temporary))
    print(json.dumps({"machine": device_name(find_device("auto")), **found}, indent=2))


if __name__ == "__main__":
    main()
