"""Output of `aft explain` and `aft tft`: pictures and other files, plain values."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.core.classifier import Classifier
from aftcli.errors import AftError
from aftcli.models.targets import Targeted
from aftcli.pictures.colours import LOOK, Look
from aftcli.pictures.figure import Shown, best, figure, overlaid, shown_as
from aftcli.pictures.overlay import Subject
from aftcli.report.manifest import Manifest, writing
from aftcli.report.names import PLAIN, Suffixes
from aftcli.settings import SELF, SOFTMAX, Search
from aftcli.tft.explain import Explanation


class Report(NamedTuple):
    """An explanation with the files that show it."""

    image: Path
    explanation: Explanation
    outputs: dict[str, Path]


def output_folder(path: Path) -> Path:
    """Make a folder for outputs."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise AftError(
            f"{path}: can't write there ({error.strerror or error}); give another --out"
        ) from error
    return path


def write_outputs(
    f: Classifier,
    subject: Subject,
    explanation: Explanation,
    kinds: Iterable[str],
    out: Path,
    settings: Suffixes = PLAIN,
    look: Look = LOOK,
    manifest: Manifest | None = None,
) -> Report:
    """Write the files that show an explanation.

    Args:
        f: the classifier.
        subject: the picture.
        explanation: of it.
        kinds: keys of OUTPUTS.
        out: the folder.
        settings: what the names say of them.
        look: colours of the map.
        manifest: lists the files.
    """
    if not (math.isfinite(explanation.probability) and explanation.attribution.isfinite().all()):
        raise AftError(
            f"{subject.path}: {f.name} gives NaN or infinite numbers for it; its weights may be "
            "damaged"
        )
    slug = _class_slug(f, explanation.class_index)
    if explanation.contrast is not None:
        slug += f"-not-{_class_slug(f, explanation.contrast)}"
    shown = shown_of(f, subject, explanation, look)
    files = {}
    for kind in kinds:
        ending, write = OUTPUTS[kind]
        said = settings.uncut if kind == "map" else settings.cut
        path = out / f"{subject.stem}-{slug}-{explanation.cam}{said}-{kind}{ending}"
        made = {"kind": kind, **made_by(f, explanation)}
        with writing(manifest, path, {subject.stem: subject.path}, made) as temporary:
            write(temporary, shown)
        files[kind] = path
    return Report(subject.path, explanation, files)


def written(
    f: Classifier,
    subject: Subject,
    explanations: Iterable[Explanation],
    kinds: Sequence[str],
    out: Path,
    settings: Suffixes = PLAIN,
    look: Look = LOOK,
    manifest: Manifest | None = None,
) -> list[Report]:
    """Write what shows explanations of one picture.

    Args:
        f: the classifier.
        subject: the picture.
        explanations: of it, of different methods or classes.
        kinds: keys of OUTPUTS.
        out: the folder.
        settings: what the names say of them.
        look: colours of the map.
        manifest: lists the files.
    """
    asked = (kinds, out, settings, look, manifest)
    return [write_outputs(f, subject, each, *asked) for each in explanations]


def shown_of(f: Classifier, subject: Subject, explanation: Explanation, look: Look) -> Shown:
    """Return an explanation with what pictures say of it."""
    return shown_as(f.classes, isinstance(f, Targeted), subject, explanation, look, f.output)


def _class_slug(f: Classifier, index: int) -> str:
    """Name a class in file names, with its index where others would have the same name."""
    slug = _slug(f.classes.name(index))
    shared = [_slug(f.classes.name(i)) for i in range(len(f.classes))].count(slug) > 1
    return f"{slug}_{index}" if shared else slug


def made_by(f: Classifier, explanation: Explanation) -> dict[str, Any]:
    """Return the network, layer, method and class of an explanation, as plain values."""
    return {
        "model": f.name,
        **({"checkpoint": f.checkpoint} if f.checkpoint else {}),
        "layer": f.layer_name,
        **({"layers": list(explanation.layers)} if explanation.layers else {}),
        "cam": explanation.cam,
        "class_index": explanation.class_index,
        "class_name": class_name(f, explanation),
        **_contrasted(f, explanation),
    }


