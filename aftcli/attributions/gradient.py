"""Attributions by the gradient of the score in the input.

Guided Backpropagation (Springenberg et al., ICLR workshop 2015), Integrated Gradients
(Sundararajan, Taly and Yan, ICML 2017), DeepLIFT (Shrikumar, Greenside and Kundaje, ICML 2017),
SmoothGrad (Smilkov et al., 2017), GradientSHAP (Lundberg and Lee, NIPS 2017).

captum does the work, zennit for Guided Backpropagation: captum's knows nn.ReLU alone and passes
over ReLU6 in silence. Both work by hooks, which are set on a copy (canonical.py). Images are
explained one by one, which bounds memory and keeps each image's random numbers its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftcli.attributions.canonical import canonical
from aftcli.core.classifier import Classifier
from aftcli.errors import AftError, AftWarning

BATCH = 16  # images in one pass with gradients

STEPS = 64  # of the path integral; what completeness lacks is in docs/guides/choose-a-method.md

NOISY = 48  # images of SmoothGrad (its paper: 50) and of GradientSHAP

NOISE = 0.15  # standard deviation as a share of the input's range: 10 to 20 % in SmoothGrad's paper

SEED = 0

MISSING = 0.05  # of the change of the score, from which on DeepLIFT says it

# What DeepLIFT's rescale rule knows in captum.
RESCALED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)


def positive(signed: Tensor) -> Tensor:
    """Return I_pre = ReLU of the sum over colours, (N, H, W), of signed attributions."""
    return (signed.sum(1) if signed.dim() == 4 else signed).relu()


def magnitude(signed: Tensor) -> Tensor:
    """Return I_pre, (N, H, W): magnitudes of signed attributions, summed over colours."""
    return signed.abs().sum(1)


@contextmanager
def seeded(device: torch.device, seed: int = SEED) -> Iterator[None]:
    """Draw random numbers from a fixed seed; the program's own generators are left as they were."""
    state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def _each(attribute: Callable[[Tensor, int], Tensor], x: Tensor, class_index: Tensor) -> Tensor:
    """Attribute image by image with gradients on, shape (N, 3, H, W)."""
    with torch.enable_grad():
        pairs = zip(x.split(1), class_index.tolist(), strict=True)
        return torch.cat([attribute(x_n, c).detach() for x_n, c in pairs])


