"""Make docs/images/report.png: the page of `aft evaluate --figures` in a browser, offline.

    python -m benchmarks report_page [--out DIR] [--browser chromium]

The data set is cut from the photographs in docs/images: four crops of each to train on, one to
evaluate on. Its numbers say nothing; the picture shows what the page looks like.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
PHOTOS = {"n02123159": "chelsea", "n07920052": "coffee", "n03773504": "rocket"}
SIZE = (1240, 2050)
COMMANDS = (
    "gen-masks photos --cam gradcam --cam layercam",
    "finetune --objective tuner --epochs 3 --held-out 0.25",
    "finetune --no-masks --epochs 3 --held-out 0.25",
    "evaluate --table --figures",
)


def make_photos(folder: Path) -> None:
    """Cut the photographs into a data set, as ImageNet lies on disk."""
    for wnid, name in PHOTOS.items():
        with Image.open(ROOT / f"docs/images/{name}.jpg") as image:
            width, height = image.size
            for split, count in (("train", 4), ("val", 1)):
                (folder / split / wnid).mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    edge = 12 * i + (6 if split == "val" else 0)
                    part = image.crop((edge, edge, width - edge, height - edge))
                    part.save(folder / split / wnid / f"{name}-{i}.png")


def main() -> None:
    """Run the commands, open the page, keep the picture small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("report-run"))
    parser.add_argument("--browser", default="chromium")
    arguments = parser.parse_args()
    make_photos(arguments.out / "photos")
    for command in COMMANDS:
        words = [sys.executable, "-m", "aftcli", *command.split()]
        subprocess.run(words, cwd=arguments.out, check=True)
    page = (arguments.out / "aft-run/results/report.html").resolve()
    shot = arguments.out.resolve() / "report.png"
    browser = [arguments.browser, "--headless", "--no-sandbox", "--disable-gpu"]
    browser += ["--hide-scrollbars", f"--window-size={SIZE[0]},{SIZE[1]}"]
    # No name is resolved: what the page would fetch is missing in the picture.
    browser += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(browser, check=True, capture_output=True)
    with Image.open(shot) as image:
        small = image.convert("RGB").quantize(128)
        small.save(ROOT / "docs/images/report.png", optimize=True)
