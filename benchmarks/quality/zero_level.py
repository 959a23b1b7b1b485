"""Draw what is kept of photographs at several zero levels (docs/images/zero-level.png).

python -m benchmarks zero_level
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image

from aftcli import attribution_map, load_classifier, read_image, to_input

IMAGES = Path(__file__).parents[2] / "docs" / "images"
PHOTOS = ("coffee", "rocket")
LEVELS = (0.0, 0.03, 0.1, 0.3)


def picture() -> Figure:
    """Draw each photograph as the network sees it, with what each level keeps outlined."""
    f = load_classifier()
    mean, std = f.preprocessing.channels(torch.zeros(1))
    figure, axes = plt.subplots(len(PHOTOS), len(LEVELS), figsize=(8, 4.7), layout="constrained")
    for photo, row in zip(PHOTOS, axes, strict=True):
        x = to_input(read_image(IMAGES / f"{photo}.jpg"), f.preprocessing)
        with torch.no_grad():
            p, c = f(x).softmax(1).max(1)
        colours = (x[0] * std + mean).clamp(0, 1)
        for level, axis in zip(LEVELS, row, strict=True):
            kept = attribution_map(f, x, c, "gradcam", zero_level=level)[0] > 0
            with torch.no_grad():
                p_hat = f(x * kept).softmax(1)[0, c[0]]
            shown = torch.where(kept, colours, 0.3 * colours + 0.35)
            axis.imshow(shown.permute(1, 2, 0))
            if not kept.all():
                axis.contour(kept.float(), [0.5], colors="#ffcc00", linewidths=1.5)
            whole = f"{f.classes.name(int(c))}, p = {p.item():.3f}"
            name = f"zero level {level:g}" if level else whole
            axis.set_title(f"{name}\nkept {kept.float().mean():.0%}, p = {p_hat:.3f}")
            axis.set_axis_off()
    return figure


def main() -> None:
    """Write the picture, in 256 colours."""
    plt.rcParams["font.size"] = 8
    drawn = io.BytesIO()
    picture().savefig(drawn, dpi=110)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(IMAGES / "zero-level.png", optimize=True)


if __name__ == "__main__":
    main()
