"""Ask judges what TFT and the zero level gain, beside controls of equal area.

    python -m benchmarks judges DATA [--out DIR] [--sets imagenet,imagenette,voc] [--page]

DATA has imagenet/, imagenette/ and voc/, each with train and val, and weights/squeezenet1_0.pth.
For each network it makes masks by Grad-CAM of the training images, learns both gauges of a zero
level from them, and measures all maps on the val split: by the network itself, by it on mirrored
images, and by other networks, with the controls. It runs

    aft gen-masks DATA/imagenet --model NETWORK --cam gradcam --run DIR/imagenet-NETWORK
    aft finetune --run DIR/imagenet-NETWORK --objective zero-level [--gauge v]
    aft evaluate --run DIR/imagenet-NETWORK --masking binary --baselines --judge mirror --judge …

in this process, and reads the values of each image from the results, to divide them into two test
sets: every second image, and the others. Images of VOC are of networks with a new last layer
(`aft finetune --no-masks`), and so are their judges. What is there already is found and used.
--page makes the results the figures of docs/results/judges.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aftcli import __version__, find_studies
from aftcli.cli import setup
from aftcli.cli.process import keep_freed_memory
from aftcli.evaluation.run import Measured, Plan, evaluate_study
from aftcli.evaluation.study import Asked
from aftcli.evaluation.tables import values_of
from aftcli.measures.intervals import estimate
from aftcli.measures.registry import extras_of
from aftcli.measures.values import Unit
from aftcli.models.load import find_device
from aftcli.models.source import Source
from benchmarks import pages
from benchmarks.quality.aft_results import aft
from benchmarks.quality.grid_tables import number

NETWORKS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
SETS = ("imagenet", "imagenette", "voc")
GAUGES = ("t", "v")
UNIT = Unit("gradcam", "binary")
PROBABILITIES = ("average_increase", "average_drop")
OTHERS = {"area": "kept area", "energy": "energy in boxes", "iou": "IoU with boxes"}
HALVES = {"all": slice(None), "first half": slice(0, None, 2), "second half": slice(1, None, 2)}

# By column of a gauge's run: a row of the page. Rows of TFT are the same in both runs.
ROWS = {
    ("t", "original"): "plain map",
    ("t", "tft"): "TFT",
    ("t", "tft shift"): "shift, TFT's area",
    ("t", "tft permuted"): "tau\\* of other images",
    ("t", "tft random"): "random cells, TFT's area",
    ("t", "tft disc"): "disc, TFT's area",
    ("t", "aft"): "**zero level, t**",
    ("t", "aft shift"): "shift, t's area",
    ("v", "aft"): "zero level, v and t",
    ("v", "aft shift"): "shift, v's area",
}


def measured(
    run: Path, judges: Sequence[str], source: Source, workers: int
) -> tuple[Measured, tuple[str, ...]]:
    """Measure a run by judges, as aft evaluate does."""
    quiet = setup.noting(True)
    (study,) = find_studies(run, Asked(source, judges=judges))
    extras = extras_of((*PROBABILITIES, *OTHERS), True)
    accelerate = setup.engine("auto", "no", True)
    plan = Plan(("binary",), extras, workers, accelerate=accelerate, note=quiet, controls=True)
    *_, last = evaluate_study(study, run, plan)
    assert isinstance(last, Measured)
    return last, ("self", *(judge.name for judge in study.judges))


def figures_of(found: dict[str, tuple[Measured, tuple[str, ...]]]) -> dict[str, Any]:
    """Average all rows, and the differences from the plain map and the shift, by half."""
    judges = found["t"][1]

    def values(gauge: str, column: str, measure: str, judge: str = "self") -> Tensor | None:
        return values_of(found[gauge][0], column, UNIT, measure, judge)

    def all_of(gauge: str, column: str) -> Iterator[tuple[str, Tensor]]:
        for judge in judges:
            for measure in PROBABILITIES:
                if (one := values(gauge, column, measure, judge)) is not None:
                    yield f"{measure} {judge}", one
        for measure in OTHERS:
            if (one := values(gauge, column, measure)) is not None:
                yield measure, one

    rows = {
        title: {
            half: {name: estimate(one[part])._asdict() for name, one in all_of(gauge, column)}
            for half, part in HALVES.items()
        }
        for (gauge, column), title in ROWS.items()
    }
    pairs = {
        f"{title} minus {other}": (gauge, column, against)
        for (gauge, column), title in ROWS.items()
        for other, against in (("plain map", "original"), ("its shift", f"{column} shift"))
        if column in ("tft", "aft")
    }
    differences: dict[str, Any] = {}
    for name, (gauge, column, against) in pairs.items():
        two = dict(all_of(gauge, against))
        differences[name] = {
            half: {
                what: estimate((one - two[what])[part])._asdict()
                for what, one in all_of(gauge, column)
                if what in two
            }
            for half, part in HALVES.items()
        }
    unlike = {}
    for gauge, (each, _) in found.items():
        own, plain = (each.results[name, UNIT].values for name in ("aft", "original"))
        assert own and plain
        same = float((own.class_index == plain.class_index).double().mean())
        unlike[gauge] = [float((own.probability - plain.probability).abs().max()), same]
    return {"judges": judges, "rows": rows, "differences": differences, "probability": unlike}


def study(
    data: Path, name: str, network: str, networks: Sequence[str], out: Path, workers: int
) -> dict[str, Any]:
    """Make masks, learn both gauges, and measure one network on one data set."""
    squeezenet = f"squeezenet1_0={data / 'weights' / 'squeezenet1_0.pth'}"
    run, root = out / f"{name}-{network}", data / name
    common = ("--workers", str(workers))
    source, others = Source(device=find_device("auto")), [n for n in networks if n != network]
    if name == "voc":
        root = data / "voc" / "VOCdevkit"
        heads = {one: head(root, one, out, common) for one in networks}
        given = ("--checkpoint", str(heads[network]))
        source = source._replace(checkpoint=heads[network])
        judges = ["mirror", *(str(heads[one]) for one in others)]
    else:
        given = ("--model", network)
        judges = ["mirror", *others, squeezenet]
    aft("gen-masks", str(root), *given, "--cam", "gradcam", "--run", str(run), *common)
    found = {}
    for gauge in GAUGES:
        own = run / gauge
        own.mkdir(exist_ok=True)
        for shared in ("masks", "results"):
            (run / shared).mkdir(exist_ok=True)
            if not (own / shared).exists():
                (own / shared).symlink_to((run / shared).resolve())
        learn = ("--objective", "zero-level", "--gauge", gauge)
        start = given if name == "voc" else ()
        aft("finetune", "--run", str(own), *start, *learn, *common)
        found[gauge] = measured(own, judges, source, workers)
    return figures_of(found)


def head(root: Path, network: str, out: Path, common: Sequence[str]) -> Path:
    """Give a network a last layer of a data set's classes, and train what follows w0."""
    run = out / f"voc-head-{network}"
    aft("finetune", str(root), "--no-masks", "--model", network, "--run", str(run), *common)
    (path,) = (run / "tuned").glob("*.safetensors")
    return path


