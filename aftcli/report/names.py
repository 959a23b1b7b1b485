"""Names of output files, different for different pictures and settings."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

from aftcli.networks.names import spelled
from aftcli.networks.sources import DEFAULT_MODEL
from aftcli.pictures.colours import LOOK, Look
from aftcli.settings import AS_COMPUTED, AUTO, Search, Shaping

LONGEST = 40  # characters of settings in a name; systems allow 255 bytes of it in all

LONGEST_FILE = 24  # of a file's name

UNSAFE = re.compile(r"[^A-Za-z0-9_.+]+")


class Setting(NamedTuple):
    """A setting that differs from the default.

    Attributes:
        shown: what names say of it.
        value: what it is; where that is more than is shown, names end in a digest of it.
    """

    shown: str
    value: str


class Suffixes(NamedTuple):
    """The part of names between method and kind: nothing, or settings after a hyphen.

    Attributes:
        uncut: in the name of the map, which no threshold changes.
        cut: in the names of the other outputs.
    """

    uncut: str = ""
    cut: str = ""


PLAIN = Suffixes()


def suffixes(maps: Iterable[Setting], cut: Iterable[Setting] = ()) -> Suffixes:
    """Say which settings the files of one command were made with.

    Args:
        maps: settings that decide the plain map.
        cut: settings that decide where it is cut.

    >>> suffixes([Setting("vgg16", "vgg16")], [Setting("t0.4", "t0.4")])
    Suffixes(uncut='-vgg16', cut='-vgg16-t0.4')
    >>> suffixes([Setting("layer_a_b", "layer_a/b")]).uncut
    '-layer_a_b-455cc1'
    """
    maps = list(maps)
    return Suffixes(_suffix(maps), _suffix([*maps, *cut]))


def _suffix(settings: list[Setting]) -> str:
    if not settings:
        return ""
    shown = "-".join(each.shown for each in settings)
    value = "-".join(each.value for each in settings)
    if shown != value or len(shown) > LONGEST:
        digest = hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:6]
        shown = f"{shown[:LONGEST].rstrip('-')}-{digest}"
    return f"-{shown}"


def of_network(
    model: str | None,
    checkpoint: Path | None,
    classes: Path | None,
    layers: tuple[str, ...],
    precision: str,
    output: str = AUTO,
    fuse: str = "max",
) -> list[Setting]:
    """List settings of the network and its layers, as the options give them."""
    found = []
    if model is not None and ":" not in model:
        model = spelled(model)
    if model not in (None, DEFAULT_MODEL):
        # As run folders name it: no other model is called so.
        name = model.replace(":", "_").replace("/", "_")
        found.append(Setting(UNSAFE.sub("_", name), name))
    found += [_file(path) for path in (checkpoint, classes) if path]
    found += [Setting(f"layer_{UNSAFE.sub('_', name)}", f"layer_{name}") for name in layers]
    read_as = [] if output == AUTO else [Setting(f"output_{output}", f"output_{output}")]
    return found + _word(fuse, "max") + read_as + _word(precision, "no")


def of_map(
    shaping: Shaping = AS_COMPUTED,
    target: str | None = None,
    file: Path | None = None,
    absolute: bool = False,
) -> list[Setting]:
    """List settings of the map: how it was shaped, its target, another tool's file, magnitudes.

    Shaping says nothing of a file. `of_network` lists the fusion, beside the layers. A target is
    FILE.py:NAME.
    """
    flags = {"absolute": absolute and file is not None, "cells": shaping.cells and file is None}
    named = [_file(file)] if file else []
    zero = [_number("zero", shaping.zero_level)] if shaping.zero_level else []
    smoothed = [] if file else _word(shaping.smooth, "none")
    words = [Setting(word, word) for word, is_on in flags.items() if is_on]
    path, _, _ = (target or "").rpartition(":")
    return named + words + zero + smoothed + ([_file(Path(path))] if path else [])


def of_threshold(threshold: float | None, mute: float | None) -> list[Setting]:
    """List a fixed threshold, of scores or of percent of the map."""
    given = {"t": threshold, "mute": mute}
    return [_number(word, value) for word, value in given.items() if value is not None]


def of_search(settings: Search, thresholds: str, judges: Iterable[str] = ()) -> list[Setting]:
    """List a search of thresholds, and where it differs from the default.

    Args:
        settings: of the search.
        thresholds: as the option gives them.
        judges: who else is asked, as the options give them.
    """
    default = Search()
    found = [Setting("tft", "tft")]
    if settings.thresholds != default.thresholds:
        said = thresholds.replace(" ", "").replace(":", "..").replace(",", "_")
        found.append(Setting(f"T{UNSAFE.sub('_', said)}", f"T{said}"))
    for name in ("masking", "fill", "mode", "search"):
        found += _word(getattr(settings, name), getattr(default, name))
    return found + [_judge(name) for name in judges]


def _judge(name: str) -> Setting:
    """Show a judge by its name, or its file's, and tell files apart by where they are."""
    model, _, file = name.rpartition("=")
    path = Path(file)
    shown, value = (path.stem, f"{model}={path.resolve()}") if path.is_file() else (name, name)
    return Setting(f"by_{UNSAFE.sub('_', shown)[:LONGEST_FILE]}", f"by_{value}")


def of_look(look: Look) -> list[Setting]:
    """List what differs from the default in the colours of pictures."""
    alpha = [] if look.alpha == LOOK.alpha else [_number("alpha", look.alpha)]
    return _word(look.colormap, LOOK.colormap) + alpha


def _word(word: str, default: str) -> list[Setting]:
    return [] if word == default else [Setting(word, word)]


def _number(word: str, value: float) -> Setting:
    short = f"{value:g}"
    return Setting(word + short, word + (short if float(short) == value else repr(value)))


def _file(path: Path) -> Setting:
    """Show a file by its name and tell it apart by where it is."""
    return Setting(UNSAFE.sub("_", path.stem)[:LONGEST_FILE], str(path.resolve()))


LONGEST_NAME = 120  # bytes of an image's name in the names of its outputs; systems allow 255 in all


def stems(paths: Iterable[Path]) -> dict[Path, str]:
    """Name outputs after their images; images of one name by their folders or formats too."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        names[path] = next(c for c in _candidates(path) if c.lower() not in taken)
        taken.add(names[path].lower())
    return names


def _candidates(path: Path) -> Iterator[str]:
    parts = path.with_suffix("").parts
    long = "-".join(p for p in path.parts if p not in ("/", "..", ".")).replace(".", "-")
    yield from map(_short, (path.stem, "-".join(parts[-2:]).replace(os.sep, ""), long))
    yield from (f"{_short(long)}-{i}" for i in count(2))


def _short(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST_NAME else encoded[:LONGEST_NAME].decode(errors="ignore")
