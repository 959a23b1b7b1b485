"""Measures of a map by their command-line names (§5.2 and beyond), and the tables by their numbers.

Formulas: metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from aftcli.errors import AftError, nearest
from aftcli.settings import MIRROR, SELF

if TYPE_CHECKING:
    from torch import Tensor

FORMULAS = "aftcli.measures.metrics"

# The categories of Quantus (Hedström et al., JMLR 2023).
Group = Literal[
    "faithfulness", "localisation", "complexity", "robustness", "randomisation", "axiomatic"
]
GROUPS: tuple[Group, ...] = get_args(Group)


QUANTUS = "quantus:"  # before the name of a metric of Quantus in `--metrics`


class Measure(NamedTuple):
    """A measure of tables. Functions are named, not imported, so that `--help` needs no torch.

    Attributes:
        title: its name in tables.
        group: what it asks of a map.
        better: 1 where higher is better, -1 where lower is, 0 where neither is.
        extra: what must be asked for to have it; "" where it costs nothing. "boxes" and
            "segmentation" are there where the data set has them. A measure that is added needs
            an extra of its own: results without it are then measured again.
        source: its paper.
        function: its formula, of metrics.py, or "module:function"; it gives shape (N,).
        needs: the function's arguments: attributes of `aftcli.measures.given.Given`, or other
            measures above it.
        passes: how many images pass the network for one map, beyond those of its needs.
    """

    title: str
    group: Group
    better: int
    extra: str
    source: str
    function: str
    needs: tuple[str, ...]
    passes: int = 0

    @property
    def of_probabilities(self) -> bool:
        """True where the probabilities of the masked and of the whole image suffice."""
        return self.needs == ("y_hat", "y")

    def load(self) -> Callable[..., Tensor]:
        """Import the formula."""
        module, _, name = self.function.rpartition(":")
        return cast("Callable[..., Tensor]", getattr(import_module(module or FORMULAS), name))


class _Measures(dict[str, Measure]):
    """The measures by name; those of Quantus are not listed, but looked up in the library."""

    def __missing__(self, name: str) -> Measure:
        if not name.startswith(QUANTUS):
            raise KeyError(name)
        from aftcli.measures.quantus import find_metric

        found = find_metric(name.removeprefix(QUANTUS))
        title, group = f"Quantus {found.kind.name}", cast("Group", found.group)
        return Measure(title, group, found.better, name, f"Quantus {found.version}", "", ())


_Y, _I, _RUN = ("y_hat", "y"), ("attribution",), ("x", "attribution", "probability_of")
_BOXES = ("attribution", "boxes")
_SEEN = ("segmentation", "counted")

WANG = "Wang et al., CVPRW 2020 (Score-CAM)"
POPPI = "Poppi et al., CVPRW 2021"
RISE = "Petsiuk et al., BMVC 2018 (RISE)"
_LISTED: dict[str, Measure] = {
    "average_increase": Measure(
        "Average Increase", "faithfulness", 1, "", "the paper, §5.2", "increase", _Y
    ),
    "average_drop": Measure("Average Drop", "faithfulness", -1, "", "the paper, §5.2", "drop", _Y),
    "average_gain": Measure(
        "Average Gain", "faithfulness", 1, "", "Zhang et al., CVIU 2024 (Opti-CAM)", "gain", _Y
    ),
    "area": Measure(
        "Kept area", "complexity", 0, "", "share of pixels with I != 0", "area", ("mask",)
    ),
    "complexity": Measure("Complexity", "complexity", -1, "", POPPI, "complexity", _I),
    "coherency": Measure(
        "Coherency", "robustness", 1, "adcc", POPPI, "coherency", ("attribution", "product_map"), 1
    ),
    "adcc": Measure(
        "ADCC",
        "faithfulness",
        1,
        "adcc",
        POPPI,
        "adcc",
        ("coherency", "complexity", "product_drop"),
    ),
    "insertion": Measure("Insertion", "faithfulness", 1, "insertion", RISE, "insertion", _RUN, 11),
    "deletion": Measure("Deletion", "faithfulness", -1, "insertion", RISE, "deletion", _RUN, 11),
    "road": Measure(
        "ROAD", "faithfulness", -1, "road", "Rong et al., ICML 2022", "road", (*_RUN, "seeds"), 4
    ),
    "road_last": Measure(
        "ROAD, least first",
        "faithfulness",
        1,
        "arcc",
        "Rong et al., ICML 2022",
        "road",
        ("x", "inverse", "probability_of", "seeds"),
        4,
    ),
    "arcc": Measure(
        "ARCC",
        "faithfulness",
        1,
        "arcc",
        "Domeniconi et al., ICPR 2026; pytorch_grad_cam.metrics.arcc",
        "arcc",
        ("coherency", "complexity", "road", "road_last"),
    ),
    "energy": Measure("Energy in boxes", "localisation", 1, "boxes", WANG, "energy", _BOXES),
    "pointing": Measure(
        "Pointing game", "localisation", 1, "boxes", "Zhang et al., ECCV 2016", "pointing", _BOXES
    ),
    "iou": Measure(
        "IoU with boxes",
        "localisation",
        1,
        "boxes",
        "Jaccard index of M_tau and the boxes",
        "iou",
        ("mask", "boxes"),
    ),
    "energy_segmentation": Measure(
        "Energy in segmentation",
        "localisation",
        1,
        "segmentation",
        WANG,
        "energy",
        ("attribution", *_SEEN),
    ),
    "iou_segmentation": Measure(
        "IoU with segmentation",
        "localisation",
        1,
        "segmentation",
        "Jaccard index of M_tau and the segmentation",
        "iou",
        ("mask", *_SEEN),
    ),
}

MEASURES: dict[str, Measure] = _Measures(_LISTED)

PAPER = ("average_increase", "average_drop")  # Table 3's

OBJECTS = ("boxes", "segmentation")  # extras that nobody asks for: data sets have them

# Extras that cost passes of the network.
EXTRAS = tuple(dict.fromkeys(m.extra for m in MEASURES.values() if m.extra not in ("", *OBJECTS)))

BASELINES = "baselines"  # an extra too: the view of fixed cut-offs, by all measures

# Judges that are always at hand: the network itself, which no one needs to ask for, and the same
# on the mirrored image (`aftcli.tft.judges`).

# The columns of Table 3 and Table 4, beyond them the fixed shares of Table 1 and the control.
VARIANTS = {
    "original": "Original",
    "fixed": "Fixed",
    "tft": "TFT",
    "aft": "AFT",
    "control": "Control",
}

# By column of the tables: whose maps it is made of, and their view.
SOURCES = {
    "original": ("original", "original"),
    "fixed": ("original", "fixed"),
    "tft": ("original", "tft"),
    "aft": ("aft", "original"),
    "control": ("control", "original"),
}

COMPARED: tuple[tuple[str, str], ...] = (
    ("tft", "original"),
    ("tft", "fixed"),
    ("aft", "original"),
    ("aft", "tft"),
    ("aft", "control"),
    ("control", "original"),
)

CONTROLS = "controls"  # whose maps controls are: of no variant (`aftcli.measures.controls`)

# The columns of the controls, by the column that they control. The first two are of equal area
# and of equal mean over the data set: a gain over Original must be one over them as well.
CONTROLLED = {
    row: {f"{row} {control}": f"{VARIANTS[row]} {control}" for control in controls}
    for row, controls in {
        "tft": ("shift", "gamma", "permuted", "random", "disc"),
        "aft": ("shift", "gamma", "random", "disc"),
    }.items()
}

SOURCES |= {name: (CONTROLS, name) for own in CONTROLLED.values() for name in own}
COMPARED += tuple((row, name) for row, own in CONTROLLED.items() for name in own)

TITLES = {**VARIANTS, **CONTROLLED["tft"], **CONTROLLED["aft"]}


def measures(text: str | None) -> tuple[str, ...]:
    """Read names of measures, separated by commas; None is the paper's two, "all" ours.

    >>> measures("average_drop,adcc")
    ('average_drop', 'adcc')
    """
    if text is None:
        return PAPER
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    foreign = [name for name in names if name.startswith(QUANTUS)]
    for name in foreign:
        MEASURES[name]  # noqa: B018 - tells what is wrong with it
    if "all" in names:
        return (*MEASURES, *foreign)
    for name in names or [text]:
        if name not in MEASURES and name not in foreign:
            raise AftError(
                f"unknown measure {name!r} in --metrics; nearest: {nearest(name, MEASURES)}; all: "
                f"{', '.join(MEASURES)}, quantus:NAME, or `all`"
            )
    return names


MOST_JUDGES = 8  # each has a part in names of files


def judges(names: Sequence[str] | None) -> tuple[str, ...]:
    """Read names of judges beside the network itself; None is the mirror, "none" is nobody.

    Raises:
        AftError: "none" stands beside others, or they are too many.

    >>> judges(None), judges(["none"]), judges(["mirror", "self", "resnet50"])
    (('mirror',), (), ('mirror', 'resnet50'))
    """
    asked = tuple(dict.fromkeys(name for name in names or [MIRROR] if name != SELF))
    if "none" in asked and len(asked) > 1:
        raise AftError("--judge none stands alone; leave it or the other judges out")
    if len(asked) > MOST_JUDGES:
        raise AftError(f"{len(asked)} judges; at most {MOST_JUDGES} are asked in one call")
    return tuple(name for name in asked if name != "none")


def by_group() -> Iterator[tuple[Group, list[str]]]:
    """Yield the groups that have measures, with their keys of MEASURES."""
    for group in GROUPS:
        if names := [name for name, measure in MEASURES.items() if measure.group == group]:
            yield group, names


def extras_of(names: Iterable[str], baselines: bool) -> frozenset[str]:
    """Return what must be computed for measures beyond what is always there."""
    needed = completed(MEASURES[name].extra for name in names)
    return needed | ({BASELINES} if baselines else frozenset())


def completed(extras: Iterable[str]) -> frozenset[str]:
    """Add to extras those of the measures that theirs need.

    >>> sorted(completed(["arcc"]))
    ['adcc', 'arcc', 'road']
    """
    found = {*extras} - {"", *OBJECTS}
    # From the last, as measures need others above them.
    for measure in reversed(MEASURES.values()):
        if measure.extra in found:
            found |= {MEASURES[name].extra for name in measure.needs if name in MEASURES}
    return frozenset(found - {"", *OBJECTS})


# The tables by the number that asks for them, as help names them; `tables.TABLES` has their rows.
TABLES = {
    1: "cut-offs",
    2: "data sets",
    3: "measures of maps",
    4: "accuracies",
    5: "seconds a map",
}
MEASURED = (3, 4)  # made of measured maps; the default
EVALUATED = (*MEASURED, 5)  # all that the network must run for
