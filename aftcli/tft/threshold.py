"""Thresholds of a map (§4.1, equations 4 to 7), and the result of a search for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from aftcli.core.classifier import Classifier

BLUR_SIGMA = 10.0  # pixels

# Rounding: a network gives the same image slightly different numbers in another batch, on another
# engine, by another number of threads or on another CPU. No comparison may turn on that
# (docs/method/decisions/search.md, Rounding).
SCORE_ROUNDING = 2.0**-20  # of a map in [0, 1]: scores that differ by less are equal

LOG_ODDS_ROUNDING = 1e-4  # of a probability: ten times what engines differed by

MEASURE_ROUNDING = 1e-6  # of a mean of measures in [0, 1]


def slack(y: Tensor) -> Tensor:
    """Return the relative error that a probability may have, same shape.

    An error of LOG_ODDS_ROUNDING in log(y / (1 - y)), and the last bits of y itself.

    Args:
        y: probabilities, in [0, 1].
    """
    return LOG_ODDS_ROUNDING * (1 - y) + 4 * torch.finfo(torch.float32).eps


def rises(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return where y_hat^c is above y^c by more than rounding, bool.

    Args:
        y_hat: probability of class c for the masked image, in [0, 1].
        y: the same for the whole image.

    >>> rises(torch.tensor([0.6, 0.500001, 0.4]), torch.tensor(0.5))
    tensor([ True, False, False])
    """
    return y_hat > y * (1 + slack(y))


def first_maximum(rpi: Tensor, y: Tensor) -> Tensor:
    """Return the argmax over T, shape (N,): of those equal up to rounding the first.

    Args:
        rpi: RPI of each threshold, shape (N, |T|); NaN, not tried, does not count.
        y: y^c of the whole image, shape (N,).
    """
    tried = torch.where(rpi.isnan(), -1, rpi)
    largest = tried.amax(1, keepdim=True)
    y_hat = (1 + largest) * y[:, None]
    # An RPI is infinite where y underflows.
    equal = tried >= largest - (1 + largest) * slack(y_hat)
    return ((tried == largest) | equal).int().argmax(1)


def log_odds_increase(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return log(y_hat / (1 - y_hat)) - log(y / (1 - y)), same shape, in float64.

    Unlike RPI it is as large for networks that are sure of a class as for others. Probabilities
    within a rounding's width of 1 count as this far from it, so that no increase is infinite.

    Args:
        y_hat: probability of class c for the masked image, in [0, 1].
        y: the same for the whole image.

    >>> log_odds_increase(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])).exp()
    tensor([3.0000, 0.3333], dtype=torch.float64)
    """
    finite = torch.finfo(torch.float32)
    ends = finite.tiny, 1 - 4 * finite.eps
    return y_hat.double().clamp(*ends).logit() - y.double().clamp(*ends).logit()


def least_increase(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return the least increase of log-odds over judges, at least 0, shape (N, |T|), in float64.

    Args:
        y_hat: of each judge, shape (N, J, |T|); NaN at thresholds that were not tried.
        y: the same for the whole image, shape (N, J); NaN where a judge does not know the class,
            who is not asked.
    """
    rise = log_odds_increase(y_hat, y[..., None])
    return torch.where(y.isnan()[..., None], torch.inf, rise).amin(1).clamp(min=0)


