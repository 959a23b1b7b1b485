"""Explanations of single images: the plain map and its fine-tuned threshold (§3.1, §4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from aftcli.attributions.maps import (
    COPIES,
    Layers,
    Seen,
    Signed,
    can_smooth,
    check_explains,
    check_smooth,
    cuts,
    map_of_layers,
    signed_maps,
    smoothed_by,
    takes_target,
)
from aftcli.core.cam import wide
from aftcli.core.classifier import Classifier
from aftcli.core.inputs import (
    check_classes,
    check_shape,
    class_indices,
    first_activation,
)
from aftcli.core.methods import METHODS, named, spelled
from aftcli.cutting.networks import outside_inference_mode
from aftcli.errors import AftError
from aftcli.models.targets import Target, Targeted, contrasted, with_target
from aftcli.settings import AS_COMPUTED, Search, Shaping
from aftcli.tft.judges import Judge
from aftcli.tft.result import TftResult
from aftcli.tft.search import search_threshold


@dataclass(frozen=True)
class Explanation:
    """Explanation of one class that a classifier gives an image.

    Attributes:
        cam: the method, or "map" for a map from another tool.
        class_index: c.
        probability: y^c, in [0, 1]; of a target its score, any number.
        attribution: I, shape (H, W), in [0, 1].
        tft: the threshold fine-tuned for I, N = 1; None if not asked for.
        thresholds: those searched, T, or the fixed one.
        cells: a map of pixels was averaged over the activation's cells.
        fixed: I cut at a fixed threshold instead, as a search of this one only, N = 1.
        zero_level: the share of the map's maximum that was subtracted from its cells first.
        smooth: how the map was smoothed; "none" if it was not.
        layers: the layers whose maps were fused; none for the map of one layer.
        fuse: what they were fused by, "max" or "product"; "" for the map of one layer.
        likeliest: index and probability of the three likeliest classes, or of all.
        signed: the map before its ReLU, shape (H, W), in [-1, 1]: positive speaks for the class;
            None where the method has no sign, or its map was averaged, lowered, smoothed or fused.
        contrast: the class B of a map of y^A - y^B, where A is the class explained.
        contrast_probability: y^B, in [0, 1]; 0 without.
        judges: names of those that the search asked beside the classifier.
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
    smooth: str = "none"
    layers: tuple[str, ...] = ()
    fuse: str = ""
    likeliest: tuple[tuple[int, float], ...] = ()
    signed: Tensor | None = None
    contrast: int | None = None
    contrast_probability: float = 0.0
    judges: tuple[str, ...] = ()

    @property
    def cut(self) -> TftResult | None:
        """Return I cut at a threshold, fine-tuned or fixed; None for the plain map."""
        return self.tft or self.fixed


def fits(f: Classifier, method: str) -> bool:
    """Check that a method can explain a classifier: CAM only fits some heads."""
    if isinstance(f, Targeted):
        return takes_target(method)
    return method != "cam" or (
        f.linear_head is not None and f.linear_head.is_last and f.linear_head.is_mean
    )


TRIED = 10  # passes that a method may take to be tried on a network


def choose_methods(
    layers: Sequence[Classifier],
    words: Sequence[str],
    default: str,
    smooth: str = "none",
    option: str = "",
) -> tuple[list[str], dict[str, str]]:
    """Find the methods that words stand for; `all` and families leave out what does not fit.

    Args:
        layers: the network, cut at each layer whose maps are fused.
        words: names, families or "all"; none for the network's own method.
        default: the method of networks without one.
        smooth: see `attribution_map`.
        option: in messages, what gave the words.

    Returns:
        The methods, and why others were left out, by their names.

    Raises:
        AftError: no method fits, or one of the names can't be smoothed in this way.
    """
    f, asked = layers[0], spelled(words)
    found = named(asked or [f.cam or default])
    own = [name for name in found if name in asked or not asked]
    for name in own:
        check_smooth(smooth, name)
    reasons = refusals(layers, [name for name in found if name not in own], smooth)
    kept = [name for name in found if name not in reasons]
    if not kept:
        which = " ".join(filter(None, [option, ", ".join(asked)]))
        raise AftError(f"no method of {which} fits {f.name}: {next(iter(reasons.values()))}")
    return kept, reasons


