"""Measure what docs/decisions.md claims, on any images.

    python benchmarks/decisions.py [IMAGES...] [--limit 120] [--model NAME] [--checkpoint FILE]
                                   [--only masking,stretch,score,cams,scorecam,passes,layers]

IMAGES are files, folders or globs; of more than --limit images every n-th is taken, in the order
of their paths. The class explained is the predicted one. Markdown goes to stdout.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli import attribution_map, fine_tune_threshold, load_classifier, read_image, to_input
from aftcli.core.cam import (
    class_score,
    eigen_cam,
    masked_scores,
    normalise,
    score_gradient,
    upsample,
    weighted_sum,
)
from aftcli.core.classifier import Classifier
from aftcli.data.text import find_images
from aftcli.settings import MODES
from aftcli.tft import threshold as tft

FAST = ("cam", "gradcam", "gradcam++", "ablationcam", "layercam", "xgradcam", "hirescam")


class Case(NamedTuple):
    """An image as the model sees it: x, A, the predicted class c, and its Grad-CAM map I."""

    x: Tensor
    activation: Tensor
    c: Tensor
    least: Tensor
    attribution: Tensor


class Effect(NamedTuple):
    """What masking does to one image: y, y_hat without and with TFT, kept areas."""

    tau: float
    y: float
    plain: float
    tuned: float
    plain_area: float
    tuned_area: float
    helped: bool


def cases(f: Classifier, arguments: list[str], limit: int) -> list[Case]:
    """Read the images and explain each once."""
    paths, _ = find_images(arguments)
    paths = paths[:: -(-len(paths) // limit)]
    found = []
    for path in paths:
        x = to_input(read_image(path), f.preprocessing)
        with torch.no_grad():
            activation = f.activation(x)
            logits = f.head(activation)
        c = logits.argmax(1)
        attribution = attribution_map(f, x, c, "gradcam")
        found.append(Case(x, activation, c, logits.argmin(1), attribution))
        print(f"\r{len(found)}/{len(paths)} images", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def effect(
    f: Classifier,
    case: Case,
    attribution: Tensor,
    masking: str = "binary",
    fill: str = "mean",
    mode: str = "value",
) -> Effect:
    """Mask one image by the plain map and by the fine-tuned one."""
    found = fine_tune_threshold(
        f, case.x, attribution, case.c, masking=masking, fill=fill, mode=mode
    )
    best = int(found.rpi[0].argmax())
    return Effect(
        float(found.tau),
        float(found.probability),
        float(found.probabilities[0, 0]),
        float(found.probabilities[0, best]),
        float((attribution != 0).float().mean()),
        float(found.mask.float().mean()),
        bool(found.rpi.max() > 0),
    )


def increase_and_drop(effects: list[Effect], which: str) -> str:
    """Average Increase and Average Drop (§5.2)."""
    pairs = [(e.y, getattr(e, which)) for e in effects]
    increase = sum(y_hat > y for y, y_hat in pairs) / len(pairs)
    drop = sum(max(y - y_hat, 0) / y for y, y_hat in pairs) / len(pairs)
    return f"{increase:.3f} / {drop:.3f}"


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def spread(values: list[float], form: str = ".3f") -> str:
    """Smallest, median and largest."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return " .. ".join(f"{v:{form}}" for v in (ordered[0], middle, ordered[-1]))


def correlation(one: Tensor, two: Tensor) -> float:
    """Pearson's correlation of two maps; 0 where one is constant."""
    return float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1].nan_to_num())


