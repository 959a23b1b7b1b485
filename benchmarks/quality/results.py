"""Make the paper's tables for the models and images that install or lie at hand.

    python -m benchmarks results DATA [--out DIR]

DATA holds `imagenet/` (with train/, val/ and val_boxes.csv), `voc/VOCdevkit` and
`weights/squeezenet1_0.pth`. Every step is a command of aft's, printed on docs/results/tables.md;
each resumes and reuses what is done, so the second run takes a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aftcli.evaluation.seconds import Table5Row
from aftcli.evaluation.tables import (
    Difference,
    Table1Row,
    Table2Row,
    Table3Row,
    Table4Row,
    Tables,
)
from aftcli.measures.published import TABLE5
from aftcli.pages.grids import Shown, grids
from aftcli.pages.printed import markdown_lines
from benchmarks import pages

CAMS = ("gradcam", "gradcam++", "ablationcam", "layercam")
# All but insertion, deletion and ROAD, which take 30 passes a map: 2 hours more on two cores.
METRICS = (
    "average_increase,average_drop,average_gain,area,complexity,coherency,adcc,energy,pointing,iou,"
    "energy_segmentation,iou_segmentation"
)
PAPER = ("average_increase", "average_drop")
IMAGES = {"ImageNet, 1,281,167 images": 1_281_167, "VOC, 1464 images": 1464}
EVALUATED = {"ImageNet, 1,281,167 images": 10_000, "VOC, 1464 images": 1449}
EPOCHS = 10
MEASURES = ("Average Increase", "Average Drop")
COLUMNS = ("Original", "TFT", "AFT", "Control")
# Equation 8 alone; what the defaults reach is in docs/results/aft-study.md.
PLAIN = "--lam 1 --consistency 0 --classification labels --blend 1 --lr 1e-4 --epochs 10"
COSTS = """\
An estimate of hours on one RTX 2080 Ti for all four CAMs, without mixed precision; no GPU was at
hand. TFT scores the image and {least:.1f} to {most:.1f} masked images for each image and method.
The paper's VGG-16 scores 11 masked images in {seconds:.3f} s (its Table 5), {rate:.0f} images/s;
ResNet-50 counts as {factor:.1f} times as fast, as measured on two cores. For all of ImageNet, whose
w0 outputs no memory holds, w0 runs once an epoch:"""
# Captions of grids, which the head of the page has once.
FACTORS = "In brackets: factor against Original; bold: better than Original; "
INTERVALS = "95 % intervals; "


class Study(NamedTuple):
    """A model, its run, and the commands that make it."""

    title: str
    run: str
    commands: tuple[str, ...]
    images: int | None = None  # evaluated; None for all


def studies(data: Path) -> list[Study]:
    """Return what is evaluated."""
    cams = " ".join(f"--cam {cam}" for cam in CAMS)
    imagenet, voc = data / "imagenet", data / "voc" / "VOCdevkit"
    lite, squeeze = "efficientnet_lite0-imagenet", "squeezenet1_0-imagenet"
    weights = data / "weights" / "squeezenet1_0.pth"
    head = "voc-head/tuned/efficientnet_lite0-control.safetensors"
    return [
        Study(
            "efficientnet_lite0, ImageNet subset",
            lite,
            (
                f"aft gen-masks {imagenet} {cams} --run {lite}",
                f"aft finetune --run {lite} {PLAIN}",
                f"aft finetune --no-masks --run {lite} --lr 1e-4 --epochs 10",
            ),
        ),
        Study(
            "squeezenet1_0, ImageNet subset",
            squeeze,
            (
                f"aft gen-masks {imagenet} {cams} --run {squeeze} --model squeezenet1_0 "
                f"--checkpoint {weights} --limit 500",
                f"aft finetune --run {squeeze} {PLAIN}",
            ),
            220,
        ),
        Study(
            "efficientnet_lite0 with a head for VOC's 20 classes, VOC subset",
            "efficientnet_lite0-voc",
            (
                f"aft finetune {voc} --no-masks --run voc-head",
                f"aft gen-masks {voc} {cams} --run efficientnet_lite0-voc --checkpoint {head}",
                f"aft finetune --run efficientnet_lite0-voc {PLAIN}",
            ),
        ),
    ]


def evaluation(study: Study) -> str:
    """Return the command that prints a study's tables."""
    limit = f"--limit {study.images} " if study.images else ""
    tables = "--table 2,3,4,5 --baselines --ci"
    return f"aft evaluate --run {study.run} {limit}{tables} --judge none --metrics {METRICS}"


