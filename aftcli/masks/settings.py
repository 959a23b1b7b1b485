"""Settings that a mask store records, and how those of two stores differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aftcli.core.classifier import Classifier
from aftcli.data.sets import DataSet
from aftcli.errors import AftError
from aftcli.networks.sources import imagenet_classes
from aftcli.settings import JUDGES, SOFTMAX, Search
from aftcli.tft.judges import Judge, judges_named
from aftcli.version import __version__

FORMAT_VERSION = 2

# Recorded, but not compared: a store may be resumed by another version of aft or from a moved
# data set, and class names, which older stores lack, change no number.
INFORMATION = frozenset(
    {
        "aft_version",
        "checkpoint",
        "class_names",
        "complete",
        "data_set",
        "digest",
        "files",
        "imagenet",
        "seal",
    }
)

# Settings that are written only where they are not the default.
UNWRITTEN = {
    "search": "exact",
    "precision": "no",
    "output": SOFTMAX,
    "output_key": "",
    "held": {},
    "every": False,
    JUDGES: [],
}

# Settings that users know by other words.
WORDS = {"every": "--labels", "held": "what is held out"}

# Settings whose values, hashes, say nothing to users.
HASHES = {
    "contents": "contents of images differ",
    "images_hash": "names or labels of images differ",
    "start": "weights that the training starts from differ",
}

# Settings that class names change, and nothing else of a store.
NAMING = frozenset({"classes", "images_hash", "labels"})


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name the settings in which a store differs from what is asked for."""
    found, wanted = UNWRITTEN | dict(found), UNWRITTEN | dict(wanted)
    told = []
    for key in _differing(found, wanted):
        before, now = found.get(key), wanted.get(key)
        if key == "masks" and before and now:
            told += [f"masks: {each}" for each in _of_masks(before, now)]
        elif key in HASHES:
            told.append(HASHES[key])
        else:
            word = WORDS.get(key, key)
            told.append(f"{word} is {_short(key, before)}, asked for {_short(key, now)}")
    return told


def _of_masks(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings in which masks that a network was tuned with differ."""
    other = differences(before, now)
    same = not other and before.get("digest") != now.get("digest")
    return [*other, *(["they were made again, of other content"] if same else [])]


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    keys = sorted({*found, *wanted} - INFORMATION)
    return [key for key in keys if found.get(key) != wanted.get(key)]


def refuse_other_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a file that was begun with other settings."""
    named_since = (found.get("labels"), wanted.get("labels")) == ("data set", "model")
    if named_since and NAMING.issuperset(_differing(found, wanted)):
        raise AftError(
            f"{path}: was begun without class names, which change no mask; leave --classes out "
            "here and pass it to aft finetune and aft evaluate, or use --overwrite"
        )
    other = differences(found, wanted)
    if other:
        raise AftError(
            f"{path}: was begun with other settings: {'; '.join(other)}; use the same ones, "
            "another --run, or --overwrite"
        )


def _short(key: str, value: Any) -> str:  # noqa: ANN401 - of any setting
    if key == JUDGES:
        return judges_named(value)
    if key == "every":
        return "all" if value else "largest"
    if key == "held":
        return f"{value['share']:g} of each class by seed {value['seed']}" if value else "nothing"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def store_settings(
    f: Classifier, data_set: DataSet, settings: Search, judges: Sequence[Judge] = ()
) -> dict[str, Any]:
    """Return a store's attributes but for the CAM: settings (docs/reference/files.md)."""
    seldom = {
        "search": settings.search,
        JUDGES: [judge.recorded(f) for judge in judges],
        "precision": f.precision,
        "output": f.output,
        "output_key": f.output_key,
    }
    return {
        "format_version": FORMAT_VERSION,
        "aft_version": __version__,
        "model": f.name,
        "weights": f.weights_hash(),
        "checkpoint": f.checkpoint,
        "layer": f.layer_name,
        "activation_shape": list(f.activation_shape),
        "thresholds": list(settings.thresholds),
        "masking": settings.masking,
        "fill": settings.fill,
        "threshold_mode": settings.mode,
        # So that older stores without them still match.
        **{key: value for key, value in seldom.items() if value != UNWRITTEN[key]},
        **({"class_names": list(f.classes.own)} if f.classes.own else {}),
        **({"imagenet": True} if _are_imagenets(f, data_set) else {}),
        "preprocessing": f.preprocessing.as_dict(),
        "data_set": str(data_set.root.resolve()),
        "data_kind": data_set.kind,
        **data_set.record,
        "labels": "model" if data_set.mapped else "data set",
        "classes": [] if data_set.mapped else list(data_set.classes),
        "images": len(data_set.samples),
        "images_hash": data_set.fingerprint(),
    }


def _are_imagenets(f: Classifier, data_set: DataSet) -> bool:
    """Tell if labels are ImageNet's classes, where the names of images do not say so."""
    named = data_set.format.named_by_folder or not data_set.mapped
    return not named and f.classes == imagenet_classes()
