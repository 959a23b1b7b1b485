"""Parts of images and masks, chosen at random by name, seed and epoch (`--augment`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Crop(NamedTuple):
    """A square part of an input, in shares of its sides, and whether it is mirrored."""

    top: float
    left: float
    side: float
    mirrored: bool


def random_crop(name: str, seed: int, epoch: int) -> Crop:
    """Choose a part with 60 to 100 % of the area; the same for the same name, seed and epoch."""
    digest = hashlib.sha256(f"{seed}\0{epoch}\0{name}".encode("utf-8", "surrogateescape"))
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))
    area, top, left, mirror = torch.rand(4, generator=generator).tolist()
    side = (0.6 + 0.4 * area) ** 0.5
    return Crop(top * (1 - side), left * (1 - side), side, mirror < 0.5)


def crop(x: Tensor, views: Sequence[Crop], size: Sequence[int]) -> Tensor:
    """Take a part of each input and bring it to a size.

    Args:
        x: shape (N, C, H, W).
        views: one for each.
        size: height and width of the result.
    """
    high, wide = x.shape[2:]
    out = []
    for one, view in zip(x, views, strict=True):
        top, left = round(view.top * high), round(view.left * wide)
        down, right = round(view.side * high), round(view.side * wide)
        part = one[None, :, top : top + down, left : left + right]
        part = F.interpolate(
            part, tuple(size), mode="bilinear", align_corners=False, antialias=True
        )
        out.append(part.flip(3) if view.mirrored else part)
    return torch.cat(out)
