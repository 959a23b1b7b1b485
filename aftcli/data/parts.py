"""Parts of data sets: splits, and images that are held out where a data set has no val split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from aftcli.core.classes import Classes
from aftcli.data.sets import DataSet, format_of, not_its_classes, open_data_set, split_kind
from aftcli.errors import AftError


def place_of(made: Mapping[str, Any], split: str | None = None) -> Path:
    """Return the path that opens a data set again.

    Args:
        made: what a store or checkpoint records of it.
        split: that is wanted; default the recorded one.
    """
    root, kind = Path(made["data_set"]), made["data_kind"]
    above = format_of(kind).above(root, made["split"] if split is None else split)
    return above / str(made.get("data_file", ""))


class Validation(NamedTuple):
    """The val split beside a train split.

    Attributes:
        data_set: its images; None where there is no such split, or it can't be used.
        reason: why it can't be used; "" where it can, or there is none.
    """

    data_set: DataSet | None = None
    reason: str = ""


def validation_of(data_set: DataSet, classes: Classes) -> Validation:
    """Open the val split beside a train split."""
    root = data_set.format.above(data_set.root, data_set.split) / data_set.file
    if split_kind(data_set.split) != "train" or not data_set.format.has_split(root, "val"):
        return Validation()
    try:
        found = open_data_set(root, "val", classes, every=data_set.every)
    except AftError as error:
        return Validation(reason=str(error))
    if not found.mapped:
        return Validation(reason=not_its_classes(found, classes))
    return Validation(replace(found, named=data_set.named or found.named))
