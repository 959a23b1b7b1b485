"""Compare what the same commands give again, and with other threads, batches and engines.

    python -m benchmarks determinism DATA/imagenet [--limit 64] [--work FOLDER] [--json FILE]

Runs gen-masks, finetune and evaluate again, on two processes, with other numbers of decoding
workers, threads and images in a batch, and by other engines, on efficientnet_lite0. DATA has train
and val. Files are compared by their bytes; where these differ, by what they hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from aftcli import MaskStore, __version__, load_classifier
from aftcli.core.methods import CAMS
from aftcli.data.sets import open_data_set
from aftcli.masks.generate import generate_masks
from aftcli.masks.hdf5 import join_float
from aftcli.settings import Search

PAIR = ("gradcam", "layercam")
FORMATS = ("json", "csv", "markdown", "latex", "table")
TABLES = tuple(f"tables.{words}" for words in FORMATS)
BATCHES = (16, 1, 2, 7, 32)  # the first is compared with
SLOW = "scorecam"  # a pass a channel: fewer images


class Runs:
    """Runs commands in folders of their own, with the same arguments.

    Args:
        data: with train and val.
        limit: images.
        work: where the folders are made.
    """

    def __init__(self, data: Path, limit: int, work: Path) -> None:
        self.data, self.limit, self.work = data.resolve(), limit, work

    def aft(
        self, name: str, *arguments: str, processes: int = 1, threads: int = 1, workers: int = 1
    ) -> str:
        """Run `aft` in the folder of that name; what it prints."""
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        launch = [sys.executable, "-m"]
        if processes > 1:
            launch += ["torch.distributed.run", "--nproc_per_node", str(processes), "-m", "--"]
        given = [*arguments, "--run", "run", "--quiet", "--device", "cpu"]
        given += ["--workers", str(workers)]
        print(f"{name}: aft {' '.join(given)}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [*launch, "aftcli", *given],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.decode()}")
        return done.stdout.decode()

    def masks(self, name: str, cams: tuple[str, ...] = PAIR, *more: str, **how: int) -> Path:
        """Run gen-masks; the run."""
        chosen = [each for cam in cams for each in ("--cam", cam)]
        limit = self.limit if SLOW not in cams else max(self.limit // 16, 4)
        self.aft(name, "gen-masks", str(self.data), *chosen, "--limit", str(limit), *more, **how)
        return self.work / name / "run"

    def study(self, name: str, formats: tuple[str, ...] = FORMATS[:1], **how: int) -> Path:
        """Run gen-masks, finetune and evaluate; the run, with the tables beside it."""
        run = self.masks(name, PAIR, **how)
        learn = ("--objective", "tuner", "--epochs", "2", "--batch-size", "8")
        self.aft(name, "finetune", *learn, "--cam", PAIR[0], **how)
        options = ("--table", "1,2,3,4", "--ci", "--limit", str(self.limit))
        for words in formats:
            found = self.aft(name, "evaluate", *options, "--format", words, **how)
            # The command is named there, and is another one by intent.
            same = re.sub(r'"command": ".*"', "", found)
            (run.parent / f"tables.{words}").write_text(same)
        return run

    def as_it_is(self, name: str, cams: tuple[str, ...]) -> Path:
        """Make masks by the network as it is written, without an engine."""
        f = load_classifier("efficientnet_lite0")
        data = open_data_set(self.data, None, f.classes).limited(self.limit)
        run = self.work / name / "run"
        for _ in generate_masks(f, data, cams, run, Search(), workers=1):
            pass
        return run


def digests(run: Path) -> dict[str, str]:
    """Return the SHA-256 of a run's files, and of the tables beside it."""
    return {
        str(path.relative_to(run.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.parent.rglob("*"))
        # What remembers the images' hashes is one file a process.
        if path.is_file() and path.suffix != ".lock" and not path.name.startswith(".contents")
    }


def compared(a: Path, b: Path) -> dict[str, Any]:
    """Return which files of two studies are equal, and how far the others differ."""
    first, second = digests(a), digests(b)
    names = sorted({*first, *second} - (set(TABLES) - set(second)))
    other = [name for name in names if first.get(name) != second.get(name)]
    far = {
        name: greatest_difference(a.parent / name, b.parent / name)
        for name in other
        if name.endswith(".safetensors") and name in first and name in second
    }
    found: dict[str, Any] = {"files": len(names), "equal": len(names) - len(other)}
    if other:
        found |= {"other": other, "greatest_difference": far, "stores": stores(a, b)}
    return {**found, "sha256": first}


def greatest_difference(a: Path, b: Path) -> float:
    """Return the greatest difference between the tensors of two files."""
    first, second = load_file(a), load_file(b)
    pairs = ((first[name], second[name]) for name in first)
    return max(
        (float((x.double() - y.double()).nan_to_num().abs().max()) for x, y in pairs if x.numel()),
        default=0.0,
    )


def stores(a: Path, b: Path) -> dict[str, dict[str, Any]]:
    """Compare the stores of two runs, by method."""
    paths = sorted((a / "masks").glob("*.h5"))
    return {
        p.stem.partition("-")[2]: store_difference(p, b / "masks" / p.name)
        for p in paths
        if (b / "masks" / p.name).exists()
    }


def store_difference(a: Path, b: Path) -> dict[str, Any]:
    """Return how many images have the same tau* and mask, and how far the numbers differ."""
    with MaskStore(a) as one, MaskStore(b) as two:
        x, y = one.rows(0, len(one)), two.rows(0, len(two))
    maps = [join_float(rows.attribution, rows.correction) for rows in (x, y)]
    # RPI of the first run at the second's choice: how near a tie the two are.
    thresholds = np.array(one.settings["thresholds"], dtype=np.float32)
    chosen = np.abs(thresholds[None] - y.tau[:, None]).argmin(1)
    lost = np.nanmax(x.rpi, 1) - x.rpi[np.arange(len(x.rpi)), chosen]
    moved = x.tau != y.tau

    def far(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.abs(np.nan_to_num(p.astype(float) - q.astype(float))).max(initial=0))

    return {
        "images": len(x.tau),
        "classes_equal": int((x.class_index == y.class_index).sum()),
        "tau_equal": int((~moved).sum()),
        "masks_equal": int((x.mask == y.mask).all((1, 2)).sum()),
        "cells_other": int((x.mask != y.mask).sum()),
        "map": far(*maps),
        "probability": far(x.probability, y.probability),
        "probabilities": far(x.probabilities, y.probabilities),
        "rpi": far(x.rpi, y.rpi),
        "rpi_lost_where_tau_moved": lost[moved].tolist(),
    }


def conditions(runs: Runs) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Return what is compared, by name, each with what runs it."""
    base = cache(lambda: runs.study("base", FORMATS))
    yield "the same commands again", lambda: compared(base(), runs.study("again", FORMATS))
    yield "2 processes (torchrun)", lambda: compared(base(), runs.study("two", processes=2))
    for count in (0, 2):
        name = f"{count} decoding workers instead of 1"
        yield name, lambda count=count: compared(base(), runs.study(f"w{count}", workers=count))
    yield "2 threads instead of 1", lambda: compared(base(), runs.study("threads", threads=2))
    cheap = tuple(cam for cam in CAMS if cam != SLOW)
    usual = cache(lambda cams: runs.masks(f"batch-{len(cams)}", cams))

    def batches(cams: tuple[str, ...], size: int) -> dict[str, Any]:
        run = runs.masks(f"batch-{len(cams)}-{size}", cams, "--batch-size", str(size))
        return {"stores": stores(usual(cams), run)}

    for cams in (cheap, (SLOW,)):
        for size in BATCHES[1:]:
            name = f"batches of {size} instead of {BATCHES[0]}"
            more = "" if cams == cheap else f", {SLOW}"
            yield name + more, lambda cams=cams, size=size: batches(cams, size)
    plain = cache(lambda: runs.as_it_is("plain", cheap))
    for engine in ("torch", "onnxruntime"):
        yield (
            f"engine {engine}, not the network itself",
            lambda engine=engine: {
                "stores": stores(plain(), runs.masks(engine, cheap, "--engine", engine))
            },
        )


def shown(name: str, found: dict[str, Any]) -> list[str]:
    """Return a comparison as lines of a plain table."""
    lines = [name]
    if "files" in found:
        lines.append(f"  {found['equal']} of {found['files']} files equal")
        lines += [
            f"  other: {other}{f', by at most {far:.1e}' if far is not None else ''}"
            for other in found.get("other", [])
            for far in [found["greatest_difference"].get(other)]
        ]
    for cam, each in found.get("stores", {}).items():
        lost = each["rpi_lost_where_tau_moved"]
        lines.append(
            f"  {cam:12} tau* {each['tau_equal']}/{each['images']}, masks "
            f"{each['masks_equal']}/{each['images']} ({each['cells_other']} cells), map "
            f"{each['map']:.1e}, y {each['probability']:.1e}, y_hat {each['probabilities']:.1e}, "
            f"RPI {each['rpi']:.1e}{f', RPI at stake {max(lost):.1e}' if lost else ''}"
        )
    return lines


def main() -> None:
    """Compare, print, and store what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path, help="kept as it goes; what it has is kept")
    parser.add_argument("--only", default="", help="only comparisons with this in their name")
    asked = parser.parse_args()
    document: dict[str, Any] = {
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {
            "aft": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "model": "efficientnet_lite0",
        "images": asked.limit,
        "found": {},
    }
    if asked.json and asked.json.exists():
        document["found"] = json.loads(asked.json.read_text())["found"]
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(asked.data, asked.limit, (asked.work or Path(folder)).resolve())
        for name, run in conditions(runs):
            if asked.only not in name:
                continue
            document["found"][name] = found = run()
            print("\n".join(shown(name, found)), flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(document, indent=2))
