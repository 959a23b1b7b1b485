"""Parts of data sets: splits, and images that are held out where a data set has no val split."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from aftcli.core.classes import Classes
from aftcli.data.sets import DataSet, Reading, not_its_classes, open_data_set, split_kind
from aftcli.errors import AftError


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
    root = data_set.format.above(data_set.root, data_set.split)
    if split_kind(data_set.split) != "train" or not data_set.format.has_split(root, "val"):
        return Validation()
    try:
        found = open_data_set(root, "val", classes, reading=Reading(data_set.kind, data_set.every))
    except AftError as error:
        return Validation(reason=str(error))
    if not found.mapped:
        return Validation(reason=not_its_classes(found, classes))
    return Validation(replace(found, named=data_set.named or found.named))