def refusals(
    layers: Sequence[Classifier], methods: Sequence[str], smooth: str = "none"
) -> dict[str, str]:
    """Say which methods can't explain a network, and why.

    Methods that explain any score fit every network. Others are tried on a picture of noise, if
    that takes few passes.

    Args:
        layers: the network, cut at each layer whose maps are fused.
        methods: keys of METHODS.
        smooth: see `attribution_map`.
    """
    if not methods:
        return {}
    f = layers[0]
    noise = torch.randn(1, *f.preprocessing.shape, generator=torch.Generator().manual_seed(0))
    x = noise.to(next(f.parameters()))
    try:
        seen = [first_activation(each, x, 1) for each in layers]
    except AftError as error:
        return dict.fromkeys(methods, str(error))
    found = {method: _refusal(seen, x, method, smooth) for method in methods}
    return {method: reason for method, reason in found.items() if reason}


def _refusal(seen: Sequence[Seen], x: Tensor, method: str, smooth: str) -> str:
    passes = METHODS[method].passes
    if not can_smooth(smooth, method):
        return smoothed_by(smooth)
    try:
        check_explains(seen, x, method)
        of_any_score = takes_target(method) and method != "layercam-fusion"
        if not of_any_score and passes is not None and passes <= TRIED:
            map_of_layers(seen, torch.zeros(1, dtype=torch.long, device=x.device), x, method)
    except AftError as error:
        return str(error)
    return ""


def passes(
    f: Classifier,
    methods: Sequence[str],
    classes: int,
    settings: Search | None,
    smooth: str = "none",
    mirrors: int = 0,
) -> int:
    """Count the images that pass the network, at the most, to explain one.

    Args:
        f: the classifier.
        methods: keys of METHODS.
        classes: how many are explained.
        settings: of the search; None without one.
        smooth: see `attribution_map`.
        mirrors: how many judges of the search are the network itself.
    """
    searched = (1 + mirrors) * len(settings.thresholds) if settings else 0
    own = (METHODS[name].passes if name in METHODS else 0 for name in methods)
    perturbed = sum(f.activation_shape[0] if n is None else n for n in own)
    if COPIES[smooth]:
        perturbed = COPIES[smooth] * (len(methods) + perturbed)
    return 1 + mirrors + classes * (len(methods) * searched + perturbed)


@outside_inference_mode
def explain(
    f: Layers,
    x: Tensor,
    methods: Sequence[str],
    targets: Sequence[int] | int = (),
    top_k: int = 1,
    settings: Search | None = None,
    shaping: Shaping = AS_COMPUTED,
    *,
    fixed: bool = False,
    target: Target | None = None,
    contrast: int | None = None,
    judges: Sequence[Judge] = (),
) -> list[Explanation]:
    """Explain one image by several methods and for several classes, with one stem pass.

    Methods that weight A by the same score's gradient share it.

    Args:
        f: the classifier; several that are cut at different layers of one network give one map,
            and the first gives the probabilities.
        x: the input, shape (1, 3, H, W).
        methods: keys of METHODS.
        targets: classes to explain, or one; by default the predicted ones.
        top_k: how many predicted classes.
        settings: search thresholds with these; None for plain maps.
        shaping: how maps are averaged, lowered, smoothed and fused.
        fixed: cut maps at the one threshold of the settings, as other tools do (Table 1).
        target: a score of the network's output, explained in place of classes, see
            aftcli/models/targets.py; a threshold search needs scores in [0, 1].
        contrast: a class B: maps show why each class A and not B, as maps of y^A - y^B; thresholds
            are still searched by the probability of A.
        judges: who else a search asks, see `fine_tune_threshold`.

    Returns:
        One explanation for each method and class, method by method.

    Raises:
        AftError: x is no single image, a class is out of range, a class is contrasted with itself
            or by a method of classes, there is nothing to fix or judge, or see `scaled_map` and
            `fine_tune_threshold`.
    """
    layers = cuts(f)
    if fixed and (settings is None or len(settings.thresholds) != 1):
        raise AftError("a fixed cut needs one threshold: pass settings=Search(thresholds=(T,))")
    if judges and (settings is None or fixed):
        raise AftError("judges take part in a search of thresholds: pass settings, not fixed")
    if target is not None:
        if isinstance(targets, int) or targets or top_k != 1:
            raise AftError("a target replaces the classes: leave targets and top_k out")
        layers = tuple(with_target(each, target) for each in layers)
    first = layers[0]
    check_classes(first)
    seen = [first_activation(each, x, 1) for each in layers]
    (g, activation), *_ = seen
    with torch.no_grad():
        y = first.probabilities(g.head(activation).float())[0]
    classes = _explained(first, y, targets, top_k)
    if contrast is None:
        maps = _maps(seen, classes, x, methods, shaping)
    else:
        maps = _contrasts(first, seen, classes, contrast, x, methods, shaping)
    named = [method for method in methods for _ in classes]
    attribution = torch.cat([each.attribution for each in maps])
    signed: list[Tensor | None] = []
    for each in maps:
        signed += [None] * len(each.attribution) if each.signed is None else wide(each.signed)
    asked = (classes.repeat(len(methods)), y, settings, judges)
    found = _search(first, x, attribution, named, *asked)
    found = [replace(each, signed=s) for each, s in zip(found, signed, strict=True)]
    if contrast is not None:
        other = float(y[contrast])
        found = [replace(each, contrast=contrast, contrast_probability=other) for each in found]
    if fixed:
        found = [replace(each, tft=None, fixed=each.tft) for each in found]
    if len(layers) > 1:
        names = tuple(each.layer_name for each in layers)
        found = [replace(each, layers=names, fuse=shaping.fuse) for each in found]
    cells, zero_level, smooth, _ = shaping
    return [replace(each, cells=cells, zero_level=zero_level, smooth=smooth) for each in found]


