"""Ask judges which maps put an image's pixels into the best order.

    python -m benchmarks order DATA [--out DIR] [--page]

DATA has imagenet/, with train and val, and weights/squeezenet1_0.pth. Each map of EfficientNet-
Lite0 keeps the same share of every image, its highest pixels, so neither a threshold nor a zero
level nor area counts: only the order of the scores. Maps of pixels are averaged over the layer's
cells. The question is which map could teach a fine-tuned network a better order. On training images
RISE is measured too, with few masks: by the network's scores, and by those of the network and
Lite1. Lite2 and SqueezeNet take part in no map. Results that are in DIR already are reused. --page
makes the results figures of docs/results/judges.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli import attribution_map, load_classifier
from aftcli.cli import setup
from aftcli.cli.process import keep_freed_memory
from aftcli.core.cam import stretch
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.data.sets import DataSet, open_data_set
from aftcli.measures.controls import first_pixels, order_of
from aftcli.measures.intervals import estimate
from aftcli.tft.judges import Judge, judged, load_judges
from aftcli.tft.threshold import drop, rises
from benchmarks import pages
from benchmarks.quality.grid_tables import number
from benchmarks.quality.joint import JUDGES, NETWORK, inputs
from benchmarks.quality.judges import machine

SHARE = 0.5  # of an image's pixels that a map keeps
TRAINED = 200  # training images
MASKS = 96  # random ones of RISE
EARLIER = "blocks.4"  # a layer of 14 x 14 cells

# The head is linear: HiResCAM, XGrad-CAM, CAM and a noisy gradient give the map of Grad-CAM.
SINGLE = ("gradcam++", "layercam", "ablationcam", "eigencam", "finercam")
OTHERS = ("lrp", "guidedbackprop")
SMOOTHED = ("aug", "eigen")
FUSIONS = ("max", "product")
PLAIN = "Grad-CAM"
ASKED = {"RISE": ("self",), "RISE, self and Lite1": ("self", "efficientnet_lite1")}

Ask = Callable[[Tensor, Tensor], Tensor]  # inputs and their classes to probabilities


class Orders(NamedTuple):
    """Probabilities by J judges of N images, whole and masked by maps that keep the same share.

    Attributes:
        y: y^c of whole images, shape (N, J).
        y_hat: y_hat^c by the name of the map, each of shape (N, J).
    """

    y: Tensor
    y_hat: dict[str, Tensor]


def highest(attribution: Tensor) -> Tensor:
    """Return the mask of each image's highest pixels, shape (N, H, W); of equal ones the first."""
    return torch.stack([first_pixels(order_of(m), SHARE, m.shape) for m in attribution])


def standard(cells: Tensor) -> Tensor:
    """Give each map mean 0 and standard deviation 1."""
    flat = cells.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(cells)


def rise(ask: Sequence[Ask], x: Tensor, c: Tensor, cells: Sequence[int]) -> Tensor:
    """Correlate log-odds with what random masks keep, shape (N, h, w) (Petsiuk et al., 2018).

    Args:
        ask: whose log-odds count, each alike.
        x: inputs, shape (N, 3, H, W).
        c: classes, shape (N,).
        cells: h and w.
    """
    generator = torch.Generator().manual_seed(0)
    low = (torch.rand(MASKS, *cells, generator=generator) < 0.5).float()
    high = stretch(low, x.shape[2:])
    found = torch.zeros(len(x), *cells)
    for each in ask:
        odds = torch.stack([each(x * mask, c).logit(1e-6) for mask in high], 1)
        found += torch.einsum("nm,mhw->nhw", standard(odds), low - low.mean(0))
    return found


