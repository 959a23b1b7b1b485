"""What a gain costs in accuracy where images are few: three-fold cross-validation.

    python benchmarks/aft_accuracy.py RUN --out study/accuracy.jsonl

RUN has the masks of Grad-CAM of a data set with one or two images a class. Every image is measured
once, by a network that was tuned without it; the val split is not read. Each training is blended
with the weights before in several shares, which costs no training.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aft_study import Data, Kept

from aftcli.aft.loss import Recipe
from aftcli.aft.recipes import SITUATIONS
from aftcli.aft.training import Training
from aftcli.cli.process import keep_freed_memory
from aftcli.core.classifier import Classifier

FOLDS = 3
MEASURED = 100  # images of each fold whose maps are measured; accuracy is of all
BLENDS = (0.4, 0.7, 1.0)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "labels in place of distillation": {"classification": "labels"},
}


@torch.no_grad()
def right(f: Classifier, examples: Kept) -> torch.Tensor:
    """Whether each image is recognised, from w0's outputs on."""
    (features,) = examples.features
    logits = torch.cat([f.head(f.layer(x)) for x in features.split(64)])
    return logits.argmax(1) == examples.labels


def main() -> None:
    """Train every recipe on all folds but one, and measure on that one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    keep_freed_memory()
    data = Data(args.run, None, "blocks.6")
    data.train = list(range(len(data.names)))
    every = data.examples(0)
    order = torch.randperm(len(data.names), generator=torch.Generator().manual_seed(7))
    folds = [order[i::FOLDS] for i in range(FOLDS)]
    found: dict[tuple[str, float], dict[str, Any]] = {}
    start: dict[str, Any] = {"right": [], "values": []}
    for fold in folds:
        data.measured = fold[:MEASURED].tolist()
        start["right"] += right(data.f, every.at(fold)).tolist()
        start["values"].append(data.measure(data.f, False))
    with args.out.open("w") as file:
        about = {"images": len(data.names), "torch": torch.__version__}
        file.write(json.dumps({"recipe": "as it was", "blend": 0.0, **about, **start}) + "\n")
        for name, changed in RECIPES.items():
            settings = Recipe(**{**SITUATIONS["few"].settings, **changed})
            for i, fold in enumerate(folds):
                others = torch.cat([folds[j] for j in range(FOLDS) if j != i])
                training = Training(data.f, every.at(others), settings, cam="gradcam")
                for _ in training.run():
                    pass
                data.measured = fold[:MEASURED].tolist()
                for blend in BLENDS:
                    training.settings = replace(settings, blend=blend)
                    training.use_best()
                    f = training.classifier()
                    own = found.setdefault((name, blend), {"right": [], "values": []})
                    own["right"] += right(f, every.at(fold)).tolist()
                    own["values"].append(data.measure(f, False))
            for blend in BLENDS:
                line = {"recipe": name, "blend": blend, **found[name, blend]}
                file.write(json.dumps(line) + "\n")
                file.flush()
                accuracy = sum(line["right"]) / len(line["right"])
                rise = [v for each in line["values"] for v in each["average_increase"]]
                print(name, blend, f"{accuracy:.4f} {sum(rise) / len(rise):.3f}", flush=True)


if __name__ == "__main__":
    main()
