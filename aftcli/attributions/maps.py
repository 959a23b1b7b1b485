"""Attribution maps I of one layer or several, as their method gives them or smoothed (§2.4, §3.1).

Fused maps: torchcam's maximum of the layers' maps, and the product that Domeniconi et al., "How to
evaluate and refine your CAM" (arXiv 2605.14641, RefineCAM), take. Smoothing by copies and by
components is pytorch-grad-cam's, by noise that of Smooth Grad-CAM++ (Omeiza et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.attributions import activation as beyond
from aftcli.attributions.gradient import NOISE
from aftcli.core import cam
from aftcli.core.cam import cells_of, first_component, normalise, scaled_map, stretch, upsample
from aftcli.core.classifier import Classifier
from aftcli.core.head import Score
from aftcli.core.inputs import class_indices, first_activation
from aftcli.core.methods import METHODS, Method, method
from aftcli.core.outputs import class_score
from aftcli.core.zero_level import without_constant
from aftcli.cutting.networks import outside_inference_mode
from aftcli.errors import AftError, check_name
from aftcli.models.targets import Target, Targeted, with_target
from aftcli.settings import AS_COMPUTED, Shaping

Layers = Classifier | Sequence[Classifier]  # one network, cut at a layer or at several

Seen = tuple[Classifier, Tensor]  # a classifier for some images, and their A

# alpha of each CAM that is a weighted sum of channels: shape (N, K), or (N, K, h, w) by cell.
WEIGHTS: dict[str, Method] = {
    "cam": cam.cam_weights,
    "gradcam": cam.grad_cam_weights,
    "gradcam++": cam.plus_plus_weights,
    "scorecam": cam.score_cam_weights,
    "ablationcam": cam.ablation_weights,
    "layercam": cam.layer_cam_weights,
    "xgradcam": cam.x_grad_cam_weights,
    "hirescam": cam.hires_cam_weights,
    "finercam": beyond.finer_cam_weights,
}

# The score whose gradient in A each of these takes.
SCORES: dict[str, Score] = {
    "gradcam": class_score,
    "gradcam++": class_score,
    "layercam": class_score,
    "xgradcam": class_score,
    "hirescam": class_score,
    "finercam": beyond.finer_score,
}

FACTORS = (0.9, 1.0, 1.1)  # of the input's copies

NOISY = 8  # copies whose gradients are averaged (torchcam: 4)

SEED = 0


def eigen_smoothed(
    name: str, f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor
) -> Tensor:
    """Project alpha_k A^k, centred by channel, on its first principal component; (N, h, w).

    It takes the place of the sum over k. A component has no sign: it gets the sign that agrees with
    the sum. pytorch-grad-cam takes either sign.
    """
    plain = without_constant(f, activation)
    alpha = WEIGHTS[name](f, activation, class_index, x)[:, : plain.shape[1]]
    cells = cells_of(plain)
    weighted = alpha.view(*alpha.shape, *[1] * (plain.dim() - alpha.dim())) * plain
    first = first_component(weighted - weighted.mean(cells, keepdim=True))
    agreement = (first * weighted.sum(1)).sum([axis - 1 for axis in cells], keepdim=True)
    return (first * torch.where(agreement < 0, -1, 1)).relu()


def augmented(
    name: str, f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor
) -> Tensor:
    """Average the scaled maps of x and its mirror image, each times .9, 1 and 1.1.

    The shape is the map's. This costs six maps, with a pass of the stem for each.
    """
    maps = []
    for mirrored in (False, True):
        for factor in FACTORS:
            z = factor * (x.flip(-1) if mirrored else x)
            found = scaled_map(*f.at(z), class_index, z, name)
            maps.append(found.flip(-1) if mirrored else found)
    return torch.stack(maps).mean(0)


@torch.no_grad()
def denoised(
    name: str, f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor
) -> Tensor:
    """Compute a method's I_pre from A of x and the mean gradient at x + N(0, sigma^2), (N, h, w).

    sigma = NOISE (max x - min x), as in SmoothGrad. The noise is the same for every image, so that
    an image has the same map in any batch. torchcam averages the gradient's powers instead, and
    takes A of the last copy. This costs NOISY passes with gradients.
    """
    generator = torch.Generator().manual_seed(SEED)
    low, high = (
        side(x, tuple(range(1, x.dim())), keepdim=True) for side in (torch.amin, torch.amax)
    )
    gradient = torch.zeros_like(activation)
    for _ in range(NOISY):
        noise = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device)
        near = f.at(x + NOISE * (high - low) * noise)
        gradient += cam.score_gradient(*near, class_index, SCORES[name]) / NOISY
    smoothed = f.sharing(activation, class_index)
    smoothed.known_gradients(activation, class_index)[SCORES[name]] = gradient
    return METHODS[name].load()(smoothed, activation, class_index, x)


# Each gives a function that takes the place of a method's.
SMOOTHINGS: dict[str, Callable[[str], Method] | None] = {
    "none": None,
    "aug": lambda name: partial(augmented, name),
    "eigen": lambda name: partial(eigen_smoothed, name),
    "noise": lambda name: partial(denoised, name),
}

# Maps of an image that a way needs beside its own, or in place of it.
COPIES = {"none": 0, "eigen": 0, "aug": 2 * len(FACTORS), "noise": NOISY}


# What a way needs that these methods have; other ways smooth every method.
NEEDS: dict[str, tuple[Collection[str], str]] = {
    "eigen": (WEIGHTS, "is no weighted sum of channels, so it has no principal component"),
    "noise": (SCORES, "takes no gradient by the activation, which noise could smooth"),
}


def can_smooth(smooth: str, name: str) -> bool:
    """Tell if a method's maps can be smoothed in this way."""
    return smooth not in NEEDS or name in NEEDS[smooth][0]


