"""Ask judges about maps of four networks, five methods and seven objectives of fine-tuning.

    python -m benchmarks grid DATA [--out DIR] [--networks a,b] [--methods a,b] [--page]
    python -m benchmarks grid DATA --objectives t,v,equation8,consistency,cam --seeds 0,1,2

DATA has imagenet/, with train and val, and weights/squeezenet1_0.pth. With --methods, each method's
plain map, TFT and the zero level t are measured on val by the network itself, by its mirror and by
three other networks, each beside the shift of the plain map that keeps as much. A method without a
sign has the shift that keeps as much as Grad-CAM's t. With --objectives, networks that are tuned by
Grad-CAM's masks are measured so, by the untuned network too, and with their accuracy; their maps
are also cut to TFT's area, which tells whether the order of their scores is better. It runs

    aft gen-masks DATA/imagenet --model NETWORK --cam METHOD --run DIR/NETWORK
    aft finetune --run DIR/NETWORK/OBJECTIVE-SEED --cam METHOD ...

in this process. What is there already is found and used, so it can be stopped at any time and asked
for more later. --page makes all results the figures of docs/results/judges.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aftcli import find_studies
from aftcli.cli import setup
from aftcli.cli.process import keep_freed_memory
from aftcli.core.cam import scaled_map, stretch
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.data.blocks import batches, load_blocks, spans_of
from aftcli.data.objects import Objects
from aftcli.evaluation.batch import measure_controls
from aftcli.evaluation.run import Measured, Plan, evaluate_study
from aftcli.evaluation.study import Asked, Study
from aftcli.files import file_stem
from aftcli.masks.generate import BATCH
from aftcli.measures.controls import Control, Controlled, nearest_shift, shifted, shifted_areas
from aftcli.measures.intervals import estimate
from aftcli.measures.registry import extras_of
from aftcli.measures.values import Images, Unit, Values, Wanted, measure
from aftcli.models.load import find_device
from aftcli.models.source import Source
from aftcli.tft.judges import Judge, load_judges
from benchmarks.quality.aft_results import aft
from benchmarks.quality.grid_tables import keep_page

NETWORKS = ("efficientnet_lite0", "squeezenet1_0", "efficientnet_lite1", "efficientnet_lite2")
CAMS = ("gradcam", "ablationcam", "layercam", "gradcam++", "hirescam")
PROBABILITIES = ("average_increase", "average_drop")
MAPS = ("area", "energy", "iou")
HALVES = {"first half": slice(0, None, 2), "second half": slice(1, None, 2)}

# Options of aft finetune; equation 8 is that of the paper.
OBJECTIVES = {
    "t": ("--objective", "zero-level"),
    "v": ("--objective", "zero-level", "--gauge", "v"),
    "equation8": (
        *("--objective", "tuner", "--lam", "1", "--consistency", "0", "--blend", "1"),
        *("--classification", "labels", "--lr", "1e-4", "--epochs", "10"),
    ),
    "consistency": ("--objective", "tuner"),
    "cam": ("--objective", "cam"),
}
# "joint v" and "joint cam" are v and cam by masks that the mirror and Lite1 chose with the network.
JOINT = "joint "
OBJECTIVES |= {f"{JOINT}{name}": OBJECTIVES[name] for name in ("v", "cam")}
ASKED = ("--tft-judges", "mirror", "--tft-judges", "efficientnet_lite1")

Row = tuple[Values, str]  # values, and the view of them that is the row
Place = tuple[int, int, int]  # the network that is mirrored, or 0; where a batch is; its images


class Shifts(Controlled):
    """Shifts alone, each by the t of its name in `setting`."""

    def maps(self, cells: Tensor, plain: Tensor, index: Tensor, *_: object) -> dict[str, Control]:
        """Make the shifted maps of some images."""
        known = torch.ones(len(index), dtype=torch.bool)
        size = plain.shape[1:]
        return {
            name: Control(stretch(shifted(cells, t), size), known)
            for name, t in self.setting.items()
        }


@dataclass(frozen=True, eq=False)
class Remembering(Judge):
    """A judge that is asked about each whole image once.

    Attributes:
        whole: what it said, by the network that is explained and the place of the image's batch,
            which is held in memory; None before.
    """

    whole: dict[Place, Tensor | None] = field(default_factory=dict)

    def probabilities(self, f: Classifier, x: Tensor) -> Tensor:
        """Compute the judge's probabilities, or find them."""
        key = (id(f) if self.classifier is None else 0, x.data_ptr(), len(x))
        if key not in self.whole:
            return super().probabilities(f, x)
        if (found := self.whole[key]) is None:
            found = self.whole[key] = super().probabilities(f, x)
        return found


