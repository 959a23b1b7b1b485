"""Attribution maps I from the activations A of one layer (§2.4, §3.1).

Each method is a function of (classifier, activation, class_index, x) and returns I_pre, shape
(N, h, w), after the outer ReLU, before scaling. Only methods that perturb the input look at x.
The score y^c is the pre-softmax one (docs/method/decisions/network.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aftcli.core.classifier import Classifier
from aftcli.core.head import (
    Score,
    ablated_before_mlp,
    ablated_in_closed_form,
    attention_in_steps,
    gradient_of,
)
from aftcli.core.methods import Method
from aftcli.core.methods import method as find_method
from aftcli.core.outputs import class_score
from aftcli.core.zero_level import above, without_constant
from aftcli.cutting.watched import replaced_until_gradient
from aftcli.errors import AftError

BATCH = 64  # head or network passes at a time


def score_gradient(
    f: Classifier, activation: Tensor, class_index: Tensor, score: Score = class_score
) -> Tensor:
    """Compute dy^c / dA, shape (N, K, h, w): autograd through the head only.

    Where A depends on trained weights, so does the gradient. `score` may take the place of y^c.
    Of a classifier that is `sharing` gradients, a known one is returned.
    """
    trained = torch.is_grad_enabled() and activation.requires_grad
    known = {} if trained else f.known_gradients(activation, class_index)
    if score not in known:
        with torch.enable_grad(), attention_in_steps(trained), replaced_until_gradient():
            leaf = activation if trained else activation.detach().requires_grad_()
            y = score(f.head(leaf), class_index)
            known[score] = gradient_of(f.layer_name, y, leaf, trained)
    return known[score]


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Compute A / b, and 0 where b is 0, in the gradient too."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1), 0)


def wide(values: Tensor) -> Tensor:
    """Return values of half precision in float32, for long sums and decompositions."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _signed_sum(alpha: Tensor, activation: Tensor) -> Tensor:
    return torch.einsum("nk,nk...->n...", alpha, activation)


def cells_of(activation: Tensor) -> tuple[int, ...]:
    """Return the axes of A's cells: h and w, of a video d, h and w."""
    return tuple(range(2, activation.dim()))


def weighted_sum(alpha: Tensor, activation: Tensor) -> Tensor:
    """Compute I_pre = ReLU(sum_k alpha_k A^k), shape (N, h, w) (§2.4)."""
    return _signed_sum(alpha, activation).relu()


def cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """CAM: alpha = the class's weights of the last linear layer."""
    return _signed_cam(f, activation, class_index, x).relu()


def _signed_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    return _signed_sum(cam_weights(f, activation, class_index, x), activation)


def cam_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return CAM's alpha, shape (N, K)."""
    head = f.linear_head
    if head is None or not (head.is_last and head.is_mean):
        raise AftError(
            f"cam needs a head of global average pooling and one linear layer after "
            f"{f.layer_name}; {f.name} has another: use gradcam or layercam"
        )
    return head.weight[class_index]


def grad_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Grad-CAM: alpha_k = (1/Z) sum_ij dy^c/dA_ij^k."""
    return _signed_grad_cam(f, activation, class_index, x).relu()


def _signed_grad_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    return _signed_sum(grad_cam_weights(f, activation, class_index, x), activation)


def grad_cam_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return Grad-CAM's alpha, shape (N, K)."""
    return score_gradient(f, activation, class_index).mean(cells_of(activation))


