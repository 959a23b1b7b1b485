"""Masked images (§4.1): where thresholds cut a map, what muted pixels show, images in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from aftcli.core.classifier import Classifier
from aftcli.tft.threshold import SCORE_ROUNDING, mask_at, masked_image, threshold_map

BLUR_SIGMA = 10.0  # pixels


def cut_off(attribution: Tensor, tau: Tensor, mode: str = "value") -> Tensor:
    """Return the scores below which thresholds mute, shape (N, |T|).

    They lie a rounding's width below tau, or below the score of its rank, so that a pixel that
    scores just that is kept whatever computed the map.

    Args:
        attribution: I, shape (N, H, W), in [0, 1].
        tau: thresholds, shape (|T|,) for all images or (N, |T|), in [0, 1].
        mode: "value", tau itself (§4.1); "percentile", the score below which the share tau of
            the map's cells lies (the authors' code).
    """
    tau = tau.expand(len(attribution), -1)
    if mode == "value":
        return tau.to(attribution) - SCORE_ROUNDING
    flat = attribution.flatten(1).double()
    # In float32 a tenth is above .1, and its rank would be above a whole one.
    ranks = tau.double().mul(1e6).round() / 1e6 * (flat.shape[1] - 1)
    ordered = flat.sort(1).values
    low, high = ordered.gather(1, ranks.floor().long()), ordered.gather(1, ranks.ceil().long())
    return (low + (high - low) * ranks.frac()).to(attribution) - SCORE_ROUNDING


def _mean_fill(f: Classifier, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _black_fill(f: Classifier, x: Tensor) -> Tensor:
    mean, std = f.preprocessing.channels(x)
    return (-mean / std).expand_as(x)


def _blur_fill(f: Classifier, x: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    # The kernel reaches three sigma, or as far as reflection at the border of a small x allows.
    half = min(int(3 * BLUR_SIGMA), x.shape[-1] - 1, x.shape[-2] - 1)
    return gaussian_blur(x, [2 * half + 1] * 2, [BLUR_SIGMA] * 2)  # type: ignore[no-any-return]


# What stands in place of muted pixels, after normalisation.
FILLS: dict[str, Callable[[Classifier, Tensor], Tensor]] = {
    "mean": _mean_fill,
    "black": _black_fill,
    "blur": _blur_fill,
}


# What multiplies the image: the mask (the paper's text) or the muted map (the authors' code).
MASKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "binary": lambda attribution, cut: mask_at(attribution, cut).to(attribution),
    "soft": threshold_map,
}


def masked_images(
    x: Tensor,
    filled: Tensor,
    attribution: Tensor,
    cut: Tensor,
    owner: list[int],
    pairs: list[tuple[int, int]],
    masking: str,
    batch: int,
) -> Iterator[Tensor]:
    """Make masked images, map by map: nothing of one or its image is copied for each threshold.

    Args:
        x: inputs, shape (M, 3, H, W).
        filled: what muted pixels show, shape (M, 3, H, W).
        attribution: I, shape (N, H, W).
        cut: thresholds, from `cut_off`, shape (N, |T|).
        owner: which input each map is of.
        pairs: (map, threshold) of each, those of a map together.
        masking: a key of MASKINGS.
        batch: how many are made at a time.
    """
    steps = torch.tensor([t for _, t in pairs], dtype=torch.long, device=x.device)
    for start in range(0, len(pairs), batch):
        maps, end = [n for n, _ in pairs[start : start + batch]], 0
        x_hat = x.new_empty(len(maps), *x.shape[1:])
        for n, same in groupby(maps):
            begin, end = end, end + len(list(same))
            at = cut[n, steps[start + begin : start + end]]
            weight, image = MASKINGS[masking](attribution[n], at), owner[n]
            masked_image(x[image], weight, filled[image], out=x_hat[begin:end])
        yield x_hat