def first_for_all(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return which threshold raises the log-odds of all judges most, shape (N,).

    Of those whose `least_increase` is equal up to rounding the first; where none helps all judges
    it is the first of T. Of one judge this is Algorithm 1.

    Args:
        y_hat: see `least_increase`.
        y: see `least_increase`.
    """
    least = least_increase(y_hat, y)
    tried = torch.where(least.isnan(), -1, least)
    largest, at = tried.max(1, keepdim=True)
    # The rounding of the judge that gains least there.
    reached = y_hat.gather(2, at[:, None].expand(-1, y.shape[1], -1))[..., 0].double()
    rise = torch.where(y.isnan(), torch.inf, log_odds_increase(reached, y))
    last = reached.gather(1, rise.argmin(1, keepdim=True))
    error = slack(last) / (1 - last).clamp(min=4 * torch.finfo(torch.float32).eps)
    return (tried >= largest - error).int().argmax(1)


def raised(rpi: Tensor, y: Tensor) -> Tensor:
    """Return which thresholds raise the probability by more than rounding, (N, |T|), bool.

    Args:
        rpi: RPI of each threshold, shape (N, |T|); NaN, not tried, does not count.
        y: y^c of the whole image, shape (N,).
    """
    return rpi > slack(y)[:, None]


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
    return torch.where(rise == 0, 0, rise / y)


class Tried(NamedTuple):
    """Average Increase and Average Drop of one t, a share of the maps' mean maximum (§5.2)."""

    share: float
    increase: float
    drop: float


def drop(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return max(y^c - y_hat^c, 0) / y^c (§5.2), whose mean is Average Drop.

    >>> drop(torch.tensor([0.75, 0.2]), torch.tensor([0.5, 0.5]))
    tensor([0.0000, 0.6000])
    """
    fall = (y - y_hat).clamp(min=0)
    # y = 0 happens only where a probability underflows; 0 / 0 is no drop.
    return torch.where(fall > 0, fall / y, 0)


def tried(y_hat: Tensor, y: Tensor, share: float) -> Tried:
    """Measure masked images as §5.2 does.

    Args:
        y_hat: probability of class c for the masked image, shape (N,).
        y: the same for the whole image, shape (N,).
        share: names their t.
    """
    means = [float(each.double().mean()) for each in (rises(y_hat, y), drop(y_hat, y))]
    return Tried(share, *means)


def best_of(all_tried: Sequence[Tried]) -> Tried:
    """Return the largest Average Increase less Average Drop: of those within rounding the first."""
    largest = max(each.increase - each.drop for each in all_tried)
    return next(e for e in all_tried if e.increase - e.drop >= largest - MEASURE_ROUNDING)


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


def threshold_map(attribution: Tensor, cut: Tensor) -> Tensor:
    """I_tau = I where I >= tau, else 0 (eq. 4).

    Args:
        attribution: I, shape (..., H, W).
        cut: from `cut_off`, shape (...).

    Returns:
        I_tau, shape (..., H, W).
    """
    return torch.where(attribution >= cut[..., None, None], attribution, 0)


def mask_of(thresholded: Tensor) -> Tensor:
    """M_tau = 1 where I_tau != 0, else 0 (eq. 5; the paper prints I), bool."""
    return thresholded != 0


def mask_at(attribution: Tensor, cut: Tensor) -> Tensor:
    """M_tau as `mask_of(threshold_map(...))`, without the map between, bool.

    Args:
        attribution: I, shape (..., H, W).
        cut: from `cut_off`, shape (...).
    """
    return (attribution >= cut[..., None, None]) & (attribution != 0)


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


def masked_image(x: Tensor, weight: Tensor, fill: Tensor, out: Tensor | None = None) -> Tensor:
    """x_hat = M_tau * x, elementwise (eq. 6), muted pixels showing the fill.

    Args:
        x: inputs, shape (N, 3, H, W), or of one image (3, H, W).
        weight: M_tau or I_tau, shape (N, H, W), in [0, 1].
        fill: what muted pixels show, in x's shape; zeros are the mean colour.
        out: takes the result, shape (N, 3, H, W).
    """
    return torch.lerp(fill, x, weight[:, None].to(x), out=out)


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


MOST_SHOWN = 8  # images in a notebook


def html_image(image: Image.Image, kind: str = "PNG") -> str:
    """Return a picture as an element of HTML that holds it."""
    held = io.BytesIO()
    image.save(held, kind, quality=90)
    coded = base64.b64encode(held.getvalue()).decode()
    return f'<img src="data:image/{kind.lower()};base64,{coded}" style="max-width: 100%">'


class TftResult(NamedTuple):
    """Result of Algorithm 1 for N images.

    Attributes:
        tau: tau*, the first threshold with the largest RPI (`first_maximum`), shape (N,); where
            judges were asked, the first that raises the log-odds of all most (`first_for_all`).
        rpi: RPI of each threshold, shape (N, |T|).
        probabilities: y_hat^c of each threshold, shape (N, |T|).
        probability: y^c of the whole image, shape (N,).
        attribution: I_tau*, shape (N, H, W), in [0, 1].
        mask: M_tau*, shape (N, H, W), bool.
        judged: y_hat^c of each threshold by each judge, shape (N, J, |T|).
        judged_whole: y^c of the whole image by each judge, shape (N, J); NaN where it does not
            know the class.

    `rpi`, `probabilities` and `judged` are NaN at thresholds that a fast search left out.
    """

    tau: Tensor
    rpi: Tensor
    probabilities: Tensor
    probability: Tensor
    attribution: Tensor
    mask: Tensor
    judged: Tensor = torch.empty(0)
    judged_whole: Tensor = torch.empty(0)

    @property
    def best(self) -> Tensor:
        """Return the index of tau* in T, shape (N,)."""
        if not self.judged.numel():
            return first_maximum(self.rpi, self.probability)
        return first_for_all(*self._of_everybody())

    @property
    def increases(self) -> Tensor:
        """Return each judge's increase of log-odds at tau*, the network's own first, (N, 1 + J)."""
        y_hat, y = self._of_everybody()
        at = self.best[:, None, None].expand(-1, y.shape[1], -1)
        return log_odds_increase(y_hat.gather(2, at)[..., 0], y)

    def _of_everybody(self) -> tuple[Tensor, Tensor]:
        """Return y_hat^c and y^c of the network and its judges, (N, 1 + J, |T|) and (N, 1 + J)."""
        y_hat, y = self.probabilities[:, None], self.probability[:, None]
        if not self.judged.numel():
            return y_hat, y
        return torch.cat([y_hat, self.judged], 1), torch.cat([y, self.judged_whole], 1)

    def rows(self, part: slice) -> TftResult:
        """Take the results of some images."""
        return TftResult(*(field[part] for field in self))

    def __str__(self) -> str:
        """Return a line of numbers for each image."""
        kept = self.mask.flatten(1).float().mean(1)
        columns = (self.tau, self.best, self.probability, kept)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return "\n".join(
            f"tau* = {tau:g}: RPI {float(self.rpi[n, best]):.3f}, probability {y:.3f} → "
            f"{float(self.probabilities[n, best]):.3f}, {area:.1%} kept"
            for n, (tau, best, y, area) in enumerate(rows)
        )

    def _repr_html_(self) -> str:
        """Return the cut maps in grey and the numbers, for notebooks; MOST_SHOWN images at most."""
        rows = []
        lines = str(self).splitlines()
        for attribution, line in zip(self.attribution[:MOST_SHOWN], lines, strict=False):
            grey = attribution.detach().float().mul(255).round().byte().cpu().numpy()
            rows.append(f"<div>{html_image(Image.fromarray(grey))}<br>{line}</div>")
        left = len(lines) - len(rows)
        return "\n".join([*rows, *([f"<div>… and {left} more</div>"] if left else [])])

    @property
    def helps(self) -> Tensor:
        """Tell where a threshold raises the probability by more than rounding, (N,), bool.

        Where judges were asked, tau* must.
        """
        found = raised(self.rpi, self.probability)
        return found.gather(1, self.best[:, None])[:, 0] if self.judged.numel() else found.any(1)