def _contrasted(f: Classifier, explanation: Explanation) -> dict[str, Any]:
    if explanation.contrast is None:
        return {}
    return {
        "contrast": {
            "class_index": explanation.contrast,
            "class_name": f.classes.name(explanation.contrast),
            "probability": explanation.contrast_probability,
        }
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40] or "class"


def class_name(f: Classifier, explanation: Explanation) -> str:
    """Return the name of the class explained."""
    return f.classes.name(explanation.class_index)


def _write_overlay(path: Path, shown: Shown) -> None:
    overlaid(shown).save(path, format="PNG", compress_level=3)


def _write_map(path: Path, shown: Shown) -> None:
    with path.open("wb") as file:
        np.save(file, shown.plain.numpy().astype(np.float32))


def _write_mask(path: Path, shown: Shown) -> None:
    kept = shown.plain != 0 if shown.kept is None else shown.kept
    Image.fromarray(kept.to(torch.uint8).mul(255).numpy()).save(path, format="PNG")


def _write_figure(path: Path, shown: Shown) -> None:
    figure(shown).savefig(path, format="png", pil_kwargs={"compress_level": 3})


OUTPUTS: dict[str, tuple[str, Callable[[Path, Shown], None]]] = {
    "overlay": (".png", _write_overlay),
    "figure": (".png", _write_figure),
    "map": (".npy", _write_map),
    "mask": (".png", _write_mask),
}


def as_dict(f: Classifier, report: Report, settings: Search) -> dict[str, Any]:
    """Return an explanation as plain values (docs/reference/cli.md)."""
    e = report.explanation
    result: dict[str, Any] = {
        "image": str(report.image),
        **made_by(f, e),
        "probability": e.probability,
        "outputs": {kind: str(path) for kind, path in report.outputs.items()},
    }
    if f.output != SOFTMAX and not isinstance(f, Targeted):
        result["output"] = f.output
    if e.cells:
        result["cells"] = True
    if e.zero_level:
        result["zero_level"] = e.zero_level
    if isinstance(f, Targeted):
        result["target"] = f.classes.name(0)
    if e.smooth != "none":
        result["smooth"] = e.smooth
    if e.layers:
        result["fuse"] = e.fuse
    if e.tft:
        result["tft"] = {
            "thresholds": list(e.thresholds),
            "probabilities": _plain_list(e.tft.probabilities[0]),
            "rpi": _plain_list(e.tft.rpi[0]),
            "tau": e.thresholds[int(e.tft.best)],
            "probability": best(e),
            "area": float(e.tft.mask.float().mean()),
            "masking": settings.masking,
            "fill": settings.fill,
            "threshold_mode": settings.mode,
            "search": settings.search,
        }
        if e.judges:
            result["tft"]["judges"] = _judged(e)
    if e.fixed:
        result["fixed"] = {
            "threshold": e.thresholds[0],
            "probability": best(e),
            "area": float(e.fixed.mask.float().mean()),
            "masking": settings.masking,
            "fill": settings.fill,
            "threshold_mode": settings.mode,
        }
    return result


def _judged(e: Explanation) -> list[dict[str, Any]]:
    """List the network and its judges with what they say at tau*; None where one was not asked."""
    assert e.tft
    best = e.tft.best
    whole = [e.probability, *_plain_list(e.tft.judged_whole[0])]
    masked = [float(e.tft.probabilities[0, best]), *_plain_list(e.tft.judged[0, :, int(best)])]
    columns = zip((SELF, *e.judges), whole, masked, _plain_list(e.tft.increases[0]), strict=True)
    names = ("name", "whole", "probability", "log_odds_increase")
    return [dict(zip(names, row, strict=True)) for row in columns]


def _plain_list(values: Tensor) -> list[float | None]:
    """List values for JSON, without NaN (thresholds not tried) and infinity (RPI where y^c = 0)."""
    finite = values.clamp(max=torch.finfo(values.dtype).max)
    return [None if math.isnan(value) else value for value in finite.tolist()]