def _cell(found: dict[str, Any] | None, signed: bool = False, interval: bool = False) -> str:
    if found is None or not found["n"]:
        return ""
    text = number(found["value"], signed)
    if not interval:
        return text
    return f"{text} [{number(found['low'], True)}, {number(found['high'], True)}]"


def _titles(judges: Sequence[str]) -> str:
    """Name judges in a table's head, checkpoints by their files."""
    return " | ".join(Path(judge).stem if "/" in judge else judge for judge in judges)


def tables(results: dict[str, Any], name: str) -> str:
    """Write a data set's tables: a row a map and network, a column a judge."""
    lines = []
    for network, one in results[name].items():
        judges, plain = one["judges"], one["rows"]["plain map"]["all"]
        others = [measure for measure in OTHERS if plain[measure]["n"]]
        lines += [
            f"**{network}**: increase / drop by each judge",
            "",
            f"| map | {_titles(judges)} | {' | '.join(OTHERS[m] for m in others)} |",
            "|---|" + "---|" * (len(judges) + len(others)),
        ]
        for title, halves in one["rows"].items():
            of = halves["all"]
            if not of:
                continue
            both = [
                f"{_cell(of.get(f'average_increase {j}'))} / {_cell(of.get(f'average_drop {j}'))}"
                for j in judges
            ]
            rest = [_cell(of.get(measure)) for measure in others]
            lines.append(f"| {title} | {' | '.join(both + rest)} |")
        count = plain["area"]["n"]
        moved = max(value for value, _ in one["probability"].values())
        lines += ["", f"{count} images; largest change of a probability {moved:.0e}.", ""]
    return "\n".join(lines).rstrip()


def gains(results: dict[str, Any], name: str) -> str:
    """Write the differences of Average Increase; those of t from the plain map on halves too."""
    lines = []
    for network, one in results[name].items():
        judges = one["judges"]
        lines += [
            f"**{network}**: difference of Average Increase",
            "",
            f"| difference | images | {_titles(judges)} |",
            "|---|---|" + "---|" * len(judges),
        ]
        for title, halves in one["differences"].items():
            # Halves are test sets of what is claimed.
            claimed = title == "**zero level, t** minus plain map"
            for half, of in halves.items() if claimed else [("all", halves["all"])]:
                cells = [
                    _cell(of.get(f"average_increase {j}"), signed=True, interval=True)
                    for j in judges
                ]
                lines.append(f"| {title} | {half} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def machine() -> str:
    """Name the machine and the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {device}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, aft {__version__}"
    )


def main() -> None:
    """Measure what is asked for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("study-judges"))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    args = parser.parse_args()
    keep_freed_memory()
    networks = args.networks.split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "judges.json"
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name in args.sets.split(","):
        results.setdefault("machine", {})[name] = machine()
        for network in networks:
            one = study(args.data, name, network, networks, args.out, args.workers)
            results.setdefault(name, {})[network] = one
            path.write_text(json.dumps(results), "utf-8")
    if args.page:
        keep_page(results)


def keep_page(results: dict[str, Any]) -> None:
    """Keep results as the figures of the page."""
    sets: dict[str, list[str]] = {}
    for name, where in results["machine"].items():
        sets.setdefault(where, []).append(name)
    on = [f"{', '.join(names)}: {where}" for where, names in sets.items()]
    pages.keep("results/judges", "machine", f"Measured on: {'; '.join(on)}.")
    for name in SETS:
        if name in results:
            pages.keep("results/judges", name, tables(results, name))
            pages.keep("results/judges", f"{name}_gains", gains(results, name))


if __name__ == "__main__":
    main()
