"""What fine-tuning with the defaults does for maps, for three seeds, on the val split.

    python benchmarks/aft_results.py RUN --title TITLE --out study/nette.json

RUN has the masks of `aft gen-masks`. For each seed it runs, with the defaults,

    aft finetune --run RUN/seed-N --seed N
    aft finetune --no-masks --run RUN/seed-N --seed N
    aft evaluate --run RUN/seed-N --format json ...

in this process, w0 by ONNX Runtime (fast_stem.py). Measures that take many passes are of the first
seed and --guards images. What is there already is found and used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fast_stem import fast_stems

from aftcli.cli import app as cli
from aftcli.cli.process import keep_freed_memory

CHEAP = "average_increase,average_drop,area,complexity,coherency,adcc,energy,energy_segmentation"
QUICK = "average_increase,average_drop,area,complexity,energy,energy_segmentation"


def aft(*arguments: str) -> str:
    """Run a command of aft's; its stdout."""
    words = [*arguments, "--quiet"]
    start = time.monotonic()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.app(words, prog_name="aft", standalone_mode=False)
    print(f"{time.monotonic() - start:6.0f} s  aft {' '.join(words)}", file=sys.stderr, flush=True)
    return out.getvalue()


def seed_of(run: Path, seed: int) -> Path:
    """A run of its own with the same masks and results."""
    folder = run / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("masks", "results"):
        (run / shared).mkdir(exist_ok=True)
        if not (folder / shared).exists():
            (folder / shared).symlink_to((run / shared).resolve())
    return folder


def main() -> None:
    """Tune and evaluate, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--later-cams", nargs="*", default=[], help="methods of later seeds")
    parser.add_argument("--limit", help="evaluate so many images")
    parser.add_argument("--guards", default="60", help="images of measures with many passes")
    parser.add_argument("--guard-cams", nargs="*", default=[], help="only these methods' guards")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    keep_freed_memory()
    result: dict[str, Any] = {
        "title": args.title,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cards": [],
        "seeds": [],
    }
    with fast_stems():
        for seed in range(args.seeds):
            folder = str(seed_of(args.run, seed))
            common = ("--run", folder, "--workers", "0")
            later = [word for cam in args.later_cams if seed for word in ("--cam", cam)]
            tuned = aft("finetune", *common, *later, "--seed", str(seed), "--json")
            control = aft("finetune", "--no-masks", *common, "--seed", str(seed), "--json")
            result["cards"] += [_short(card) for card in json.loads(tuned) + json.loads(control)]
            plain = ("evaluate", *common, "--thresholds", "0", "--format", "json", "--ci")
            plain += ("--judge", "none")
            limit = ("--limit", args.limit) if args.limit else ()
            masking, names = ("both", CHEAP) if seed == 0 else ("soft", QUICK)
            found = aft(*plain, *limit, *later, "--masking", masking, "--metrics", names)
            result["seeds"].append(json.loads(found))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result))
        if int(args.guards):
            guards = ("--limit", args.guards, "--masking", "soft")
            names = ("--metrics", "insertion,deletion,road")
            cams = [word for cam in args.guard_cams for word in ("--cam", cam)]
            run = ("--run", str(seed_of(args.run, 0)), "--workers", "0", *plain[5:])
            found = aft("evaluate", *run, *guards, *names, *cams)
            result["guards"] = json.loads(found)
    args.out.write_text(json.dumps(result))


def _short(card: dict[str, Any]) -> dict[str, Any]:
    keys = ("cam", "seed", "situation", "trained_on", "lam", "consistency", "classification")
    keys += ("blend", "objective", "learning_rate", "epochs", "model", "images")
    return {**{k: card[k] for k in keys}, "epoch": card["metrics"]["epoch"]}


if __name__ == "__main__":
    main()
