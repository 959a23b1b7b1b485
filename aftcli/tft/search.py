"""Threshold fine-tuning: the search for tau* (§4.1, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.core.cam import scaled_map, upsample
from aftcli.core.classifier import Classifier
from aftcli.core.inputs import check_shape, class_indices
from aftcli.core.outputs import class_score
from aftcli.cutting.networks import outside_inference_mode
from aftcli.errors import AftError
from aftcli.settings import THRESHOLDS, Search
from aftcli.tft.judges import Judge, best_step, judged
from aftcli.tft.masking import cut_off
from aftcli.tft.result import TftResult
from aftcli.tft.scoring import judged_masks, masked_probabilities
from aftcli.tft.threshold import mask_of, relative_probability_increase, threshold_map

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


def check_judges(judges: Sequence[Judge], f: Classifier) -> None:
    """Check that judges are no names, and that each knows some of f's classes.

    Raises:
        AftError: one is no Judge with a classifier, or see `Judge.check`.
    """
    found: Sequence[object] = () if isinstance(judges, str | Judge) else judges
    known = [
        hasattr(each, "matching")
        and isinstance(getattr(each, "classifier", None), Classifier | None)
        for each in found
    ]
    if (judges and not found) or not all(known):
        raise AftError(
            f"judges is {judges!r}; give a list of aftcli.Judge: Judge('mirror') is the network on "
            "the mirrored image, Judge(NAME, aftcli.load_classifier(NAME)) another"
        )
    for judge in judges:
        judge.check(f, "judge")


@outside_inference_mode
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


class Tuned(NamedTuple):
    """Result of TFT for one batch by one method, at both sizes.

    Attributes:
        class_index: the class c that is explained, shape (N,): by default the predicted one.
        tft: tau*, RPI and probabilities.
        attribution: I at the activation's size, shape (N, h, w).
        mask: M_tau* at the activation's size, shape (N, h, w), bool.
    """

    class_index: Tensor
    tft: TftResult
    attribution: Tensor
    mask: Tensor


@torch.no_grad()
def tune_batch(
    f: Classifier,
    x: Tensor,
    methods: Sequence[str],
    settings: Search,
    wanted: Tensor | None = None,
    judges: Sequence[Judge] = (),
) -> list[Tuned]:
    """Run TFT on a batch by several methods, with one stem pass.

    Args:
        f: the classifier.
        x: inputs, shape (N, 3, H, W).
        methods: keys of METHODS.
        settings: of the search.
        wanted: the classes that are explained, shape (N,); None for the predicted ones.
        judges: who else the search asks, see `fine_tune_threshold`.

    Returns:
        One result a method. Masks that methods share are scored once.
    """
    count = len(x)
    g, activation = f.at(x)
    p = f.probabilities(g.head(activation).float())
    y, class_index = p.max(1)
    if wanted is not None:
        class_index = wanted.to(x.device)
        y = class_score(p, class_index)
    # The stored map is the one that is searched: I by cells, also for a map of pixels.
    g = g.sharing(activation, class_index)
    maps = [scaled_map(g, activation, class_index, x, method, cells=True) for method in methods]
    low = torch.cat(maps)
    high = upsample(low, x)
    owner = torch.arange(count, device=x.device)
    class_indices, y, owner = (each.repeat(len(methods)) for each in (class_index, y, owner))
    result = search_threshold(f, x, high, class_indices, settings, y, owner, judges)
    cut = cut_off(high, result.tau[:, None], settings.mode)[:, 0]
    mask = mask_of(threshold_map(low, cut))
    return [
        Tuned(class_index, result.rows(part), low[part], mask[part])
        for part in (slice(i, i + count) for i in range(0, len(low), count))
    ]