class Grid:
    """The study: where it is, and the networks and images that are loaded once.

    Args:
        data: has imagenet/ and weights/.
        out: gets a run a network, and the results.
        limit: evaluate so many images; None for all.
        train: make masks of so many images; None for all.
        asked: judges beside the network and its mirror; None for all.
        workers: processes that decode images.
    """

    def __init__(
        self,
        data: Path,
        out: Path,
        workers: int = 0,
        limit: int | None = None,
        train: int | None = None,
        asked: Sequence[str] | None = None,
    ) -> None:
        self.data, self.out, self.workers = data, out, workers
        self.limit, self.train, self.asked = limit, train, asked or NETWORKS
        self.device = find_device("auto")
        self.engine = setup.engine("auto", "no", True)
        self.fast: dict[str, Classifier] = {}
        self.decoded: dict[str, list[Images]] = {}
        self.remembered: dict[tuple[str, str], dict[Place, Tensor | None]] = {}
        self.cut: dict[str, Values] = {}
        self.path = out / "grid.json"
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        self.results: dict[str, Any] = {"maps": {}, "objectives": {}, **there}

    def keep(self) -> None:
        """Write what there is."""
        self.path.write_text(json.dumps(self.results), "utf-8")

    def accelerate(self, f: Classifier, passes: int | None) -> Classifier:
        """Give a classifier its engine once."""
        key = f"{f.layer_name} {f.weights_hash()}"
        if key not in self.fast:
            self.fast[key] = self.engine(f, passes)
        return self.fast[key]

    def given(self, network: str) -> tuple[str, ...]:
        """Return the options that name a network."""
        own = self.data / "weights" / f"{network}.pth"
        return ("--model", network, *(("--checkpoint", str(own)) if own.exists() else ()))

    @lru_cache(maxsize=8)  # noqa: B019 - there is one grid
    def judge(self, name: str) -> Judge:
        """Load a judge, with its engine."""
        own = self.data / "weights" / f"{name}.pth"
        (found,) = load_judges([f"{name}={own}" if own.exists() else name], self.device)
        if found.classifier is None:
            return found
        return replace(found, classifier=self.accelerate(found.classifier, None))

    def run_of(self, folder: str, name: str) -> Path:
        """Make a run with the masks and results of a folder."""
        run = self.out / folder
        for shared in ("masks", "results"):
            (run / shared).mkdir(parents=True, exist_ok=True)
            (run / name).mkdir(exist_ok=True)
            if not (run / name / shared).exists():
                (run / name / shared).symlink_to((run / shared).resolve())
        return run / name

    def tuned(self, network: str, cam: str, objective: str, seed: int) -> Path:
        """Make masks and a tuned network, and return the run."""
        common = ("--cam", cam, "--workers", str(self.workers))
        joint, objective = objective.startswith(JOINT), objective.removeprefix(JOINT)
        folder = f"{network}-joint" if joint else network
        run = self.out / folder
        if not (run / "masks" / f"{file_stem(network, cam)}.h5").exists():
            images = (str(self.data / "imagenet"), *self.given(network))
            limit = ("--limit", str(self.train)) if self.train else ()
            asked = ASKED if joint else ()
            aft("gen-masks", *images, "--run", str(run), *limit, *asked, *common)
        own = self.run_of(folder, f"{objective}-{seed}")
        if METHODS[cam].signed or objective not in ("t", "v"):
            learn = (*OBJECTIVES[objective], "--seed", str(seed))
            aft("finetune", "--run", str(own), *self.given(network), *learn, *common)
        return own

    def measured(self, run: Path, network: str, cam: str, others: Sequence[str]) -> Measured:
        """Measure a run's plain maps, TFT and tuned network, as aft evaluate does."""
        own = self.data / "weights" / f"{network}.pth"
        data = self.data / "imagenet"
        source = Source(network, own if own.exists() else None, device=self.device)
        (study,) = find_studies(run, Asked(source, (cam,), data, limit=self.limit))
        study = replace(study, judges=tuple(self.judge(name) for name in ("mirror", *others)))
        extras = extras_of((*PROBABILITIES, *MAPS), False)
        plan = Plan(("binary",), extras, self.workers, accelerate=self.accelerate)
        *_, last = evaluate_study(study, run, plan)
        assert isinstance(last, Measured)
        return last

    def images(self, study: Study) -> list[Images]:
        """Decode the images of a study; those of the last network are kept."""
        if study.f.name in self.decoded:
            return self.decoded[study.f.name]
        objects = Objects(study.data_set, study.f.preprocessing)
        found: list[Images] = []
        spans = spans_of(len(study.data_set.samples))
        weight = next(study.f.parameters())
        todo = range(len(spans))
        for own in load_blocks(study.f.preprocessing, study.data_set, spans, todo, self.workers):
            places = torch.tensor(own.indices).split(BATCH)
            for x, index in zip(batches(own, BATCH, weight), places, strict=True):
                label = torch.tensor([study.data_set.samples[int(i)].label for i in index])
                found.append(Images(x, label, index, objects.regions))
        self.decoded = {study.f.name: found}
        self.remembered.clear()
        return found

    def shifts(self, f: Classifier, study: Study, cam: str, areas: dict[str, float]) -> Values:
        """Measure a network's plain maps, each shifted to keep a mean area."""
        f, images = self.accelerate(f, None), self.images(study)
        kept = []
        with torch.no_grad():
            for each in images:
                g, activation = f.at(each.x)
                c = g.head(activation).argmax(1)
                cells = scaled_map(g, activation, c, each.x, cam)
                kept.append(shifted_areas(cells, each.x.shape[2:]))
        setting = {name: nearest_shift(torch.cat(kept), area) for name, area in areas.items()}
        unit, controlled = Unit(cam, "binary"), Shifts(setting, {}, None)
        judges: dict[str, Judge] = {}
        for judge in study.judges:
            known = self.remembered.setdefault((study.f.name, judge.name), {})
            by = id(f) if judge.classifier is None else 0
            for each in images:
                known.setdefault((by, each.x.data_ptr(), len(each.x)), None)
            judges[judge.key(study.f)] = Remembering(judge.name, judge.classifier, known)
        wanted = Wanted(study.search, fill=study.search.fill, judges=judges)
        parts = [
            measure_controls(f, each, [unit], wanted, {unit: controlled})[unit].columns()
            for each in images
        ]
        return Values.of({name: torch.cat([p[name] for p in parts]) for name in parts[0]})

    def method(self, network: str, cam: str) -> None:
        """Measure one method's maps of one network."""
        own = self.results["maps"].setdefault(network, {})
        others = [name for name in self.asked if name != network]
        if cam in own:
            return
        found = self.measured(self.tuned(network, cam, "t", 0), network, cam, others)
        unit = Unit(cam, "binary")
        original, aft_ = (found.results.get((name, unit)) for name in ("original", "aft"))
        assert original and original.values
        rows: dict[str, Row] = {
            "plain map": (original.values, "original"),
            "TFT": (original.values, "tft"),
        }
        areas = {"TFT's area": _area(rows["TFT"])}
        if aft_ and aft_.values:
            rows["t"] = (aft_.values, "original")
            areas["t's area"] = _area(rows["t"])
        else:
            self.method(network, "gradcam")
            areas["t's area"] = own["gradcam"]["rows"]["t"]["area"][0]
        values = self.shifts(found.study.f, found.study, cam, areas)
        rows |= {name: (values, name) for name in areas}
        pairs = [("TFT", "plain map"), ("TFT", "TFT's area"), ("t's area", "plain map")]
        pairs += [("t", "plain map"), ("t", "t's area"), ("t", "TFT")] if "t" in rows else []
        own[cam] = figures(found.study, rows, pairs)
        self.keep()

    def objective(self, network: str, objective: str, seed: int) -> None:
        """Measure a network that is tuned by Grad-CAM's masks."""
        own = self.results["objectives"].setdefault(network, {}).setdefault(objective, {})
        if str(seed) in own:
            return
        self.method(network, "gradcam")
        run = self.tuned(network, "gradcam", objective, seed)
        others = [network, *(name for name in self.asked if name != network)]
        found = self.measured(run, network, "gradcam", others)
        unit, study = Unit("gradcam", "binary"), found.study
        original, tuned = (found.results[name, unit].values for name in ("original", "aft"))
        assert original and tuned
        rows: dict[str, Row] = {"plain map": (original, "original"), "tuned": (tuned, "original")}
        cut = {"cut": _area((original, "tft"))}
        if network not in self.cut:
            self.cut[network] = self.shifts(study.f, study, "gradcam", cut)
        rows["plain, cut"] = (self.cut[network], "cut")
        shift = {"shift": _area(rows["tuned"])}
        rows["shift"] = (self.shifts(study.f, study, "gradcam", shift), "shift")
        (variant,) = [v for v in study.variants if v.name == "aft"]
        rows["tuned, cut"] = (self.shifts(variant.load(), study, "gradcam", cut), "cut")
        pairs = [("tuned", "plain map"), ("tuned", "shift"), ("tuned, cut", "plain, cut")]
        figured = figures(study, rows, pairs)
        figured["accuracy"] = {
            name: _rounded(estimate((values.class_index == values.label).double()))
            for name, values in (("plain map", original), ("tuned", tuned))
        }
        own[str(seed)] = figured
        self.keep()