def grad_cam_plus_plus(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Grad-CAM++: alpha_k = sum_ij s_ij^k ReLU(g_ij^k), s = g^2 / (2 g^2 + (sum_ab A_ab^k) g^3).

    Eq. 19 of its paper for y = exp(score); written as s = 1 / (2 + (sum_ab A_ab^k) g), which is
    the same for g != 0 and does not underflow where gradients are small.
    """
    return weighted_sum(plus_plus_weights(f, activation, class_index, x), activation)


def plus_plus_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return Grad-CAM++'s alpha, shape (N, K)."""
    g = score_gradient(f, activation, class_index)
    denominator = 2 + activation.sum(cells_of(activation), keepdim=True) * g
    s = ratio(torch.ones_like(g), torch.where(g != 0, denominator, 0))
    return (s * g.relu()).sum(cells_of(activation))


def x_grad_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """XGrad-CAM: alpha_k = sum_ij g_ij^k A_ij^k / sum_ij A_ij^k (0 for an empty channel)."""
    return _signed_x_grad_cam(f, activation, class_index, x).relu()


def _signed_x_grad_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    return _signed_sum(x_grad_cam_weights(f, activation, class_index, x), activation)


def x_grad_cam_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return XGrad-CAM's alpha, shape (N, K)."""
    g = score_gradient(f, activation, class_index)
    cells = cells_of(activation)
    return ratio((g * activation).sum(cells), activation.sum(cells))


def layer_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Layer-CAM: I_pre = ReLU(sum_k ReLU(dy^c/dA_ij^k) A_ij^k)."""
    return (layer_cam_weights(f, activation, class_index, x) * activation).sum(1).relu()


def layer_cam_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return Layer-CAM's alpha of each cell, shape (N, K, h, w)."""
    return score_gradient(f, activation, class_index).relu()


def hires_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """HiResCAM: I_pre = ReLU(sum_k dy^c/dA_ij^k A_ij^k)."""
    return _signed_hires_cam(f, activation, class_index, x).relu()


def _signed_hires_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    return (hires_cam_weights(f, activation, class_index, x) * activation).sum(1)


def hires_cam_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return HiResCAM's alpha of each cell, shape (N, K, h, w)."""
    return score_gradient(f, activation, class_index)


def eigen_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Eigen-CAM: A projected on its first right singular vector, whatever the class.

    A singular vector has no sign of its own; the one with a positive sum of the map is taken.
    """
    first = first_component(without_constant(f, activation))
    axes = tuple(range(1, first.dim()))
    return (first * torch.where(first.sum(axes, keepdim=True) < 0, -1, 1)).relu()


def first_component(channels: Tensor) -> Tensor:
    """Project cells, shape (N, K, h, w), on their first right singular vector, (N, h, w)."""
    u, s, _ = torch.linalg.svd(wide(channels).flatten(2).mT, full_matrices=False)
    first: Tensor = u[:, :, 0] * s[:, None, 0]
    return first.view(len(channels), *channels.shape[2:])


@torch.no_grad()
def score_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Score-CAM: alpha_k = softmax over k of the score of x masked by the upsampled A^k.

    Each A^k is scaled to [0, 1] first. Constant channels all give the same empty mask, which is
    scored once.
    """
    alpha = score_cam_weights(f, activation, class_index, x)
    return weighted_sum(alpha, without_constant(f, activation))


def score_cam_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return Score-CAM's alpha, shape (N, K)."""
    plain = without_constant(f, activation)
    alpha: Tensor = masked_scores(f, plain, class_index, x).softmax(1)
    return alpha


def masked_scores(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Score x masked by each channel of A, scaled and upsampled: y^c, shape (N, K)."""
    channels = normalise(activation.flatten(0, 1)).view_as(activation)
    scores = []
    for a, c, x_n in zip(channels, class_index, x, strict=True):
        varied = a.flatten(1).any(1)
        y_empty = f(torch.zeros_like(x_n)[None])[0, c]
        y = y_empty.repeat(len(a))
        masked = (f(x_n * upsample(part, x_n)[:, None])[:, c] for part in a[varied].split(BATCH))
        y[varied] = torch.cat([y_empty[None][:0], *masked])
        scores.append(y)
    return torch.stack(scores)


def ablation_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Ablation-CAM: alpha_k = (y^c - y_k^c) / |y^c|, y_k^c with channel k set to zero.

    |y^c|, where the paper has y^c, keeps maps of negative scores from turning inside out.
    """
    return _signed_ablation(f, activation, class_index, x).relu()


def _signed_ablation(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    return _signed_sum(ablation_weights(f, activation, class_index, x), activation)


def ablation_weights(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Return Ablation-CAM's alpha, shape (N, K)."""
    y = class_score(f.head(activation), class_index)[:, None]
    drop = y - ablated_scores(f, activation, class_index)
    return drop / torch.where(y != 0, y.abs(), 1)


def ablated_scores(f: Classifier, activation: Tensor, class_index: Tensor) -> Tensor:
    """Score A with each channel set to zero: y_k^c, shape (N, K); the stem never runs.

    Args:
        f: the classifier.
        activation: A, shape (N, K, h, w).
        class_index: c, shape (N,).
    """
    if f.linear_head is None:
        return ablated_by_batches(f, activation, class_index)
    if f.linear_head.is_last:
        return ablated_in_closed_form(f.linear_head, activation, class_index)
    return ablated_before_mlp(f.linear_head, activation, class_index)


def ablated_by_batches(f: Classifier, activation: Tensor, class_index: Tensor) -> Tensor:
    """y_k^c by running the head on A with channel k zero, many k at a time: for any head."""
    y = class_score(f.head(activation), class_index)
    scores = []
    for n, (a, c) in enumerate(zip(activation, class_index.tolist(), strict=True)):
        of_image, y_k = f.image(n), y[n].repeat(len(a))
        for part in a.flatten(1).any(1).nonzero().squeeze(1).split(BATCH):
            ablated = a.repeat(len(part), *[1] * a.dim())
            ablated[torch.arange(len(part)), part] = 0
            y_k[part] = of_image.head(ablated)[:, c]
        scores.append(y_k)
    return torch.stack(scores)


def normalise(attribution: Tensor) -> Tensor:
    """Apply S: scale each map, shape (N, h, w), to [0, 1]; a constant one becomes zero (§3.1)."""
    axes = tuple(range(1, attribution.dim()))
    low = attribution.amin(axes, keepdim=True)
    span = attribution.amax(axes, keepdim=True) - low
    return ratio(attribution - low, span)


def upsample(attribution: Tensor, x: Tensor) -> Tensor:
    """Stretch maps, shape (N, h, w), bilinearly to the size of x, of videos to its frames too."""
    return stretch(attribution, x.shape[1 - attribution.dim() :])


def stretch(attribution: Tensor, size: Sequence[int]) -> Tensor:
    """Stretch maps bilinearly between the centres of their cells.

    What lies between equal cells, or beyond the outermost centres, scores exactly what they do.
    F.interpolate rounds it, so that by rank a cut would go through the middle of a flat part.

    Args:
        attribution: maps, shape (N, h, w), or (N, d, h, w) of videos.
        size: (H, W), or (D, H, W).

    Returns:
        Maps of shape (N, H, W), or (N, D, H, W).
    """
    last = attribution.dim() - 1
    for axis, side in enumerate(size, 1):
        cells = attribution.shape[axis]
        if cells != side:
            centres = (torch.arange(side, dtype=torch.double) + 0.5) * (cells / side) - 0.5
            centres = centres.clamp(0, cells - 1).to(attribution.device)
            low = centres.floor().long()
            weight = (centres - low).to(attribution).view(-1, *[1] * (last - axis))
            before = attribution.index_select(axis, low)
            after = attribution.index_select(axis, (low + 1).clamp(max=cells - 1))
            attribution = torch.lerp(before, after, weight)
    return attribution


def to_cells(attribution: Tensor, activation: Tensor) -> Tensor:
    """Average maps to the activation's size, shape (N, h, w), in [0, 1].

    One of the input's size is averaged over what each cell covers, and scaled again.

    Args:
        attribution: I, shape (N, h, w) or (N, H, W), in [0, 1].
        activation: A, shape (N, K, h, w).
    """
    h, w = activation.shape[-2:]
    if attribution.shape[-2:] == (h, w):
        return attribution
    return normalise(F.adaptive_avg_pool2d(attribution[:, None], (h, w)).squeeze(1))


def scaled_map(
    f: Classifier,
    activation: Tensor,
    class_index: Tensor,
    x: Tensor,
    method: str,
    cells: bool = False,
    zero_level: float = 0.0,
    compute: Method | None = None,
) -> Tensor:
    """Compute S(I_pre), in [0, 1]: of a CAM, shape (N, h, w), of other methods (N, H, W) (§3.1).

    Args:
        f: the classifier.
        activation: A = f.activation(x), shape (N, K, h, w).
        class_index: c, shape (N,).
        x: inputs, shape (N, 3, H, W), normalised; CAMs but Score-CAM do not look.
        method: a key of METHODS.
        cells: average a map of pixels over the activation's cells, see `to_cells`.
        zero_level: subtract this share of the map's maximum from its cells first, in [0, 1).
        compute: gives I_pre in place of the method's own function.
    """
    compute = compute or find_method(method).load()
    with torch.no_grad():
        attribution = compute(f, activation, class_index, x)
    if not attribution.isfinite().all():
        raise AftError(
            f"{method} gives a map that is not finite: check the weights of {f.name} and the input"
        )
    if cells:
        attribution = to_cells(normalise(attribution), activation)
    return normalise(above(attribution, zero_level, activation, method))


def map_of(
    f: Classifier,
    activation: Tensor,
    class_index: Tensor,
    x: Tensor,
    method: str,
    cells: bool = False,
    zero_level: float = 0.0,
) -> Tensor:
    """Compute I of inputs whose activation is known, shape (N, H, W), as `attribution_map`."""
    return upsample(scaled_map(f, activation, class_index, x, method, cells, zero_level), x)
