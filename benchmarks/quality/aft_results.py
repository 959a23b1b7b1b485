"""Measure what fine-tuning with the defaults does for maps, for three seeds, on the val split.

    python -m benchmarks aft_results RUN --title TITLE --out study/nette.json --page

RUN has the masks of `aft gen-masks`. For each seed it runs, with the defaults of mask consistency,

    aft finetune --objective tuner --run RUN/seed-N --seed N
    aft finetune --no-masks --run RUN/seed-N --seed N
    aft evaluate --run RUN/seed-N --format json ...

in this process. Measures that take many passes are of the first seed and --guards images. What is
there already is found and used. --page makes the results of all files beside --out the figures of
docs/results/aft-study.md.
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
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from aftcli.cli import app as cli
from aftcli.cli.process import keep_freed_memory
from aftcli.core.methods import METHODS
from aftcli.measures.registry import MEASURES
from benchmarks import pages

QUICK = ("average_increase", "average_drop", "complexity", "energy")
SHOWN = (*QUICK, "adcc")  # of the first seed: a map needs one more pass


def aft(*arguments: str) -> str:
    """Run a command of aft's and return its stdout."""
    words = [*arguments, "--quiet"]
    start = time.monotonic()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.app(words, prog_name="aft", standalone_mode=False)
    print(f"{time.monotonic() - start:6.0f} s  aft {' '.join(words)}", file=sys.stderr, flush=True)
    return out.getvalue()


def seed_of(run: Path, seed: int) -> Path:
    """Make a run of its own with the same masks and results."""
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
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
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
    for seed in range(args.seeds):
        folder = str(seed_of(args.run, seed))
        common = ("--run", folder, "--workers", "0")
        later = [word for cam in args.later_cams if seed for word in ("--cam", cam)]
        learn = ("--objective", "tuner", *later, "--seed", str(seed))
        tuned = aft("finetune", *common, *learn, "--json")
        control = aft("finetune", "--no-masks", *common, "--seed", str(seed), "--json")
        result["cards"] += [_short(card) for card in json.loads(tuned) + json.loads(control)]
        plain = ("evaluate", *common, "--thresholds", "0", "--format", "json", "--ci")
        plain += ("--judge", "none")
        limit = ("--limit", args.limit) if args.limit else ()
        names = ("--metrics", ",".join(QUICK if seed else SHOWN))
        found = aft(*plain, *limit, *later, "--masking", "soft", *names)
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
    if args.page:
        results = [json.loads(path.read_text()) for path in sorted(args.out.parent.glob("*.json"))]
        lines = [line for each in results for line in result_lines(each)]
        pages.keep("results/aft-study", "results", "\n".join(lines))


def _short(card: dict[str, Any]) -> dict[str, Any]:
    keys = ("cam", "seed", "situation", "trained_on", "lam", "consistency", "classification")
    keys += ("blend", "objective", "learning_rate", "epochs", "model", "images")
    return {**{k: card[k] for k in keys}, "epoch": card["metrics"]["epoch"]}


def result_lines(result: dict[str, Any]) -> list[str]:
    """Return the tables of one set of images as lines."""
    seeds = result["seeds"]
    lines = [f"### {result['title']}", ""]
    card = result["cards"][0]
    chosen = [str(c["epoch"]) for c in result["cards"] if c["cam"]]
    lines += [
        f"Trained on {card['trained_on']} images with {card['classification']}, lambda "
        f"{card['lam']:g}, consistency {card['consistency']:g}, blend {card['blend']:g}, learning "
        f"rate {card['learning_rate']:g}; of at most {card['epochs']} epochs, "
        f"{', '.join(chosen)} were chosen.",
        "",
    ]
    accuracy = defaultdict(list)
    for seed in seeds:
        for row in seed["table4"]:
            accuracy[row["variant"], row["cam"]].append(row)
    first = accuracy["original", None][0]
    lines += [
        f"Accuracy ({first['n']} images), the seeds' mean and range:",
        "",
        "| network | accuracy |",
        "|---|---|",
    ]
    for (variant, cam), found in accuracy.items():
        name = (
            f"AFT, {METHODS[cam].title}"
            if cam
            else {"original": "untuned", "control": "control"}[variant]
        )
        lines.append(f"| {name} | {_range([r['accuracy'] for r in found])} |")
    lines.append("")
    lines += _measure_table(seeds)
    if "guards" in result:
        lines += ["First seed, fewer images:", ""]
        lines += _measure_table([result["guards"]])
    return lines


def _range(values: list[float]) -> str:
    if len(values) == 1 or max(values) == min(values):
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def _measure_table(seeds: list[dict[str, Any]]) -> list[str]:
    """Return a row for each CAM and measure: variants, and what is beyond the intervals."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    beyond: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    count = 0
    for seed in seeds:
        for r in seed["table3"]:
            values[r["cam"], r["measure"], r["variant"]].append(r["value"])
            count = max(count, r["n"])
        for d in seed["differences"]:
            if d["variant"] == "aft" and d["ci"]:
                low, high = d["ci"]
                sign = 1 if low > 0 else -1 if high < 0 else 0
                beyond[d["cam"], d["measure"], d["against"]].append(sign)
    if not values:
        return []
    lines = [f"Soft masking, {count} images, {_plural(len(seeds), 'seed')}:", ""]
    heads = "CAM | measure | Original | Control | AFT"
    lines += [f"| {heads} | than Original | than Control |", "|---" * 7 + "|"]
    for cam, name, variant in list(values):
        if variant != "original" or (cam, name, "aft") not in values:
            continue
        own = {v: values.get((cam, name, v), []) for v in ("original", "control", "aft")}
        ranges = [_range(v) if v else "" for v in own.values()]
        verdicts = [_verdict(name, beyond[cam, name, v]) for v in ("original", "control")]
        cells = (METHODS[cam].title, MEASURES[name].title, *ranges, *verdicts)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _verdict(name: str, signs: list[int]) -> str:
    """Return better or worse only where every seed's interval says so."""
    better = MEASURES[name].better
    if not signs or len(set(signs)) > 1 or not signs[0]:
        return "-"
    if not better:
        return "larger" if signs[0] > 0 else "smaller"
    return "better" if signs[0] == better else "**worse**"
