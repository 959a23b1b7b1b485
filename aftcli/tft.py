"""Threshold fine-tuning (§4.1, equations 4 to 7, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.core.classifier import Classifier
from aftcli.errors import AftError, nearest

THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))
BATCH = 32  # masked images in one pass of the network
BLUR_SIGMA = 10.0  # pixels


class TftResult(NamedTuple):
    """What Algorithm 1 finds for N images.

    Attributes:
        tau: tau*, the first threshold with the largest RPI, shape (N,).
        rpi: RPI of each threshold, shape (N, |T|).
        probabilities: y_hat^c of each threshold, shape (N, |T|).
        probability: y^c of the whole image, shape (N,).
        attribution: I_tau*, shape (N, H, W), in [0, 1].
        mask: M_tau*, shape (N, H, W), bool.
    """

    tau: Tensor
    rpi: Tensor
    probabilities: Tensor
    probability: Tensor
    attribution: Tensor
    mask: Tensor


def relative_probability_increase(y_hat: Tensor, y: Tensor) -> Tensor:
    """RPI(x_hat, x) = max(y_hat^c - y^c, 0) / y^c (eq. 7).

    Args:
        y_hat: probability of class c for the masked image, in [0, 1].
        y: the same for the whole image.

    >>> relative_probability_increase(torch.tensor([0.75, 0.2]), torch.tensor([0.5, 0.5]))
    tensor([0.5000, 0.0000])
    """
    rise = (y_hat - y).clamp(min=0)
    # y = 0 happens only where a probability underflows; 0 / 0 is no increase.
    return torch.where(rise > 0, rise / y, 0)


def cut_off(attribution: Tensor, tau: Tensor, mode: str = "value") -> Tensor:
    """The scores below which thresholds mute, shape (N, |T|).

    Args:
        attribution: I, shape (N, H, W), in [0, 1].
        tau: thresholds, shape (|T|,) for all images or (N, |T|), in [0, 1].
        mode: "value", tau itself (§4.1); "percentile", the score below which the share tau of
            the map's cells lies (the authors' code).
    """
    tau = tau.to(attribution).expand(len(attribution), -1)
    if mode == "value":
        return tau
    flat = attribution.flatten(1).double()
    ranks = tau.double() * (flat.shape[1] - 1)
    ordered = flat.sort(1).values
    low, high = ordered.gather(1, ranks.floor().long()), ordered.gather(1, ranks.ceil().long())
    return (low + (high - low) * ranks.frac()).to(attribution)


def threshold_map(attribution: Tensor, cut: Tensor) -> Tensor:
    """I_tau = I where I >= tau, else 0 (eq. 4).

    Args:
        attribution: I, shape (N, H, W).
        cut: from `cut_off`, shape (N, |T|).

    Returns:
        I_tau of each threshold, shape (N, |T|, H, W).
    """
    maps = attribution[:, None]
    return torch.where(maps >= cut[..., None, None], maps, 0)


def mask_of(thresholded: Tensor) -> Tensor:
    """M_tau = 1 where I_tau != 0, else 0 (eq. 5; the paper prints I), bool."""
    return thresholded != 0


def _mean_fill(f: Classifier, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _black_fill(f: Classifier, x: Tensor) -> Tensor:
    mean, std = (x.new_tensor(v) for v in (f.preprocessing.mean, f.preprocessing.std))
    return (-mean / std)[:, None, None].expand_as(x)


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
MASKINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "binary": lambda thresholded: mask_of(thresholded).to(thresholded),
    "soft": lambda thresholded: thresholded,
}

MODES = ("value", "percentile")


def masked_image(x: Tensor, weight: Tensor, fill: Tensor) -> Tensor:
    """x_hat = M_tau * x, elementwise (eq. 6), muted pixels showing the fill.

    Args:
        x: inputs, shape (N, 3, H, W).
        weight: M_tau or I_tau, shape (N, H, W), in [0, 1].
        fill: what muted pixels show, shape (N, 3, H, W); zeros are the mean colour.
    """
    weight = weight[:, None]
    return weight * x + (1 - weight) * fill


def check_settings(thresholds: Sequence[float], masking: str, fill: str, mode: str) -> None:
    """Check the settings of a search before anything is computed.

    Raises:
        AftError: thresholds are out of range or order, or a name is unknown.
    """
    if not thresholds or not all(0 <= tau <= 1 for tau in thresholds):
        raise AftError(f"thresholds must lie in [0, 1], got {_listed(thresholds)}")
    if any(b <= a for a, b in zip(thresholds, thresholds[1:], strict=False)):
        raise AftError(f"thresholds must increase, got {_listed(thresholds)}")
    for what, name, known in (
        ("masking", masking, MASKINGS),
        ("fill", fill, FILLS),
        ("threshold mode", mode, MODES),
    ):
        if name not in known:
            raise AftError(f"unknown {what} {name!r}; nearest: {nearest(name, known)}")


def _listed(thresholds: Sequence[float]) -> str:
    return ", ".join(f"{tau:g}" for tau in thresholds) or "none"


@torch.no_grad()
def _scores(
    f: Classifier, x: Tensor, thresholded: Tensor, class_index: Tensor, masking: str, fill: str
) -> Tensor:
    """y_hat^c of each thresholded map, shape (N, |T|), each distinct masked image run once."""
    count, steps = thresholded.shape[:2]
    # Masks shrink as tau grows: two of one image are equal if they keep as many pixels.
    kept = mask_of(thresholded).sum((2, 3)).cpu()
    filled = FILLS[fill](f, x)
    empty_is_shared = fill != "blur"
    first: dict[tuple[int, int], int] = {}
    pairs: list[tuple[int, int]] = []
    source = torch.empty(count, steps, dtype=torch.long)
    for n in range(count):
        for t in range(steps):
            area = int(kept[n, t])
            key = (-1 if area == 0 and empty_is_shared else n, area)
            if key not in first:
                first[key] = len(pairs)
                pairs.append((n, t))
            source[n, t] = first[key]
    image, step = torch.tensor(pairs, device=x.device).mT
    logits = [
        f(masked_image(x[i], MASKINGS[masking](thresholded[i, t]), filled[i]))
        for i, t in zip(image.split(BATCH), step.split(BATCH), strict=True)
    ]
    y_hat = torch.cat(logits).float().softmax(1)
    image_of = torch.arange(count).repeat_interleave(steps)
    chosen = y_hat[source.flatten().to(x.device), class_index[image_of.to(x.device)]]
    return chosen.view(count, steps)


def fine_tune_threshold(
    classifier: Classifier,
    x: Tensor,
    attribution: Tensor,
    class_index: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    masking: str = "binary",
    fill: str = "mean",
    mode: str = "value",
    *,
    probability: Tensor | None = None,
) -> TftResult:
    """Find each image's threshold tau* = argmax RPI (Algorithm 1).

    All thresholds of all images share passes of the network; equal masks are scored once.

    Args:
        classifier: f.
        x: inputs, shape (N, 3, H, W), normalised.
        attribution: I, shape (N, H, W), in [0, 1].
        class_index: c, shape (N,).
        thresholds: T, increasing, in [0, 1].
        masking: "binary", x_hat = M_tau * x (the text), or "soft", x_hat = I_tau * x (the
            authors' code).
        fill: what muted pixels show: "mean", "black" or "blur".
        mode: "value", tau cuts scores; "percentile", tau cuts ranks.
        probability: y^c, shape (N,), where it is known already: saves a pass.

    Returns:
        tau*, RPI and probabilities of all thresholds, I_tau* and M_tau*. Of equal maxima the
        first counts, so where no threshold helps tau* is the first of T.

    Raises:
        AftError: thresholds are out of range or order, a name is unknown, or shapes disagree.
    """
    check_settings(thresholds, masking, fill, mode)
    if attribution.shape != (len(x), *x.shape[2:]) or class_index.shape != (len(x),):
        raise AftError(
            f"attribution must have shape {(len(x), *x.shape[2:])} and class_index "
            f"{(len(x),)}, got {tuple(attribution.shape)} and {tuple(class_index.shape)}"
        )
    tau = attribution.new_tensor(thresholds)
    thresholded = threshold_map(attribution, cut_off(attribution, tau, mode))
    y_hat = _scores(classifier, x, thresholded, class_index, masking, fill)
    if probability is None:
        with torch.no_grad():
            y = classifier(x).float().softmax(1)
        probability = y.gather(1, class_index[:, None]).squeeze(1)
    rpi = relative_probability_increase(y_hat, probability[:, None])
    best = rpi.argmax(1)
    chosen = thresholded[torch.arange(len(x)), best]
    return TftResult(tau[best], rpi, y_hat, probability, chosen, mask_of(chosen))
