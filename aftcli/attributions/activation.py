"""Maps of activations beyond their plain sum: Relevance-CAM, Finer-CAM, OM-CAM, fused Layer-CAM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftcli.attributions.canonical import canonical
from aftcli.attributions.decomposition import contrast, named, relevance
from aftcli.core.cam import cells_of, layer_cam, normalise, score_gradient, upsample, weighted_sum
from aftcli.core.classifier import Classifier
from aftcli.core.outputs import class_score, log_probabilities
from aftcli.core.zero_level import without_constant
from aftcli.cutting.cut import CutPoint, cut, cut_points
from aftcli.errors import AftError, first_line


def relevance_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Relevance-CAM: alpha_k = sum_ij R_ij^k, R the relevance of A for c against the others.

    It starts from y^c at c and -y^c / (C - 1) at the other classes and follows z+ down to A, in
    one pass forward and backward through the head.
    """
    activation = without_constant(f, activation)
    r = signed_relevance(f, activation, class_index)
    return weighted_sum(r.sum((2, 3)), activation)


def signed_relevance(f: Classifier, activation: Tensor, class_index: Tensor) -> Tensor:
    """Return R of A, shape (N, K, h, w), for `relevance_cam`; it sums to 0.

    A is without the constant channel of a zero level.
    """
    head = canonical(f, part="head")
    return relevance(f, head, class_index, activation, named(f, "z-plus"), contrast)


NEAREST, CONTRAST = 3, 0.6  # of Finer-CAM: its authors' number of classes, and gamma


def finer_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Finer-CAM: Grad-CAM of `finer_score`, y^c against the classes nearest to c."""
    return weighted_sum(finer_cam_weights(f, activation, class_index, x), activation)


def finer_cam_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return Finer-CAM's alpha, shape (N, K)."""
    return score_gradient(f, activation, class_index, finer_score).mean(cells_of(activation))


def finer_score(logits: Tensor, class_index: Tensor) -> Tensor:
    """Compute y^c - gamma mean_d y^d, shape (N,), d the 3 classes with scores nearest to y^c.

    Zhang et al., CVPR 2025: gamma = .6. Of fewer classes all others are taken.
    """
    if logits.shape[1] == 1:
        raise AftError("finercam compares a class with others; the network has one: use gradcam")
    y = class_score(logits, class_index)
    distance = (logits - y[:, None]).detach().abs()
    distance = distance.scatter(1, class_index[:, None], torch.inf)
    nearest = distance.topk(min(NEAREST, logits.shape[1] - 1), largest=False).indices
    return y - CONTRAST * logits.gather(1, nearest).mean(1)


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
    """OM-CAM: the base map B of `sig_cam`, optimised by I-GOS; I_pre = 1 - M, shape (N, H, W).

    From M = 1 - B, min F(M) over M in [0, 1] (see `Masking.objective`) by steps
    M <- M - a d along the integrated gradient d (see `Masking.direction`), a by a backtracking
    line search: the first of 200, 40, 8, ... with F(M - a d) <= F(M) - 1e-4 a |d|^2. Where none
    is, the search is over, so F never rises and the map is never worse than B.

    This differs from the papers: I-GOS minimises the deletion score alone, we add the insertion
    score (as its authors do in iGOS++, with one mask), because I is what is kept of an image;
    scores are relative to p_c(x), so that lambda weighs the same for a class of low probability;
    the noise is the same for every image. 10 iterations of 10 steps are for a CPU (I-GOS: 15 to
    20 of 20).

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
    this is our reading of it: the base map, shape (N, h, w), before scaling.
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

        Phi(M) = M x + (1 - M) blurred x, M stretched; r = p_c / p_c(x).
        """
        deleted = self._relative(self._mixed(mask, self.x, self.blurred))
        inserted = self._relative(self._mixed(mask, self.blurred, self.x))
        return deleted - inserted + penalty(mask)

    def direction(self, mask: Tensor) -> Tensor:
        """Return the integrated gradient d, (1, u, v), of F's mean over the path k/S M, k = 1..S.

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
        log_p = log_probabilities(self.f(x), self.f.output)
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
    """Blur x by a wide Gaussian, so that the classifier finds nothing in it, (N, 3, H, W)."""
    scale = min(x.shape[-2:]) / 224
    radius = max(round(RADIUS * scale), 1)
    offsets = torch.arange(-radius, radius + 1).to(x)
    weights = (-((offsets / (SIGMA * scale)) ** 2) / 2).exp()
    weights = (weights / weights.sum()).repeat(x.shape[1], 1, 1)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights[:, :, :, None], groups=x.shape[1])
    return F.conv2d(rows, weights[:, :, None], groups=x.shape[1])


GAMMA = 2.0  # the paper's

PLAIN = 2  # the last stages, whose maps are not scaled by tanh: S4 and S5 of the paper's VGG

BATCH = 16  # images with gradients at a time

# Finding the stages takes half a second. The parts hold the stem's own modules, so that training
# them in place changes both; they do not hold the stem, so that it can be collected.
_cut: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()


def layer_cam_fusion(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Fused Layer-CAM: max over stages s of the stretched M_s / max M_s, shallow ones scaled.

    M_s = ReLU(sum_k ReLU(dy^c/dA_s^k) A_s^k) of each stage's last activation A_s; shallow maps are
    scaled by tanh(gamma M_s / max M_s), gamma = 2 (eq. 9), and all fused by an element-wise
    maximum. A stage is a spatial resolution, and its last activation the last one at which the
    network can be cut: before each pooling of a VGG, conv1 after its ReLU and layer1 to layer4 of
    a ResNet. The paper scales S1 to S3 of VGG's five; here all stages but the last two. The last
    stage is layer l; with no stage before it the map is Layer-CAM's.

    Cost: a forward and a backward pass of the network; memory: the activations of 16 images.
    """
    return torch.cat(
        [
            fuse(stage_maps(f, a, c, part), part)
            for a, c, part in zip(
                activation.split(BATCH), class_index.split(BATCH), x.split(BATCH), strict=True
            )
        ]
    )


