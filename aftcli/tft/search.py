"""Threshold fine-tuning: the search for tau* (§4.1, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftcli.core.cam import normalise, upsample
from aftcli.core.classifier import Classifier, ahead
from aftcli.core.inputs import at_once, check_shape, class_indices
from aftcli.cutting.networks import outside_inference_mode
from aftcli.errors import AftError
from aftcli.settings import THRESHOLDS, Search
from aftcli.tft.judges import Judge, best_step, judged
from aftcli.tft.threshold import (
    FILLS,
    MASKINGS,
    TftResult,
    cut_off,
    mask_at,
    mask_of,
    masked_images,
    relative_probability_increase,
    threshold_map,
)

BATCH = 16  # masked images in one pass of the network


def areas(attribution: Tensor, cut: Tensor) -> Tensor:
    """Count the pixels that each threshold keeps, shape (N, |T|).

    Args:
        attribution: I, shape (N, H, W).
        cut: from `cut_off`, shape (N, |T|).
    """
    counts = []
    for maps, at in zip(attribution.split(BATCH), cut.split(BATCH), strict=True):
        masks = mask_at(maps[:, None], at).flatten(2)
        if masks.device.type == "cpu":  # where a sum takes three times as long
            found = [np.count_nonzero(mask) for mask in masks.flatten(0, 1).numpy()]
            counts.append(torch.tensor(found, dtype=torch.long).view(at.shape))
        else:
            counts.append(masks.sum(2))
    return torch.cat(counts)


class Distinct(NamedTuple):
    """Masked images that must be run, each once.

    Attributes:
        pairs: (map, threshold) of each distinct masked image.
        source: place in `pairs` of each map and threshold, shape (N, |T|); WHOLE of a full mask.
    """

    pairs: list[tuple[int, int]]
    source: Tensor


WHOLE = -1


def distinct_masks(attribution: Tensor, cut: Tensor, owner: list[int], search: Search) -> Distinct:
    """Find equal masks, so that each distinct masked image is run once.

    Masks shrink as tau grows, so two of one map are equal if they keep as many pixels; those
    of different maps of one image are compared. Empty masks of all images give the same masked
    image, unless it shows the image blurred. Args as of `masked_probabilities`.
    """
    masking, share_empty = search.masking, search.fill != "blur"
    steps = range(cut.shape[1])
    # The only copy from the device: it decides which masked images are packed into batches.
    kept = areas(attribution, cut).tolist()
    whole = attribution[0].numel() if masking == "binary" else -1
    pairs: list[tuple[int, int]] = []
    known: dict[tuple[int, int], list[int]] = {}
    source = torch.full(cut.shape, WHOLE, dtype=torch.long)
    for n, image in enumerate(owner):
        for t in steps:
            area = kept[n][t]
            if area == whole:
                continue
            alike = known.setdefault((WHOLE if share_empty and not area else image, area), [])
            for place in alike:
                if (
                    pairs[place][0] == n
                    or not area
                    or _same(attribution, cut, masking, (n, t), pairs[place])
                ):
                    source[n, t] = place
                    break
            else:
                source[n, t] = len(pairs)
                alike.append(len(pairs))
                pairs.append((n, t))
    return Distinct(pairs, source)


def _same(attribution: Tensor, cut: Tensor, masking: str, *at: tuple[int, int]) -> bool:
    return torch.equal(*(MASKINGS[masking](attribution[n], cut[n, t]) for n, t in at))


@torch.no_grad()
def masked_probabilities(
    f: Classifier,
    x: Tensor,
    attribution: Tensor,
    cut: Tensor,
    class_index: Tensor,
    y: Tensor,
    owner: Tensor,
    search: Search,
    ask: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return y_hat^c of each threshold of each map, (N, |T|); equal masks are scored once.

    Args:
        f: the classifier.
        x: inputs, shape (M, 3, H, W).
        attribution: I, shape (N, H, W).
        cut: thresholds, from `cut_off`, shape (N, |T|), in any order.
        class_index: c, shape (N,).
        y: y^c of the whole image, shape (N,).
        owner: which input each map is of, shape (N,).
        search: gives masking and fill.
        ask: gives probabilities of masked images, where another network than f is asked.
    """
    owners = owner.tolist()
    pairs, source = distinct_masks(attribution, cut, owners, search)
    filled, of_maps = FILLS[search.fill](f, x), (attribution, cut, owners, pairs)
    made = masked_images(x, filled, *of_maps, search.masking, at_once(f.engine, x, BATCH))

    def passed(x_hat: Tensor) -> Tensor:
        with torch.no_grad():  # which each thread has of its own
            return ask(x_hat) if ask else f.probabilities(f(x_hat).float())

    rows = [*(map(passed, made) if ask else ahead(f, passed, made))]
    if not rows:
        return y[:, None].repeat(1, cut.shape[1])
    source = source.to(x.device)
    y_hat = torch.cat(rows)[source.clamp(min=0), class_index[:, None]]
    # A mask that keeps everything changes nothing: exactly y, not y up to rounding.
    return torch.where(source == WHOLE, y[:, None], y_hat)


