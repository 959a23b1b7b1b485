"""Maps from the score of inputs with parts hidden: Occlusion and RISE.

Occlusion: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
RISE: Petsiuk, Das and Saenko, RISE: Randomized Input Sampling for Explanation of Black-box
Models, BMVC 2018. Hidden is 0 after normalisation, the data set's mean colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from aftcli.core.cam import BATCH, wide
from aftcli.core.classifier import Classifier, probabilities

WINDOW = 1 / 7  # of the side: 32 of 224 pixels, one cell of a 7 x 7 activation
STRIDE = 1 / 4  # of the window: 625 passes; a half takes 169, but its map correlates 0.91 only
# N, even: two halves' maps of a photo correlate 0.98 with masks in pairs, 0.77 without.
MASKS = 2000
CELLS = 7  # s, the paper's
KEPT = 0.5  # p = E[M], the paper's; pairs need it
SEED = 0


def occlusion(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Occlusion: how far the score y^c falls when a window that slides over x is hidden.

    Args:
        f: the classifier.
        activation: not looked at.
        class_index: c, shape (N,).
        x: inputs, shape (N, 3, H, W), normalised.

    Returns:
        I_pre, shape (N, H, W): ReLU of `signed_occlusion`.

    Cost: 626 forward passes a map at 224 x 224, 64 at a time.
    """
    return signed_occlusion(f, class_index, x).relu()


@torch.no_grad()
def signed_occlusion(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """The mean of y^c(x) - y^c(x with window W hidden) over the windows W that cover a pixel.

    Zeiler and Fergus §4.2 show the score at each place of the window; captum averages over the
    windows of a pixel, so does this.

    Args:
        f: the classifier.
        class_index: c, shape (N,).
        x: inputs, shape (N, 3, H, W), normalised.

    Returns:
        Signed drops of the score, shape (N, H, W).
    """
    from captum.attr import Occlusion

    height, width = (max(1, round(side * WINDOW)) for side in x.shape[-2:])
    strides = (3, max(1, round(height * STRIDE)), max(1, round(width * STRIDE)))
    maps = [
        Occlusion(f).attribute(
            x_n[None],
            sliding_window_shapes=(3, height, width),
            strides=strides,
            target=c,
            perturbations_per_eval=BATCH,
        )
        for x_n, c in zip(x, class_index.tolist(), strict=True)
    ]
    # The window hides all three channels at once, which each get its whole drop; in float32.
    return torch.cat(maps)[:, 0].to(x)


@torch.no_grad()
def rise(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """RISE: S = 1 / (E[M] N) sum_i p^c(x * M_i) M_i over random masks M_i (eq. 6).

    As in the paper the score is the probability p^c, after softmax. The masks are the same for
    every image.

    Args:
        f: the classifier.
        activation: not looked at.
        class_index: c, shape (N,).
        x: inputs, shape (N, 3, H, W), normalised.

    Returns:
        I_pre = S, shape (N, H, W); no ReLU is needed.

    Cost: 2000 forward passes a map, 64 at a time; 64 masks are held (17 MB stretched, 13 MB cut).
    """
    total = torch.zeros_like(wide(x[:, 0]))
    for masks in rise_masks(total[:, None]):
        for n, c in enumerate(class_index.tolist()):
            p = probabilities(wide(f(x[n] * masks[:, None].to(x))))[:, c]
            total[n] += torch.einsum("i,ihw->hw", p, masks)
    return total / (KEPT * MASKS)


def rise_masks(x: Tensor) -> Iterator[Tensor]:
    """Masks M_i, shape (at most BATCH, H, W), in [0, 1], for inputs of x's size (§3.2).

    Cells of an s x s grid are kept with probability p; the grid is stretched bilinearly to s + 1
    cells a side and an H x W window of it, at random up to one cell from the corner, is taken.
    After each mask comes 1 - M, which p = 1/2 makes as likely, so that the masks of a pixel add
    up to E[M] N, as eq. 6 supposes; where they do not, that error is most of the map.
    """
    height, width = x.shape[-2:]
    cell = (math.ceil(height / CELLS), math.ceil(width / CELLS))
    size = ((CELLS + 1) * cell[0], (CELLS + 1) * cell[1])
    generator = torch.Generator().manual_seed(SEED)
    pairs = MASKS // 2
    kept = torch.rand(pairs, CELLS, CELLS, generator=generator) < KEPT
    kept = torch.stack([kept, ~kept], 1).flatten(0, 1)
    tops, lefts = (
        torch.randint(side, (pairs,), generator=generator).repeat_interleave(2).tolist()
        for side in cell
    )
    for start in range(0, MASKS, BATCH):
        grids = kept[start : start + BATCH, None].to(x)
        large = F.interpolate(grids, size, mode="bilinear", align_corners=False)[:, 0]
        corners = zip(tops[start : start + BATCH], lefts[start : start + BATCH], strict=True)
        yield torch.stack(
            [
                m[top : top + height, left : left + width]
                for m, (top, left) in zip(large, corners, strict=True)
            ]
        )
