"""Measures of a map by their command-line names (§5.2 and beyond), and the published numbers.

Formulas: metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

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
        needs: the function's arguments: attributes of `aftcli.evaluation.batch.Given`, or other
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

MODELS = ("ResNet-50", "VGG-16")

PAPER_VARIANTS = ("original", "tft", "aft")

# By data set, method and measure: Original, TFT, AFT of each model.
TABLE3: dict[tuple[str, str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("ImageNet", "gradcam", "average_increase"): ((0.334, 0.439, 0.449), (0.294, 0.385, 0.561)),
    ("ImageNet", "gradcam", "average_drop"): ((0.130, 0.117, 0.116), (0.159, 0.144, 0.124)),
    ("ImageNet", "gradcam++", "average_increase"): ((0.342, 0.454, 0.507), (0.228, 0.322, 0.505)),
    ("ImageNet", "gradcam++", "average_drop"): ((0.136, 0.123, 0.105), (0.188, 0.174, 0.153)),
    ("ImageNet", "ablationcam", "average_increase"): ((0.342, 0.456, 0.514), (0.261, 0.352, 0.496)),
    ("ImageNet", "ablationcam", "average_drop"): ((0.137, 0.123, 0.109), (0.173, 0.159, 0.136)),
    ("ImageNet", "layercam", "average_increase"): ((0.340, 0.452, 0.512), (0.230, 0.325, 0.492)),
    ("ImageNet", "layercam", "average_drop"): ((0.128, 0.124, 0.104), (0.187, 0.172, 0.150)),
    ("VOC", "gradcam", "average_increase"): ((0.546, 0.679, 0.659), (0.569, 0.670, 0.698)),
    ("VOC", "gradcam", "average_drop"): ((0.055, 0.045, 0.037), (0.054, 0.045, 0.053)),
    ("VOC", "gradcam++", "average_increase"): ((0.522, 0.674, 0.618), (0.445, 0.583, 0.618)),
    ("VOC", "gradcam++", "average_drop"): ((0.059, 0.046, 0.041), (0.067, 0.056, 0.062)),
    ("VOC", "ablationcam", "average_increase"): ((0.523, 0.682, 0.666), (0.519, 0.638, 0.674)),
    ("VOC", "ablationcam", "average_drop"): ((0.049, 0.036, 0.033), (0.052, 0.044, 0.050)),
    ("VOC", "layercam", "average_increase"): ((0.486, 0.645, 0.620), (0.420, 0.538, 0.562)),
    ("VOC", "layercam", "average_drop"): ((0.063, 0.051, 0.042), (0.069, 0.058, 0.059)),
}

# By data set and method: accuracy before and after AFT of each model.
TABLE4: dict[tuple[str, str], tuple[tuple[float, float], tuple[float, float]]] = {
    ("ImageNet", "gradcam"): ((0.737, 0.736), (0.720, 0.720)),
    ("ImageNet", "gradcam++"): ((0.737, 0.737), (0.720, 0.718)),
    ("ImageNet", "ablationcam"): ((0.737, 0.737), (0.720, 0.720)),
    ("ImageNet", "layercam"): ((0.737, 0.736), (0.720, 0.719)),
    ("VOC", "gradcam"): ((0.922, 0.922), (0.905, 0.904)),
    ("VOC", "gradcam++"): ((0.922, 0.923), (0.905, 0.903)),
    ("VOC", "ablationcam"): ((0.922, 0.922), (0.905, 0.903)),
    ("VOC", "layercam"): ((0.922, 0.922), (0.905, 0.904)),
}

# Seconds a map without and with TFT, VGG-16 on an RTX 2080 Ti.
TABLE5: dict[str, tuple[float, float]] = {
    "gradcam": (0.017, 0.045),
    "gradcam++": (0.017, 0.046),
    "ablationcam": (1.691, 1.719),
    "layercam": (0.018, 0.047),
}


def published_records() -> dict[str, list[dict[str, Any]]]:
    """Return the paper's numbers as records of our tables, by table."""
    return {"table3": list(_records3()), "table4": list(_records4()), "table5": list(_records5())}


def _records3() -> Iterator[dict[str, Any]]:
    for (data, cam, measure), models in TABLE3.items():
        for model, own in zip(MODELS, models, strict=True):
            for variant, value in zip(PAPER_VARIANTS, own, strict=True):
                where = {"dataset": data, "model": model, "cam": cam, "variant": variant}
                yield {**where, "measure": measure, "value": value}


def _records4() -> Iterator[dict[str, Any]]:
    for (data, cam), models in TABLE4.items():
        for model, own in zip(MODELS, models, strict=True):
            for tuned, variant, value in zip((None, cam), ("original", "aft"), own, strict=True):
                where = {"dataset": data, "model": model, "cam": tuned, "variant": variant}
                yield {**where, "accuracy": value}


def _records5() -> Iterator[dict[str, Any]]:
    for cam, (without, with_tft) in TABLE5.items():
        seconds = {"without": without, "with": with_tft, "delta": round(with_tft - without, 3)}
        yield {"model": "VGG-16", "cam": cam, **seconds, "device": "RTX 2080 Ti"}
