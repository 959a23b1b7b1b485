"""The places of channels and cells in a layer's output: maps, channels last, tokens."""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    kind: str
    height: int
    width: int
    prefix: int = 0


def to_maps(out: Tensor, kind: str, height: int, width: int, prefix: int) -> Tensor:
    """Make A, shape (N, K, h, w), of a layer's output; arguments as of `Layout`."""
    if kind == "last":
        return out.permute(0, 3, 1, 2)
    tokens = out.transpose(0, 1) if kind == "sequence" else out
    maps: Tensor = tokens[:, prefix:].mT.unflatten(2, (height, width))
    return maps


def before_maps(out: Tensor, kind: str, height: int, width: int, prefix: int) -> Tensor:
    """Take the tokens that belong to no cell, shape (N, prefix, K), of a layer's output."""
    tokens = out.transpose(0, 1) if kind == "sequence" else out
    return tokens[:, :prefix]


def from_maps(
    maps: Tensor, before: Sequence[Tensor], kind: str, height: int, width: int, prefix: int
) -> Tensor:
    """Make a layer's output of A and the tokens before its cells, as `Layout` says."""
    if kind == "last":
        return maps.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    tokens = torch.cat([*before, maps.flatten(2).mT], 1)
    return (tokens.transpose(0, 1) if kind == "sequence" else tokens).contiguous()
