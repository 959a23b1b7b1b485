"""Measure every family of methods with TFT, on three networks, for docs/results/tables.md.

    python -m benchmarks attributions DATA [--out DIR] [--images N]

DATA holds `imagenet/val` and `imagenet/val_boxes.csv`. Plain maps and TFT of every method are
measured with EfficientNet-Lite0 on N images (`table`); every method is run from the command line,
by `aft explain --tft` and `aft evaluate`, on three networks (`works`; ResNet-50 and VGG-16 with
random weights: published ones can't be had without a download); seconds and memory of a map are
measured (`costs`), and all maps of a photograph drawn (`picture`). `--only` takes these words, and
`page`. What is in DIR already is not done again. Needs the extra `attributions`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from PIL import Image

from aftcli.attributions.maps import attribution_map
from aftcli.core.cam import normalise, upsample
from aftcli.core.methods import METHODS
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.evaluation.tables import Difference, Table3Row
from aftcli.measures import metrics
from aftcli.measures.intervals import estimate
from aftcli.models.load import load_classifier
from aftcli.tft.result import TftResult
from aftcli.tft.search import fine_tune_threshold
from benchmarks import pages
from benchmarks.quality.attributions_tables import MEASURED, NETWORKS, machine, tables

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "docs" / "images" / "chelsea.jpg"
TURNS = 5
REFERENCE = "layercam"  # on fewer images too, beside the slow methods
SLOW = ("xrai", "occlusion", "lime", "omcam", "rise", "kernelshap", "scorecam")  # last


def aft(words: list[str], processes: int = 1) -> str:
    """Run a command of aft; its stdout."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "--"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if processes > 1 else {})}
    done = subprocess.run(
        [*start, "aftcli", *words], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"aft {' '.join(words)}\n{done.stderr}")
    return done.stdout


def weights_of(network: str, out: Path) -> list[str]:
    """Return options for a network; random weights where published ones would be downloaded."""
    if network == "efficientnet_lite0":
        return []
    path = out / f"{network}-random.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(getattr(torchvision.models, network)(weights=None).state_dict(), path)
    return ["--model", network, "--checkpoint", str(path)]


def table(data: Path, out: Path, images: int, slow_images: int, processes: int) -> None:
    """Measure plain maps and TFT of all methods by `aft evaluate`, by pixels and by cells."""
    quick = [name for name in METHODS if name not in SLOW]
    pixels = [name for name in quick if METHODS[name].of_pixels]
    runs = [
        (quick, images, "", []),
        (pixels, images, "-cells", ["--cells"]),
        (pixels, images, "-percentile", ["--threshold-mode", "percentile"]),
        ([REFERENCE], slow_images, f"-{slow_images}", []),
        *(([name], slow_images, "", []) for name in SLOW),
    ]
    (out / "table").mkdir(exist_ok=True)
    for names, count, end, options in runs:
        kept = {name: out / "table" / f"{name}{end}.json" for name in names}
        if not all(path.exists() for path in kept.values()):
            words = [
                "evaluate",
                str(data / "imagenet"),
                "--limit",
                str(count),
                "--table",
                "3",
                "--judge",
                "none",
            ]
            words += ["--run", str(out / "run"), "--metrics", MEASURED, "--format", "json"]
            words += [*options, *(word for name in names for word in ("--cam", name))]
            document = json.loads(aft(words, processes))
            for name, path in kept.items():
                own = {
                    key: [row for row in document[key] if row["cam"] == name]
                    for key in ("table3", "differences")
                }
                path.write_text(json.dumps(own))


def chance(data: Path, out: Path, images: int) -> None:
    """Measure maps that know nothing: what the search finds in random numbers."""
    f = load_classifier()
    data_set = open_data_set(data / "imagenet", None, f.classes, default="val").limited(images)
    generator = torch.Generator().manual_seed(0)
    cells = normalise(torch.rand(images, *f.activation_shape[1:], generator=generator))
    pixels = normalise(torch.rand(images, *f.preprocessing.size, generator=generator))
    for end, mode, maps in (("cells", "value", cells), ("percentile", "percentile", pixels)):
        kept = out / "table" / f"random-{end}.json"
        if kept.exists():
            continue
        rows: list[Any] = []
        changes: list[Any] = []
        for masking in ("binary", "soft"):
            found = []
            for i in range(images):
                x = to_input(read_image(data_set.picture(i)), f.preprocessing)
                attribution, c = upsample(maps[i : i + 1], x), f(x).argmax(1)
                settings = {"masking": masking, "mode": mode}
                found.append(fine_tune_threshold(f, x, attribution, c, **settings))
            of_masking, differences = rows_of(found, ("imagenet", f.name, "random", masking))
            rows += of_masking
            changes += differences
        document = {"table3": list(map(asdict, rows)), "differences": list(map(asdict, changes))}
        kept.write_text(json.dumps(document))


def rows_of(
    found: list[TftResult], where: tuple[str, str, str, str]
) -> tuple[list[Table3Row], list[Difference]]:
    """Return what `aft evaluate` says of searches: plain maps, TFT and their paired differences."""
    y = torch.cat([r.probability for r in found])
    # T begins with 0, which mutes nothing: Original.
    curve = torch.cat([r.probabilities for r in found])
    y_hat = {"original": curve[:, 0], "tft": curve.amax(1)}
    rows, changes = [], []
    for measure, of in (("average_increase", metrics.increase), ("average_drop", metrics.drop)):
        values = {variant: of(each, y).float() for variant, each in y_hat.items()}
        for variant, each in values.items():
            e = estimate(each)
            rows.append(Table3Row(*where, variant, measure, e.value, e.interval, e.n))
        e = estimate(values["tft"] - values["original"])
        changes.append(Difference(*where, measure, "tft", "original", e.value, e.interval, e.n))
    e = estimate(torch.cat([r.mask.float().mean((1, 2)) for r in found]))
    rows.append(Table3Row(*where, "tft", "area", e.value, e.interval, e.n))
    return rows, changes


