"""Elementary modules: what functions, sums and batch normalisations of a network become."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import fusion, skip_init


class Sum(nn.Module):
    """The sum of stacked branches, shape (branches, ...): zennit.layer.Sum over dimension 0."""

    def forward(self, branches: Tensor) -> Tensor:
        """Return the sum, shape (...)."""
        return branches.sum(0)


class Product(nn.Module):
    """The product of two activations, as of a squeeze-and-excitation block."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product, elementwise."""
        return a * b


def stack(*branches: Tensor) -> Tensor:
    """Stack branches of shapes that broadcast to (...): (branches, ...)."""
    return torch.stack(torch.broadcast_tensors(*branches))


# Functions and methods with a module of their own: its class, names of the arguments after x.
_POOL = ("kernel_size", "stride", "padding")


MODULES: dict[Any, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), (nn.ReLU, ())),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), (nn.Sigmoid, ())),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), (nn.Tanh, ())),
    F.relu6: (nn.ReLU6, ()),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), (nn.Hardtanh, ("min_val", "max_val"))),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope",)),
    F.elu: (nn.ELU, ("alpha",)),
    F.gelu: (nn.GELU, ("approximate",)),
    F.silu: (nn.SiLU, ()),
    F.hardswish: (nn.Hardswish, ()),
    F.hardsigmoid: (nn.Hardsigmoid, ()),
    F.avg_pool2d: (nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad")),
    F.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    torch.max_pool2d: (nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
}


ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


MEANS = (torch.mean, "mean")


# They change nothing in eval mode. torchvision's own stochastic depth is a leaf to torch.fx.
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


IDENTITY_NAMES = ("dropout", "dropout1d", "dropout2d", "alpha_dropout", "stochastic_depth")


# Functions that take their weights: names of the arguments after x.
WEIGHTED: dict[Any, tuple[str, ...]] = {
    F.linear: ("weight", "bias"),
    torch.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    F.batch_norm: (
        *("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
}


def weighted(function: object, settings: dict[str, Any]) -> nn.Module | None:
    """Make the layer of a key of WEIGHTED; None if it needs the batch's statistics."""
    tensors = {key: t for key, t in settings.items() if torch.is_tensor(t)}
    given = {key: value for key, value in settings.items() if key not in tensors}
    weight, has_bias = tensors.get("weight"), "bias" in tensors
    if function is F.batch_norm:
        if given.get("training") or "running_mean" not in tensors:
            return None
        size, eps = len(tensors["running_mean"]), given.get("eps", 1e-5)
        module: nn.Module = skip_init(nn.BatchNorm2d, size, eps=eps, affine=weight is not None)
    elif weight is None:
        return None
    elif function is F.linear:
        module = skip_init(nn.Linear, *reversed(weight.shape), bias=has_bias)
    else:
        given.pop("bias", None)
        channels = weight.shape[1] * given.get("groups", 1), len(weight)
        kernel = tuple(weight.shape[2:])
        module = skip_init(nn.Conv2d, *channels, kernel_size=kernel, bias=has_bias, **given)
    for key, value in tensors.items():
        is_buffer = key.startswith("running")
        setattr(module, key, value if is_buffer else nn.Parameter(value.detach(), False))
    return module


def fold_into(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> None:
    """Fold a batch normalisation, in eval mode, into the weights of the layer before it."""
    statistics: list[Any] = [norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias]
    if isinstance(layer, nn.Linear):
        folded = fusion.fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        fuse: Any = fusion.fuse_conv_bn_weights
        transposed = isinstance(layer, _ConvTransposeNd)
        folded = fuse(layer.weight, layer.bias, *statistics, transpose=transposed)
    layer.weight, layer.bias = (nn.Parameter(t.detach(), False) for t in folded)
