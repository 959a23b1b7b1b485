"""The trained part of a network: w1, w2 and w' (§4.2), and layers between them and w0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aftcli.aft.loss import OBJECTIVES, Compared, Features, Outputs, Recipe
from aftcli.core.classifier import Classifier
from aftcli.cutting.cut import cut, cut_modules, flow_of
from aftcli.cutting.networks import copied
from aftcli.errors import AftError, nearest


class Tail(nn.Module):
    """The trained modules: w1, w2, w', and layers between w0 and w1 that are tuned with them.

    Batch norms keep their statistics and dropout is off: what is tuned is the very function
    that is explained, and a batch's images do not depend on each other.

    Args:
        f: the classifier; it is copied.
        settings: of the training.
        cam: the method of the masks; None without masks.
        earlier: further layers to tune.
    """

    def __init__(
        self, f: Classifier, settings: Recipe, cam: str | None, earlier: Earlier | None
    ) -> None:
        super().__init__()
        # Together: parameters that parts share stay shared.
        self.layer, self.head, between = copied((f.layer, f.head, earlier.parts if earlier else ()))
        self.between = nn.ModuleList(between)
        self.taken = earlier.taken if earlier else ()
        self.tuner, self.earlier_tuners = None, nn.ModuleList()
        self.compared: tuple[Compared, ...] = ()
        if cam:
            shapes = [*(earlier.shapes if earlier else ()), f.activation_shape]
            build = OBJECTIVES[settings.objective].build
            assert build is not None
            self.compared = tuple(build(g, cam, settings) for g in self._cut_at_each(f, shapes))
            *others, own = (c.weights and c.weights.to(next(f.parameters())) for c in self.compared)
            self.earlier_tuners = nn.ModuleList(w for w in others if w)
            self.tuner = own
        self.eval()
        frozen = {id(p) for p in self.head.parameters()} if settings.trained == "w1" else set()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in frozen)

    def _cut_at_each(
        self, f: Classifier, shapes: Sequence[tuple[int, int, int]]
    ) -> Iterator[Classifier]:
        """Yield these modules as classifiers cut at each tuned layer, l last."""
        parts = [*self.between, self.layer]
        for i, shape in zip((*self.taken, len(parts) - 1), shapes, strict=True):
            after = [*parts[i + 1 :], self.head]
            head = after[0] if len(after) == 1 else nn.Sequential(*after)
            yield with_parts(f, nn.Identity(), parts[i], head, shape)

    def flows(self, features: Features) -> list[Features]:
        """Return what each tuned layer gives, A first, l's last."""
        x: Any = features[0] if len(features) == 1 else features
        found: list[Features] = []
        for i, part in enumerate(self.between):
            x = part(x)
            if i in self.taken:
                found.append((x,))
        return [*found, flow_of(self.layer(x))]

    def forward(
        self, features: Features, class_index: Tensor | None = None, masked: Features | None = None
    ) -> Outputs:
        """Return logits and the values compared with the masks; arguments as of `Batch`."""
        flows = self.flows(features)
        tuned: tuple[Tensor, ...] = ()
        if class_index is not None and self.compared:
            pairs = zip(self.compared, flows, strict=True)
            tuned = tuple(compared.values(flow, class_index) for compared, flow in pairs)
        logits = self.head(*flows[-1])
        return Outputs(
            logits, tuned, None if masked is None else self.head(*self.flows(masked)[-1])
        )

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of all weights and statistics, by name."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    @torch.no_grad()
    def blend(self, start: Tail, share: float) -> None:
        """Set weights to start + share * (these - start); a tuner, which has no start, stays."""
        tuned = dict(self.named_parameters())
        for name, before in start.named_parameters():
            tuned[name].copy_(torch.lerp(before, tuned[name], share))

    def classifier(self, f: Classifier, cam: str | None) -> Classifier:
        """Return f with a copy of these weights; its stem is shared unless part of it is tuned."""
        stem = f.stem
        if len(self.between):
            stem = copied(f.stem)
            weights = stem.state_dict()
            for part in self.between:
                weights |= part.state_dict()  # under the names of the uncut model
            stem.load_state_dict(weights)
        layer, head = (part.to(f.device) for part in copied((self.layer, self.head)))
        tuned = with_parts(f, stem, layer, head, f.activation_shape)
        tuned.cam = cam
        return tuned.eval().requires_grad_(False)


def with_parts(
    f: Classifier,
    stem: nn.Module,
    layer: nn.Module,
    head: nn.Module,
    shape: tuple[int, int, int],
) -> Classifier:
    """Return a classifier of other parts with f's names and classes; see `Classifier`."""
    return Classifier(
        stem,
        layer,
        head,
        name=f.name,
        layer_name=f.layer_name,
        preprocessing=f.preprocessing,
        classes=f.classes,
        activation_shape=shape,
        bypassed=f.bypassed,
        output=f.output,
        output_key=f.output_key,
    )


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
    """Cut a classifier's stem at layers before l, named in any order as `cut` takes them."""
    ordered = [name for name, _ in cut_modules(f.stem)]
    for name in names:
        if name.split("+")[-1] not in ordered:
            raise AftError(
                f"layer {name!r} can't be tuned with {f.layer_name}, the masks' layer: it does "
                f"not come before it; nearest that does: {nearest(name, ordered)}"
            )
    in_order = sorted(names, key=lambda name: ordered.index(name.split("+")[-1]))
    parts: list[nn.Module] = [f.stem]
    for name in in_order:
        parts += cut(parts.pop(), name)
    stem, *parts = parts
    taken = range(0, len(parts), 2)
    shapes = []
    with torch.no_grad():
        x = stem(torch.zeros(1, *f.preprocessing.shape).to(next(f.parameters())))
        for i, part in enumerate(parts):
            x = part(x)
            if i in taken:
                shapes.append((x.shape[1], x.shape[2], x.shape[3]))
    return Earlier(tuple(in_order), stem, tuple(parts), tuple(taken), tuple(shapes))