def maps_of(
    f: Classifier, earlier: Classifier, ask: dict[str, Ask], x: Tensor, c: Tensor, teachers: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each map and its scores, before the ReLU where a method has a sign.

    Args:
        f: the classifier.
        earlier: the same, cut at an earlier layer.
        ask: who is asked, by name.
        x: inputs, shape (N, 3, H, W).
        c: classes, shape (N,).
        teachers: yield RISE and its sums with Grad-CAM too.
    """
    g, activation = f.at(x)
    size, cells = x.shape[2:], tuple(activation.shape[2:])
    signed: dict[str, Tensor] = {}
    for name in ("gradcam", *SINGLE):
        before = METHODS[name].load_before_relu()
        if before is None:
            yield METHODS[name].title, attribution_map(f, x, c, name)
            continue
        with torch.enable_grad():
            signed[name] = before(g, activation, c, x).detach()
        yield METHODS[name].title, stretch(signed[name], size)
    for way in SMOOTHED:
        yield f"Grad-CAM, `--smooth {way}`", attribution_map(f, x, c, "gradcam", smooth=way)
    for name in ("gradcam", "layercam"):
        for way in FUSIONS:
            fused = attribution_map([f, earlier], x, c, name, fuse=way)
            yield f"{METHODS[name].title} of two layers, `--fuse {way}`", fused
    for name in OTHERS:
        yield METHODS[name].title, attribution_map(f, x, c, name, cells=True)
    low = standard(signed["gradcam"])
    for title, names in ASKED.items() if teachers else ():
        found = rise([ask[name] for name in names], x, c, cells)
        yield title, stretch(found, size)
        yield f"Grad-CAM + {title}", stretch(low + standard(found), size)


def ordered(
    f: Classifier,
    earlier: Classifier,
    judges: Sequence[Judge],
    images: DataSet,
    teachers: bool,
    workers: int,
) -> Orders:
    """Ask all judges about all maps of some images, by the predicted class."""
    y: list[Tensor] = []
    y_hat: dict[str, list[Tensor]] = {}

    def own(x: Tensor, c: Tensor) -> Tensor:
        return f(x).softmax(1).gather(1, c[:, None])[:, 0]

    def by(judge: Judge) -> Ask:
        return lambda x, c: judged(judge, f, x, c)

    ask: dict[str, Ask] = dict(zip(JUDGES, [own, *map(by, judges)], strict=True))
    with torch.no_grad():
        for x in inputs(f, images, workers):
            c = f(x).argmax(1)
            y.append(torch.stack([each(x, c) for each in ask.values()], 1))
            for title, scores in maps_of(f, earlier, ask, x, c, teachers):
                x_hat = x * highest(scores)[:, None]
                said = torch.stack([each(x_hat, c) for each in ask.values()], 1)
                y_hat.setdefault(title, []).append(said)
            print(f"{sum(map(len, y))} images", flush=True)
    return Orders(torch.cat(y), {title: torch.cat(parts) for title, parts in y_hat.items()})


def sign(better: Tensor) -> str:
    """Write + where one map is better than Grad-CAM beyond a 95 % interval, - where it is worse."""
    found = estimate(better)
    return "+" * bool(found.low > 0) + "-" * bool(found.high < 0)


def measure(found: Orders) -> str:
    """Write increase and drop by each judge, with the signs of their differences."""
    lines = [f"| map | {' | '.join(JUDGES)} |", "|---|" + "---|" * len(JUDGES)]
    for title, y_hat in found.y_hat.items():
        cells = []
        for j in range(len(JUDGES)):
            known = ~found.y[:, j].isnan()
            y = found.y[known, j]
            own, plain = y_hat[known, j], found.y_hat[PLAIN][known, j]
            parts = []
            for of, direction in ((rises, 1), (drop, -1)):
                values = of(own, y).double()
                better = direction * (values - of(plain, y).double())
                parts.append(number(float(values.mean())) + sign(better))
            cells.append(" / ".join(parts))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compare orders on training images and on the val split, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("study-order"))
    parser.add_argument("--limit", type=int, help="images of the val split")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="keep as the page's figures")
    args = parser.parse_args()
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    quiet, fast = setup.noting(True), setup.engine("auto", "no", True)
    f, earlier = (load_classifier(NETWORK, layer=name, note=quiet) for name in (None, EARLIER))
    squeezenet = f"squeezenet1_0={args.data / 'weights' / 'squeezenet1_0.pth'}"
    judges = setup.fast_judges(load_judges([*JUDGES[1:-1], squeezenet], note=quiet), fast, None)
    for split, limit in (("train", TRAINED), ("val", args.limit)):
        path = args.out / f"{split}.pt"
        if not path.exists():
            images = open_data_set(args.data / "imagenet", split, f.classes).limited(limit)
            given = fast(f, None), fast(earlier, None), judges, images
            found = ordered(*given, split == "train", args.workers)
            torch.save(tuple(found), path)
        found = Orders(*torch.load(path))
        text = f"{len(found.y)} images of the {split} split:\n\n{measure(found)}"
        print(f"{split}\n{text}\n")
        if args.page:
            pages.keep("results/judges", f"order_{split}", text)
    if args.page:
        pages.keep("results/judges", "order_machine", f"Measured on: {machine()}.")


if __name__ == "__main__":
    main()