@torch.no_grad()
def judged_masks(
    judge: Judge,
    f: Classifier,
    x: Tensor,
    attribution: Tensor,
    cut: Tensor,
    class_index: Tensor,
    y: Tensor,
    owner: Tensor,
    search: Search,
) -> Tensor:
    """Return the judge's p(c | x_hat), shape (N, |T|); equal masks are asked about once.

    Args:
        judge: who is asked.
        f: the classifier that x is an input of.
        x: inputs, shape (M, 3, H, W).
        attribution: I, shape (N, H, W).
        cut: thresholds, from `cut_off`, shape (N, |T|).
        class_index: c, a class of f, shape (N,).
        y: the judge's p(c | x) of each map, shape (N,); NaN where it does not know class c.
        owner: which input each map is of, shape (N,).
        search: gives masking and fill.
    """
    theirs = judge.matching(f).to(class_index.device)[class_index]
    known = (theirs >= 0).nonzero()[:, 0]
    found = y.new_full(cut.shape, torch.nan)
    if len(known):
        found[known] = masked_probabilities(
            f,
            x,
            attribution[known],
            cut[known],
            theirs[known],
            y[known],
            owner[known],
            search,
            partial(judge.probabilities, f),
        )
    return found


def level_probabilities(
    f: Classifier,
    x: Tensor,
    signed: Tensor,
    levels: Tensor,
    class_index: Tensor,
    y: Tensor,
    fill: str = "mean",
) -> Tensor:
    """Return y_hat^c of images that the support of S - t masks, of each t, shape (N, T).

    The support is that of the map as it is shown: ReLU, scaled to [0, 1], stretched. The stretch
    comes after the ReLU, so each t is a map of its own.

    Args:
        f: the classifier.
        x: inputs, shape (N, 3, H, W).
        signed: S, a map before its ReLU, shape (N, h, w).
        levels: t, in the unit of S, shape (T,).
        class_index: c, shape (N,).
        y: y^c of the whole image, shape (N,).
        fill: what muted pixels show.
    """
    cells = (signed[:, None] - levels.to(signed)[:, None, None]).relu().flatten(0, 1)
    attribution = upsample(normalise(cells), x)
    owner = torch.arange(len(x), device=x.device).repeat_interleave(len(levels))
    above_zero = attribution.new_zeros(len(attribution), 1)
    of_maps = (class_index[owner], y[owner], owner)
    y_hat = masked_probabilities(f, x, attribution, above_zero, *of_maps, Search(fill=fill))
    return y_hat.view(len(x), len(levels))


# Steps of T, shape (N, k), to y_hat^c of the network and each judge, shape (N, 1 + J, k).
Score = Callable[[Tensor], Tensor]


def every_threshold(score: Score, y: Tensor, count: int) -> Tensor:
    """Score all of T, y_hat^c of shape (N, 1 + J, |T|): Algorithm 1."""
    return score(torch.arange(count, device=y.device).repeat(len(y), 1))


