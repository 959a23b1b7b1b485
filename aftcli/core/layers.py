"""The layer at which a network is cut where nobody names one."""

from __future__ import annotations

from torch import nn

from aftcli.core.cut import CutPoint, cut_points, is_spatial
from aftcli.errors import AftError, first_line


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


def last_layer(model: nn.Module, size: tuple[int, int] = (224, 224)) -> str:
    """Find the last convolutional layer with spatial extent, its norm and activation included.

    It is named as `cut` takes it.
    """
    try:
        points = cut_points(model, size)
    except AftError:
        raise
    except Exception as error:
        raise AftError(
            f"no layer found at which {type(model).__name__} can be cut ({first_line(error)}); "
            "pass --layer NAME"
        ) from error
    spatial = [p for p in points if is_spatial(p.shape) and _has_convolution(p.module)]
    inner = [
        p for p in spatial if not any(q.name.startswith(f"{p.name}.") for q in spatial if q != p)
    ]
    if not inner:
        raise AftError(
            f"{type(model).__name__} has no convolutional layer with spatial extent on the only "
            "path to its logits: it is not a plain CNN, or it needs --layer NAME"
        )
    after = points[points.index(inner[-1]) + 1 :]
    if any("Attention" in type(m).__name__ for p in after for m in p.module.modules()):
        raise AftError(
            f"{type(model).__name__} attends over tokens after its last convolution: it is a "
            "transformer, not a CNN; pass --layer NAME to cut it all the same"
        )
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
    """Leave out what is inside a norm or activation: timm's BatchNormAct2d has children."""
    outer = tuple(f"{p.name}." for p in points if _is_pointwise(p.module))
    return [p for p in points if not p.name.startswith(outer or ("\0",))]


def _same_weights(point: CutPoint, layer: list[CutPoint]) -> bool:
    ids = {id(w) for p in layer for w in p.module.parameters()}
    return {id(w) for w in point.module.parameters()} == ids
