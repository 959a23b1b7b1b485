"""Thresholds of a map (§4.1): equations 4 to 7, and the argmax of Algorithm 1 up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rounding: a network gives the same image slightly different numbers in another batch, on another
# engine, by another number of threads or on another CPU. No comparison may turn on that
# (docs/method/decisions/search.md, Rounding).
SCORE_ROUNDING = 2.0**-20  # of a map in [0, 1]: scores that differ by less are equal

LOG_ODDS_ROUNDING = 1e-4  # of a probability: ten times what engines differed by

MEASURE_ROUNDING = 1e-6  # of a mean of measures in [0, 1]


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


def masked_image(x: Tensor, weight: Tensor, fill: Tensor, out: Tensor | None = None) -> Tensor:
    """x_hat = M_tau * x, elementwise (eq. 6), muted pixels showing the fill.

    Args:
        x: inputs, shape (N, 3, H, W), or of one image (3, H, W).
        weight: M_tau or I_tau, shape (N, H, W), in [0, 1].
        fill: what muted pixels show, in x's shape; zeros are the mean colour.
        out: takes the result, shape (N, 3, H, W).
    """
    return torch.lerp(fill, x, weight[:, None].to(x), out=out)


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


def raised(rpi: Tensor, y: Tensor) -> Tensor:
    """Return which thresholds raise the probability by more than rounding, (N, |T|), bool.

    Args:
        rpi: RPI of each threshold, shape (N, |T|); NaN, not tried, does not count.
        y: y^c of the whole image, shape (N,).
    """
    return rpi > slack(y)[:, None]


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


def drop(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return max(y^c - y_hat^c, 0) / y^c (§5.2), whose mean is Average Drop.

    >>> drop(torch.tensor([0.75, 0.2]), torch.tensor([0.5, 0.5]))
    tensor([0.0000, 0.6000])
    """
    fall = (y - y_hat).clamp(min=0)
    # y = 0 happens only where a probability underflows; 0 / 0 is no drop.
    return torch.where(fall > 0, fall / y, 0)


class Tried(NamedTuple):
    """Average Increase and Average Drop of one t, a share of the maps' mean maximum (§5.2)."""

    share: float
    increase: float
    drop: float


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