def smoothed_by(smooth: str) -> str:
    """Say which methods a way smooths."""
    return f"--smooth {smooth} takes {', '.join(NEEDS[smooth][0])}, --smooth aug every method"


def check_smooth(smooth: str, name: str) -> None:
    """Check that a method's maps can be smoothed in this way.

    Raises:
        AftError: the way is unknown, or needs what the method has not.
    """
    check_name("smoothing", smooth, SMOOTHINGS)
    if not can_smooth(smooth, name):
        raise AftError(f"{method(name).title} {NEEDS[smooth][1]}; {smoothed_by(smooth)}")


class Signed(NamedTuple):
    """Maps I, and what they were before the ReLU.

    Attributes:
        attribution: I, shape (N, H, W), in [0, 1].
        signed: shape (N, H, W), in [-1, 1], the largest magnitude 1: positive speaks for the class;
            None where the method has no sign, or its map was changed afterwards.
    """

    attribution: Tensor
    signed: Tensor | None


def signed_maps(
    seen: Sequence[Seen],
    class_index: Tensor,
    x: Tensor,
    name: str,
    shaping: Shaping = AS_COMPUTED,
) -> Signed:
    """Compute maps as `map_of_layers` does, and their signs where they cost nothing more."""
    before = METHODS[name].load_before_relu() if name in METHODS else None
    is_changed = len(seen) > 1 or shaping._replace(fuse=AS_COMPUTED.fuse) != AS_COMPUTED
    if before is None or is_changed:
        return Signed(map_of_layers(seen, class_index, x, name, shaping), None)
    kept: list[Tensor] = []

    def compute(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
        kept.append(before(f, activation, class_index, x))
        return kept[0].relu()

    check_explains(seen, x, name)
    maps = upsample(scaled_map(*seen[0], class_index, x, name, compute=compute), x)
    return Signed(maps, upsample(symmetric(kept[0]), x))


def symmetric(signed: Tensor) -> Tensor:
    """Divide each map, shape (N, h, w), by its largest magnitude; a map of zeros stays zero."""
    most = signed.abs().amax(tuple(range(1, signed.dim())), keepdim=True)
    return torch.where(most > 0, signed / torch.where(most > 0, most, 1), 0)


def layer_map(
    seen: Seen,
    class_index: Tensor,
    x: Tensor,
    name: str,
    shaping: Shaping = AS_COMPUTED,
) -> Tensor:
    """Compute the map of one layer: `scaled_map`, smoothed or not."""
    check_smooth(shaping.smooth, name)
    smoothed = SMOOTHINGS[shaping.smooth]
    compute = smoothed(name) if smoothed else None
    return scaled_map(*seen, class_index, x, name, shaping.cells, shaping.zero_level, compute)


FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda maps: maps.amax(0),
    "product": lambda maps: maps.prod(0),
}


def fused(maps: Sequence[Tensor], fuse: str = "max") -> Tensor:
    """Stretch maps to the size of the largest, combine them cell by cell and scale to [0, 1].

    Args:
        maps: one of each layer, shape (N, h, w), in [0, 1]; a single one stays as it is.
        fuse: a key of FUSIONS.
    """
    check_name("fusion", fuse, FUSIONS)
    if len(maps) == 1:
        return maps[0]
    size = [max(sides) for sides in zip(*(m.shape[1:] for m in maps), strict=True)]
    return normalise(FUSIONS[fuse](torch.stack([stretch(m, size) for m in maps])))