def _area(row: Row) -> float:
    return float(row[0].views[row[1]].measures["area"].double().mean())


def _rounded(found: Any) -> list[float]:  # noqa: ANN401 - an estimate
    return [round(float(value), 4) for value in (found.value, found.low, found.high)]


def figures(study: Study, rows: dict[str, Row], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Average rows and differences of rows: value, and 95 % interval.

    Args:
        study: with its judges.
        rows: values and view, by name.
        pairs: names of rows whose difference is asked for; of increase on both halves too.
    """
    judges = {"self": None, **study.judge_keys}

    def all_of(row: Row) -> dict[str, Tensor]:
        found = {
            f"{name} {judge}": measure(*row, name, key)
            for judge, key in judges.items()
            for name in PROBABILITIES
        }
        return found | {name: measure(*row, name) for name in MAPS}

    of_rows = {name: all_of(row) for name, row in rows.items()}
    differences: dict[str, Any] = {}
    for one, two in pairs:
        values = {name: v - of_rows[two][name] for name, v in of_rows[one].items()}
        own = {name: _rounded(estimate(v)) for name, v in values.items()}
        for half, part in HALVES.items():
            own |= {
                f"{name}, {half}": _rounded(estimate(v[part]))
                for name, v in values.items()
                if name.startswith("average_increase")
            }
        differences[f"{one} minus {two}"] = own
    return {
        "images": len(next(iter(rows.values()))[0].index),
        "judges": list(judges),
        "rows": {
            row: {name: _rounded(estimate(v)) for name, v in values.items()}
            for row, values in of_rows.items()
        },
        "differences": differences,
    }


def main() -> None:
    """Measure what is asked for and not there yet, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("study-grid"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default="", help=f"of {', '.join(CAMS)}")
    parser.add_argument("--objectives", default="", help=f"of {', '.join(OBJECTIVES)}")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--judges", help=f"of {', '.join(NETWORKS)}; default all")
    parser.add_argument("--limit", type=int, help="evaluate so many images")
    parser.add_argument("--train", type=int, help="make masks of so many images")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    args = parser.parse_args()
    keep_freed_memory()
    asked = args.judges.split(",") if args.judges else None
    grid = Grid(args.data, args.out, args.workers, args.limit, args.train, asked)
    networks = args.networks.split(",")
    for cam in filter(None, args.methods.split(",")):
        for network in networks:
            grid.method(network, cam)
    for seed in map(int, args.seeds.split(",")):
        for network in networks:
            for objective in filter(None, args.objectives.split(",")):
                grid.objective(network, objective, seed)
    if args.page:
        keep_page(grid.results)


if __name__ == "__main__":
    main()
