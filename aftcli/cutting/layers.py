"""The default layer at which a network is cut, and the layout of its cells."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from aftcli.cutting.cut import CutPoint, Parts, Untraceable, cut, cut_points, is_spatial
from aftcli.cutting.layouts import same_output
from aftcli.cutting.networks import copied
from aftcli.cutting.places import Place, calls_of, find_layout, layout_at, places, two_images
from aftcli.cutting.watched import (
    Ran,
    RunFrom,
    RunTo,
    first_tensor,
    replaced_until_gradient,
    run_watched,
)
from aftcli.errors import AftError, first_line

ROUNDING = 1e-5  # of the largest logit

PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Embedding)  # of tokens, inside an attention or an MLP


class Divided(NamedTuple):
    """The parts of a network, and what they gave of an input.

    Attributes:
        parts: w0, w1, w2.
        flow: A, and what bypasses the layer.
        out: the network's output.
    """

    parts: Parts
    flow: tuple[Tensor, ...]
    out: Any


@torch.no_grad()
def divided(
    model: nn.Module, layer: str, x: Tensor, expected: object, note: Callable[[str], None]
) -> Divided:
    """Cut a model by its graph; without a graph run it up to the layer, and again from it.

    Args:
        model: the network, in eval mode.
        layer: as `cut` takes it.
        x: an input, shape (1, C, H, W).
        expected: what the model returns of it.
        note: is told if the network runs as it is.

    Returns:
        Parts whose logits equal the model's bit for bit; up to rounding where it runs as it is.

    Raises:
        AftError: the layer is unknown, or has no cells, or the parts do not equal the model.
    """
    try:
        parts = cut(model, layer, x)
        flow = parts.flow(x)
        if not _are_maps(flow[0], x):
            parts = cut(model, layer, x, layout_at(model, layer, x)[0])
            flow = parts.flow(x)
        if len(flow) > 1 and (times := _times(parts, layer)) > 1:
            note(_last_of(layer, times))
        return _checked(parts, flow, layer, expected, 0.0)
    except Untraceable as error:
        reason, _, _ = first_line(error).partition("; ")
        layout, calls = layout_at(model, layer, x)
        own = (model, layer.split("+")[-1], calls, layout)
        parts = Parts(nn.Identity(), RunTo(*own), RunFrom(*own))
        try:
            # With hooks torch does not use its fused kernels.
            found = _checked(parts, parts.flow(x), layer, expected, ROUNDING)
        except Untraceable as failed:
            raise AftError(failed.args[0]) from failed
        note(
            f"{type(model).__name__} is cut at {layer} by running it twice, which is slower: "
            f"{textwrap.shorten(reason, 160, placeholder='...')}"
        )
        if calls > 1:
            note(_last_of(layer, calls))
    return found


def _times(parts: Parts, layer: str) -> int:
    """Count the calls of a layer in a pass."""
    graphs = (m.graph for part in parts for m in part.modules() if isinstance(m, fx.GraphModule))
    name = layer.split("+")[-1]
    return sum(n.op == "call_module" and n.target == name for g in graphs for n in g.nodes)


def _last_of(layer: str, times: int) -> str:
    return f"layer {layer} runs {times} times in a pass; maps explain its last output only"


def moves_output(head: nn.Module, activation: Tensor, rest: Sequence[Tensor]) -> bool:
    """Tell if some number of A moves the output.

    Args:
        head: w2.
        activation: A, shape (1, K, h, w).
        rest: what bypasses the layer.
    """
    with torch.enable_grad(), replaced_until_gradient():
        a = activation.detach().requires_grad_()
        out = head(a, *rest)
        score = _weighted_sum(out)
        if not score.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(score, a, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def _are_maps(activation: object, x: Tensor) -> bool:
    if not isinstance(activation, Tensor) or activation.dim() != x.dim():
        return False
    if x.dim() == 5:
        return True
    layout = find_layout(activation.shape, x.shape, [])
    return layout is None or layout.kind == "first"


def _checked(
    parts: Parts, flow: tuple[Tensor, ...], layer: str, expected: object, tolerance: float
) -> Divided:
    """Check that parts give a model's output, up to a share of the largest, and keep A as it is.

    Raises:
        Untraceable: they do not.
    """
    before = [t.clone() for t in flow]
    out = parts.head(*flow)
    if not same_output(out, expected, tolerance):
        raise Untraceable(f"cutting at {layer!r} changes the logits; cut at another layer")
    if not all(map(torch.equal, before, flow)):
        raise Untraceable(f"a module after {layer!r} writes into its output; cut at another layer")
    return Divided(parts, flow, out)


def default_layer(model: nn.Module, x: Tensor, note: Callable[[str], None]) -> str:
    """Choose the layer to cut at: the last one with cells that the logits depend on.

    That is the last convolutional layer, with its norm and activation, unless later modules mix its
    cells, as attention does. Then it is the last module most of whose cells move the logits. For a
    vision transformer with a class token, that is the first norm of the last block. Of volumes and
    videos it is the last module with weights and cells.

    Args:
        model: the network, in eval mode.
        x: an input, shape (1, C, H, W).
        note: is told if a convolution with cells runs after the layer.

    Returns:
        Its name, as `cut` takes it.

    Raises:
        AftError: no layer has cells that move the logits.
    """
    calls, out = calls_of(model, x)
    logits = first_tensor(out)
    count = logits.shape[1] if logits is not None and logits.dim() == 2 else None
    if x.dim() == 5:
        return _last_of_volumes(model, calls, count)
    layer = last_convolution(model, (x.shape[2], x.shape[3]), count)
    behind = _with_cells_behind(layer, calls, x, count)
    if layer is None or _convolutions(behind):
        layer = _last_that_matters(model, x, None, count)
    elif not all(_is_pointwise(ran.module) for ran in behind):
        layer = _last_that_matters(model, x, layer, count)
    left = _convolutions(_with_cells_behind(layer, calls, x, count))
    if left:
        note(
            f"layer {layer} is explained, not the last convolution {left[-1].name}, most of whose "
            "cells do not move the output; --layer NAME chooses another"
        )
    return layer


def _last_of_volumes(model: nn.Module, calls: Sequence[Ran], classes: int | None) -> str:
    found = [
        ran
        for ran in calls
        if ran.alone
        and ran.output.dim() == 5
        and ran.output.shape[1] not in (1, classes)
        and ran.output[0, 0].numel() > 1
        and any(True for _ in ran.module.parameters())
    ]
    if not found:
        raise AftError(
            f"{type(model).__name__} takes volumes, (N, C, D, H, W), and has no layer with cells "
            "of them; pass --layer NAME"
        )
    return next(ran.name for ran in found if ran.output is found[-1].output)


def _with_cells_behind(
    layer: str | None, calls: Sequence[Ran], x: Tensor, classes: int | None
) -> list[Ran]:
    """Find modules with weights and cells that run after a layer, neither inside nor around it."""
    *_, last = names = (layer or "").split("+")
    end = max((i for i, ran in enumerate(calls) if ran.name == last), default=-1)
    behind = [
        ran
        for ran in calls[end + 1 :]
        if not any(f"{ran.name}.".startswith(f"{name}.") for name in names)
        and not f"{last}.".startswith(f"{ran.name}.")
        and any(True for _ in ran.module.parameters())
    ]
    return [p.ran for p in places(behind, two_images(x)) if not _classifies(p, classes)]


def _convolutions(calls: Sequence[Ran]) -> list[Ran]:
    return [ran for ran in calls if isinstance(ran.module, nn.Conv2d)]


def _classifies(place: Place, classes: int | None) -> bool:
    """Tell if a convolution is the classifier, with a map for each class, as in SqueezeNet."""
    return isinstance(place.ran.module, nn.Conv2d) and place.maps.shape[1] == classes


def _last_that_matters(model: nn.Module, x: Tensor, layer: str | None, classes: int | None) -> str:
    """Find the last module whose cells move the logits; keep `layer` if it is as good."""
    network = _stirred(model)
    x = two_images(x).detach().requires_grad_()
    with torch.enable_grad():
        calls, out = run_watched(network, x)
    found = [
        p
        for p in places(calls, x)
        if p.ran.output.requires_grad
        and p.maps.shape[1] > 1
        and not _classifies(p, classes)
        and not isinstance(p.ran.module, PROJECTIONS)
        and any(True for _ in p.ran.module.parameters())
    ]
    logits = first_tensor(out)
    outputs = [p.ran.output for p in found]
    gradients: Sequence[Tensor | None] = ()
    if logits is not None and logits.requires_grad and outputs:
        score = _weighted_sum(logits)
        with suppress(RuntimeError):  # as a network raises it that computes activations again
            gradients = torch.autograd.grad(score, outputs, allow_unused=True, retain_graph=True)
    live = [p for p, g in zip(found, gradients, strict=False) if g is not None and _moves(p, g)]
    if not live:
        if layer is None:
            raise AftError(
                f"{type(model).__name__} has no layer with cells that move its output; pass "
                "--layer NAME"
            )
        return layer
    # Containers return what their last part does, or pass on what came in: the first counts.
    first = {id(p.ran.output): p for p in reversed(live)}
    last = [p for p in live if first[id(p.ran.output)] is p][-1]
    own = next((p for p in reversed(found) if layer and p.ran.name == layer.split("+")[-1]), None)
    if layer and own and (own.ran.output is last.ran.output or not _mixed(own, last)):
        return layer
    return last.ran.name


def _weighted_sum(values: Tensor) -> Tensor:
    """Sum values with random weights: a norm keeps the plain sum at 0."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return (values * weights.to(values)).sum()