def coarse_to_fine(score: Score, y: Tensor, count: int) -> Tensor:
    """Score some of T, y_hat^c of shape (N, 1 + J, |T|), NaN elsewhere.

    A coarse part of T comes first. Then the stride is halved each time, and both sides of the best
    so far are scored. This finds tau* where what is maximised has one prominent peak.
    """
    y_hat = y.new_full((*y.shape, count), torch.nan)
    stride = 1 << max((count - 1) // 4, 1).bit_length() - 1
    coarse = sorted({*range(0, count, stride), count - 1})
    steps = torch.tensor(coarse, device=y.device).repeat(len(y), 1)
    while True:
        y_hat.scatter_(2, steps[:, None].expand(-1, y.shape[1], -1), score(steps))
        if stride == 1:
            return y_hat
        stride //= 2
        best = best_step(y_hat, y)
        # At an end of T there is one side only; it is scored once.
        low = torch.where(best < stride, best + stride, best - stride)
        high = torch.where(best + stride >= count, best - stride, best + stride)
        steps = torch.stack([low, high], 1).clamp(0, count - 1)


SEARCHES: dict[str, Callable[[Score, Tensor, int], Tensor]] = {
    "exact": every_threshold,
    "fast": coarse_to_fine,
}


def fine_tune_threshold(
    classifier: Classifier,
    x: Tensor,
    attribution: Tensor,
    class_index: Tensor | int,
    thresholds: Sequence[float] = THRESHOLDS,
    masking: str = "binary",
    fill: str = "mean",
    mode: str = "value",
    *,
    probability: Tensor | None = None,
    owner: Tensor | None = None,
    search: str = "exact",
    judges: Sequence[Judge] = (),
) -> TftResult:
    """Find each image's threshold tau* = argmax RPI (Algorithm 1).

    All thresholds of all images share passes of the network; equal masks are scored once. With
    judges tau* pleases not only the network that is explained: it is the threshold with the
    largest of the least increases of log-odds over the network and its judges (`first_for_all`).

    Args:
        classifier: f.
        x: inputs, shape (N, 3, H, W), normalised.
        attribution: I, shape (N, H, W), in [0, 1].
        class_index: c, shape (N,), of each map; a number for one map.
        thresholds: T, increasing, in [0, 1].
        masking: "binary", x_hat = M_tau * x (the text), or "soft", x_hat = I_tau * x (the
            authors' code).
        fill: what muted pixels show: "mean", "black" or "blur".
        mode: "value", tau cuts scores; "percentile", tau cuts ranks.
        probability: y^c, shape (N,), of each map, if already known: saves a pass.
        owner: index of each map's input, shape (N,), if several maps (of other methods or
            classes) share inputs: equal masks of one input are scored once. Default one each.
        search: "exact", all of T, or "fast", some of T, coarse to fine.
        judges: who else is asked, of `load_judges`. One that does not know a class is not asked
            about it.

    Returns:
        tau*, RPI and probabilities of all thresholds, I_tau* and M_tau*. Of maxima that are
        equal up to rounding the first counts, so where no threshold helps tau* is the first of T.

    Raises:
        AftError: thresholds are out of range or order, a name is unknown, shapes disagree, a
            class is out of range, the network has one output only, or a judge knows none of its
            classes.
    """
    settings = Search(tuple(thresholds), masking, fill, mode, search)
    given = (probability, owner, judges)
    return search_threshold(classifier, x, attribution, class_index, settings, *given)


def _check_unit(f: Classifier | Judge, y: Tensor) -> None:
    """Check that probabilities lie in [0, 1]; a target's scores may not."""
    wrong = y[(y < -1e-6) | (y > 1 + 1e-6)]
    if len(wrong):
        raise AftError(
            f"a threshold search needs scores in [0, 1], and {f.name} gives "
            f"{float(wrong[0]):.4g}; let its target return a sigmoid or softmax, or search none"
        )


@outside_inference_mode
def check_judges(judges: Sequence[Judge], f: Classifier) -> None:
    """Check that judges are no names, and that each knows some of f's classes.

    Raises:
        AftError: one is no Judge with a classifier, or see `Judge.check`.
    """
    found: Sequence[object] = () if isinstance(judges, str | Judge) else judges
    known = [isinstance(getattr(each, "classifier", ""), Classifier | None) for each in found]
    if (judges and not found) or not all(known):
        raise AftError(
            f"judges is {judges!r}; give a list of aftcli.Judge: Judge('mirror') is the network on "
            "the mirrored image, Judge(NAME, aftcli.load_classifier(NAME)) another"
        )
    for judge in judges:
        judge.check(f, "judge")


def search_threshold(
    f: Classifier,
    x: Tensor,
    attribution: Tensor,
    class_index: Tensor | int,
    search: Search,
    probability: Tensor | None = None,
    owner: Tensor | None = None,
    judges: Sequence[Judge] = (),
) -> TftResult:
    """Find each image's threshold: `fine_tune_threshold` with its settings as one `Search`."""
    check_shape(x)
    check_judges(judges, f)
    owner = torch.arange(len(x), device=x.device) if owner is None else owner
    count = len(owner)
    if attribution.shape != (count, *x.shape[2:]):
        raise AftError(
            f"attribution must have shape {(count, *x.shape[2:])}, got {tuple(attribution.shape)}"
        )
    classes = class_indices(f, class_index, count, attribution.device)
    cut = cut_off(attribution, attribution.new_tensor(search.thresholds), search.mode)
    if probability is None:
        with torch.no_grad():
            y = f.probabilities(f(x).float())
        probability = y[owner, classes]

    whole = [probability, *(judged(judge, f, x, classes, owner) for judge in judges)]
    asking: list[Callable[..., Tensor]] = [
        masked_probabilities,
        *(partial(judged_masks, judge) for judge in judges),
    ]

    def score(steps: Tensor) -> Tensor:
        masks = (f, x, attribution, cut.gather(1, steps), classes)
        pairs = zip(asking, whole, strict=True)
        return torch.stack([ask(*masks, y, owner, search) for ask, y in pairs], 1)

    y = torch.stack(whole, 1)
    y_hat = SEARCHES[search.search](score, y, len(search.thresholds))
    if len(search.thresholds) > 1:
        everybody: tuple[Classifier | Judge, ...] = (f, *judges)
        for i, each in enumerate(everybody):
            _check_unit(each, torch.cat([y[:, i, None], y_hat[:, i]], 1))
    best = best_step(y_hat, y)
    chosen = threshold_map(attribution, cut.gather(1, best[:, None]).squeeze(1))
    tau = attribution.new_tensor(search.thresholds)[best]
    rpi = relative_probability_increase(y_hat[:, 0], y[:, :1])
    maps = (chosen, mask_of(chosen))
    return TftResult(tau, rpi, y_hat[:, 0], probability, *maps, y_hat[:, 1:], y[:, 1:])
