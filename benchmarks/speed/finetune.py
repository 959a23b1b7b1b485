"""Time an epoch of fine-tuning against loops that run the whole network.

    python -m benchmarks finetune DATA/imagenet

All train w1, w2 and the tuner of efficientnet_lite0 by eq. 8 with batches of 32, on random masks,
which cost what real ones do. Each part runs in a process of its own:

- ours: w0's outputs cached in memory; also what filling the cache costs, once.
- plain: what anyone would write: decode the images in DataLoader workers, run the whole network
  with w0 frozen, step.
- strict: the same with our setting of malloc (aftcli/cli/process.py) and without decoding: all
  inputs in memory already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH = 32


def ours(data: Path, limit: int | None, epochs: int, device: str = "cpu") -> dict[str, object]:
    """Measure the seconds of each epoch with cached features, and of filling the cache."""
    import torch

    from aftcli import load_classifier
    from aftcli.aft.examples import CachedExamples
    from aftcli.aft.features import Cache, Masks
    from aftcli.aft.loss import Recipe
    from aftcli.aft.training import Epoch, Training
    from aftcli.cli.process import keep_freed_memory
    from aftcli.data.sets import open_data_set

    keep_freed_memory()
    f = load_classifier(device=device)
    data_set = open_data_set(data, "train", f.classes).limited(limit)
    start = time.perf_counter()
    cache = Cache(f, data_set, "memory", Path())
    count = sum(cache.fill())
    cache.share_out(lambda t: t, lambda: None)
    filled = time.perf_counter() - start
    low, classes = torch.rand(count, 7, 7) < 0.4, torch.zeros(count).long()
    masks = Masks(low, lambda i: torch.zeros(224, 224), classes, lambda x, i: x, "")
    examples = CachedExamples(cache, masks)
    settings = Recipe(batch=BATCH, epochs=epochs, held_out=0.0)
    training = Training(f, examples, settings, cam="gradcam")
    seconds = []
    for event in training.run():
        if isinstance(event, Epoch):
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return {"images": count, "fill": filled, "epochs": seconds[1:]}


def whole(data: Path, limit: int | None, strict: bool) -> dict[str, object]:
    """Measure the seconds of one epoch of a loop that runs the whole network."""
    import torch

    from aftcli import load_classifier, read_image, to_input
    from aftcli.aft.loss import Batch, Recipe, aft_loss
    from aftcli.aft.tail import Tail
    from aftcli.cli.process import keep_freed_memory
    from aftcli.data.sets import open_data_set

    if strict:
        keep_freed_memory()
    f = load_classifier()
    data_set = open_data_set(data, "train", f.classes).limited(limit)
    count = len(data_set.samples)
    labels = torch.tensor([sample.label for sample in data_set.samples])
    masks = torch.rand(count, 7, 7) < 0.4

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, i: int):  # noqa: ANN204
            return to_input(read_image(data_set.picture(i)), f.preprocessing)[0].numpy(), i

    def loader(workers: int):  # noqa: ANN202
        return torch.utils.data.DataLoader(
            Images(), BATCH, shuffle=True, num_workers=workers, multiprocessing_context="fork"
        )

    settings = Recipe()
    tail = Tail(f, settings, "gradcam", None)
    optimizer = torch.optim.Adam(tail.parameters(), lr=1e-4, fused=strict)
    batches = list(loader(1)) if strict else loader(1)
    start = time.perf_counter()
    for x, i in batches:
        with torch.no_grad():
            features = f.stem(x)
        batch = Batch((features,), labels[i], (masks[i],), labels[i])
        loss = aft_loss(tail(batch.features, batch.class_index), batch, settings).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"images": count, "epochs": [time.perf_counter() - start]}


def main() -> None:
    """Run the parts in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a data set with ImageNet's classes")
    parser.add_argument("--limit", type=int, help="take N images")
    parser.add_argument("--runs", type=int, default=3, help="rounds of all parts")
    parser.add_argument("--part", choices=("ours", "plain", "strict"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        found = (
            ours(args.data, args.limit, 5)
            if args.part == "ours"
            else whole(args.data, args.limit, args.part == "strict")
        )
        print(json.dumps(found))
        return

    import torch

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    rounds: dict[str, list[dict]] = {"ours": [], "plain": [], "strict": []}
    for _ in range(args.runs):
        for part in rounds:
            command = [sys.executable, "-m", "benchmarks", "finetune", str(args.data)]
            command += ["--part", part]
            command += ["--limit", str(args.limit)] if args.limit else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds[part].append(json.loads(done.stdout.splitlines()[-1]))
            print(part, done.stdout.splitlines()[-1], file=sys.stderr)
    images = rounds["ours"][0]["images"]
    own = [statistics.median(r["epochs"]) for r in rounds["ours"]]
    fill = statistics.median(r["fill"] for r in rounds["ours"])
    print(f"{images} images; filling the cache {fill:.1f} s")
    print(f"ours    {statistics.median(own):8.2f} s an epoch ({min(own):.2f} .. {max(own):.2f})")
    for part in ("plain", "strict"):
        seconds = [r["epochs"][0] for r in rounds[part]]
        ratios = [s / o for s, o in zip(seconds, own, strict=True)]
        print(
            f"{part:7} {statistics.median(seconds):8.2f} s an epoch ({min(seconds):.2f} .. "
            f"{max(seconds):.2f}), {statistics.median(ratios):.1f} times ours "
            f"({min(ratios):.1f} .. {max(ratios):.1f})"
        )