def _maps(
    seen: Sequence[Seen], classes: Tensor, x: Tensor, methods: Sequence[str], shaping: Shaping
) -> list[Signed]:
    """Compute the maps of each method for all classes, with one A."""
    count = len(classes)
    x_c = x.expand(count, *x.shape[1:])
    wide_a = [a.expand(count, *a.shape[1:]) for _, a in seen]
    seen_c = [(each.sharing(a, classes), a) for (each, _), a in zip(seen, wide_a, strict=True)]
    return [signed_maps(seen_c, classes, x_c, method, shaping) for method in methods]


def _contrasts(
    f: Classifier,
    seen: Sequence[Seen],
    classes: Tensor,
    other: int,
    x: Tensor,
    methods: Sequence[str],
    shaping: Shaping,
) -> list[Signed]:
    """Compute the maps of y^A - y^B of each method, for each class A."""
    if isinstance(f, Targeted):
        raise AftError("a target is no class, so nothing can be contrasted with it: leave one out")
    class_indices(f, other, 1, x.device)
    if other in classes.tolist():
        name = f.classes.name(other)
        raise AftError(f"{name} is the class explained; contrast it with another one")
    for method in methods:
        if not takes_target(method):
            raise AftError(
                f"{METHODS[method].title} explains one class, not a difference of two; take one of "
                f"{', '.join(name for name in METHODS if takes_target(name))}"
            )
    zero = torch.zeros_like(classes[:1])
    against = [[(contrasted(g, int(c), other), a) for g, a in seen] for c in classes]
    return [signed_maps(each, zero, x, method, shaping) for method in methods for each in against]


@outside_inference_mode
def explain_map(
    f: Classifier,
    x: Tensor,
    attribution: Tensor,
    targets: Sequence[int] | int = (),
    top_k: int = 1,
    settings: Search | None = None,
    judges: Sequence[Judge] = (),
) -> list[Explanation]:
    """Fine-tune the threshold of a map from another tool.

    Args:
        f: the classifier.
        x: the input, shape (1, 3, H, W).
        attribution: I, shape (1, H, W), in [0, 1].
        targets: see `explain`.
        top_k: see `explain`.
        settings: see `explain`.
        judges: see `explain`.
    """
    check_shape(x, 1)
    with torch.no_grad():
        y = f.probabilities(f(x).float())[0]
    classes = _explained(f, y, targets, top_k)
    count = len(classes)
    maps = attribution.expand(count, -1, -1)
    return _search(f, x, maps, ["map"] * count, classes, y, settings, judges)


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
    judges: Sequence[Judge],
) -> list[Explanation]:
    results: list[TftResult | None] = [None] * len(maps)
    if settings:
        owner = torch.zeros_like(classes)
        found = search_threshold(f, x, maps, classes, settings, y[classes], owner, judges)
        results = [found.rows(slice(i, i + 1)) for i in range(len(maps))]
    highest = y.topk(min(3, len(y)))
    likeliest = tuple(zip(highest.indices.tolist(), highest.values.tolist(), strict=True))
    return [
        Explanation(
            method,
            int(c),
            float(y[c]),
            wide(attribution),
            result,
            settings.thresholds if settings else (),
            likeliest=likeliest,
            judges=tuple(judge.name for judge in judges) if settings else (),
        )
        for method, c, attribution, result in zip(methods, classes, maps, results, strict=True)
    ]