def works(data: Path, out: Path, networks: list[str], explained_only: list[str]) -> None:
    """Run each method on each network: explain with TFT, evaluate on one image."""
    (out / "works").mkdir(exist_ok=True)
    for network in networks:
        # CAM needs pooling and one linear layer.
        quick = [n for n in METHODS if n not in SLOW and (network, n) != ("vgg16", "cam")]
        for names in (quick, *([name] for name in SLOW)):
            if not (out / "works" / f"{network}-{names[-1]}.json").exists():
                evaluated = f"{network}:{names[-1]}" not in explained_only
                try_out(data, out, network, names, evaluated)


def try_out(data: Path, out: Path, network: str, names: list[str], evaluated: bool) -> None:
    """Keep what the commands say of methods on one network."""
    options = [*weights_of(network, out), *(word for name in names for word in ("--cam", name))]
    maps = str(out / "maps" / network)
    words = ["explain", str(PHOTO), *options, "--tft", "--json", "--save", "map", "--out", maps]
    begun = processor_time(resource.RUSAGE_CHILDREN)
    explained = json.loads(aft(words))
    seconds = processor_time(resource.RUSAGE_CHILDREN) - begun
    if evaluated:
        words = ["evaluate", str(data / "imagenet"), *options, "--limit", "1", "--table", "3"]
        words += ["--run", str(out / f"run-{network}"), "--format", "json"]
        rows = json.loads(aft(words))["table3"]
        found = {(row["cam"], row["variant"]) for row in rows}
        assert found == {(name, variant) for name in names for variant in ("original", "tft")}
    for name, each in zip(names, explained, strict=True):
        row = {"evaluated": evaluated, "seconds": seconds / len(names), **each["outputs"]}
        row |= {"tau": each["tft"]["tau"], "rpi": max(each["tft"]["rpi"])}
        (out / "works" / f"{network}-{name}.json").write_text(json.dumps(row))


def processor_time(whose: int) -> float:
    """Measure the seconds of all cores, which other jobs of the machine do not change much."""
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def picture(out: Path) -> None:
    """Draw all maps of the photograph, what TFT keeps outlined."""
    columns = 7
    rows = -(-len(METHODS) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.75 * columns, 2.3 * rows), dpi=80)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, entry) in zip(axes.flat, METHODS.items(), strict=False):
        row = json.loads((out / "works" / f"{NETWORKS[0]}-{name}.json").read_text())
        values = np.load(row["map"])
        axis.imshow(values, cmap="inferno", vmin=0, vmax=np.quantile(values, 0.999) or 1)
        if row["tau"]:
            axis.contour(values, [row["tau"]], colors="cyan", linewidths=0.8)
        axis.set_title(f"{entry.title}\ntau* {row['tau']:g}", fontsize=7, pad=3)
    figure.tight_layout(pad=0.4, h_pad=0.8)
    path = ROOT / "docs" / "images" / "attributions.png"
    figure.savefig(path)
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(160).save(path, optimize=True)


def one(network: str, name: str, out: Path) -> None:
    """Print seconds and memory of one method's map, in a process of its own."""
    torch.set_num_threads(1)
    options = weights_of(network, out)
    f = load_classifier(*options[1::2]) if options else load_classifier()
    x = to_input(read_image(PHOTO), f.preprocessing)
    passes = METHODS[name].passes
    fast = accelerated(f, "auto", f.activation_shape[0] if passes is None else passes)
    c = f(x).argmax(1)
    attribution_map(fast, x, c, "gradcam")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: list[float] = []
    while len(seconds) < TURNS + 1 and (len(seconds) < 2 or sum(seconds) < 20):
        begun = processor_time(resource.RUSAGE_SELF)
        attribution_map(fast, x, c, name)
        seconds.append(processor_time(resource.RUSAGE_SELF) - begun)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"seconds": statistics.median(seconds[1:]), "megabytes": (after - before) / 1024}
    print(json.dumps({**row, "turns": len(seconds) - 1, "threads": torch.get_num_threads()}))


def costs(out: Path, networks: list[str]) -> None:
    """Measure seconds and memory of a map by every method on every network."""
    for network in networks:
        for name in METHODS:
            kept = out / "costs" / f"{network}-{name}.json"
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                words = [sys.executable, "-m", "benchmarks", "attributions", str(out), "--one"]
                done = subprocess.run(
                    [*words, network, name, "--out", str(out)],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    check=False,
                )
                failed = (done.stderr.strip().splitlines() or ["failed"])[-1]
                kept.write_text(done.stdout or json.dumps({"error": failed}))


def main() -> None:
    """Measure what is asked for; keep the page's figures when all is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("attributions-run"))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--slow-images", type=int, default=32)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="table,works,costs,picture,page")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of works and costs")
    parser.add_argument(
        "--explained-only", default="", help="NETWORK:METHOD, ... that works leaves out of evaluate"
    )
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out, data = arguments.out.resolve(), arguments.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        return one(*arguments.one, out)
    networks = arguments.networks.split(",")
    for part in arguments.only.split(","):
        if part == "table":
            table(data, out, arguments.images, arguments.slow_images, arguments.processes)
            chance(data, out, arguments.images)
        if part == "works":
            works(data, out, networks, arguments.explained_only.split(","))
        if part == "costs":
            costs(out, networks)
        if part == "picture":
            picture(out)
        if part == "page":
            pages.keep("results/tables", "attributions_machine", machine())
            pages.keep("results/tables", "attributions", "\n".join(tables(out)).rstrip())
