"""Activation maps optimised by perturbation: Zhang, Rao, Yang, AAAI 2021, with I-GOS.

"A Novel Visual Interpretability for Deep Neural Networks by Optimizing Activation Maps with
Perturbation" is a framework of two stages (AOP): a CAM as base mask, then a perturbation method
that optimises it. Its instance SIGCAM takes a Grad-CAM weighted by the feature map and optimises
it by I-GOS (Qi, Khorram, Li: "Visualizing Deep Networks by Optimizing with Integrated Gradients",
AAAI 2020). No library has either; the authors' research code of I-GOS needs a GPU, draws noise
from the global generator and reads image files, so this is written from the equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aftcli.core.cam import class_score, normalise, score_gradient, upsample, weighted_sum
from aftcli.core.classifier import Classifier, check_several

ITERATIONS = 10
STEPS = 10  # S of the integrated gradient: images with gradients at a time
PIXELS = 8  # of x's side to a cell of the mask: 28 x 28 cells for 224 x 224
LAMBDA_1, LAMBDA_2 = 1.0, 20.0  # I-GOS's weights of the mask's size and of its variation
# Standard deviation of the noise on the path, in units of x: about SIGCAM's authors' 0.25 / (max -
# min). With I-GOS's 0.2 lite0's integrated gradient often was no direction of descent.
NOISE = 0.05
LONGEST, DECAY, SHORTEST, ARMIJO = 200.0, 0.2, 1e-5, 1e-4  # of the line search
RADIUS, SIGMA = 25, 50.0  # of the blur, pixels where the shorter side has 224
SEED = 0


class Optimised(NamedTuple):
    """An optimised mask M, shape (1, u, v), and F(M) at the start and after each iteration."""

    mask: Tensor
    curve: list[float]


@torch.no_grad()
def om_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """OM-CAM: the base map B of `sig_cam`, optimised by I-GOS; I_pre = 1 - M.

    From M = 1 - B, min F(M) over M in [0, 1] (see `Masking.objective`) by steps
    M <- M - a d along the integrated gradient d (see `Masking.direction`), a by a backtracking
    line search: the first of 200, 40, 8, ... with F(M - a d) <= F(M) - 1e-4 a |d|^2. Where none
    is, the search is over, so F never rises and the map is never worse than B.

    Where this is not the papers': I-GOS minimises the deletion score alone, we add the insertion
    score (as its authors do in iGOS++, with one mask), because I is what is kept of an image;
    scores are relative to p_c(x), so that lambda weighs the same for a class of low probability;
    the noise is the same for every image. 10 iterations of 10 steps are for a CPU (I-GOS: 15 to
    20 of 20).

    Args:
        f: the classifier; it is not changed.
        activation: A, shape (N, K, h, w).
        class_index: c, shape (N,).
        x: inputs, shape (N, 3, H, W).

    Returns:
        I_pre, shape (N, H, W), in [0, 1]: the region that is kept.

    Cost: up to 20 STEPS = 200 forward and backward passes an image, and 2 to 22 forward passes an
    iteration for the line search. Images one by one, so that each is the same in any batch, 10
    with gradients at a time: memory does not grow with N.
    """
    base = normalise(sig_cam(f, activation, class_index))
    size = [max(n // PIXELS, 1) for n in x.shape[-2:]]
    base = F.interpolate(base[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    images = zip(x.split(1), class_index.split(1), base.split(1), strict=True)
    masks = [optimise(Masking(f, x_n, c), 1 - b).mask for x_n, c, b in images]
    return upsample(1 - torch.cat(masks), x)


def sig_cam(f: Classifier, activation: Tensor, class_index: Tensor) -> Tensor:
    """Grad-CAM with A as coefficients of the gradient: alpha_k = (1/Z) sum_ij A_ij^k dy^c/dA_ij^k.

    The abstract of SIGCAM says no more than "applying the feature map as weight coefficients";
    this is our reading of it.

    Args:
        f: the classifier.
        activation: A, shape (N, K, h, w).
        class_index: c, shape (N,).

    Returns:
        The base map, shape (N, h, w), before scaling.
    """
    g = score_gradient(f, activation, class_index)
    return weighted_sum((activation * g).mean((2, 3)), activation)


class Masking:
    """One image x and its blurred self, mixed by a mask M, shape (n, u, v): 1 keeps, 0 deletes.

    Args:
        f: the classifier.
        x: one input, shape (1, 3, H, W).
        class_index: c, shape (1,).
    """

    def __init__(self, f: Classifier, x: Tensor, class_index: Tensor) -> None:
        self.f, self.x, self.class_index = f, x, class_index
        self.blurred = blurred(x)
        generator = torch.Generator().manual_seed(SEED)
        noise = torch.randn((STEPS, *x.shape[1:]), generator=generator, dtype=x.dtype)
        self.noise = NOISE * noise.to(x.device)
        self.log_p = self._log_probability(x)

    def objective(self, mask: Tensor) -> Tensor:
        """F(M) = r(Phi(M)) - r(Phi(1 - M)) + lambda_1 mean |1 - M| + lambda_2 TV(M), shape (n,).

        Phi(M) = M x + (1 - M) blurred x, M stretched; r = p_c / p_c(x), p the softmax.
        """
        deleted = self._relative(self._mixed(mask, self.x, self.blurred))
        inserted = self._relative(self._mixed(mask, self.blurred, self.x))
        return deleted - inserted + penalty(mask)

    def direction(self, mask: Tensor) -> Tensor:
        """The integrated gradient d, shape (1, u, v): of F's mean over the path k/S M, k = 1..S.

        d = d/dM [1/S sum_k (r(Phi_k + noise_k) - r(Phi'_k + noise_k)) + penalty(M)], where Phi_k
        mixes x into its blurred self by k/S M, and Phi'_k the blurred one into x.
        """
        ends = ((self.x, self.blurred, 1), (self.blurred, self.x, -1))
        with torch.enable_grad():
            mask = mask.detach().requires_grad_()
            along = torch.arange(1, STEPS + 1).to(mask)[:, None, None] / STEPS
            (d,) = torch.autograd.grad(penalty(mask).sum(), mask)
            for kept, other, sign in ends:
                r = self._relative(self._mixed(along * mask, kept, other) + self.noise)
                d = d + sign * torch.autograd.grad(r.mean(), mask)[0]
        return d

    def _mixed(self, mask: Tensor, kept: Tensor, other: Tensor) -> Tensor:
        m = upsample(mask, self.x)[:, None]
        return m * kept + (1 - m) * other

    def _log_probability(self, x: Tensor) -> Tensor:
        logits = self.f(x)
        check_several(logits.shape[1])
        log_p = logits.log_softmax(1)
        return class_score(log_p, self.class_index.expand(len(x)))

    def _relative(self, x: Tensor) -> Tensor:
        return (self._log_probability(x) - self.log_p).exp()


def penalty(mask: Tensor) -> Tensor:
    """lambda_1 mean |1 - M| + lambda_2 (mean squared step down + to the right), shape (n,)."""
    variation = sum(
        step.square().flatten(1).sum(1) / max(step[0].numel(), 1)
        for step in (mask.diff(dim=1), mask.diff(dim=2))
    )
    return LAMBDA_1 * (1 - mask).abs().mean((1, 2)) + LAMBDA_2 * variation


def optimise(masking: Masking, mask: Tensor) -> Optimised:
    """Descend from a mask M, shape (1, u, v), in [0, 1], until no step is accepted."""
    value = masking.objective(mask)
    curve = [value.item()]
    for _ in range(ITERATIONS):
        d = masking.direction(mask)
        slope, step = ARMIJO * d.square().sum(), LONGEST
        while step >= SHORTEST:
            stepped = (mask - step * d).clamp(0, 1)
            reached = masking.objective(stepped)
            if reached <= value - step * slope:
                break
            step *= DECAY
        else:
            break
        mask, value = stepped, reached
        curve.append(value.item())
    return Optimised(mask, curve)


def blurred(x: Tensor) -> Tensor:
    """X under a wide Gaussian, which the classifier finds nothing in, shape (N, 3, H, W)."""
    scale = min(x.shape[-2:]) / 224
    radius = max(round(RADIUS * scale), 1)
    offsets = torch.arange(-radius, radius + 1).to(x)
    weights = (-((offsets / (SIGMA * scale)) ** 2) / 2).exp()
    weights = (weights / weights.sum()).repeat(x.shape[1], 1, 1)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights[:, :, :, None], groups=x.shape[1])
    return F.conv2d(rows, weights[:, :, None], groups=x.shape[1])
