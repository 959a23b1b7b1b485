"""Make the pictures of the site's gallery, by the commands that its page shows.

    python docs/make_gallery.py            makes all
    python docs/make_gallery.py classes    makes docs/images/gallery/classes.jpg

Each picture is one that `aft` wrote, only smaller; those of several images or classes lie in a row.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).parents[1]
GAP = 8  # pixels between pictures in a row
PHOTOS = "docs/images/chelsea.jpg docs/images/coffee.jpg docs/images/rocket.jpg"
PIXELS = "aft explain docs/images/chelsea.jpg --method lrp --method smoothgrad --tft"
CAMS = ("gradcam", "gradcam++", "hirescam", "scorecam", "eigencam")
# Each picture by its name: the kind that is taken of what aft wrote, its height, the command.
PICTURES = {
    "photos": ("overlay", 366, f"aft explain {PHOTOS} --cam layercam --tft"),
    "figure": ("figure", 377, "aft explain docs/images/rocket.jpg --cam gradcam --tft"),
    "methods": (
        "grid",
        600,
        f"aft explain docs/images/chelsea.jpg {' '.join(f'--cam {cam}' for cam in CAMS)} --tft",
    ),
    "classes": (
        "overlay",
        366,
        "aft explain docs/images/chelsea.jpg --target tabby --target 285 --target lynx --tft",
    ),
    "pixels": ("grid", 600, PIXELS),
    "cells": ("grid", 600, f"{PIXELS} --cells"),
    "mute": (
        "overlay",
        366,
        "aft explain docs/images/chelsea.jpg --mute 85 --colormap inferno --alpha 0.7",
    ),
}


def made(name: str) -> Path:
    """Run a picture's command and keep what it wrote, smaller."""
    kind, height, command = PICTURES[name]
    with tempfile.TemporaryDirectory() as out:
        words = [*shlex.split(command)[1:], "--quiet", "--json", "--out", out]
        call = [sys.executable, "-m", "aftcli", *words]
        done = subprocess.run(call, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        outputs = [one["outputs"] for one in json.loads(done.stdout)]
        pictures = [_small(ROOT / each[kind], height) for each in outputs if kind in each]
    wide = sum(picture.width + GAP for picture in pictures) - GAP
    row = Image.new("RGB", (wide, height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    path = ROOT / f"docs/images/gallery/{name}.jpg"
    row.save(path, quality=82, optimize=True)
    return path


def _small(path: Path, height: int) -> Image.Image:
    """Read a picture without its white margin, at a height in pixels."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    picture = picture.crop(ImageChops.difference(picture, white).getbbox())
    width = round(picture.width * height / picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PICTURES:
        print(made(chosen).relative_to(ROOT))
