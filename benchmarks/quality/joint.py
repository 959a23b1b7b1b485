"""Ask judges what thresholds gain that several judges have chosen.

    python -m benchmarks joint DATA [--out DIR] [--sets imagenet,imagenette] [--page]

DATA has imagenet/ and imagenette/, each with train and val, and weights/squeezenet1_0.pth. All
thresholds of EfficientNet-Lite0's Grad-CAMs are judged once, with binary masks. On training images
of ImageNet this compares the rules that choose one of them, asking the network, its mirror image
and Lite1, by Lite2, which no rule asks. On the val splits it measures the rule of
`aft explain --tft-judges` by all judges, SqueezeNet too, beside shifts of the same area. What is
there already in DIR is used. --page makes the results figures of docs/results/judges.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftcli import load_classifier
from aftcli.cli import setup
from aftcli.cli.process import keep_freed_memory
from aftcli.core.cam import scaled_map, stretch, upsample
from aftcli.core.classifier import Classifier
from aftcli.data.blocks import batches, load_blocks, spans_of
from aftcli.data.sets import DataSet, open_data_set
from aftcli.measures.controls import SHIFTS, nearest_shift, shifted, shifted_areas
from aftcli.measures.intervals import estimate
from aftcli.settings import Search
from aftcli.tft.judges import Judge, best_step, judged, load_judges
from aftcli.tft.masking import cut_off
from aftcli.tft.scoring import areas, judged_masks, masked_probabilities
from aftcli.tft.threshold import (
    drop,
    first_maximum,
    log_odds_increase,
    relative_probability_increase,
    rises,
)
from benchmarks import pages
from benchmarks.quality.judges import machine

NETWORK = "efficientnet_lite0"
SETS = ("imagenet", "imagenette")
TRAINED = 300  # training images that the rule is chosen on
BATCH = 16
JUDGES = ("self", "mirror", "efficientnet_lite1", "efficientnet_lite2", "squeezenet1_0")
ASKED = {"TFT": 1, "TFT, self and mirror": 2, "TFT, self, mirror and Lite1": 3}  # of JUDGES
SEARCH = Search()


class Curves(NamedTuple):
    """All thresholds of the maps of N images, by J judges, the network itself first.

    Attributes:
        class_index: c, the predicted class, shape (N,).
        y: y^c of whole images, shape (N, J); NaN where a judge does not know the class.
        y_hat: of masked images, shape (N, J, |T|).
        areas: share of pixels that a threshold keeps, shape (N, |T|).
        cells: maps by cells, shape (N, h, w).
        shifts: share of pixels that each shift keeps, shape (N, |SHIFTS|).
    """

    class_index: Tensor
    y: Tensor
    y_hat: Tensor
    areas: Tensor
    cells: Tensor
    shifts: Tensor


Rule = Callable[[Tensor, Tensor], Tensor]  # y_hat (N, J, |T|) and y (N, J) to the index of tau*


def _first(scores: Tensor) -> Tensor:
    """Return the first of the largest scores, shape (N,)."""
    return (scores >= scores.amax(1, keepdim=True) - 1e-6).int().argmax(1)


def _mean_rpi(y_hat: Tensor, y: Tensor) -> Tensor:
    return _first(relative_probability_increase(y_hat, y[..., None]).nanmean(1))


def _mean_increase(y_hat: Tensor, y: Tensor) -> Tensor:
    return _first(log_odds_increase(y_hat, y[..., None]).nanmean(1))


def _least_of_any_sign(y_hat: Tensor, y: Tensor) -> Tensor:
    rise = log_odds_increase(y_hat, y[..., None])
    return _first(rise.nan_to_num(nan=torch.inf).amin(1))


RULES: dict[str, Rule] = {
    "largest RPI of the network (TFT)": lambda y_hat, y: first_maximum(
        relative_probability_increase(y_hat[:, 0], y[:, :1]), y[:, 0]
    ),
    "largest mean RPI": _mean_rpi,
    "largest mean increase of log-odds": _mean_increase,
    "largest least increase of log-odds, of any sign": _least_of_any_sign,
    "**largest least increase of log-odds, 0 or more**": best_step,
}


def inputs(f: Classifier, images: DataSet, workers: int) -> Iterator[Tensor]:
    """Yield the inputs of a data set in batches."""
    spans = spans_of(len(images.samples))
    for loaded in load_blocks(f.preprocessing, images, spans, range(len(spans)), workers):
        yield from batches(loaded, BATCH, next(f.parameters()))


def _masked(
    f: Classifier,
    judges: Sequence[Judge],
    x: Tensor,
    maps: Tensor,
    cut: Tensor,
    c: Tensor,
    y: Tensor,
    owner: Tensor,
) -> Tensor:
    """Ask all about masked images, shape (N, J, |T|)."""
    masks = (f, x, maps, cut, c)
    own = masked_probabilities(*masks, y[:, 0], owner, SEARCH)
    others = [judged_masks(g, *masks, y[:, i], owner, SEARCH) for i, g in enumerate(judges, 1)]
    return torch.stack([own, *others], 1)


def curves(f: Classifier, judges: Sequence[Judge], images: DataSet, workers: int) -> Curves:
    """Ask all judges about all thresholds of a data set's maps."""
    found = []
    for x in inputs(f, images, workers):
        g, activation = f.at(x)
        with torch.no_grad():
            own, c = f.probabilities(g.head(activation).float()).max(1)
        cells = scaled_map(g.sharing(activation, c), activation, c, x, "gradcam").detach()
        maps = upsample(cells, x)
        cut = cut_off(maps, maps.new_tensor(SEARCH.thresholds))
        with torch.no_grad():
            y = torch.stack([own, *(judged(judge, f, x, c) for judge in judges)], 1)
            y_hat = _masked(f, judges, x, maps, cut, c, y, torch.arange(len(x)))
        kept = areas(maps, cut) / maps[0].numel()
        found.append(Curves(c, y, y_hat, kept, cells, shifted_areas(cells, maps.shape[1:])))
        print(sum(len(each.y) for each in found), "of", len(images.samples), flush=True)
    return Curves(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def shifted_curves(
    f: Classifier,
    judges: Sequence[Judge],
    images: DataSet,
    known: Curves,
    shifts: Sequence[float],
    workers: int,
) -> Tensor:
    """Ask all judges about what shifts of the maps keep, shape (|shifts|, N, J)."""
    found, start = [], 0
    for x in inputs(f, images, workers):
        own = slice(start, start + len(x))
        start += len(x)
        maps = torch.cat([stretch(shifted(known.cells[own], t), x.shape[2:]) for t in shifts])
        c, y = (each[own].repeat(len(shifts), *[1] * (each.ndim - 1)) for each in known[:2])
        owner = torch.arange(len(x)).repeat(len(shifts))
        y_hat = _masked(f, judges, x, maps, maps.new_zeros(len(maps), 1), c, y, owner)
        found.append(y_hat[..., 0].view(len(shifts), len(x), -1))
    return torch.cat(found, 1)


class Row(NamedTuple):
    """Figures of what one row keeps: y_hat, shape (N, J), and the share of pixels, shape (N,)."""

    y_hat: Tensor
    area: Tensor


def chosen(known: Curves, best: Tensor) -> Row:
    """Take each image's threshold."""
    at = best[:, None, None].expand(-1, known.y.shape[1], -1)
    return Row(known.y_hat.gather(2, at)[..., 0], known.areas.gather(1, best[:, None])[:, 0])


def rows_of(known: Curves) -> dict[str, Row]:
    """Choose thresholds by the rule of each row."""
    rows = {"plain map": chosen(known, torch.zeros(len(known.y), dtype=torch.long))}
    for title, count in ASKED.items():
        rows[title] = chosen(known, best_step(known.y_hat[:, :count], known.y[:, :count]))
    return rows


def _number(value: float, signed: bool = False) -> str:
    return (f"{value:+.3f}" if signed else f"{value:.3f}").replace("0.", ".", 1)


def table(known: Curves, rows: dict[str, Row], judges: Sequence[str]) -> list[str]:
    """Write Average Increase and Average Drop of rows by each judge."""
    lines = [f"| map | {' | '.join(judges)} | kept area |", "|---|" + "---|" * (len(judges) + 1)]
    for title, row in rows.items():
        cells = []
        for j, name in enumerate(JUDGES):
            if name in judges:
                y_hat, y = row.y_hat[:, j], known.y[:, j]
                of = ~y.isnan()
                two = (rises(y_hat, y)[of], drop(y_hat, y)[of])
                cells.append(" / ".join(_number(float(each.double().mean())) for each in two))
        cells.append(_number(float(row.area.double().mean())))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def differences(
    known: Curves, pairs: dict[str, tuple[Row, Row]], judges: Sequence[str]
) -> list[str]:
    """Write differences of Average Increase and Average Drop, with 95 % intervals."""
    lines = [f"| difference | {' | '.join(judges)} |", "|---|" + "---|" * len(judges)]
    for measure, of in (("increase", rises), ("drop", drop)):
        for title, (one, other) in pairs.items():
            cells = []
            for j, name in enumerate(JUDGES):
                if name in judges:
                    y = known.y[:, j]
                    moved = of(one.y_hat[:, j], y).double() - of(other.y_hat[:, j], y).double()
                    e = estimate(torch.where(y.isnan(), torch.nan, moved))
                    ends = f"[{_number(e.low, True)}, {_number(e.high, True)}]"
                    cells.append(f"{_number(e.value, True)} {ends}")
            lines.append(f"| {measure}: {title} | {' | '.join(cells)} |")
    return lines


def choose(known: Curves) -> str:
    """Compare rules on training images, by the judges that they ask and by Lite2."""
    count = max(ASKED.values())
    asked = known.y_hat[:, :count], known.y[:, :count]
    rows = {title: chosen(known, rule(*asked)) for title, rule in RULES.items()}
    plain = chosen(known, torch.zeros(len(known.y), dtype=torch.long))
    shown = JUDGES[: count + 1]
    lines = table(known, {"plain map": plain, **rows}, shown)
    return "\n".join([*lines, "", f"{len(known.y)} training images."])


def measure(known: Curves, shift: Callable[[list[float]], Tensor], name: str) -> str:
    """Write the tables of one val split."""
    rows = rows_of(known)
    of_rows = [nearest_shift(known.shifts, float(rows[t].area.double().mean())) for t in ASKED]
    controls = dict(zip(ASKED, zip(of_rows, shift(of_rows), strict=True), strict=True))
    shown: dict[str, Row] = {}
    pairs: dict[str, tuple[Row, Row]] = {}
    for title, row in rows.items():
        shown[title] = row
        if title in ASKED:
            t, y_hat = controls[title]
            control = Row(y_hat, known.shifts[:, SHIFTS.index(t)])
            shown[f"shift, area of {title}"] = control
            pairs[f"{title} minus plain map"] = (row, rows["plain map"])
            pairs[f"{title} minus its shift"] = (row, control)
            if title != "TFT":
                pairs[f"{title} minus TFT"] = (row, rows["TFT"])
    lines = [
        f"**{name}**, {len(known.y)} images: increase / drop by each judge",
        "",
        *table(known, shown, JUDGES),
        "",
        *differences(known, pairs, JUDGES),
    ]
    return "\n".join(lines)


def main() -> None:
    """Choose on training images, measure on the val splits, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("study-joint"))
    parser.add_argument("--sets", default=",".join(SETS), help="val splits; '' measures none")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    quiet = setup.noting(True)
    f = load_classifier(NETWORK, note=quiet)
    squeezenet = f"squeezenet1_0={args.data / 'weights' / 'squeezenet1_0.pth'}"
    judges = load_judges([*JUDGES[1:-1], squeezenet], note=quiet)
    fast = setup.engine("auto", "no", True)

    def known(name: str, split: str, limit: int | None) -> tuple[Curves, DataSet]:
        images = open_data_set(args.data / name, split, f.classes).limited(limit)
        path = args.out / f"{name}-{split}.pt"
        if not path.exists():
            torch.save(tuple(curves(quick, others, images, args.workers)), path)
        return Curves(*torch.load(path)), images

    passes = 10_000
    quick = fast(f, passes)
    others = setup.fast_judges(judges, fast, passes)
    parts: dict[str, Any] = {"joint_rules": choose(known("imagenet", "train", TRAINED)[0])}
    for name in filter(None, args.sets.split(",")):
        found, images = known(name, "val", None)

        def shift(
            t: list[float], name: str = name, found: Curves = found, images: DataSet = images
        ) -> Tensor:
            path = args.out / f"{name}-shifted-{'-'.join(map(str, t))}.pt"
            if not path.exists():
                own = (quick, others, images, found, t, args.workers)
                torch.save(shifted_curves(*own), path)
            shifted: Tensor = torch.load(path)
            return shifted

        parts[f"joint_{name}"] = measure(found, shift, name)
    parts["joint_machine"] = f"Measured on: {machine()}."
    for part, text in parts.items():
        print(f"{part}\n{text}\n")
        if args.page:
            pages.keep("results/judges", part, text)


if __name__ == "__main__":
    main()
