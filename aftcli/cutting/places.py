"""The places of cells in the outputs of a network's modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aftcli.cutting.cut import on_meta
from aftcli.cutting.layouts import Layout, to_maps
from aftcli.cutting.watched import Ran, run_watched
from aftcli.errors import AftError

MOST_TOKENS = 8  # beside those of the cells: class, distillation, registers


class Place(NamedTuple):
    """A call of a module whose output has cells.

    Attributes:
        ran: the call.
        layout: where the channels and the cells are; kind "first" is (N, K, h, w).
    """

    ran: Ran
    layout: Layout

    @property
    def maps(self) -> Tensor:
        """The output as (N, K, h, w)."""
        first = self.layout.kind == "first"
        return self.ran.output if first else to_maps(self.ran.output, *self.layout)


def places(calls: Sequence[Ran], x: Tensor) -> list[Place]:
    """Find the calls whose outputs have cells, more than one.

    The axes of the cells are those whose sides have the input's ratio. A row of tokens is laid out
    on the grid of the last map before it, or on one with the input's ratio.

    Args:
        calls: the calls of a pass.
        x: the pass's input, shape (N, C, H, W).
    """
    found, grids = [], [(0, 0)]
    for ran in calls:
        layout = find_layout(ran.output.shape, x.shape, grids)
        if layout:
            found.append(Place(ran, layout))
            if layout.kind in ("first", "last"):
                grids.append((layout.height, layout.width))
    return found


def find_layout(
    shape: Sequence[int], input_: Sequence[int], grids: Sequence[tuple[int, int]]
) -> Layout | None:
    """Find the places of cells in an output, of kind "first" where they are (N, K, h, w).

    Args:
        shape: the output's.
        input_: the input's, (N, C, H, W).
        grids: (h, w) of maps that came before.
    """
    count, _, *_, high, wide = input_
    if len(shape) == 4 and shape[0] == count:
        for kind, (h, w) in (("first", shape[2:]), ("last", shape[1:3])):
            if h * w > 1 and abs(h * wide - w * high) < wide:
                return Layout(kind, h, w)
    if len(shape) != 3 or count not in shape[:2]:
        return None
    kind, tokens = ("tokens", shape[1]) if shape[0] == count else ("sequence", shape[0])
    for h, w in reversed(grids):
        if h * w > 1 and 0 <= tokens - h * w <= MOST_TOKENS:
            return Layout(kind, h, w, tokens - h * w)
    for prefix in range(MOST_TOKENS + 1):
        h = round(math.sqrt(max(tokens - prefix, 0) * high / wide))
        if h > 1 and h * round(h * wide / high) == tokens - prefix:
            return Layout(kind, h, round(h * wide / high), prefix)
    return None


def layout_at(model: nn.Module, layer: str, x: Tensor) -> tuple[Layout | None, int]:
    """Return the layout of a layer's output, and the number of times the layer runs in a pass.

    Args:
        model: the network.
        layer: the module's name.
        x: an input, shape (1, C, H, W).

    Raises:
        AftError: the layer does not run, or its output has no cells.
    """
    calls, _ = calls_of(model, x)
    layer = layer.split("+")[-1]
    own = [ran for ran in calls if ran.name == layer]
    if not own:
        raise AftError(f"layer {layer!r} does not run in a pass of {type(model).__name__}")
    place = next((p for p in places(calls, two_images(x)) if p.ran is own[-1]), None)
    if place is None:
        known = dict.fromkeys(p.ran.name for p in places(calls, two_images(x)))
        raise AftError(
            f"layer {layer!r} can't be used: its output has shape (N, "
            f"{', '.join(map(str, own[-1].output.shape[1:]))}), a CAM needs (N, K, h, w), or "
            f"tokens of cells; the last layers that have them: {', '.join([*known][-12:])}"
        )
    layout = place.layout._replace(contiguous=own[-1].output.is_contiguous())
    return None if layout.kind == "first" else layout, len(own)


def two_images(x: Tensor) -> Tensor:
    """Repeat an image, so that the axis of images is told from the others."""
    return x[:1].repeat(2, *[1] * (x.dim() - 1))


def calls_of(model: nn.Module, x: Tensor) -> tuple[list[Ran], object]:
    """Run two images without their numbers where that works; return the calls and the output."""
    with torch.no_grad():
        try:
            return run_watched(on_meta(model), two_images(x).to("meta"))
        except Exception:  # noqa: BLE001 - it needs its numbers
            return run_watched(model, two_images(x))
