"""Time the first map: `aft explain` of one photograph beside what it takes to import torch.

    python -m benchmarks first_map [--runs 11] [--page]

Each contestant is a process of its own; they take turns, another one first each time. The
photograph is docs/images/chelsea.jpg, the network efficientnet_lite0, the method Layer-CAM. The
goal is at most 1.6 times the time of `python -c "import torch"`. --page keeps the figures for
docs/results/speed.md.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median

import torch

from aftcli.version import __version__
from benchmarks.pages import keep
from benchmarks.speed.peers import Ratio, table

PHOTO = Path(__file__).parents[2] / "docs/images/chelsea.jpg"
GOAL = 1.6
IMPORT = 'python -c "import torch"'

COMMANDS = {
    IMPORT: ["-c", "import torch"],
    'python -c "import torch, torchvision, timm"': ["-c", "import torch, torchvision, timm"],
    "aft explain": ["-m", "aftcli", "explain", str(PHOTO)],
    "aft explain --tft": ["-m", "aftcli", "explain", str(PHOTO), "--tft"],
}


def measured(arguments: list[str], folder: str) -> tuple[float, float]:
    """Run a command; return its seconds of wall and of all processors."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    own = after.children_user - before.children_user
    return wall, own + after.children_system - before.children_system


def lines(found: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """Return the section of the page."""
    runs = len(found[IMPORT])
    yield "## The first map"
    yield ""
    machine = platform.processor() or platform.machine()
    yield f"Machine: {machine}, {os.cpu_count()} cores; {date.today()}."
    yield (
        f"Versions: python {platform.python_version()}, aftcli {__version__}, torch "
        f"{torch.__version__}. Made by `python -m benchmarks first_map --runs {runs} --page`: "
        f"{runs} processes of each, taking turns; medians, ratios with their least and largest."
    )
    yield ""
    rows = []
    for name, times in found.items():
        walls = [wall for wall, _ in times]
        ratio = Ratio.of(walls, [wall for wall, _ in found[IMPORT]])
        rows.append(
            [f"`{name}`", f"{median(walls):.2f}", f"{median(c for _, c in times):.2f}", str(ratio)]
        )
    yield from table(["command", "wall, s", "processors, s", "of importing torch"], rows)
    ratio = Ratio.of([w for w, _ in found["aft explain"]], [w for w, _ in found[IMPORT]])
    yield f"The goal is {GOAL}: {'met' if ratio.middle <= GOAL else '**missed**'}."


def main() -> None:
    """Print the section, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    names = list(COMMANDS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:  # what the disk has to give is in memory then
            measured(COMMANDS[name], folder)
        for run in range(args.runs):
            turn = run % len(names)
            for name in [*names[turn:], *names[:turn]]:
                found[name].append(measured(COMMANDS[name], folder))
    text = "\n".join(lines(found))
    print(text)
    if args.page:
        keep("results/speed", "first_map", text)


if __name__ == "__main__":
    main()
