"""Cut the tiny data set docs/demo out of four free photographs, and draw docs/images/demo.webp.

    python docs/make_demo.py

docs/demo/README.md names the photographs, their authors and licences. The fourth one comes with
scikit-image, which the extra `dev` installs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageOps

DOCS = Path(__file__).parent
TRIPOD = Path(skimage.__file__).parent / "data/camera.png"

# Class folders (wnids of tiger cat, espresso, missile, tripod): the photograph, and where in it
# the object is, pixels.
PHOTOS = {
    "n02123159": (DOCS / "images/chelsea.jpg", (225, 150)),
    "n07920052": (DOCS / "images/coffee.jpg", (315, 185)),
    "n03773504": (DOCS / "images/rocket.jpg", (325, 230)),
    "n04485082": (TRIPOD, (310, 265)),
}
COUNTS = {"train": 6, "val": 3}
SIDE = 224  # pixels of a crop
SEED = 0


def crop(photo: Image.Image, x: int, y: int, rng: np.random.Generator) -> Image.Image:
    """Return a random square of SIDE x SIDE pixels that shows the point (x, y)."""
    width, height = photo.size
    side = int(min(photo.size) * rng.uniform(0.72, 1))
    left, top = (int(at + side * rng.uniform(-0.8, -0.2)) for at in (x, y))
    left, top = max(0, min(left, width - side)), max(0, min(top, height - side))
    square = photo.crop((left, top, left + side, top + side))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def sheet() -> Image.Image:
    """Return all crops: a row for each class, first those of train."""
    side, across = SIDE // 2, sum(COUNTS.values())
    drawn = Image.new("RGB", (across * side, len(PHOTOS) * side))
    for row, name in enumerate(PHOTOS):
        files = [f for split in COUNTS for f in sorted((DOCS / "demo" / split / name).iterdir())]
        for column, file in enumerate(files):
            with Image.open(file) as picture:
                drawn.paste(picture.resize((side - 2, side - 2)), (column * side, row * side))
    return drawn


def main() -> None:
    """Write train, val and the sheet; crops of val are mirrored, so that none is one of train."""
    rng = np.random.default_rng(SEED)
    for split, count in COUNTS.items():
        shutil.rmtree(DOCS / "demo" / split, ignore_errors=True)
        for name, (path, point) in PHOTOS.items():
            folder = DOCS / "demo" / split / name
            folder.mkdir(parents=True)
            with Image.open(path) as opened:
                photo = opened.convert("RGB")
            for number in range(1, count + 1):
                picture = crop(photo, *point, rng)
                if split == "val":
                    picture = ImageOps.mirror(picture)
                picture.save(folder / f"{number}.jpg", quality=80, optimize=True)
    sheet().save(DOCS / "images/demo.webp", quality=80)


if __name__ == "__main__":
    main()
