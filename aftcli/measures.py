"""The measures of a map by their command-line names (§5.2 and beyond); formulas: metrics.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aftcli.errors import AftError, nearest


class Measure(NamedTuple):
    """A measure of tables.

    Attributes:
        title: its name in tables.
        better: 1 where higher is better, -1 where lower is, 0 where neither is.
        extra: what must be asked for to have it; "" where it costs nothing. "boxes" and
            "segmentation" are there where the data set has them.
        source: its paper.
    """

    title: str
    better: int
    extra: str
    source: str


MEASURES: dict[str, Measure] = {
    "average_increase": Measure("Average Increase", 1, "", "the paper, §5.2"),
    "average_drop": Measure("Average Drop", -1, "", "the paper, §5.2"),
    "average_gain": Measure("Average Gain", 1, "", "Zhang et al., CVIU 2024 (Opti-CAM)"),
    "area": Measure("Kept area", 0, "", "share of pixels with I != 0"),
    "complexity": Measure("Complexity", -1, "", "Poppi et al., CVPRW 2021"),
    "coherency": Measure("Coherency", 1, "adcc", "Poppi et al., CVPRW 2021"),
    "adcc": Measure("ADCC", 1, "adcc", "Poppi et al., CVPRW 2021"),
    "insertion": Measure("Insertion", 1, "insertion", "Petsiuk et al., BMVC 2018 (RISE)"),
    "deletion": Measure("Deletion", -1, "insertion", "Petsiuk et al., BMVC 2018 (RISE)"),
    "road": Measure("ROAD", -1, "road", "Rong et al., ICML 2022"),
    "energy": Measure("Energy in boxes", 1, "boxes", "Wang et al., CVPRW 2020 (Score-CAM)"),
    "pointing": Measure("Pointing game", 1, "boxes", "Zhang et al., ECCV 2016"),
    "iou": Measure("IoU with boxes", 1, "boxes", "Jaccard index of M_tau and the boxes"),
    "energy_segmentation": Measure(
        "Energy in segmentation", 1, "segmentation", "Wang et al., CVPRW 2020 (Score-CAM)"
    ),
    "iou_segmentation": Measure(
        "IoU with segmentation", 1, "segmentation", "Jaccard index of M_tau and the segmentation"
    ),
}
PAPER = ("average_increase", "average_drop")  # Table 3's
EXTRAS = ("adcc", "insertion", "road")  # what costs passes of the network
BASELINES = "baselines"  # an extra too: the view of fixed cut-offs, by all measures

# The columns of Table 3 and Table 4, beyond them the fixed shares of Table 1 and the control.
VARIANTS = {
    "original": "Original",
    "fixed": "Fixed",
    "tft": "TFT",
    "aft": "AFT",
    "control": "Control",
}


def measures(text: str | None) -> tuple[str, ...]:
    """Read names of measures, separated by commas; None is the paper's two, "all" is all.

    Raises:
        AftError: a name is unknown.

    >>> measures("average_drop,adcc")
    ('average_drop', 'adcc')
    """
    if text is None:
        return PAPER
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if "all" in names:
        return tuple(MEASURES)
    for name in names or [text]:
        if name not in MEASURES:
            raise AftError(
                f"unknown measure {name!r} in --metrics; nearest: {nearest(name, MEASURES)}; all: "
                f"{', '.join(MEASURES)}, or `all`"
            )
    return names


def extras_of(names: Iterable[str], baselines: bool) -> frozenset[str]:
    """What must be computed for measures beyond what is always there."""
    needed = {MEASURES[name].extra for name in names} & set(EXTRAS)
    return frozenset(needed | ({BASELINES} if baselines else set()))
