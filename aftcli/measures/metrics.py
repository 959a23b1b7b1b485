"""Formulas of the measures of attribution maps (§5.2).

Formulas act on batches and return one value an image; `Average` is their mean over images and
over processes. Those that run the network take it as `probability_of`, a function from inputs,
shape (N, 3, H, W), to the probability y^c of each one's class, shape (N,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.aggregation import MeanMetric

from aftcli.tft.threshold import SCORE_ROUNDING, rises
from aftcli.tft.threshold import drop as drop  # the zero level is chosen by it

STEPS = 10  # of insertion and deletion: shares 0, 0.1, … 1 of the pixels
ROAD_SHARES = (0.2, 0.4, 0.6, 0.8)  # of the pixels that ROAD removes
NOISE = 0.01  # of ROAD: standard deviation, in units of the normalised input
BLUR = (11, 5.0)  # kernel and sigma, pixels, of what insertion starts from

Probability = Callable[[Tensor], Tensor]


def increase(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return 1[y_hat^c > y^c] (§5.2), whose mean is Average Increase.

    A difference within rounding is no increase (`aftcli.tft.threshold.rises`).

    Args:
        y_hat: probability of class c for the masked image, shape (N,).
        y: the same for the whole image.

    >>> increase(torch.tensor([0.75, 0.5]), torch.tensor([0.5, 0.5]))
    tensor([1., 0.])
    """
    return rises(y_hat, y).float()


def gain(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return max(y_hat^c - y^c, 0) / (1 - y^c), whose mean is Average Gain (Opti-CAM, 2024).

    >>> gain(torch.tensor([0.75, 0.2]), torch.tensor([0.5, 0.5]))
    tensor([0.5000, 0.0000])
    """
    rise = (y_hat - y).clamp(min=0)
    return torch.where(rise > 0, rise / (1 - y), 0)


def area(mask: Tensor) -> Tensor:
    """Return the share of pixels that M_tau, shape (N, H, W), bool, keeps."""
    return mask.float().flatten(1).mean(1)


def complexity(attribution: Tensor) -> Tensor:
    """Return the mean of the map, ||I||_1 / (H W) (ADCC, Poppi et al. 2021).

    Args:
        attribution: I, shape (N, H, W), in [0, 1].
    """
    return attribution.flatten(1).mean(1)


def coherency(attribution: Tensor, of_masked: Tensor) -> Tensor:
    """Return (1 + rho(I(x * I), I)) / 2 with Pearson's rho (ADCC, Poppi et al. 2021).

    Args:
        attribution: I of the image, shape (N, H, W).
        of_masked: I of the image multiplied by I, same class and method.

    Returns:
        In [0, 1], shape (N,); 0 where a map is constant, for which there is no correlation (its
        authors' code gives 0 where a map is not a number).
    """
    one, two = (m.flatten(1).double() for m in (attribution, of_masked))
    one, two = one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True)
    scale = (one.square().sum(1) * two.square().sum(1)).sqrt()
    # A constant map has no more than the rounding of its mean.
    flat = torch.minimum(one.abs().amax(1), two.abs().amax(1)) < 1e-9
    rho = torch.where(flat, -1, (one * two).sum(1) / torch.where(flat, 1, scale))
    return ((1 + rho) / 2).clamp(0, 1).float()


def adcc(coherency: Tensor, complexity: Tensor, drop: Tensor) -> Tensor:
    """Return 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop)) (Poppi et al. 2021).

    A map of all ones has drop 0 and complexity 1, so ADCC 0.

    >>> adcc(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.0]))
    tensor([0.7500])
    """
    parts = torch.stack([coherency, 1 - complexity, 1 - drop])
    return torch.where((parts > 0).all(0), 3 / parts.reciprocal().sum(0), 0)


def arcc(coherency: Tensor, complexity: Tensor, road: Tensor, road_last: Tensor) -> Tensor:
    """Return ADCC with max(road_last - road, 0) for 1 - drop (ARCC, Domeniconi et al. 2026).

    >>> arcc(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([0.75]))
    tensor([0.6000])
    """
    return adcc(coherency, complexity, 1 - (road_last - road).clamp(min=0))


def order_of(attribution: Tensor) -> Tensor:
    """Sort pixels from the highest score down, shape (N, H W); equal ones from the top left."""
    return _graded(attribution).argsort(dim=1, descending=True, stable=True)


def _graded(attribution: Tensor) -> Tensor:
    """Round scores to whole steps, shape (N, H W), so that rounding orders none."""
    return (attribution.flatten(1) / SCORE_ROUNDING).round()


def ranks_of(attribution: Tensor) -> Tensor:
    """Return the place of each pixel in `order_of`, shape (N, H, W), from 0."""
    order = order_of(attribution)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(attribution)


def blurred(x: Tensor) -> Tensor:
    """Blur x, shape (N, 3, H, W), as RISE's authors do: insertion starts from that."""
    from torchvision.transforms.functional import gaussian_blur

    kernel, sigma = BLUR
    size = min(kernel, (min(x.shape[-2:]) - 1) | 1)
    return gaussian_blur(x, [size, size], [sigma, sigma])  # type: ignore[no-any-return]


