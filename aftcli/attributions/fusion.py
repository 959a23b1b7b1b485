"""Layer-CAM maps of several stages, fused (Jiang et al., TIP 2021, section on fusing layers).

Jiang, Zhang, Hou, Cheng, Wei: "LayerCAM: Exploring Hierarchical Class Activation Maps for
Localization". torchcam's `fuse_cams` scales the maps of all layers by tanh and works on one
image; pytorch-grad-cam averages layers. The stem is cut here instead, so that no hook is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aftcli.core.cam import class_score, layer_cam, upsample
from aftcli.core.classifier import Classifier
from aftcli.core.cut import CutPoint, cut, cut_points
from aftcli.errors import AftError, first_line

GAMMA = 2.0  # the paper's
PLAIN = 2  # the last stages, whose maps are not scaled by tanh: S4 and S5 of the paper's VGG
BATCH = 16  # images with gradients at a time

# Finding the stages takes half a second. The parts hold the stem's own modules, so that training
# them in place changes both; they do not hold the stem, so that it can be collected.
_cut: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()


def layer_cam_fusion(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Multi-layer Layer-CAM: max over stages s of the stretched M_s / max M_s, shallow ones scaled.

    M_s = ReLU(sum_k ReLU(dy^c/dA_s^k) A_s^k) of each stage's last activation A_s; shallow maps are
    scaled by tanh(gamma M_s / max M_s), gamma = 2 (eq. 9), and all fused by an element-wise
    maximum. A stage is a spatial resolution, and its last activation the last one at which the
    network can be cut: before each pooling of a VGG, conv1 after its ReLU and layer1 to layer4 of
    a ResNet. The paper scales S1 to S3 of VGG's five; here all stages but the last two. The last
    stage is layer l; with no stage before it the map is Layer-CAM's.

    Args:
        f: the classifier; it is not changed.
        activation: A, shape (N, K, h, w).
        class_index: c, shape (N,).
        x: inputs, shape (N, 3, H, W).

    Returns:
        I_pre, shape (N, H, W), in [0, 1].

    Raises:
        AftError: the stem can't be looked into.

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
    """Layer-CAM maps M_s, shape (N, h_s, w_s), of all stages, the shallowest first.

    Args:
        f: the classifier.
        activation: A of layer l, shape (N, K, h, w); used where there is no stage before l.
        class_index: c, shape (N,).
        x: inputs, shape (N, 3, H, W).
    """
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
    """The parts from x to the first stage's activation, to the second's, ..., to layer l's.

    Args:
        f: the classifier; the parts hold its modules.
        size: height and width of x, pixels.
        cells: (h, w) of layer l's activation.

    Returns:
        One part for each stage; none if there is no stage before l.

    Raises:
        AftError: the stem can't be looked into.
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