def _in_type_of(f: Classifier, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return f for captum's noisy images, float32 or wider, run in the type of the inputs x."""
    return lambda noisy: f(noisy.to(x.dtype))


def signed_guided_backpropagation(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """Guided Backpropagation: gradients that are negative are stopped at each ReLU.

    R^l = 1[a^l > 0] 1[R^(l+1) > 0] R^(l+1), from R = dy^c/dy^c down to the pixels. One pass with
    gradients a map.
    """
    from zennit.composites import LayerMapComposite
    from zennit.rules import ReLUGuidedBackprop

    network = canonical(f)
    if not any(isinstance(m, nn.ReLU | nn.ReLU6) for m in network.modules()):
        raise AftError(
            f"guidedbackprop needs a network with ReLUs, and {f.name} has none; use smoothgrad or "
            "integratedgradients"
        )
    composite = LayerMapComposite([((nn.ReLU, nn.ReLU6), ReLUGuidedBackprop())])

    def guided(x_n: Tensor, c: int) -> Tensor:
        x_n = x_n.detach().requires_grad_()
        with composite.context(network) as modified:
            return torch.autograd.grad(modified(x_n)[0, c], x_n)[0]

    return _each(guided, x, class_index)


def signed_integrated_gradients(
    f: Classifier, class_index: Tensor, x: Tensor, steps: int = STEPS
) -> Tensor:
    """Integrated Gradients: (x - x') integral_0^1 dy^c(x' + t (x - x')) / dx dt (eq. 1).

    x' is the mean colour, 0 after normalisation, as where TFT mutes. The integral is a
    Gauss-Legendre sum of gradients, BATCH at a time; attributions sum to y^c(x) - y^c(x')
    (completeness) up to its error.
    """
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(f)
    return _each(
        lambda x_n, c: method.attribute(
            x_n, torch.zeros_like(x_n), target=c, n_steps=steps, internal_batch_size=BATCH
        ),
        x,
        class_index,
    )


def signed_deep_lift(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """DeepLIFT: contributions C by the rescale rule against the mean colour, sum C = Delta y^c.

    Each non-linearity takes the multiplier Delta out / Delta in in place of its derivative
    (section 3.5.1). ReLU6(z) is written ReLU(z) - ReLU(z - 6): multipliers add up, so this is its
    rescale rule exactly. Windows of a max pooling are laid side by side, since captum's rule loses
    what cells in several windows contribute. One pass with gradients of two images a map.
    """
    from captum.attr import DeepLift

    network = _without_overlap(canonical(f, split_relu6=True))
    for module in network.modules():
        pointwise = type(module).__module__ == "torch.nn.modules.activation"
        if pointwise and not isinstance(module, RESCALED):
            raise AftError(
                f"deeplift has no rule for the {type(module).__name__} of {f.name}; use "
                "integratedgradients or gradientshap"
            )
    method = DeepLift(network)
    found = _each(
        lambda x_n, c: method.attribute(x_n, torch.zeros_like(x_n), target=c), x, class_index
    )
    _say_what_is_missing(f, class_index, x, found)
    return found


@torch.no_grad()
def _say_what_is_missing(f: Classifier, class_index: Tensor, x: Tensor, found: Tensor) -> None:
    """Warn where contributions do not sum to Delta y^c: captum passes over what it has no rule for.

    Such are products, LayerNorm, GroupNorm, clamp and a softmax within the network.
    """
    *scores, mean = f(torch.cat([x, torch.zeros_like(x[:1])]))
    change = torch.stack(scores).gather(1, class_index[:, None])[:, 0] - mean[class_index]
    missing = ((found.flatten(1).sum(1) - change).abs() / change.abs()).max()
    if missing > MISSING:
        warnings.warn(
            f"deeplift: its contributions to {f.name} miss up to {float(missing):.0%} of the "
            "change of the score: the network has steps that its rule does not know, such as "
            "LayerNorm or products; integratedgradients misses less",
            AftWarning,
            stacklevel=2,
        )


def _without_overlap(network: nn.Module) -> nn.Module:
    """Give each max pooling windows that do not overlap, in place."""
    for name, pool in list(network.named_modules()):
        if type(pool) is nn.MaxPool2d:
            network.set_submodule(
                name, nn.Sequential(_SideBySide(pool), nn.MaxPool2d(pool.kernel_size))
            )
    return network


class _SideBySide(nn.Module):
    """The windows of a max pooling side by side: a cell is repeated for each one that has it."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.window = pool.kernel_size, pool.stride, pool.padding, pool.dilation
        self.ceil = pool.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, K, i k, j l) for i x j windows of k x l cells; padding is the lowest number.

        Args:
            x: shape (N, K, h, w).
        """
        sides = x.new_empty(1, 1, *x.shape[2:], device="meta")
        counts = F.max_pool2d(sides, *self.window, ceil_mode=self.ceil).shape
        pairs = [(v, v) if isinstance(v, int) else v for v in self.window]
        for axis, (kernel, stride, padding, dilation) in enumerate(zip(*pairs, strict=True), 2):
            first = torch.arange(counts[axis], device=x.device)[:, None] * stride - padding
            cells = (first + torch.arange(kernel, device=x.device) * dilation).flatten()
            inside = cells.clamp(0, x.shape[axis] - 1)
            missing = (cells != inside).view(-1, *[1] * (3 - axis))
            x = x.index_select(axis, inside).masked_fill(missing, torch.finfo(x.dtype).min)
        return x


def signed_smooth_grad(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """SmoothGrad: the mean of dy^c/dx at x + N(0, sigma^2), sigma = NOISE (max x - min x).

    NOISY images, BATCH at a time. Its map is the magnitude, as in the paper: the sign of a gradient
    says how to change a pixel, not that it supports c.
    """
    from captum.attr import NoiseTunnel, Saliency

    method = NoiseTunnel(Saliency(_in_type_of(f, x)))

    def smooth(x_n: Tensor, c: int) -> Tensor:
        x_n = x_n.detach()
        with seeded(x.device):
            return method.attribute(  # type: ignore[no-any-return]
                x_n,
                nt_samples=NOISY,
                nt_samples_batch_size=BATCH,
                stdevs=float(NOISE * (x_n.max() - x_n.min())),
                target=c,
                abs=False,
            )

    return _each(smooth, x, class_index)


def signed_gradient_shap(
    f: Classifier, class_index: Tensor, x: Tensor, draws: int = NOISY
) -> Tensor:
    """GradientSHAP: E[(x - x') dy^c(x' + t (x - x')) / dx] over baselines x' and t in [0, 1].

    Baselines are the mean colour, black and white, drawn BATCH at a time. The sum is
    y^c(x) - E[y^c(x')] in expectation.
    """
    from captum.attr import GradientShap

    method = GradientShap(_in_type_of(f, x))
    plain = baselines(f, x)

    def shap(x_n: Tensor, c: int) -> Tensor:
        with seeded(x.device):
            # captum takes all draws of a call in one pass.
            parts = [
                method.attribute(x_n, plain, target=c, n_samples=BATCH)
                for _ in range(draws // BATCH)
            ]
        return torch.stack(parts).mean(0)

    return _each(shap, x, class_index)


def baselines(f: Classifier, x: Tensor) -> Tensor:
    """Return images without anything to see: mean colour, black and white, (3, C, H, W)."""
    mean, std = f.preprocessing.channels(x)
    colours = [torch.zeros_like(mean), -mean / std, (1 - mean) / std]
    return torch.stack([colour.expand(x.shape[1:]) for colour in colours])
