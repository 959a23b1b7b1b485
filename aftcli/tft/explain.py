"""Explanations of single images: the plain map and its fine-tuned threshold (§3.1, §4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from aftcli.core.cam import map_of, wide
from aftcli.core.classifier import Classifier
from aftcli.core.inputs import check_shape, class_indices, first_activation
from aftcli.core.methods import METHODS
from aftcli.cutting.networks import outside_inference_mode
from aftcli.errors import AftError
from aftcli.settings import Search
from aftcli.tft.search import TftResult, search_threshold


@dataclass(frozen=True)
class Explanation:
    """Explanation of one class that a classifier gives an image.

    Attributes:
        cam: the method, or "map" for a map from another tool.
        class_index: c.
        probability: y^c, in [0, 1].
        attribution: I, shape (H, W), in [0, 1].
        tft: the threshold fine-tuned for I, N = 1; None if not asked for.
        thresholds: those searched, T, or the fixed one.
        cells: a map of pixels was averaged over the activation's cells.
        fixed: I cut at a fixed threshold instead, as a search of this one only, N = 1.
        zero_level: the share of the map's maximum that was subtracted from its cells first.
    """

    cam: str
    class_index: int
    probability: float
    attribution: Tensor
    tft: TftResult | None
    thresholds: tuple[float, ...] = ()
    cells: bool = False
    fixed: TftResult | None = None
    zero_level: float = 0.0

    @property
    def cut(self) -> TftResult | None:
        """Return I cut at a threshold, fine-tuned or fixed; None for the plain map."""
        return self.tft or self.fixed


def fits(f: Classifier, method: str) -> bool:
    """Check that a method can explain a classifier: CAM only fits some heads."""
    return method != "cam" or (
        f.linear_head is not None and f.linear_head.is_last and f.linear_head.is_mean
    )


def passes(f: Classifier, methods: Sequence[str], classes: int, settings: Search | None) -> int:
    """Count the images that pass the network, at the most, to explain one."""
    searched = len(settings.thresholds) if settings else 0
    own = (METHODS[name].passes if name in METHODS else 0 for name in methods)
    perturbed = sum(f.activation_shape[0] if n is None else n for n in own)
    return 1 + classes * (len(methods) * searched + perturbed)


@outside_inference_mode
def explain(
    f: Classifier,
    x: Tensor,
    methods: Sequence[str],
    targets: Sequence[int] | int = (),
    top_k: int = 1,
    settings: Search | None = None,
    cells: bool = False,
    fixed: bool = False,
    zero_level: float = 0.0,
) -> list[Explanation]:
    """Explain one image by several methods and for several classes, with one stem pass.

    Args:
        f: the classifier.
        x: the input, shape (1, 3, H, W).
        methods: keys of METHODS.
        targets: classes to explain, or one; by default the predicted ones.
        top_k: how many predicted classes.
        settings: search thresholds with these; None for plain maps.
        cells: average maps of pixels over the activation's cells.
        fixed: cut maps at the one threshold of the settings, as other tools do (Table 1).
        zero_level: subtract this share of the maximum from maps of cells first, in [0, 1).

    Returns:
        One explanation for each method and class, method by method.

    Raises:
        AftError: x is no single image, a class is out of range, or see `scaled_map` and
            `fine_tune_threshold`.
    """
    g, activation = first_activation(f, x, 1)
    with torch.no_grad():
        y = f.probabilities(g.head(activation).float())[0]
    classes = _explained(f, y, targets, top_k)
    count = len(classes)
    x_c, activation_c = x.expand(count, -1, -1, -1), activation.expand(count, -1, -1, -1)
    maps = [map_of(g, activation_c, classes, x_c, method, cells, zero_level) for method in methods]
    named = [method for method in methods for _ in classes]
    attribution = torch.cat(maps)
    found = _search(f, x, attribution, named, classes.repeat(len(maps)), y, settings)
    if fixed:
        found = [replace(each, tft=None, fixed=each.tft) for each in found]
    return [replace(each, cells=cells, zero_level=zero_level) for each in found]


@outside_inference_mode
def explain_map(
    f: Classifier,
    x: Tensor,
    attribution: Tensor,
    targets: Sequence[int] | int = (),
    top_k: int = 1,
    settings: Search | None = None,
) -> list[Explanation]:
    """Fine-tune the threshold of a map from another tool.

    Args:
        f: the classifier.
        x: the input, shape (1, 3, H, W).
        attribution: I, shape (1, H, W), in [0, 1].
        targets: see `explain`.
        top_k: see `explain`.
        settings: see `explain`.
    """
    check_shape(x, 1)
    with torch.no_grad():
        y = f.probabilities(f(x).float())[0]
    classes = _explained(f, y, targets, top_k)
    count = len(classes)
    maps = attribution.expand(count, -1, -1)
    return _search(f, x, maps, ["map"] * count, classes, y, settings)


def _explained(f: Classifier, y: Tensor, targets: Sequence[int] | int, top_k: int) -> Tensor:
    """Return the classes asked for, by default those with the largest probabilities y, (C,)."""
    alone = isinstance(targets, int) or getattr(targets, "ndim", 1) == 0
    given = cast("list[int]", [targets] if alone else list(cast("Sequence[int]", targets)))
    if given:
        return class_indices(f, given, len(given), y.device)
    if not 0 < top_k <= len(y):
        raise AftError(f"top_k must lie in 1..{len(y)}, the classes of {f.name}; got {top_k}")
    return y.topk(top_k).indices


def _search(
    f: Classifier,
    x: Tensor,
    maps: Tensor,
    methods: Sequence[str],
    classes: Tensor,
    y: Tensor,
    settings: Search | None,
) -> list[Explanation]:
    results: list[TftResult | None] = [None] * len(maps)
    if settings:
        owner = torch.zeros_like(classes)
        found = search_threshold(f, x, maps, classes, settings, y[classes], owner)
        results = [TftResult(*(field[i : i + 1] for field in found)) for i in range(len(maps))]
    return [
        Explanation(
            method,
            int(c),
            float(y[c]),
            wide(attribution),
            result,
            settings.thresholds if settings else (),
        )
        for method, c, attribution, result in zip(methods, classes, maps, results, strict=True)
    ]
