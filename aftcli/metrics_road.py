"""ROAD: remove pixels and fill the gaps from what surrounds them (Rong et al., ICML 2022).

Its noisy linear imputation makes each missing pixel the weighted mean of its eight neighbours:
direct ones count 1/6, diagonal ones 1/12. That is one sparse symmetric system an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aftcli.metrics import ROAD_SHARES, Probability, ranks_of

NOISE = 0.01  # standard deviation, in units of the normalised input


@lru_cache(maxsize=2)
def _laplacian(high: int, wide: int) -> Any:  # noqa: ANN401 - scipy is untyped
    """(sum of the neighbours' weights) x_i - sum_j w_ij x_j for each pixel of a grid, sparse."""
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
    """Mean y^c after the most relevant pixels are removed and imputed (ROAD, MoRF).

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
