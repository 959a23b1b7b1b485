"""Parts of data sets: splits by their names, and images that are held out where there is no val."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from aftcli.data.text import listed

# Usual names of splits, whatever the case; the first is what `--split` and defaults are named by.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


class Held(NamedTuple):
    """A share of the images that is held out of a data set without a val split.

    Attributes:
        share: of the images of each class, in (0, 1).
        seed: chooses which.
        part: "val" for these images, "train" for the others; "" where that is not chosen yet.
    """

    share: float
    seed: int = 0
    part: str = ""


class Reading(NamedTuple):
    """Choices in reading a data set.

    Attributes:
        kind: the name of its format, a key of FORMATS; None recognises it by its content.
        every: a sample for each image and class that it shows; otherwise one for each image. None
            is as masks were made, otherwise one.
        held: what is held out where there is no val split; None holds out nothing.
        trained: names of the images that were not held out, where the data set has changed since.
    """

    kind: str | None = None
    every: bool | None = None
    held: Held | None = None
    trained: frozenset[str] = frozenset()

    @classmethod
    def of(cls, made: Mapping[str, Any]) -> Reading:
        """Return the choices that a mask store or a checkpoint records."""
        held = made.get("held")
        kept = Held(held["share"], held["seed"]) if held else None
        return cls(made["data_kind"], bool(made.get("every")), kept)


AS_FOUND = Reading()


def split_kind(name: str) -> str:
    """Name the kind of a split: a key of SPLITS, "" for another name.

    >>> split_kind("Validation")
    'val'
    """
    return next((kind for kind, names in SPLITS.items() if name.lower() in names), "")


def check_held(values: object) -> None:
    """Check what a file records of held-out images.

    Raises:
        ValueError: it is not what this module records.
    """
    if values is None:
        return
    kinds = {"share": float, "seed": int, "part": str}
    if not isinstance(values, dict) or {k: type(v) for k, v in values.items()} != kinds:
        raise ValueError("its held is not a share, a seed and a part")
    if not 0 < values["share"] < 1 or values["part"] not in ("train", "val"):
        raise ValueError(f"its held is {values}"[:120])


def held_names(
    samples: Iterable[tuple[str, int]], held: Held, trained: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Choose the images that are held out: of each class the same share.

    The choice depends on the names and the seed alone. A class of two images or more has one held
    out at the least, and one left. An image of several classes counts for its first one.

    Args:
        samples: names of images and labels.
        held: the share and the seed.
        trained: names that were not held out before. Then those that come before the first of
            their class in the order of the choice are held out: they were, or are new.
    """
    classes: dict[int, list[str]] = defaultdict(list)
    for name, label in dict(reversed([*samples])).items():
        classes[label].append(name)
    chosen: set[str] = set()
    for names in classes.values():
        count = min(max(round(held.share * len(names)), 1), len(names) - 1)
        ordered = sorted(names, key=lambda name: _order(name, held.seed))
        if trained:
            count = next((i for i, name in enumerate(ordered) if name in trained), 0)
        chosen.update(ordered[:count])
    return frozenset(chosen)


def _order(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0".encode() + os.fsencode(name)).digest()


def held_note(
    root: object, out: frozenset[str], every: Iterable[str], held: Held, trained: frozenset[str]
) -> str:
    """Say which images are held out, and which are new where some were trained on before."""
    names, total = sorted(out), len(set(every))
    use = "only these are taken" if held.part == "val" else "these are left out"
    return (
        f"{root}: has no val split, so {len(names)} of {total} images are held out to evaluate on "
        f"(--val-share {held.share:g}, seed {held.seed}); {use}: "
        f"{listed(names)}{_new_note(set(every) - out - trained) if trained else ''}"
    )


def _new_note(new: set[str]) -> str:
    changed = "; the data set has changed since, the split stays as it was"
    if not new:
        return changed
    return f"{changed}, and {len(new)} new images are in no part of it: {listed(sorted(new))}"


def spread(total: int, count: int | None) -> list[int]:
    """Pick `count` of `total` places, evenly spread; None, or too many, picks all.

    >>> spread(10, 3)
    [0, 3, 6]
    """
    count = min(total if count is None else count, total)
    return [i * total // count for i in range(count)]