# Beside those of family decomposition: methods that read the head, or compare classes.
OF_CLASSES = ("cam", "finercam", "relevancecam", "omcam", "guidedbackprop", "deeplift")


def takes_target(name: str) -> bool:
    """Tell if a method explains any score of the output, not only a class's."""
    return name not in OF_CLASSES and method(name).family != "decomposition"


def map_of_layers(
    seen: Sequence[Seen],
    class_index: Tensor,
    x: Tensor,
    name: str,
    shaping: Shaping = AS_COMPUTED,
) -> Tensor:
    """Compute I, shape (N, H, W), as `attribution_map` does, from known activations."""
    check_explains(seen, x, name)
    maps = [layer_map(each, class_index, x, name, shaping) for each in seen]
    return upsample(fused(maps, shaping.fuse), x)


def check_explains(seen: Sequence[Seen], x: Tensor, name: str) -> None:
    """Check that a method explains these inputs, scores and layers."""
    if isinstance(seen[0][0], Targeted) and not takes_target(name):
        raise AftError(
            f"{method(name).title} explains classes only, not a target; take one of "
            f"{', '.join(other for other in METHODS if takes_target(other))}"
        )
    if x.dim() == 5 and method(name).family != "cam":
        raise AftError(f"{method(name).title} explains images only; take a CAM for videos")
    if len(seen) > 1 and method(name).family not in ("cam", "activation"):
        raise AftError(
            f"{method(name).title} gives the same map for every layer, so nothing can be fused; "
            "give one --layer, or a CAM"
        )


def cuts(f: Layers) -> tuple[Classifier, ...]:
    """Check that classifiers are of one network, and return them.

    Raises:
        AftError: there is none, or they are cut at the same layer, or they are of different
            networks.
    """
    layers = (f,) if isinstance(f, Classifier) else tuple(f)
    names = [each.layer_name for each in layers]
    if not layers or len(set(names)) < len(names):
        raise AftError(f"maps of several layers need different layers, got {names or 'none'}")
    first = layers[0]
    for other in layers[1:]:
        same = (other.name, other.classes, other.preprocessing, other.checkpoint)
        if same != (first.name, first.classes, first.preprocessing, first.checkpoint):
            raise AftError(
                f"only maps of one network can be fused; {other.name} at {other.layer_name} "
                f"and {first.name} at {first.layer_name} have other names, classes, weights or "
                "preprocessing"
            )
    return layers


@outside_inference_mode
def attribution_map(
    f: Layers,
    x: Tensor,
    class_index: Tensor | int | Target,
    method: str,
    cells: bool = False,
    zero_level: float = 0.0,
    *,
    smooth: str = "none",
    fuse: str = "max",
) -> Tensor:
    """Compute the attribution map I of a method, at the input's size (§2.4, §3.1).

    Args:
        f: the classifier; several that are cut at different layers of one network give one map.
        x: inputs, shape (N, 3, H, W), normalised as the model wants; videos (N, 3, D, H, W) for
            CAMs.
        class_index: the class to explain for each input, shape (N,); for one input a number too; or
            a target, a function of the output (aftcli/models/targets.py).
        method: a key of METHODS: gradcam, ablationcam, layercam, lrp, rise, …
        cells: average a map of pixels over the activation's cells, see `to_cells`.
        zero_level: see `scaled_map`; for maps of cells.
        smooth: "none"; "aug", the mean over mirrored and scaled inputs; "eigen", the first
            principal component of the weighted channels in place of their sum; or "noise", the
            mean gradient over noisy inputs, see `denoised`.
        fuse: "max" or "product", which combines several layers' maps, see `fused`.

    Returns:
        I, shape (N, H, W), of videos (N, D, H, W), in [0, 1]; an all-zero map stays zero.

    Raises:
        AftError: x is no batch of images, an image has not one class of f's, the method can't be
            smoothed or fused in this way, or see `scaled_map`.
    """
    layers = cuts(f)
    if callable(class_index):
        layers = tuple(with_target(each, class_index) for each in layers)
        class_index = torch.zeros(len(x), dtype=torch.long)
    seen = [first_activation(each, x) for each in layers]
    classes = class_indices(layers[0], class_index, len(x), x.device)
    shaping = Shaping(cells, zero_level, smooth, fuse)
    return map_of_layers(seen, classes, x, method, shaping)