def _stirred(model: nn.Module) -> nn.Module:
    """Copy a network with small numbers for weights that are all 0, since these hide paths."""
    network = copied(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.is_floating_point() and not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return network


def _moves(place: Place, gradient: Tensor) -> bool:
    """Tell if most cells move the logits; none does if only a class token is read."""
    maps = Place(place.ran._replace(output=gradient), place.layout).maps
    return bool((maps != 0).any(1).float().mean() > 0.5)


def _mixed(own: Place, last: Place) -> bool:
    """Tell if a cell of the last output depends on more cells of the layer than its own."""
    h, w = last.layout.height, last.layout.width
    score = _weighted_sum(last.maps[:, :, h // 2, w // 2])
    (gradient,) = torch.autograd.grad(score, [own.ran.output], allow_unused=True, retain_graph=True)
    if gradient is None or (own.layout.height, own.layout.width) != (h, w):
        return True
    moved = (Place(own.ran._replace(output=gradient), own.layout).maps != 0).any(1)
    moved[:, h // 2, w // 2] = False
    return bool(moved.any())


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def _is_pointwise(module: nn.Module) -> bool:
    """Tell if a module is a normalisation or activation, which belongs to the layer before it."""
    # torchvision's Conv2dNormActivation has a norm in its name, and a convolution in it.
    if _has_convolution(module):
        return False
    return type(module).__module__ == "torch.nn.modules.activation" or (
        "Norm" in type(module).__name__
    )


def last_convolution(
    model: nn.Module, size: tuple[int, int] = (224, 224), classes: int | None = None
) -> str | None:
    """Find the last convolutional layer with spatial extent, its norm and activation included.

    A layer that gives a map for each class is the classifier, as in SqueezeNet: the one before it
    is taken.

    Args:
        model: the network.
        size: height and width of its input, pixels.
        classes: the number of logits; None where it is unknown.

    Returns:
        Its name as `cut` takes it; None if the only path to the logits has no such layer.
    """
    try:
        points = cut_points(model, size)
    except Exception:  # noqa: BLE001 - torch.fx can't follow it, or it needs its numbers
        return None
    # One channel is a weight of each cell, as attention has it, and no activation.
    spatial = [
        p for p in points if is_spatial(p.shape) and p.shape[1] > 1 and _has_convolution(p.module)
    ]
    inner = [
        p for p in spatial if not any(q.name.startswith(f"{p.name}.") for q in spatial if q != p)
    ]
    if len(inner) > 1 and inner[-1].shape[1] == classes:
        inner.pop()
    if not inner:
        return None
    after = points[points.index(inner[-1]) + 1 :]
    layer = [inner[-1]]
    for point in _outermost_pointwise(after):
        if layer[0].name.startswith(f"{point.name}."):
            if isinstance(point.module, nn.Sequential) and _same_weights(point, layer):
                layer = [point]
        elif _is_pointwise(point.module) and point.shape == layer[-1].shape:
            layer.append(point)
        else:
            break
    return "+".join(p.name for p in layer)


def _outermost_pointwise(points: list[CutPoint]) -> list[CutPoint]:
    """Leave out modules inside a norm or activation: timm's BatchNormAct2d has children."""
    outer = tuple(f"{p.name}." for p in points if _is_pointwise(p.module))
    return [p for p in points if not p.name.startswith(outer or ("\0",))]


def _same_weights(point: CutPoint, layer: list[CutPoint]) -> bool:
    ids = {id(w) for p in layer for w in p.module.parameters()}
    return {id(w) for w in point.module.parameters()} == ids
