"""Time ours against pytorch-grad-cam, torchcam, captum and plain loops.

    python -m benchmarks peers --images DATA/imagenet --out peers.json --page

Contestants take turns in each run, another one first each time. What the file has is not measured
again. --page makes the file's figures those of docs/results/speed.md, also without --images;
--page again keeps those of some sections beside the full ones. The
calls are in peers_calls.py; this process imports no torch, which would count in its children's
memory.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import correlation, mean, median
from typing import Any, NamedTuple

from benchmarks import pages

ROOT = Path(__file__).parents[2]
AFT, AFT_TORCH = "aft (onnxruntime)", "aft (torch)"
ENGINES = {AFT: "onnxruntime", AFT_TORCH: "torch"}
GRAD_CAM, TORCHCAM, CAPTUM = PEERS = ("pytorch-grad-cam", "torchcam", "captum")
LOOP, PLAIN, FLOOR, BEST = "serial loop", "plain loop", "floor", "best peer"
# What the peers call each method.
CAMS: dict[str, dict[str, str]] = {
    "gradcam": {GRAD_CAM: "GradCAM", TORCHCAM: "GradCAM", CAPTUM: "LayerGradCam"},
    "gradcam++": {GRAD_CAM: "GradCAMPlusPlus", TORCHCAM: "GradCAMpp"},
    "xgradcam": {GRAD_CAM: "XGradCAM", TORCHCAM: "XGradCAM"},
    "layercam": {GRAD_CAM: "LayerCAM", TORCHCAM: "LayerCAM"},
    "hirescam": {GRAD_CAM: "HiResCAM"},
    "eigencam": {GRAD_CAM: "EigenCAM"},
    "ablationcam": {GRAD_CAM: "AblationCAM"},
    "scorecam": {GRAD_CAM: "ScoreCAM", TORCHCAM: "ScoreCAM"},
}
SLOW = ("ablationcam", "scorecam")
QUICK = tuple(method for method in CAMS if method not in SLOW)
LONG_RUNS = 3  # at most, of masks and fine-tuning
RATIOS = "Ratios are of medians (least .. largest of a run)."
TFT_IMAGES = 7  # that take turns
SHAPES = {"one image": 1, "16 images": 16}
MODELS = ("resnet50", "vgg16", "efficientnet_lite0")
PACKAGES = "aftcli torch torchvision timm onnxruntime grad-cam torchcam captum numpy pillow".split()


class Target(NamedTuple):
    """At least so many times the peer's speed, or at most so much of its time."""

    words: str
    place: tuple[str, str, str, str]  # section, model, group, method
    peer: str
    bound: float


LITE = "efficientnet_lite0"
TARGETS = (
    *(
        Target("speed", ("cams", "resnet50", group, method), peer, bound)
        for method in ("gradcam", "layercam")
        for group, peer, bound in (
            ("one image", TORCHCAM, 1),
            ("one image", GRAD_CAM, 3),
            ("16 images", BEST, 1.2),
        )
    ),
    Target("speed", ("slow", "resnet50", "one image", "ablationcam"), GRAD_CAM, 500),
    Target("speed", ("slow", "vgg16", "one image", "ablationcam"), GRAD_CAM, 200),
    Target("time", ("slow", "resnet50", "one image", "scorecam"), BEST, 0.75),
    Target("time", ("slow", LITE, "one image", "scorecam"), BEST, 0.4),
    *(
        Target("time", ("tft", model, group, "gradcam"), LOOP, bound)
        for model, bound in (("resnet50", 0.5), ("vgg16", 0.6), (LITE, 0.3))
        for group in ("search", "map and search")
    ),
    Target("images/s", ("masks", LITE, "data set", "gradcam"), FLOOR, 0.85),
    Target("images/s", ("masks", "resnet50", "data set", "gradcam"), FLOOR, 0.85),
    Target("images/s", ("masks", LITE, "data set", "gradcam"), PLAIN, 2.5),
)


def contestants(method: str) -> list[str]:
    """Return who has a method; ours first."""
    return [*ENGINES, *CAMS[method]]


