"""Controls: maps that keep as much of an image as another map, chosen without a search.

A mask that keeps less often raises the probability, whatever it keeps. A map that is said to be
better must therefore beat these at an equal amount. The amount of a map is its mean weight: with
binary masks the share of pixels that it keeps, with soft ones the mean of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.core.cam import normalise, stretch

ROUNDING = 2.0**-20  # of scores in [0, 1], as aftcli.tft.threshold.SCORE_ROUNDING

SHIFTS = tuple(i / 100 for i in range(101))  # t

GAMMAS = tuple(2 ** (i / 16) for i in range(-48, 49))  # g, from 1/8 to 8

SEED = 0


def _lowest(t: float) -> float:
    """Return the lowest score that a shift by t keeps; t = 0 keeps all that is not zero."""
    return t + ROUNDING if t else torch.finfo(torch.float32).tiny


def shifted(cells: Tensor, t: float) -> Tensor:
    """Return S(ReLU(I - t)), shape (N, h, w), in [0, 1]; t = 0 is I.

    Args:
        cells: I at the size that its method gives, shape (N, h, w), in [0, 1].
        t: what is taken from each score, in [0, 1]; one that is above it by rounding is muted.
    """
    if not t:
        return cells
    return normalise(torch.where(cells >= _lowest(t), cells - t, 0))


def shifted_areas(cells: Tensor, size: Sequence[int]) -> Tensor:
    """Return the share of pixels that each shift of SHIFTS keeps, shape (N, |SHIFTS|).

    A stretched pixel is not zero if one of the cells that it lies between is not, so the largest
    of these tells all shifts at once.

    Args:
        cells: I, shape (N, h, w), in [0, 1].
        size: (H, W) of the stretched map.
    """
    largest = _largest(cells, size).flatten(1).sort(1).values.contiguous()
    lowest = largest.new_tensor([_lowest(t) for t in SHIFTS]).expand(len(cells), -1).contiguous()
    return 1 - torch.searchsorted(largest, lowest).float() / largest.shape[1]


def _largest(cells: Tensor, size: Sequence[int]) -> Tensor:
    """Take the largest of the cells that each pixel of a stretched map weighs, (N, H, W)."""
    for axis, side in ((1, size[0]), (2, size[1])):
        count = cells.shape[axis]
        if count != side:
            # As `stretch` computes it, so that both round alike.
            at = (torch.arange(side, dtype=torch.double) + 0.5) * (count / side) - 0.5
            at = at.clamp(0, count - 1).to(cells.device)
            low, high = at.floor().long(), at.ceil().long()
            cells = torch.maximum(cells.index_select(axis, low), cells.index_select(axis, high))
    return cells


def gamma_means(attribution: Tensor) -> Tensor:
    """Return the mean of I^g for each g of GAMMAS, shape (N, |GAMMAS|).

    Args:
        attribution: I, shape (N, H, W), in [0, 1].
    """
    logarithm = attribution.flatten(1).log()
    return torch.stack([(g * logarithm).exp().mean(1) for g in GAMMAS], 1)


def nearest_shift(areas: Tensor, goal: float) -> float:
    """Return the t of SHIFTS whose mean area is nearest; of equal ones the first.

    Args:
        areas: of `shifted_areas`, shape (N, |SHIFTS|).
        goal: the area that is to be met, in [0, 1].
    """
    return SHIFTS[int((areas.double().mean(0) - goal).abs().argmin())]


def equal_gamma(means: Tensor, goal: float) -> float:
    """Return g with a mean of I^g that equals the goal, linear in log g between GAMMAS.

    Args:
        means: of `gamma_means`, shape (N, |GAMMAS|); their average falls as g grows.
        goal: the mean that is to be met, in [0, 1]; what no g reaches gets the nearest one.
    """
    average: list[float] = means.double().mean(0).tolist()
    if goal >= average[0]:
        return GAMMAS[0]
    for i in range(1, len(GAMMAS)):
        if goal >= average[i]:
            share = (average[i - 1] - goal) / (average[i - 1] - average[i])
            return float(GAMMAS[i - 1] * (GAMMAS[i] / GAMMAS[i - 1]) ** share)
    return GAMMAS[-1]


def exchanged(values: Tensor) -> Tensor | None:
    """Give each image the value of another one, shape (N,); None of fewer than two images.

    One cycle through all of them in an order of fixed seed: no image keeps its own.
    """
    count = len(values)
    if count < 2:
        return None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    found = values.clone()
    found[order] = values[order.roll(1)]
    return found


def first_pixels(order: Tensor, share: float, size: Sequence[int]) -> Tensor:
    """Mark so many pixels, the first in an order, shape (H, W), 1 or 0."""
    marked = torch.zeros(len(order))
    marked[order[: round(share * len(order))]] = 1
    return marked.view(*size)


def order_of(scores: Tensor) -> Tensor:
    """Sort pixels from the highest score down, shape (H W,); of equal ones the first is first."""
    return scores.flatten().argsort(descending=True, stable=True)


# One order serves all rows, methods and maskings of an image, or of a batch.
@lru_cache(maxsize=64)
def _random_order(cells: tuple[int, int], size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, *cells, generator=generator, dtype=torch.double)
    return order_of(stretch(scores, size))


@lru_cache(maxsize=4)
def _disc_order(size: tuple[int, int]) -> Tensor:
    down, across = (2 * torch.arange(side) + 1 - side for side in size)
    return order_of(-((down[:, None] * size[1]) ** 2 + (across * size[0]) ** 2))


def random_cells(cells: Sequence[int], size: Sequence[int], share: float, seed: int) -> Tensor:
    """Return the mask of random cells, shape (H, W), 1 or 0, on the CPU.

    Each cell gets a random score; these are stretched like a map, and the highest pixels kept.

    Args:
        cells: (h, w) of the map.
        size: (H, W) of the mask.
        share: of the pixels, in [0, 1]; met to one pixel.
        seed: of the scores.
    """
    (h, w), (high, wide) = cells, size
    return first_pixels(_random_order((h, w), (high, wide), seed), share, size)


def disc(size: Sequence[int], share: float) -> Tensor:
    """Return the mask of a centred disc, an ellipse where H is not W; (H, W), on the CPU.

    Args:
        size: (H, W) of the mask.
        share: of the pixels, in [0, 1]; met to one pixel.
    """
    high, wide = size
    return first_pixels(_disc_order((high, wide)), share, size)


class Control(NamedTuple):
    """The maps of one control.

    Attributes:
        maps: shape (N, H, W), in [0, 1].
        known: for which images there is one, shape (N,), bool, on the CPU.
        flat: the maps are 1 or 0, so that no pixel is the maximum.
    """

    maps: Tensor
    known: Tensor
    flat: bool = False


class Controlled(NamedTuple):
    """The settings of all controls of one method; tensors hold one value an image of a data set.

    Attributes:
        setting: by the row that is controlled, tft or aft: t of the shift, with soft masks g.
        amount: likewise, what the row keeps of each image; NaN where it lacks the image.
        tau: tau* of another image; NaN where there is none; None without a search.
    """

    setting: dict[str, float]
    amount: dict[str, Tensor]
    tau: Tensor | None

    @property
    def masks(self) -> int:
        """The number of controls of an image."""
        return 3 * len(self.setting) + ("tft" in self.setting and self.tau is not None)

    def maps(
        self,
        cells: Tensor,
        plain: Tensor,
        index: Tensor,
        masking: str,
        muted: Callable[[Tensor], Tensor],
    ) -> dict[str, Control]:
        """Make the maps of some images' controls, by name.

        Args:
            cells: I at the size that its method gives, shape (N, h, w), in [0, 1].
            plain: the same stretched, shape (N, H, W).
            index: places in the data set, shape (N,), on the CPU.
            masking: "binary" or "soft".
            muted: gives I_tau of tau, shape (N,).
        """
        found, size = {}, plain.shape[1:]
        for row, value in self.setting.items():
            share = self.amount[row][index]
            known = ~share.isnan()
            if masking == "soft":
                found[f"{row} gamma"] = Control(plain**value, known)
            else:
                found[f"{row} shift"] = Control(stretch(shifted(cells, value), size), known)
            if row == "tft" and self.tau is not None:
                tau = self.tau[index]
                found[f"{row} permuted"] = Control(muted(tau.nan_to_num()), ~tau.isnan())
            shares, seeds = share.nan_to_num().tolist(), index.tolist()
            of_each = [
                random_cells(cells.shape[1:], size, *own) for own in zip(shares, seeds, strict=True)
            ]
            found[f"{row} random"] = Control(torch.stack(of_each).to(plain), known, True)
            discs = torch.stack([disc(size, own) for own in shares])
            found[f"{row} disc"] = Control(discs.to(plain), known, True)
        return found
