"""Whether the fast search over a fine grid of thresholds is worth it, on real images.

    python benchmarks/search.py DATA/imagenet [--limit 60] [--out search.json] [--page search.md]

Exact and fast search of the same maps on the same grid, and the exact search of the paper's grid:
how often they agree on tau*, the RPI they find, and how many masked images pass the network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli import load_classifier
from aftcli.core.cam import attribution_map
from aftcli.core.classifier import Classifier
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.settings import THRESHOLDS
from aftcli.tft.search import fine_tune_threshold
from aftcli.tft.threshold import MASKINGS

FINE = tuple(i / 40 for i in range(41))
METHODS = ("gradcam", "layercam")
SEARCHES = {
    "exact, 11 thresholds": (THRESHOLDS, "exact"),
    "fast, 11 thresholds": (THRESHOLDS, "fast"),
    "fast, 41 thresholds": (FINE, "fast"),
    "exact, 41 thresholds": (FINE, "exact"),
}
EXACT = {11: "exact, 11 thresholds", 41: "exact, 41 thresholds"}


class Found(NamedTuple):
    """What a search gives: tau* and its RPI of each image, and passes an image."""

    tau: Tensor
    rpi: Tensor
    passes: float


class Counted:
    """A classifier's engine that counts the images it is given."""

    def __init__(self, f: Classifier) -> None:
        """Stand before the engine of f."""
        assert f.engine
        self.engine, self.name, self.images = f.engine, f.engine.name, 0
        self.takes, self.activation = f.engine.takes, f.engine.activation

    def logits(self, x: Tensor) -> Tensor:
        """Count and pass on."""
        self.images += len(x)
        return self.engine.logits(x)


def search(f: Classifier, inputs: Tensor, method: str, masking: str, name: str) -> Found:
    """Search the thresholds of all images."""
    thresholds, how = SEARCHES[name]
    engine = Counted(f)
    f = f.with_engine(engine)
    taus, rpis, passes = [], [], 0
    for x in inputs.split(8):
        with torch.no_grad():
            y, c = f(x).softmax(1).max(1)
        maps = attribution_map(f, x, c, method)
        before = engine.images
        found = fine_tune_threshold(f, x, maps, c, thresholds, masking, probability=y, search=how)
        passes += engine.images - before
        taus.append(found.tau)
        rpis.append(found.rpi.gather(1, found.best[:, None])[:, 0])
    return Found(torch.cat(taus), torch.cat(rpis), passes / len(inputs))


def compare(f: Classifier, inputs: Tensor) -> list[dict[str, object]]:
    """A row for each method, masking and search."""
    rows = []
    for method in METHODS:
        for masking in MASKINGS:
            found = {name: search(f, inputs, method, masking, name) for name in SEARCHES}
            for name, own in found.items():
                exact = found[EXACT[len(SEARCHES[name][0])]]
                rows.append(
                    {
                        "method": method,
                        "masking": masking,
                        "search": name,
                        "passes": own.passes,
                        "agrees": float((own.tau == exact.tau).float().mean()),
                        "rpi": float(own.rpi.clamp(max=1).mean()),
                        "share": float(own.rpi.clamp(max=1).sum() / exact.rpi.clamp(max=1).sum()),
                    }
                )
    return rows


def page(rows: list[dict[str, object]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| CAM | masking | search | passes an image | tau\\* as exact | mean RPI | of exact's |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['method']} | {r['masking']} | {r['search']} | {r['passes']:.1f} | "
        f"{r['agrees']:.0%} | {r['rpi']:.4f} | {r['share']:.1%} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("search.json"))
    parser.add_argument("--page", type=Path, default=Path("search.md"))
    args = parser.parse_args()
    f = load_classifier()
    data = open_data_set(args.data, "val", f.classes).limited(args.limit)
    inputs = torch.cat(
        [to_input(read_image(data.path(i)), f.preprocessing) for i in range(len(data.samples))]
    )
    rows = compare(accelerated(f, "onnxruntime"), inputs)
    args.out.write_text(json.dumps({"images": len(inputs), "rows": rows}, indent=1))
    args.page.write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
