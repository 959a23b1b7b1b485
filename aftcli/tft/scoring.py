"""Probabilities of masked images, each distinct one run once (§4.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftcli.core.cam import normalise, upsample
from aftcli.core.classifier import Classifier, ahead
from aftcli.core.inputs import at_once
from aftcli.settings import Search
from aftcli.tft.judges import Judge
from aftcli.tft.masking import FILLS, MASKINGS, masked_images
from aftcli.tft.threshold import mask_at

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
