"""Rounding: differences too small to decide anything (docs/decisions.md, Rounding).

A network gives the same image slightly different numbers in another batch, on another engine, by
another number of threads or on another CPU. No comparison may turn on that.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORE = 2.0**-20  # of a map in [0, 1]: scores that differ by less are equal

LOG_ODDS = 1e-4  # of a probability: ten times what engines differed by

MEASURE = 1e-6  # of a mean of measures in [0, 1]


def slack(y: Tensor) -> Tensor:
    """Return the relative error that a probability may have, same shape.

    An error of LOG_ODDS in log(y / (1 - y)), and the last bits of y itself.

    Args:
        y: probabilities, in [0, 1].
    """
    return LOG_ODDS * (1 - y) + 4 * torch.finfo(torch.float32).eps


def rises(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return where y_hat^c is above y^c by more than rounding, bool.

    Args:
        y_hat: probability of class c for the masked image, in [0, 1].
        y: the same for the whole image.

    >>> rises(torch.tensor([0.6, 0.500001, 0.4]), torch.tensor(0.5))
    tensor([ True, False, False])
    """
    return y_hat > y * (1 + slack(y))