def run(command: str, folder: Path) -> str:
    """Run a command of aft's; its stdout."""
    print(command, file=sys.stderr, flush=True)
    words = [sys.executable, "-m", "aftcli", *shlex.split(command)[1:], "--quiet"]
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def rows(kind: type, records: list[dict[str, Any]]) -> list[Any]:
    """Return records of aft's JSON as the rows that they were."""
    known = {field.name for field in fields(kind)}
    own = [{k: v for k, v in r.items() if k in known} for r in records]
    return [kind(**{**r, "ci": tuple(r["ci"])} if r.get("ci") else r) for r in own]


def tables_of(document: dict[str, Any], names: tuple[str, ...]) -> Tables:
    """Return what the JSON of an evaluation holds, of some measures."""
    chosen = [r for r in document["table3"] if r["measure"] in names]
    pairs = [r for r in document["differences"] if r["measure"] in names]
    return Tables(
        {"table3": rows(Table3Row, chosen), "differences": rows(Difference, pairs)},
        kinds={r["dataset"]: "voc" if "VOC" in r["dataset"] else "folders" for r in chosen},
    )


def passes(folder: Path) -> float:
    """Return the mean of masked images that TFT scores, for an image and a method of a run."""
    from aftcli.masks.store import MaskStore

    counts = []
    for path in sorted((folder / "masks").glob("*.h5")):
        with MaskStore(path) as store:
            for start in range(0, len(store), 1024):
                found = store.rows(start, min(start + 1024, len(store)))
                # Equal masks have equal probabilities, that of all pixels is y^c.
                for y, curve in zip(found.probability, found.probabilities, strict=True):
                    counts.append(len({float(v) for v in curve} - {float(y)}))
    return sum(counts) / len(counts)


def machine(settings: dict[str, Any]) -> str:
    """Return where the figures were made."""
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return f"Machine: {settings['device']}, {platform.machine()}. Versions: {versions}."


def tables(folder: Path, made: list[tuple[Study, dict[str, Any]]]) -> Iterator[str]:
    """Return the tables as lines."""
    yield from markdown_lines(
        grids(Tables({"table1": [Table1Row(c, m) for c, m in muted()]}), Shown())
    )
    for study, document in made:
        yield f"## {study.title}"
        yield ""
        yield "```console"
        for command in (*study.commands, evaluation(study)):
            yield f"$ {shown(command)}"
        yield "```"
        yield ""
        yield from markdown_lines(
            grids(Tables({"table2": rows(Table2Row, document["table2"])}), Shown())
        )
        yield "### The paper's measures"
        yield ""
        paper = tables_of(document, PAPER)
        yield from markdown_lines(grids(paper, Shown(ci=True)))
        yield "### Beside the published figures"
        yield ""
        yield from markdown_lines(
            grids(Tables({"table3": paper.rows["table3"]}, kinds=paper.kinds), Shown(paper=True))
        )
        yield "### Accuracy and time"
        yield ""
        yield from markdown_lines(
            grids(Tables({"table4": rows(Table4Row, document["table4"])}), Shown(ci=True))
        )
        timed = [
            Table5Row(
                r["model"], r["cam"], r["without"], r["with"], r["masking"], r["device"], r["runs"]
            )
            for r in document["table5"]
        ]
        yield from markdown_lines(grids(Tables({"table5": timed}), Shown(paper=True)))
        yield "### Further measures"
        yield ""
        others = tuple(m for m in METRICS.split(",") if m not in PAPER)
        more = tables_of(document, others)
        yield from markdown_lines(grids(Tables({"table3": more.rows["table3"]}), Shown()))
    yield from hours(folder, made)


def captioned(lines: Iterable[str]) -> Iterator[str]:
    """Leave out captions that the head of the page has."""
    before = ""
    for line in lines:
        kept = "" if line.startswith(INTERVALS) else line.replace(FACTORS, "")
        if kept.startswith("**"):
            kept = re.sub(r" masks, the (paper's text|authors' code)\*\*$", " masks**", kept)
        if kept or before:
            yield kept
        before = kept


