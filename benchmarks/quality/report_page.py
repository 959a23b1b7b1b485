"""Make docs/images/report.png and explained.png: the pages of aft in a browser, offline.

    python -m benchmarks report_page [--out DIR] [--browser chromium]

The data set is cut from the photographs in docs/images: four crops of each to train on and one to
evaluate on. Sixty pictures are explained: the 36 of docs/demo, and twelve other crops and their
mirror images. Their numbers say nothing; the pictures show what the page of
`aft evaluate --figures` and that of `aft explain --html` look like.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parents[2]
PHOTOS = {"n02123159": "chelsea", "n07920052": "coffee", "n03773504": "rocket"}
SIZES = {"report": (1240, 2050), "explained": (1200, 1180)}
PAGES = {"report": "aft-run/results/report.html", "explained": "aft-out/index.html#sort=-rpi"}
COMMANDS = (
    "gen-masks photos --cam gradcam --cam layercam",
    "finetune --objective tuner --epochs 3 --held-out 0.25",
    "finetune --no-masks --epochs 3 --held-out 0.25",
    "evaluate --table --figures",
    "explain crops demo --tft --html --quiet",
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


def make_crops(folder: Path) -> None:
    """Cut the corners of the photographs, each of its own size, and mirror them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOS.values():
        with Image.open(ROOT / f"docs/images/{name}.jpg") as image:
            width, height = image.size
            for i, (right, low) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
                share = 0.9 - 0.1 * i
                wide, high = round(share * width), round(share * height)
                left, top = right * (width - wide), low * (height - high)
                corner = image.crop((left, top, left + wide, top + high))
                corner.save(folder / f"{name}-{i}.jpg")
                ImageOps.mirror(corner).save(folder / f"{name}-{i}-mirrored.jpg")


def main() -> None:
    """Run the commands, open the page, keep the picture small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("report-run"))
    parser.add_argument("--browser", default="chromium")
    arguments = parser.parse_args()
    make_photos(arguments.out / "photos")
    make_crops(arguments.out / "crops")
    shutil.copytree(ROOT / "docs/demo", arguments.out / "demo", dirs_exist_ok=True)
    for command in COMMANDS:
        words = [sys.executable, "-m", "aftcli", *command.split()]
        subprocess.run(words, cwd=arguments.out, check=True)
    for name, page in PAGES.items():
        shot = arguments.out.resolve() / f"{name}.png"
        browser = [arguments.browser, "--headless", "--no-sandbox", "--disable-gpu"]
        browser += ["--hide-scrollbars", "--window-size={},{}".format(*SIZES[name])]
        # No name is resolved: what the page would fetch is missing in the picture.
        browser += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={shot}"]
        browser.append(f"{arguments.out.resolve().as_uri()}/{page}")
        subprocess.run(browser, check=True, capture_output=True)
        with Image.open(shot) as image:
            small = image.convert("RGB").quantize(256)
            small.save(ROOT / f"docs/images/{name}.png", optimize=True)
