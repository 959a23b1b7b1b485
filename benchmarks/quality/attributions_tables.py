"""Tables of docs/results/tables.md that the benchmark attributions has measured the figures of."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aftcli.core.methods import METHODS
from aftcli.evaluation.tables import Difference, Table3Row

NETWORKS = ("efficientnet_lite0", "resnet50", "vgg16")
MEASURED = "average_increase,average_drop,area,energy,pointing"
PACKAGES = ("torch", "torchvision", "timm", "captum", "zennit", "saliency", "scikit-image")
# What was thresholded, by the ends of files' names.
KINDS = {
    "": "As they are",
    "cells": "Averaged over cells (`--cells`)",
    "percentile": "As they are, cut by rank (`--threshold-mode percentile`)",
}


def interval(value: float, ci: tuple[float, float] | None) -> str:
    """Return a value and its interval."""
    low, high = ci or (float("nan"), float("nan"))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def of_masking(documents: dict[str, Any], masking: str, kind: str) -> Iterator[str]:
    """Return a table: maps of one kind, a key of KINDS, under one reading of the paper."""
    yield f"**{KINDS[kind]}: {masking} masks**"
    yield ""
    kinds = ("Original", "TFT", "TFT - Original")
    columns = [f"{measure}, {kind}" for measure in ("inc", "drop") for kind in kinds]
    yield f"| method | images | {' | '.join(columns)} | area, TFT |"
    yield f"|---|--:|{'--:|' * (len(columns) + 1)}"
    titles = {name: entry.title for name, entry in METHODS.items()}
    titles["random"] = "random cells" if kind == "cells" else "random pixels"
    order = list(titles)
    for stem in sorted(documents, key=lambda stem: order.index(method_of(stem))):
        if kind_of(stem) != kind:
            continue
        document = documents[stem]
        rows = [Table3Row(**row) for row in document["table3"] if row["masking"] == masking]
        value = {(r.measure, r.variant): r for r in rows}
        changes = [Difference(**d) for d in document["differences"] if d["masking"] == masking]
        change = {d.measure: d for d in changes if (d.variant, d.against) == ("tft", "original")}
        row = [titles[method_of(stem)], str(rows[0].n)]
        for measure in ("average_increase", "average_drop"):
            both = (value[measure, variant] for variant in ("original", "tft"))
            row += (interval(each.value, each.ci) for each in both)
            found = change[measure]
            row.append(interval(found.difference, found.ci) + (" \\*" if found.is_clear else ""))
        row.append(f"{value['area', 'tft'].value:.2f}")
        yield f"| {' | '.join(row)} |"
    yield ""


def kind_of(stem: str) -> str:
    """Return the key of KINDS that a file's name ends on."""
    end = stem.rpartition("-")[2]
    return end if end in KINDS else ""


def method_of(stem: str) -> str:
    """Return the method of a file's name: layercam-32 and lrp-cells are of layercam and lrp.

    >>> method_of("lrp-epsilon-cells"), method_of("layercam-32"), method_of("layercam-fusion")
    ('lrp-epsilon', 'layercam', 'layercam-fusion')
    """
    name, _, end = stem.rpartition("-")
    return name if end in KINDS or end.isdigit() else stem


def machine() -> str:
    """Return where the figures were made."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    where = f"AMD EPYC, {os.cpu_count()} threads, {platform.machine()}"
    return f"Machine: {where}. Versions: python {platform.python_version()}, {versions}."


def tables(out: Path) -> Iterator[str]:
    """Return the tables as lines."""
    documents = {p.stem: json.loads(p.read_text()) for p in sorted((out / "table").glob("*.json"))}
    yield "```console"
    most = max(row["n"] for document in documents.values() for row in document["table3"])
    yield (
        f"$ aft evaluate DATA/imagenet --limit {most} --table 3 --metrics {MEASURED} --cam METHOD"
    )
    yield "```"
    yield ""
    for kind in KINDS:
        for masking in ("binary", "soft"):
            yield from of_masking(documents, masking, kind)
    yield (
        "EfficientNet-Lite0, ImageNet's validation images, spread over the classes. "
        "area: pixels kept."
    )
    yield ""
    yield "**Every method on three networks, from the command line**"
    yield ""
    yield (
        "tau\\* and RPI of `aft explain docs/images/chelsea.jpg --cam METHOD --tft`; then `aft "
        "evaluate` on one image, except at +. ResNet-50 and VGG-16 have random weights. CAM does "
        "not fit VGG-16."
    )
    yield ""
    yield f"| method | {' | '.join(NETWORKS)} |"
    yield f"|---|{'--:|' * len(NETWORKS)}"
    for name, entry in METHODS.items():
        paths = [out / "works" / f"{network}-{name}.json" for network in NETWORKS]
        found = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
        yield f"| {entry.title} | {' | '.join(map(told, found))} |"
    yield ""
    yield (
        "**Cost of a map of EfficientNet-Lite0: processor seconds on one thread, "
        "memory beyond Grad-CAM's**"
    )
    yield ""
    yield "| method | passes without gradients | seconds | MB |"
    yield "|---|--:|--:|--:|"
    for name, entry in METHODS.items():
        path = out / "costs" / f"{NETWORKS[0]}-{name}.json"
        if path.exists():
            passes = "one a channel" if entry.passes is None else str(entry.passes)
            cost = json.loads(path.read_text())
            cells_ = (passes, f"{cost['seconds']:.2f}", f"{cost['megabytes']:.0f}")
            yield f"| {entry.title} | {' | '.join(cells_)} |"
    yield ""


def told(found: dict[str, Any]) -> str:
    """Return what became of a method on a network."""
    if not found:
        return "-"
    return f"{found['tau']:g}, {found['rpi']:.3f}" + ("" if found["evaluated"] else " +")
