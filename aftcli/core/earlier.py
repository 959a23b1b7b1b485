"""Layers before l that are tuned together with it (§6 leaves this open)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from aftcli.core.classifier import Classifier
from aftcli.core.cut import cut, cut_modules
from aftcli.errors import AftError, nearest


class Earlier(NamedTuple):
    """A classifier's stem, cut at layers before l: parts[-1](... parts[0](stem(x))).

    Attributes:
        names: of the layers, in the order in which they run.
        stem: w0: what is before the first of them.
        parts: from there to what layer l takes, one after the other.
        taken: the parts whose outputs are the layers' activations.
        shapes: (K, h, w) of these.
    """

    names: tuple[str, ...]
    stem: nn.Module
    parts: tuple[nn.Module, ...]
    taken: tuple[int, ...]
    shapes: tuple[tuple[int, int, int], ...]


def earlier_layers(f: Classifier, names: Sequence[str]) -> Earlier:
    """Cut a classifier's stem at further layers.

    Args:
        f: the classifier; it is not changed.
        names: of layers before l, in any order, as `cut` takes them.

    Raises:
        AftError: one is not before l, or can't be cut at.
    """
    ordered = [name for name, _ in cut_modules(f.stem)]
    for name in names:
        if name.split("+")[-1] not in ordered:
            raise AftError(
                f"layer {name!r} can't be tuned together with {f.layer_name}, which the masks are "
                f"of: it is not before it; nearest that is: {nearest(name, ordered)}"
            )
    in_order = sorted(names, key=lambda name: ordered.index(name.split("+")[-1]))
    parts: list[nn.Module] = [f.stem]
    for name in in_order:
        parts += cut(parts.pop(), name)
    stem, *parts = parts
    taken = range(0, len(parts), 2)
    shapes = []
    with torch.no_grad():
        x = stem(torch.zeros(1, 3, *f.preprocessing.size).to(next(f.parameters())))
        for i, part in enumerate(parts):
            x = part(x)
            if i in taken:
                shapes.append((x.shape[1], x.shape[2], x.shape[3]))
    return Earlier(tuple(in_order), stem, tuple(parts), tuple(taken), tuple(shapes))
