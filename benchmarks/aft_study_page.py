"""Write docs/aft-study.md and its plots of what aft_study.py and aft_results.py measured.

    python benchmarks/aft_study_page.py STUDY > docs/aft-study.md

STUDY has many.jsonl and few.jsonl of aft_study.py, and a .json of aft_results.py for each set of
images.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from aftcli.aft.recipes import SITUATIONS
from aftcli.core.methods import METHODS
from aftcli.evaluation.measures import MEASURES, PAPER
from aftcli.evaluation.metrics import estimate

TITLES = {
    "many": "many images a class: imagenette, 50 images of each of 10 classes",
    "few": "few images a class: ImageNet subset, 1000 images of 1000 classes",
}
COLUMNS = {
    "average_increase": "inc",
    "average_drop": "drop",
    "accuracy": "accuracy",
    "mean_map": "mean map",
    "judged_increase": "inc, judged",
    "judged_drop": "drop, judged",
}
GUARDS = ("complexity", "coherency", "adcc", "insertion", "deletion")
GROUPS = {
    "parts": "What does it: the parts alone and together",
    "cause": "Is it the masks",
    "masks": "Which masks, and what is shown of the image",
    "layers": "What is trained",
    "classification": "What teaches the classes",
    "tuner": "The tuner",
    "eq. 8: lambda": "lambda of equation 8 alone",
    "lambda": "lambda in the recipe",
    "consistency": "Weight of mask consistency",
    "blend": "Blend: how far from the weights before to the trained ones",
    "learning rate": "Learning rate",
    "optimizer": "Optimizer",
    "epochs": "Epochs, without early stopping",
    "n_AFT": "n_AFT, images to train on",
    "|T|": "|T|, thresholds tried",
}
CURVES = ("eq. 8: lambda", "lambda", "consistency", "blend", "epochs", "n_AFT", "|T|")


class Cell:
    """Values of a row, image by image, by seed; and those of the start."""

    def __init__(self, values: list[torch.Tensor], start: torch.Tensor) -> None:
        self.values, self.start = values, start

    @property
    def mean(self) -> float:
        """Over seeds and images."""
        return mean(v.mean().item() for v in self.values)

    def text(self) -> str:
        """The mean, and a star where the difference from the start is beyond its interval."""
        pair = torch.stack(self.values).mean(0) - self.start
        low, high = estimate(pair).interval or (0.0, 0.0)
        star = "\\*" if low > 0 or high < 0 else ""
        spread = max(v.mean().item() for v in self.values) - min(
            v.mean().item() for v in self.values
        )
        seeds = f" ±{spread / 2:.3f}" if len(self.values) > 1 else ""
        return f"{self.mean:.3f}{seeds}{star}"


class Study:
    """What aft_study.py wrote."""

    def __init__(self, path: Path) -> None:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        self.start = next(r for r in records if r["key"] == "original")
        self.about = self.start["about"]
        self.by_key = defaultdict(list)
        for r in records:
            if r["key"] != "original":
                self.by_key[r["key"]].append(r)

    def cell(self, key: str, column: str) -> Cell | None:
        """Of the row with a key; None where it was not measured."""
        found = [r["values"][column] for r in self.by_key[key] if column in r["values"]]
        if not found:
            return None
        tensors = [torch.tensor(v, dtype=torch.float64) for v in found]
        return Cell(tensors, torch.tensor(self.start["values"][column], dtype=torch.float64))


def tables(study: Study, base: str) -> list[str]:
    """A table for each question."""
    from aft_study import rows

    lines = []
    for group, title in GROUPS.items():
        own = _own(study, base, group, rows())
        if len(own) < 2:
            continue
        guards = GUARDS if group in ("parts", "cause") else ()
        names = [*COLUMNS.values(), *(MEASURES[g].title for g in guards)]
        lines += [f"#### {title}", "", f"| | {' | '.join(names)} | seeds |"]
        lines += ["|---" * (len(names) + 2) + "|"]
        first = [_mean(study.start["values"].get(c)) for c in (*COLUMNS, *guards)]
        lines.append(f"| the network as it was | {' | '.join(first)} | |")
        for row, key in own:
            cells = [study.cell(key, column) for column in (*COLUMNS, *guards)]
            texts = [c.text() if c else "" for c in cells]
            lines.append(f"| {row.name} | {' | '.join(texts)} | {len(study.by_key[key])} |")
        lines.append("")
    return lines


def _mean(values: list[float] | None) -> str:
    return f"{mean(values):.3f}" if values else ""


def draw(studies: dict[str, Study], folder: Path) -> None:
    """The curves, and accuracy against gain."""
    from aft_study import rows
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        base: [g for g in CURVES if len(_own(study, base, g, rows())) > 1]
        for base, study in studies.items()
    }
    wide = max(map(len, panels.values()))
    figure = Figure(figsize=(3.0 * wide, 3.0 * len(studies)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(studies), wide, squeeze=False)
    for (base, study), line in zip(studies.items(), axes, strict=True):
        for ax in line[len(panels[base]) :]:
            ax.axis("off")
        for ax, group in zip(line, panels[base], strict=False):
            _curve(ax, study, base, group, rows())
        line[0].set_ylabel(f"{base} images a class")
    axes[0][0].legend(fontsize=7)
    figure.savefig(folder / "aft-curves.png")


def draw_accuracy(path: Path, folder: Path) -> list[str]:
    """Accuracy against gain by cross-validation: the curve, and its table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start, *records = [json.loads(line) for line in path.read_text().splitlines()]
    figure = Figure(figsize=(5.4, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    lines = ["| recipe | blend | accuracy | lost | won | inc | drop |", "|---" * 7 + "|"]

    def point(r: dict[str, Any]) -> tuple[float, float, float]:
        columns = [
            [v for each in r["values"] for v in each[name]]
            for name in ("average_increase", "average_drop")
        ]
        return mean(r["right"]), mean(columns[0]), mean(columns[1])

    first = point(start)
    lines.append(f"| as it was | | {first[0]:.4f} | | | {first[1]:.3f} | {first[2]:.3f} |")
    for recipe in dict.fromkeys(r["recipe"] for r in records):
        own = [r for r in records if r["recipe"] == recipe]
        points = [first, *map(point, own)]
        ax.plot([p[0] for p in points], [p[1] for p in points], "o-", label=recipe)
        for r, (accuracy, inc, drop) in zip(own, points[1:], strict=True):
            ax.annotate(f"{r['blend']:g}", (accuracy, inc), fontsize=7)
            pairs = list(zip(start["right"], r["right"], strict=True))
            lost, won = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
            lines.append(
                f"| {recipe} | {r['blend']:g} | {accuracy:.4f} | {lost} | {won} | {inc:.3f} | "
                f"{drop:.3f} |"
            )
    ax.plot(first[0], first[1], "k*", markersize=11, label="as it was")
    ax.set_xlabel(f"accuracy, {len(start['right'])} images")
    ax.set_ylabel("Average Increase, soft")
    ax.legend(fontsize=7)
    figure.savefig(folder / "aft-trade-off.png")
    return lines


def _own(study: Study, base: str, group: str, all_rows: list[Any]) -> list[tuple[Any, str]]:
    found = []
    for row in all_rows:
        settings = {**SITUATIONS[base].settings, **row.settings}
        key = json.dumps([settings, row.data], sort_keys=True)
        enough = row.data.get("images", 0) <= study.about["train"]
        if row.group == group and study.by_key.get(key) and enough:
            found.append((row, key))
    return found


def _curve(ax: Any, study: Study, base: str, group: str, all_rows: list[Any]) -> None:  # noqa: ANN401
    own = _own(study, base, group, all_rows)
    names = [row.name for row, _ in own]
    for column, colour in (
        ("average_increase", "C0"),
        ("average_drop", "C1"),
        ("accuracy", "C2"),
        ("judged_increase", "C0"),
    ):
        cells = [study.cell(key, column) for _, key in own]
        values = [c.mean if c else float("nan") for c in cells]
        style = "o:" if column.startswith("judged") else "o-"
        label = {**COLUMNS, "judged_increase": "inc, judged by the start"}[column]
        ax.plot(range(len(names)), values, style, color=colour, markersize=3, label=label)
        if not column.startswith("judged"):
            ax.axhline(
                mean(study.start["values"][column]), color=colour, linestyle="--", linewidth=0.6
            )
    ax.set_xticks(range(len(names)), names, fontsize=7)
    ax.set_title(group, fontsize=9)
    ax.set_ylim(0, 1.02)


def result_lines(result: dict[str, Any]) -> list[str]:
    """Tables of one set of images."""
    seeds = result["seeds"]
    lines = [f"### {result['title']}", ""]
    card = result["cards"][0]
    chosen = [str(c["epoch"]) for c in result["cards"] if c["cam"]]
    lines += [
        f"Trained on {card['trained_on']} images with {card['classification']}, lambda "
        f"{card['lam']:g}, consistency {card['consistency']:g}, blend {card['blend']:g}, learning "
        f"rate {card['learning_rate']:g}; of at most {card['epochs']} epochs, "
        f"{', '.join(chosen)} were chosen.",
        "",
    ]
    accuracy = defaultdict(list)
    for seed in seeds:
        for row in seed["table4"]:
            accuracy[row["variant"], row["cam"]].append(row)
    first = accuracy["original", None][0]
    lines += [
        f"Accuracy ({first['n']} images), the seeds' mean and range:",
        "",
        "| network | accuracy |",
        "|---|---|",
    ]
    for (variant, cam), found in accuracy.items():
        name = (
            f"AFT, {METHODS[cam].title}"
            if cam
            else {"original": "as it was", "control": "control"}[variant]
        )
        lines.append(f"| {name} | {_range([r['accuracy'] for r in found])} |")
    lines.append("")
    for masking in ("soft", "binary"):
        lines += _measure_table(seeds, masking)
    if "guards" in result:
        lines += ["First seed, fewer images:", ""]
        lines += _measure_table([result["guards"]], "soft")
    return lines


def _range(values: list[float]) -> str:
    if len(values) == 1 or max(values) == min(values):
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def _measure_table(seeds: list[dict[str, Any]], masking: str) -> list[str]:
    """One row a CAM and measure: the variants, the ratios, and what is beyond the intervals."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    beyond: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    count, seeds = 0, [s for s in seeds if any(r["masking"] == masking for r in s["table3"])]
    for seed in seeds:
        for r in seed["table3"]:
            if r["masking"] == masking:
                values[r["cam"], r["measure"], r["variant"]].append(r["value"])
                count = max(count, r["n"])
        for d in seed["differences"]:
            if d["masking"] == masking and d["variant"] == "aft" and d["ci"]:
                low, high = d["ci"]
                sign = 1 if low > 0 else -1 if high < 0 else 0
                beyond[d["cam"], d["measure"], d["against"]].append(sign)
    if not values:
        return []
    lines = [f"{masking.capitalize()} masking, {count} images, {_plural(len(seeds), 'seed')}:", ""]
    heads = "CAM | measure | Original | Control | AFT | / Original | / Control"
    lines += [f"| {heads} | than Original | than Control |", "|---" * 9 + "|"]
    for cam, name, variant in list(values):
        if variant != "original" or (cam, name, "aft") not in values:
            continue
        if masking == "binary" and name not in PAPER:
            continue  # the same maps
        own = {v: values.get((cam, name, v), []) for v in ("original", "control", "aft")}
        ranges = [_range(v) if v else "" for v in own.values()]
        ratios = [_ratio(own["aft"], own[v]) for v in ("original", "control")]
        verdicts = [_verdict(name, beyond[cam, name, v]) for v in ("original", "control")]
        cells = (METHODS[cam].title, MEASURES[name].title, *ranges, *ratios, *verdicts)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _ratio(a: list[float], b: list[float]) -> str:
    return f"x {mean(a) / mean(b):.2f}" if b and mean(b) else ""


def _verdict(name: str, signs: list[int]) -> str:
    """Better or worse only where every seed's interval says so."""
    better = MEASURES[name].better
    if not signs or len(set(signs)) > 1 or not signs[0]:
        return "-"
    if not better:
        return "larger" if signs[0] > 0 else "smaller"
    return "better" if signs[0] == better else "**worse**"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--text", type=Path, default=Path("benchmarks/aft_study_text.md"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    studies = {
        n: Study(args.study / f"{n}.jsonl") for n in TITLES if (args.study / f"{n}.jsonl").exists()
    }
    draw(studies, args.images)
    text = args.text.read_text()
    results = [json.loads(p.read_text()) for p in sorted(args.study.glob("*.json"))]
    of_results = "\n".join(line for r in results for line in result_lines(r))
    of_studies = "\n".join(
        "\n".join(
            [
                f"### {TITLES[base][0].upper()}{TITLES[base][1:]}",
                "",
                _about(study),
                "",
                *tables(study, base),
            ]
        )
        for base, study in studies.items()
    )
    print(
        text.replace(
            "{{accuracy}}", "\n".join(draw_accuracy(args.study / "accuracy.jsonl", args.images))
        )
        .replace("{{results}}", of_results)
        .replace("{{study}}", of_studies)
        .rstrip()
    )


def _about(study: Study) -> str:
    about = study.about
    values = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in about["base"].items())
    return (
        f"{about['model']}, Grad-CAM, torch {about['torch']}, {about['machine']} with "
        f"{about['cores']} cores. {about['train']} images trained on, "
        f"{len(study.start['values']['accuracy'])} others measured. Base: {values}."
    )


if __name__ == "__main__":
    main()