def masking(f: Classifier, images: list[Case]) -> Iterator[str]:
    """Binary or soft, value or percentile, and what muted pixels show."""
    yield (
        "| masking | fill | threshold mode | Original inc / drop | TFT inc / drop "
        "| kept, Original | kept, TFT | no threshold helps |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    fills = [("mean", 10.0), ("black", 10.0), ("blur", 5.0), ("blur", 10.0), ("blur", 20.0)]
    for how in tft.MASKINGS:
        for fill, sigma in fills:
            for mode in MODES if fill == "mean" else MODES[:1]:
                tft.BLUR_SIGMA = sigma
                effects = [effect(f, case, case.attribution, how, fill, mode) for case in images]
                name = f"blur, sigma {sigma:g}" if fill == "blur" else fill
                yield (
                    f"| {how} | {name} | {mode} | {increase_and_drop(effects, 'plain')} "
                    f"| {increase_and_drop(effects, 'tuned')} "
                    f"| {mean([e.plain_area for e in effects]):.1%} "
                    f"| {mean([e.tuned_area for e in effects]):.1%} "
                    f"| {mean([not e.helped for e in effects]):.1%} |"
                )
    tft.BLUR_SIGMA = 10.0


def stretch(f: Classifier, images: list[Case]) -> Iterator[str]:
    """Scale then stretch (ours), or stretch then scale."""
    yield "| method | largest score of I: min .. median .. max | empty at tau 0.8 | 0.9 | 1 |"
    yield "|---|---|---|---|---|"
    for method in ("gradcam", "layercam"):
        tops = [float(attribution_map(f, case.x, case.c, method).max()) for case in images]
        empty = " | ".join(f"{mean([top < tau for top in tops]):.1%}" for tau in (0.8, 0.9, 1))
        yield f"| {method} | {spread(tops, '.4f')} | {empty} |"
    ours = [effect(f, case, case.attribution) for case in images]
    other = [effect(f, case, normalise(case.attribution)) for case in images]
    moved = [float(a.tau != b.tau) for a, b in zip(ours, other, strict=True)]
    yield ""
    yield f"Grad-CAM, TFT inc / drop: scale then stretch {increase_and_drop(ours, 'tuned')},"
    yield f"stretch then scale {increase_and_drop(other, 'tuned')};"
    yield f"tau* differs for {mean(moved):.1%} of the images."


def score(f: Classifier, images: list[Case]) -> Iterator[str]:
    """The gradient of the score or of the probability."""
    both: dict[str, list[Effect]] = {"score": [], "probability": []}
    same, largest = [], {"score": [], "probability": []}
    for case in images:
        a = case.activation.detach().requires_grad_()
        logits = f.head(a)
        outputs = {
            "score": class_score(logits, case.c),
            "probability": class_score(logits.softmax(1), case.c),
        }
        maps = {}
        for name, y in outputs.items():
            g = torch.autograd.grad(y.sum(), a, retain_graph=True)[0]
            largest[name].append(float(g.abs().max()))
            plain = normalise(weighted_sum(g.mean((2, 3)), a.detach()))
            maps[name] = upsample(plain, case.x)
            both[name].append(effect(f, case, maps[name]))
        same.append(correlation(*maps.values()))
    yield "| gradient of | Original inc / drop | TFT inc / drop | max abs gradient |"
    yield "|---|---|---|---|"
    for name, effects in both.items():
        yield (
            f"| {name} | {increase_and_drop(effects, 'plain')} "
            f"| {increase_and_drop(effects, 'tuned')} | {spread(largest[name], '.2g')} |"
        )
    yield ""
    yield f"Correlation of the two Grad-CAM maps: {spread(same)}."


def cams(f: Classifier, images: list[Case]) -> Iterator[str]:
    """Grad-CAM++'s two forms, empty channels, signs of scores, Eigen-CAM, constant maps."""
    form, underflow, swamped, empty, negative, flipped, centred = [], [], [], [], [], [], []
    uncentred_effects, centred_effects = [], []
    constant: dict[str, list[float]] = {method: [] for method in FAST}
    for case in images:
        a = case.activation
        g = score_gradient(f, a, case.c)
        total = a.sum((2, 3), keepdim=True)
        empty.append(float((total == 0).float().mean()))
        published = g**2 / (2 * g**2 + total * g**3)
        underflow.append(float((published.isnan() & (g != 0)).float().mean()))
        swamped.append(float((2 * g[g != 0] ** 2 < 1e-6).float().mean()))
        g64, total64 = g.double(), total.double()
        s = 1 / (2 + total64 * g64)
        relative = ((g64**2 / (2 * g64**2 + total64 * g64**3) - s) / s).abs()
        form.append(float(relative[g64 != 0].max()))
        with torch.no_grad():
            logits = f.head(a)
        negative += (logits < 0).float().mean(1).tolist()
        cells = a.flatten(2).mT
        u, singular, _ = torch.linalg.svd(cells - cells.mean(1, keepdim=True), full_matrices=False)
        first = u[:, :, 0] * singular[:, None, 0]
        # A centred component sums to zero: take the sign that follows the mean activation.
        first = first * torch.where((first * cells.mean(2)).sum(1, keepdim=True) < 0, -1, 1)
        other = upsample(normalise(first.view(1, *a.shape[2:]).relu()), case.x)
        ours = upsample(normalise(eigen_cam(f, a, case.c, case.x)), case.x)
        centred.append(correlation(ours, other))
        uncentred_effects.append(effect(f, case, ours))
        centred_effects.append(effect(f, case, other))
        flipped.append(float(torch.linalg.svd(cells, full_matrices=False)[0][0, :, 0].sum() < 0))
        if f.linear_head is not None and f.linear_head.is_last and f.linear_head.is_mean:
            for method in FAST:
                maps = attribution_map(f, case.x, case.least, method)
                constant[method].append(float(maps.max() == 0))
    yield f"- Grad-CAM++, s in float64: largest relative difference of the forms {max(form):.2g};"
    yield f"  g^2 / (2 g^2 + S g^3) in float32 is 0 / 0 for {max(underflow):.2%} of cells at most;"
    yield f"  cells with 2 g^2 < 1e-6 (an epsilon elsewhere): {spread(swamped, '.1%')} of g != 0."
    yield f"- Empty channels (sum of A is 0): {spread(empty, '.1%')} of the channels."
    yield f"- Scores y^c below zero, of all classes: {spread(negative, '.1%')}."
    yield f"- Eigen-CAM: LAPACK's vector has a negative sum for {mean(flipped):.1%} of the images;"
    yield f"  correlation with the map of centred activations: {spread(centred)};"
    yield (
        f"  TFT inc / drop uncentred {increase_and_drop(uncentred_effects, 'tuned')}, "
        f"centred {increase_and_drop(centred_effects, 'tuned')}; Original "
        f"{increase_and_drop(uncentred_effects, 'plain')} and "
        f"{increase_and_drop(centred_effects, 'plain')}."
    )
    shares = ", ".join(f"{m} {mean(v):.1%}" for m, v in constant.items() if v)
    yield f"- All-zero maps for the least likely class: {shares or 'not measured (no such head)'}."


def scorecam(f: Classifier, images: list[Case]) -> Iterator[str]:
    """Softmax over the channels of logits or of probabilities (the first three images)."""
    yield "| image | largest / smallest alpha, logits | probabilities | constant channels |"
    yield "|---|---|---|---|"

    class Probabilities(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x).softmax(1)

    for i, case in enumerate(images[:3]):
        flat = case.activation.flatten(2)
        constant = float((flat.amax(2) == flat.amin(2)).float().mean())
        ratios = []
        for network in (f, Probabilities()):
            with torch.no_grad():
                scores = masked_scores(network, case.activation, case.c, case.x)  # type: ignore[arg-type]
            ratios.append(f"{float((scores.max() - scores.min()).exp()):.3g}")
        yield f"| {i + 1} | {ratios[0]} | {ratios[1]} | {constant:.1%} |"


def passes(f: Classifier, images: list[Case]) -> Iterator[str]:
    """Distinct masks among the eleven of an image, and ties of the largest RPI."""
    counts, ties = [], []
    tau = torch.tensor(tft.THRESHOLDS)
    for case in images:
        areas = {int((case.attribution * (case.attribution >= t) != 0).sum()) for t in tau}
        counts.append(float(len(areas - {0, case.attribution.numel()})))
        found = fine_tune_threshold(f, case.x, case.attribution, case.c)
        rpi = found.rpi[0]
        ties.append(float(rpi.max() > 0 and int((rpi == rpi.max()).sum()) > 1))
    yield f"- Masks that are neither whole nor empty nor equal to another: {spread(counts, 'g')},"
    yield f"  mean {mean(counts):.1f} of {len(tau)}."
    yield f"- Images with several thresholds at a largest RPI above zero: {mean(ties):.1%}."


def layers(f: Classifier, images: list[Case]) -> Iterator[str]:
    """The layer of some models and what the head is (random weights)."""
    yield "| model | layer l (w1) | A | first linear layer | CAM | closed-form Ablation-CAM |"
    yield "|---|---|---|---|---|---|"
    for name in (
        "efficientnet_lite0 resnet50 resnet18 vgg16 vgg16_bn alexnet densenet121 googlenet "
        "inception_v3 mnasnet1_0 shufflenet_v2_x1_0 squeezenet1_0 regnet_y_400mf convnext_tiny "
        "efficientnet_b0 mobilenet_v2 mobilenet_v3_small timm:efficientnet_b0 "
        "timm:mobilenetv2_100 timm:mobilenetv3_small_100 timm:repvgg_a0"
    ).split():
        g = load_classifier(name, weights=False)
        head = g.linear_head
        linear = f"{head.linear.in_features} -> {head.linear.out_features}" if head else "none"
        cam = "yes" if head and head.is_last and head.is_mean else "no"
        closed = "closed form" if head and head.is_last else "first layer" if head else "no"
        shape = " x ".join(map(str, g.activation_shape))
        yield f"| `{name}` | `{g.layer_name}` | {shape} | {linear} | {cam} | {closed} |"


SECTIONS: dict[str, Callable[[Classifier, list[Case]], Iterator[str]]] = {
    section.__name__: section
    for section in (masking, stretch, score, cams, scorecam, passes, layers)
}


def main() -> None:
    """Print every section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="*", default=["docs/images/*.jpg"])
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    args = parser.parse_args()
    torch.manual_seed(0)
    f = load_classifier(args.model, args.checkpoint)
    images = cases(f, args.images, args.limit)
    print(f"{args.model}, {len(images)} images, torch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    for name in args.only.split(","):
        print(f"## {name}: {SECTIONS[name].__doc__}\n", flush=True)
        for line in SECTIONS[name](f, images):
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