def _area(
    start: Tensor, attribution: Tensor, goal: Tensor, probability_of: Probability, steps: int
) -> Tensor:
    """Return the area under y^c while start becomes goal, most relevant pixels first."""
    ranks, pixels = ranks_of(attribution)[:, None], attribution[0].numel()
    y = [
        probability_of(torch.where(ranks < round(i / steps * pixels), goal, start))
        for i in range(steps + 1)
    ]
    return torch.trapezoid(torch.stack(y), dx=1 / steps, dim=0)


def insertion(
    x: Tensor, attribution: Tensor, probability_of: Probability, steps: int = STEPS
) -> Tensor:
    """Return the area under y^c while a blurred image becomes x, best pixels first (RISE, 2018).

    Args:
        x: inputs, shape (N, 3, H, W).
        attribution: I, shape (N, H, W).
        probability_of: y^c of inputs of this shape.
        steps: in how many equal parts pixels are shown (RISE: one row of pixels a part).

    Returns:
        In [0, 1], shape (N,); higher is better.
    """
    return _area(blurred(x), attribution, x, probability_of, steps)


def deletion(
    x: Tensor, attribution: Tensor, probability_of: Probability, steps: int = STEPS
) -> Tensor:
    """Return the area under y^c while x becomes the mean colour, best pixels first (RISE, 2018).

    Lower is better; arguments as of `insertion`.
    """
    return _area(x, attribution, torch.zeros_like(x), probability_of, steps)