def overview(blocks: Sequence[Any]) -> Iterator[str]:
    """Return Grad-CAM's figures of each network, read from the tables of the page.

    Args:
        blocks: lines and tables, as `pages.taken_apart` gives them.
    """
    columns = [f"{short}, {of}" for short in ("inc", "drop") for of in COLUMNS]
    found: list[str] = []
    accuracy: list[str] = []
    network = caption = ""
    for block in blocks:
        if isinstance(block, str):
            network = block[3:] if block.startswith("## ") else network
            caption = block.strip("*") if block.startswith("**") else caption
            continue
        cells = {
            tuple(row[1:3]): dict(zip(block["head"], row, strict=True)) for row in block["rows"]
        }
        # The published figures stand in tables of their own.
        ours = not any(str(name).startswith("paper") for name in block["head"])
        both = [cells.get(("Grad-CAM", measure)) for measure in MEASURES]
        if caption.startswith("Table 3") and ours and all(both):
            values = [_number(row.get(of)) for row in both if row for of in COLUMNS]
            found.append(
                f"| {network} | {caption.split(': ')[1].split()[0]} | {' | '.join(values)} |"
            )
        if caption.startswith("Table 4"):
            row = dict(zip(block["head"], block["rows"][0], strict=True))
            values = [_number(row.get(of)) for of in ("Original", "AFT", "Control")]
            accuracy.append(f"| {network} | {' | '.join(values)} |")
    yield f"| Grad-CAM | masks | {' | '.join(columns)} |"
    yield f"|---|---|{'--:|' * len(columns)}"
    yield from found
    yield ""
    yield "| accuracy | Original | AFT, Grad-CAM | Control |"
    yield "|---|--:|--:|--:|"
    yield from accuracy


def _number(cell: str | None) -> str:
    """Return a cell's value without its interval and factor."""
    return re.findall(r"\d\.\d+", cell)[0] if cell else "-"


def muted() -> list[tuple[str, float | None]]:
    """Return the published muted shares."""
    from aftcli.core.methods import CAMS

    return [(cam, CAMS[cam].muted) for cam in CAMS]


def shown(command: str) -> str:
    """Return a command as others would write it."""
    words = shlex.split(command)
    return shlex.join(w if "/data/" not in w else "DATA/" + w.split("/data/")[1] for w in words)


def hours(folder: Path, made: list[tuple[Study, dict[str, Any]]]) -> Iterator[str]:
    """Return what the paper's own setting would take."""
    searched = {study.title: passes(folder / study.run) for study, _ in made}
    least, most = min(searched.values()), max(searched.values())
    without, with_tft = TABLE5["gradcam"]
    vgg = 11 / (with_tft - without)
    # benchmarks of issue 7 on two cores: 10 images eager in 3160 and 750 ms.
    rates = {"VGG-16": vgg, "ResNet-50": vgg * 3160 / 750}
    yield "## The paper's own setting"
    yield ""
    yield "ResNet-50 and VGG-16 with torchvision's weights, all of ImageNet and VOC, the four CAMs:"
    yield ""
    yield "```console"
    cams = " ".join(f"--cam {cam}" for cam in CAMS)
    for model in ("resnet50", "vgg16"):
        yield f"$ aft gen-masks imagenet {cams} --model {model} --run {model}-imagenet"
        yield f"$ aft finetune --objective tuner --run {model}-imagenet"
        yield f"$ aft evaluate --run {model}-imagenet --table --paper --ci"
        yield f"$ aft finetune VOCdevkit --no-masks --model {model} --run {model}-voc-head"
        head = f"{model}-voc-head/tuned/{model}-control.safetensors"
        yield f"$ aft gen-masks VOCdevkit {cams} --checkpoint {head} --run {model}-voc"
        yield f"$ aft finetune --objective tuner --run {model}-voc"
        yield f"$ aft evaluate --run {model}-voc --table --paper --ci"
    yield "```"
    yield ""
    yield COSTS.format(
        least=least, most=most, seconds=with_tft - without, rate=vgg, factor=3160 / 750
    )
    yield ""
    yield "| data | model | gen-masks | finetune | evaluate, both readings |"
    yield "|---|---|--:|--:|--:|"
    for data, count in IMAGES.items():
        for model, rate in rates.items():
            masks = count * (1 + 4 * most) / rate / 3600
            # w0's outputs do not fit in memory for all of ImageNet: it runs once an epoch.
            tune = 4 * (count * (EPOCHS if count > 10_000 else 1)) / rate / 3600
            test = EVALUATED[data] * (1 + 8 * most + 4 * 2 * 2) / rate / 3600
            cells = (f"{h:.1f}" if h >= 0.1 else f"{h:.2f}" for h in (masks, tune, test))
            yield f"| {data} | {model} | {' | '.join(cells)} |"
    yield ""


def main() -> None:
    """Run everything and keep the page's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results-runs"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    made = []
    for study in studies(arguments.data.resolve()):
        for command in study.commands:
            run(command, arguments.out)
        made.append((study, json.loads(run(f"{evaluation(study)} --format json", arguments.out))))
    pages.keep("results/tables", "machine", machine(made[0][1]["settings"]))
    lines = "\n".join(captioned(tables(arguments.out, made))).rstrip()
    pages.keep("results/tables", "tables", lines)
    shown_first = "\n".join(overview(pages.taken_apart(lines)))
    pages.keep("results/tables", "overview", shown_first)