def fuse(maps: Sequence[Tensor], x: Tensor) -> Tensor:
    """Scale the maps M_s, shape (N, h_s, w_s), shallow first; their maximum, shape (N, H, W)."""
    scaled = [_over_maximum(m) for m in maps]
    shallow = max(len(maps) - PLAIN, 0)
    scaled[:shallow] = [torch.tanh(GAMMA * m) for m in scaled[:shallow]]
    return torch.stack([upsample(m, x) for m in scaled]).amax(0)


def _over_maximum(m: Tensor) -> Tensor:
    highest = m.amax((1, 2), keepdim=True)
    return m / torch.where(highest > 0, highest, 1)


def stage_maps(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> list[Tensor]:
    """Return Layer-CAM's maps M_s, shape (N, h_s, w_s), of all stages, the shallowest first.

    `activation` is looked at only where there is no stage before layer l.
    """
    if f.bypassed:
        raise AftError(
            f"layercam-fusion needs a layer that is the only path to the logits; {f.layer_name} of "
            f"{f.name} is not: use layercam"
        )
    _, _, *cells = activation.shape
    parts = stages(f, (x.shape[-2], x.shape[-1]), (cells[0], cells[1]))
    if not parts:
        return [layer_cam(f, activation, class_index, x)]
    first, *further = parts
    with torch.enable_grad():
        activations = [first(x.detach()).detach().requires_grad_()]
        for part in further:
            # A copy: the next part may begin with an activation that writes into its input.
            activations.append(part(activations[-1].clone()))
        y = class_score(f.head(activations[-1]), class_index)
        gradients = torch.autograd.grad(y.sum(), activations)
    with torch.no_grad():
        return [(g.relu() * a).sum(1).relu() for g, a in zip(gradients, activations, strict=True)]


def stages(f: Classifier, size: tuple[int, int], cells: tuple[int, int]) -> tuple[nn.Module, ...]:
    """Return the parts from x to the first stage's activation, to the second's, ..., to layer l's.

    Args:
        f: the classifier; the parts hold its modules.
        size: height and width of x, pixels.
        cells: (h, w) of layer l's activation.

    Returns:
        One part for each stage; none if there is no stage before l.
    """
    if f.stem not in _cut:
        _cut[f.stem] = _cut_stem(f, size, cells)
    parts = _cut[f.stem]
    return (*parts[:-1], nn.Sequential(parts[-1], f.layer)) if parts else ()


def _cut_stem(
    f: Classifier, size: tuple[int, int], cells: tuple[int, int]
) -> tuple[nn.Module, ...]:
    try:
        points = cut_points(f.stem, size)
    except Exception as error:
        raise AftError(
            f"layercam-fusion finds no stages before {f.layer_name} of {f.name} "
            f"({first_line(error)}); use layercam"
        ) from error
    # cut changes flags of the modules it shares.
    flags = [(m, m.training, getattr(m, "inplace", None)) for m in f.stem.modules()]
    parts: list[nn.Module] = [f.stem]
    try:
        for point in _last_of_each_size(points, cells):
            # A module that runs several times may be behind the next point already.
            with suppress(AftError):
                before, layer, after = cut(parts[-1], point.name)
                parts[-1:] = [nn.Sequential(before, layer), after]
    finally:
        for module, training, inplace in flags:
            module.training = training
            if inplace is not None:
                module.inplace = inplace
    return tuple(parts) if len(parts) > 1 else ()


def _last_of_each_size(points: Sequence[CutPoint], cells: tuple[int, int]) -> list[CutPoint]:
    spatial = [p for p in points if len(p.shape) == 4 and math.prod(p.shape[2:]) > 1]
    last = {p.shape[2:]: p for p in spatial if p.shape[2:] != cells}
    return [p for p in spatial if last.get(p.shape[2:]) is p]
