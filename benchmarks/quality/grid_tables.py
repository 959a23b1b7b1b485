"""Tables of docs/results/judges.md about methods and objectives, from the figures of `grid`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from aftcli.core.methods import METHODS
from benchmarks import pages

FIGURES = Path(__file__).with_name("grid.json")

# The best-known network that took no part: of another family than the one that is explained.
STRANGER = {"squeezenet1_0": "efficientnet_lite0"}
OTHER = "squeezenet1_0"

ROWS = {
    "plain map": "plain",
    "TFT": "TFT",
    "TFT's area": "shift, TFT's area",
    "t": "**t**",
    "t's area": "shift, t's area",
}
AGAINST = {"TFT": "TFT's area", "t": "t's area"}

NAMES = {
    "t": "zero level t, the default",
    "v": "zero level, v and t",
    "equation8": "equation 8",
    "consistency": "mask consistency",
    "cam": "the CAM itself, with consistency",
    "joint v": "v and t, masks of three judges",
    "joint cam": "the CAM itself, masks of three judges",
}


def number(value: float, signed: bool = False) -> str:
    """Write a share without its zero.

    >>> number(0.25), number(0.25, signed=True), number(-0.5)
    ('.250', '+.250', '-.500')
    """
    return f"{value:{'+' if signed else ''}.3f}".replace("0.", ".", 1)


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Write the mean of seeds, and their range where it is seen.

    >>> spread([0.25]), spread([0.25, 0.75])
    ('.250', '.500 (.250 .. .750)')
    """
    first, *others = texts = sorted((number(v, signed) for v in values), key=float)
    if not others or first == texts[-1]:
        return first
    return f"{number(mean(values), signed)} ({first} .. {texts[-1]})"


def clear(found: dict[str, Any], name: str, measure: str) -> bool:
    """Tell if a difference is above 0 beyond its interval."""
    return found["differences"].get(name, {measure: [0, 0, 0]})[measure][1] > 0


def of_methods(maps: dict[str, Any]) -> str:
    """Write a table a network: rows are methods with their maps, columns judges."""
    lines: list[str] = []
    for network, by_cam in maps.items():
        judges = ["self", "mirror", STRANGER.get(network, OTHER)]
        (count,) = {found["images"] for found in by_cam.values()}
        lines += [
            f"**{network}**, {count} images",
            "",
            f"| method | map | {' | '.join(judges)} | kept area | energy in boxes | IoU |",
            "|---|---|" + "---|" * (len(judges) + 3),
        ]
        for cam in METHODS:
            if cam in by_cam:
                lines += _rows_of(METHODS[cam].title, by_cam[cam], judges)
        lines.append("")
    return "\n".join(lines).rstrip()


def _rows_of(title: str, found: dict[str, Any], judges: Sequence[str]) -> Iterator[str]:
    for row, shown in ROWS.items():
        if row not in found["rows"]:
            continue
        of, cells = found["rows"][row], []
        for judge in judges:
            measure = f"average_increase {judge}"
            star = "\\*" * clear(found, f"{row} minus plain map", measure)
            if row in AGAINST:
                star += "†" * clear(found, f"{row} minus {AGAINST[row]}", measure)
            drop = number(of[f"average_drop {judge}"][0])
            cells.append(f"{number(of[measure][0])}{star} / {drop}")
        cells += [number(of[name][0]) for name in ("area", "energy", "iou")]
        yield f"| {title} | {shown} | {' | '.join(cells)} |"


def of_objectives(objectives: dict[str, Any]) -> str:
    """Write a table a network: rows are objectives, columns judges and accuracy."""
    lines: list[str] = []
    for network, by_name in objectives.items():
        some = next(iter(next(iter(by_name.values())).values()))
        judges = some["judges"]
        lines += [
            f"**{network}**, {some['images']} images: increase / drop",
            "",
            f"| objective | seeds | {_heads(judges, network)} | kept area | accuracy |",
            "|---|---|" + "---|" * (len(judges) + 2),
        ]
        plain = some["rows"]["plain map"]
        cells = [
            f"{number(plain[f'average_increase {j}'][0])} / {number(plain[f'average_drop {j}'][0])}"
            for j in judges
        ]
        rest = number(plain["area"][0]), number(some["accuracy"]["plain map"][0])
        lines.append(f"| plain map | | {' | '.join((*cells, *rest))} |")
        for name in NAMES:
            if by_seed := by_name.get(name):
                lines.append(_objective(NAMES[name], list(by_seed.values()), judges))
        lines.append("")
    return "\n".join(lines).rstrip()


def _heads(judges: Sequence[str], network: str) -> str:
    return " | ".join("the untuned network" if judge == network else judge for judge in judges)


def _objective(title: str, seeds: Sequence[dict[str, Any]], judges: Sequence[str]) -> str:
    def all_of(row: str, measure: str) -> list[float]:
        return [found["rows"][row][measure][0] for found in seeds]

    cells = []
    for judge in judges:
        measure = f"average_increase {judge}"
        star = "\\*" * all(clear(found, "tuned minus plain map", measure) for found in seeds)
        star += "†" * all(clear(found, "tuned minus shift", measure) for found in seeds)
        drop = number(mean(all_of("tuned", f"average_drop {judge}")))
        cells.append(f"{spread(all_of('tuned', measure))}{star} / {drop}")
    accuracy = spread([found["accuracy"]["tuned"][0] for found in seeds])
    cells += [number(mean(all_of("tuned", "area"))), accuracy]
    return f"| {title} | {len(seeds)} | {' | '.join(cells)} |"


def of_order(objectives: dict[str, Any]) -> str:
    """Write what tuned maps gain over the plain ones where both are cut to TFT's area."""
    lines: list[str] = []
    for network, by_name in objectives.items():
        some = next(iter(next(iter(by_name.values())).values()))
        judges = some["judges"]
        lines += [
            f"**{network}**, kept area {number(some['rows']['plain, cut']['area'][0])}",
            "",
            f"| objective | {_heads(judges, network)} | IoU |",
            "|---|" + "---|" * (len(judges) + 1),
        ]
        measures = [*(f"average_increase {judge}" for judge in judges), "iou"]
        for name in NAMES:
            seeds = list(by_name.get(name, {}).values())
            found = [each["differences"]["tuned, cut minus plain, cut"] for each in seeds]
            if not found:
                continue
            cells = []
            for measure in measures:
                values, lows, highs = zip(*(each[measure] for each in found), strict=True)
                if len(found) == 1:
                    interval = f" [{number(lows[0], True)}, {number(highs[0], True)}]"
                    cells.append(number(values[0], True) + interval)
                else:
                    apart = min(lows) > 0 or max(highs) < 0
                    cells.append(spread(values, True) + "\\*" * apart)
            lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def keep_page(results: dict[str, Any]) -> None:
    """Keep results as the figures of the page, and all of them as grid.json."""
    FIGURES.write_text(pages.laid_out(results) + "\n", "utf-8")
    pages.keep("results/judges", "methods", of_methods(results["maps"]))
    pages.keep("results/judges", "objectives", of_objectives(results["objectives"]))
    pages.keep("results/judges", "order", of_order(results["objectives"]))