def rotated(names: Sequence[str], run: int) -> list[str]:
    """Return the order of a run: another one first each time."""
    first = run % len(names)
    return [*names[first:], *names[:first]]


def run_process(command: Sequence[str]) -> dict[str, Any]:
    """Return what a process prints last, read as JSON, and its peak memory in MiB (Linux)."""
    print(*command[1:], file=sys.stderr, flush=True)
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": ROOT}
    with subprocess.Popen(command, **options) as process:
        out = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[1:4])} failed: {process.returncode}")
    return {**json.loads(out.splitlines()[-1]), "peak": usage.ru_maxrss // 1024}


def in_turn(parts: Mapping[str, Callable[[], dict[str, Any]]], runs: int) -> list[dict[str, Any]]:
    """Return what each part gives in each run, another one first each time."""
    return [{name: parts[name]() for name in rotated(list(parts), run)} for run in range(runs)]


def peaks(rounds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the peak memory of each contestant, MiB."""
    return {name: max(r[name]["peak"] for r in rounds) for name in rounds[0]}


def call(part: str, model: str, args: argparse.Namespace, **options: object) -> dict[str, Any]:
    """Run a part of peers_calls.py."""
    words = json.dumps({"model": model, "data": str(args.images.resolve()), **options})
    return run_process([sys.executable, "-m", "benchmarks.speed.peers_calls", part, words])


def measure_cams(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure CAMs of few passes in one process in turn; memory of Grad-CAM in one each."""
    found = call("cams", model, args, runs=args.runs)
    alone = {"method": "gradcam", "batch": 1, "runs": 1}
    found["memory"] = {
        f"gradcam, {group}": {
            name: call("once", model, args, contestant=name, count=count, **alone)["peak"]
            for name in contestants("gradcam")
        }
        for group, count in SHAPES.items()
    }
    return found


def measure_slow(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure Ablation-CAM and Score-CAM, each contestant in a process of its own."""
    batch = call("best_batch", model, args)["batch"]
    found: dict[str, Any] = {"times": {"one image": {}}, "memory": {}, "agreement": {}}
    for method in SLOW:
        names = contestants(method)
        options = {"method": method, "count": 1, "batch": batch, "runs": args.runs}
        parts = {n: partial(call, "once", model, args, contestant=n, **options) for n in names}
        rounds = in_turn(parts, args.slow_runs)
        maps = {n: rounds[0][n]["map"] for n in names}
        found["times"]["one image"][method] = {
            n: [median(r[n]["seconds"]) for r in rounds] for n in names
        }
        found["memory"][method] = peaks(rounds)
        varied = [n for n in names[1:] if min(len({*maps[n]}), len({*maps[AFT]})) > 1]
        found["agreement"][method] = {n: [correlation(maps[AFT], maps[n])] for n in varied}
    return found | {"batch": batch}


def measure_tft(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure TFT of one image, with the map and without."""
    found = call("tft", model, args, runs=args.runs, images=TFT_IMAGES)
    names = (*ENGINES, LOOP)
    memory = {n: call("tft_once", model, args, contestant=n)["peak"] for n in names}
    return found | {"memory": {"map and search": memory}}


def measure_masks(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure gen-masks, its floor, and a plain loop."""
    parts = {
        AFT: partial(call, "masks_ours", model, args, limit=args.limit, contestant=AFT),
        PLAIN: partial(call, "masks_loop", model, args, limit=args.limit),
    }
    rounds = in_turn(parts, min(args.runs, LONG_RUNS))
    times = {name: [r[name]["seconds"] for r in rounds] for name in parts}
    times[FLOOR] = [r[AFT]["floor"] for r in rounds]
    found = {"times": {"data set": {"gradcam": times}}, "memory": {"gradcam": peaks(rounds)}}
    return found | {"images": args.limit, "passes": rounds[0][AFT]["passes"]}


def measure_finetune(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure an epoch with cached features, and a loop that runs the whole network each step."""
    script = [sys.executable, "-m", "benchmarks", "finetune", str(args.images.resolve())]
    command = [*script, "--limit", str(args.limit), "--part"]
    parts = {
        AFT_TORCH: partial(run_process, [*command, "ours"]),
        PLAIN: partial(run_process, [*command, "plain"]),
    }
    rounds = in_turn(parts, min(args.runs, LONG_RUNS))
    loop = [r[PLAIN]["epochs"][0] for r in rounds]
    first = [r[AFT_TORCH]["fill"] + r[AFT_TORCH]["epochs"][0] for r in rounds]
    later = [median(r[AFT_TORCH]["epochs"][1:]) for r in rounds]
    own = {"first epoch": first, "later epochs": later}
    times = {what: {"eq. 8": {AFT_TORCH: own[what], PLAIN: loop}} for what in own}
    return {"times": times, "memory": {"eq. 8": peaks(rounds)}, "images": args.limit}


class Section(NamedTuple):
    """A part of the page."""

    title: str
    text: str
    measure: Callable[[str, argparse.Namespace], dict[str, Any]]
    models: tuple[str, ...] = MODELS
    by_rate: bool = False


SECTIONS = {
    "cams": Section(
        "Maps",
        "Seconds from the input to the map at its size (torchcam's and captum's stretched).",
        measure_cams,
    ),
    "slow": Section(
        "Maps that cost the peers a pass for each channel",
        "Seconds of one image in its own process, with the network's best batch size.",
        measure_slow,
    ),
    "tft": Section(
        "TFT of one image",
        "Seconds of Algorithm 1 by Grad-CAM on real images that take turns. The serial loop passes "
        "the image and 11 masked images one by one, with pytorch-grad-cam's map; `search` begins "
        "with a given map.",
        measure_tft,
    ),
    "masks": Section(
        "Masks of a data set",
        "Images a second, with decoding and storing. The floor is (1 + distinct masked images) "
        "times the engine's best batch forward. The plain loop passes batches of 16 through "
        "pytorch-grad-cam and the eager network, and stores nothing.",
        measure_masks,
        ("efficientnet_lite0", "resnet50"),
        by_rate=True,
    ),
    "finetune": Section(
        "Fine-tuning",
        "Seconds of an epoch with batches of 32; the first of ours fills the cache of features. "
        "The plain loop decodes and passes the whole network, its stem frozen, in every epoch.",
        measure_finetune,
        ("efficientnet_lite0",),
    ),
}


class Ratio(NamedTuple):
    """The ratio of two medians, and the smallest and largest ratio of a run."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, over: Sequence[float], under: Sequence[float]) -> Ratio:
        """Divide what two contestants took in the same runs."""
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        return cls(median(over) / median(under), min(ratios), max(ratios))

    def __str__(self) -> str:
        middle, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in self)
        return f"{middle} ({low} .. {high})"


def best_peer(times: dict[str, list[float]]) -> str:
    """Return the fastest of the others by its median."""
    others = [name for name in times if name not in ENGINES and name != FLOOR]
    return min(others, key=lambda name: median(times[name]))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a markdown table; the first column holds words, the others numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


MISSING = "not measured"


def target_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """Return each target and whether it is met; those not measured yet say so."""
    for what, place, peer, bound in TARGETS:
        section, model, group, method = place
        times = results.get(section, {}).get(model, {}).get("times")
        relation, ratio, verdict = "<=" if what == "time" else ">=", "-", MISSING
        if times:
            own, name = times[group][method][AFT], best_peer(times[group][method])
            other = times[group][method][name if peer == BEST else peer]
            found = Ratio.of(own, other) if what == "time" else Ratio.of(other, own)
            met = found.middle <= bound if what == "time" else found.middle >= bound
            ratio, verdict = str(found), "met" if met else "**missed**"
        yield [
            f"{', '.join(place)}: {what} against {peer}",
            f"{relation} {bound:g}",
            ratio,
            verdict,
        ]


def section_lines(section: Section, results: dict[str, Any]) -> Iterator[str]:
    """Return the tables of one section."""
    yield from (f"### {section.title}", "", section.text, "")
    for model, found in results.items():
        by_method = (times for group in found["times"].values() for times in group.values())
        names = list(max(by_method, key=len))
        memory = found["memory"].items()
        rows = ([what, *(str(peak.get(name, "-")) for name in names)] for what, peak in memory)
        yield from table([model, *names, "best peer / ours"], _time_rows(section, found, names))
        yield from table(["peak memory, MiB", *names], rows)
        yield from _notes(found)


def _time_rows(section: Section, found: dict[str, Any], names: list[str]) -> Iterator[list[str]]:
    for group, methods in found["times"].items():
        for method, times in methods.items():
            middle = {name: median(seconds) for name, seconds in times.items()}
            if section.by_rate:
                middle = {name: found["images"] / value for name, value in middle.items()}
            cells = (f"{middle[n]:.4g}" if n in middle else "-" for n in names)
            ratio = Ratio.of(times[best_peer(times)], times[names[0]])
            yield [f"{method}, {group}", *cells, str(ratio)]


def _notes(found: dict[str, Any]) -> Iterator[str]:
    agreement = found.get("agreement", {})
    if agreement:
        names = list(max(agreement.values(), key=len))
        yield from table(
            ["mean correlation with our map", *names], _agreement_rows(agreement, names)
        )
    if "same tau" in found:
        counts = ", ".join(f"{n} {v} of {found['images']}" for n, v in found["same tau"].items())
        yield f"The same tau* as the serial loop from the same map: {counts} images."
    if "passes" in found:
        yield f"{found['images']} images, {found['passes']:.2f} passes an image."
    yield ""


def _agreement_rows(
    agreement: dict[str, dict[str, list[float]]], names: list[str]
) -> Iterator[list[str]]:
    for method, peers in agreement.items():
        correlations = (peers.get(name) for name in names)
        yield [method, *(f"{mean(values):.3f}" if values else "-" for values in correlations)]


TITLES = {"peers": "Against other tools", "again": "Some of it, measured again"}


def page(record: dict[str, Any], part: str = "peers") -> str:
    """Return a section of a markdown page: all targets, or those measured again."""
    lines = [f"## {TITLES[part]}", "", *machine_lines(record), RATIOS, ""]
    rows = [row for row in target_rows(record["results"]) if part == "peers" or row[-1] != MISSING]
    lines += table(["target", "wanted", "ratio", ""], rows)
    for name in (name for name in SECTIONS if name in record["results"]):
        lines += section_lines(SECTIONS[name], record["results"][name])
    return "\n".join(lines)


def machine_lines(record: dict[str, Any]) -> list[str]:
    """Return where and how a record was made."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        f"Machine: {record['cpu']}, {record['threads']} threads; {record['date']}.",
        f"Versions: {versions}. Data: {record['data']}.",
        f"Made by `{record['command']}`.",
    ]


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Return machine, versions, data, command and date, without a path of the machine."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    paths = {str(args.images): "DATA", str(args.out): args.out.name}
    return {
        "cpu": next(line.partition(": ")[2] for line in info if line.startswith("model name")),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "data": args.images.name,
        "command": " ".join(paths.get(word, word) for word in sys.argv),
        "date": datetime.date.today().isoformat(),
    }


def measure_all(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Measure what is missing; the file is written after each section and model."""
    for name in args.sections:
        results = record.setdefault("results", {}).setdefault(name, {})
        for model in (m for m in args.models if m in SECTIONS[name].models):
            if model in results and not args.overwrite:
                continue
            results[model] = SECTIONS[name].measure(model, args)
            record.update(provenance(args))
            args.out.write_text(json.dumps(record, indent=1))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="a data set with ImageNet's classes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--slow-runs", type=int, default=1, help="of the section slow")
    parser.add_argument("--limit", type=int, default=96, help="images of masks and finetune")
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    parser.add_argument(
        "--page", nargs="?", const="peers", choices=TITLES, help="keep as this part of the page"
    )
    parser.add_argument("--overwrite", action="store_true", help="measure again what is there")
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.images:
        measure_all(record, args)
    if args.page:
        pages.keep("results/speed", args.page, page(record, args.page).strip())