def energy(attribution: Tensor, region: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the share of the map's sum on the object (energy pointing game, Score-CAM, 2020).

    Args:
        attribution: I, shape (N, H, W), in [0, 1].
        region: the object, shape (N, H, W), bool.
        counted: pixels that count, as of `iou`.

    Returns:
        In [0, 1], shape (N,); 0 for an all-zero map. Higher is better.
    """
    attribution = attribution if counted is None else attribution * counted
    total = attribution.flatten(1).sum(1)
    inside = (attribution * region).flatten(1).sum(1)
    return torch.where(total > 0, inside / total, 0)


def pointing(attribution: Tensor, region: Tensor) -> Tensor:
    """Return 1 where the map's maximum lies on the object (pointing game, Zhang et al. 2016).

    Without their tolerance of 15 pixels. Of equal maxima the first counts; an all-zero map
    points nowhere: 0.
    """
    top, where = _graded(attribution).max(1)
    hit = region.flatten(1).gather(1, where[:, None])[:, 0]
    return (hit & (top > 0)).float()


def iou(mask: Tensor, region: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the intersection over union of a mask and the object, shape (N,).

    Args:
        mask: M_tau, shape (N, H, W), bool.
        region: the object, shape (N, H, W), bool.
        counted: pixels that count, shape (N, H, W), bool; default all. VOC leaves the objects'
            borders out.
    """
    counted = torch.ones_like(mask) if counted is None else counted
    both = (mask & region & counted).flatten(1).sum(1)
    either = ((mask | region) & counted).flatten(1).sum(1)
    return torch.where(either > 0, both / either, 0)


class Average(MeanMetric):
    """The mean of a measure over images, over batches and over processes; undefined ones left out.

    A torchmetrics metric: `update` batch by batch, `compute` reduces over the processes of
    torch.distributed.

    Args:
        measure: a function of this file; default values as they are.

    >>> average_drop = Average(drop)
    >>> average_drop.update(torch.tensor([0.75, 0.2]), torch.tensor([0.5, 0.5]))
    >>> round(float(average_drop.compute()), 4)
    0.3
    """

    def __init__(self, measure: Callable[..., Tensor] | None = None) -> None:
        super().__init__(nan_strategy="ignore")
        self.measure = measure
        self.set_dtype(torch.float64)

    def update(self, *args: Any) -> None:  # noqa: ANN401 - those of the measure
        """Add a batch; arguments as of the measure."""
        (values,) = (self.measure(*args),) if self.measure else args
        known = values.double()[~values.isnan()]
        if len(known):
            super().update(known)


@lru_cache(maxsize=2)
def _laplacian(high: int, wide: int) -> Any:  # noqa: ANN401 - scipy is untyped
    """Build (sum_j w_ij) x_i - sum_j w_ij x_j for each pixel i of a grid, sparse."""
    from scipy import sparse

    places = np.arange(high * wide).reshape(high, wide)
    pairs = [
        (places[:, 1:], places[:, :-1], 1 / 6),
        (places[1:], places[:-1], 1 / 6),
        (places[1:, 1:], places[:-1, :-1], 1 / 12),
        (places[1:, :-1], places[:-1, 1:], 1 / 12),
    ]
    one = np.concatenate([a.ravel() for a, _, _ in pairs])
    two = np.concatenate([b.ravel() for _, b, _ in pairs])
    weight = np.concatenate([np.full(a.size, w) for a, _, w in pairs])
    half = sparse.coo_array((weight, (one, two)), shape=(high * wide, high * wide))
    weights = (half + half.T).tocsr()
    return (sparse.diags_array(weights.sum(1)) - weights).tocsr()


def impute(x: Tensor, missing: Tensor) -> Tensor:
    """Fill missing pixels so that each is the weighted mean of its neighbours.

    Args:
        x: one input, shape (3, H, W).
        missing: shape (H, W), bool; not all.

    Returns:
        x with the missing pixels filled, without noise, shape (3, H, W).
    """
    from scipy.sparse.linalg import splu

    gap = missing.flatten().cpu().numpy()
    if not gap.any():
        return x
    rows = _laplacian(*missing.shape)[gap]
    values = x.flatten(1).cpu().double().numpy()
    known = -(rows[:, ~gap] @ values[:, ~gap].T)
    # The ordering for symmetric matrices keeps the factors small.
    factors = splu(
        rows[:, gap].tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}
    )
    values[:, gap] = factors.solve(known).T
    return torch.from_numpy(values).to(x).view_as(x)


def road(
    x: Tensor,
    attribution: Tensor,
    probability_of: Probability,
    seeds: Sequence[int],
    shares: Sequence[float] = ROAD_SHARES,
    noise: float = NOISE,
) -> Tensor:
    """Return the mean y^c after the best pixels are removed and imputed (ROAD, MoRF).

    Args:
        x: inputs, shape (N, 3, H, W).
        attribution: I, shape (N, H, W).
        probability_of: y^c of inputs of this shape.
        seeds: of each image's noise, so that it depends on nothing else.
        shares: of the pixels that are removed.
        noise: standard deviation of what is added to imputed pixels.

    Returns:
        In [0, 1], shape (N,); lower is better.
    """
    ranks, pixels = ranks_of(attribution), attribution[0].numel()
    added = noise * torch.stack(
        [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
    ).to(x)
    y = []
    for share in shares:
        missing = ranks < round(share * pixels)
        filled = torch.stack([impute(*pair) for pair in zip(x, missing, strict=True)])
        y.append(probability_of(torch.where(missing[:, None], filled + added, filled)))
    return torch.stack(y).mean(0)
