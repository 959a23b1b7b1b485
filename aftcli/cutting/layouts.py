"""The places of channels and cells in a layer's output: maps, channels last, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The places of channels and cells in a layer's output, where it is not (N, K, h, w).

    Attributes:
        kind: "last", (N, h, w, K); "tokens", (N, T, K); "sequence", (T, N, K).
        height: h, cells.
        width: w, cells.
        prefix: tokens before those of the cells: of the class, registers.
        contiguous: the output is contiguous. Later modules may rely on it, and sums over another
            memory order round differently.
    """

    kind: str
    height: int
    width: int
    prefix: int = 0
    contiguous: bool = True


def to_maps(
    out: Tensor, kind: str, height: int, width: int, prefix: int, contiguous: bool
) -> Tensor:
    """Turn a layer's output into A, shape (N, K, h, w); arguments as in `Layout`."""
    if kind == "last":
        return out.permute(0, 3, 1, 2)
    tokens = out.transpose(0, 1) if kind == "sequence" else out
    maps: Tensor = tokens[:, prefix:].mT.unflatten(2, (height, width))
    return maps


def before_maps(
    out: Tensor, kind: str, height: int, width: int, prefix: int, contiguous: bool
) -> Tensor:
    """Return the tokens of a layer's output that belong to no cell, shape (N, prefix, K)."""
    tokens = out.transpose(0, 1) if kind == "sequence" else out
    return tokens[:, :prefix]


def from_maps(
    maps: Tensor,
    before: Sequence[Tensor],
    kind: str,
    height: int,
    width: int,
    prefix: int,
    contiguous: bool,
) -> Tensor:
    """Turn A and the tokens before its cells into a layer's output, as `Layout` says."""
    if kind == "last":
        out = maps.permute(0, 2, 3, 1)
    else:
        tokens = maps.flatten(2).mT
        tokens = torch.cat([*before, tokens], 1) if before else tokens
        out = tokens.transpose(0, 1) if kind == "sequence" else tokens
    return out.contiguous() if contiguous else out


def same_output(one: object, two: object, tolerance: float = 0.0) -> bool:
    """Tell if two outputs of a network are equal: tensors, or collections of them.

    Args:
        one: an output.
        two: the other.
        tolerance: a share of a tensor's largest number; 0 asks for equality bit for bit.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or not one.numel():
            return one.shape == two.shape
        if one.dtype == torch.bool:
            return torch.equal(one, two)
        return bool((one - two).abs().max() <= tolerance * two.abs().max())
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(
            same_output(one[key], two[key], tolerance) for key in one
        )
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(
            same_output(a, b, tolerance) for a, b in zip(one, two, strict=True)
        )
    if hasattr(one, "__dict__") and type(one) is type(two):
        return same_output(vars(one), vars(two), tolerance)
    return type(one) is type(two) and bool(one == two)
