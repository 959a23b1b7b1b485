"""Networks that are watched while they run, and that run to or from a layer without a graph.

Only here does a network get hooks; they are removed when the pass ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, ValuesView
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, jit, nn

from aftcli.cutting.layouts import Layout, before_maps, from_maps, to_maps
from aftcli.cutting.networks import SameModules


class Ran(NamedTuple):
    """A call of a module in a pass of a network.

    Attributes:
        name: the module's name.
        module: the module that ran.
        output: what it returned; the first tensor of a tuple or dict.
        alone: it returned nothing else.
    """

    name: str
    module: nn.Module
    output: Tensor
    alone: bool


def first_tensor(out: object) -> Tensor | None:
    """Find the first tensor in what a module returned; None without one."""
    if isinstance(out, Tensor):
        return out
    parts = out.values() if isinstance(out, Mapping) else out
    if isinstance(parts, list | tuple | ValuesView):
        return next((t for part in parts if (t := first_tensor(part)) is not None), None)
    return None


def run_watched(model: nn.Module, x: Tensor) -> tuple[list[Ran], object]:
    """Run a network and return the calls of its modules, in the order in which they end.

    Args:
        model: the network; our hooks are removed afterwards.
        x: its input.
    """
    calls: list[Ran] = []
    handles = []
    for name, module in model.named_modules():

        def ended(module: nn.Module, _: object, out: object, name: str = name) -> None:
            if name and (tensor := first_tensor(out)) is not None:
                calls.append(Ran(name, module, tensor, tensor is out))

        if not isinstance(module, jit.ScriptModule):  # which takes no hooks
            handles.append(module.register_forward_hook(ended))
    try:
        out = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls, out


class _Done(Exception):  # noqa: N818 - it is no error
    """A signal that the layer's output is known, so that the rest need not run."""


_REPLACED: ContextVar[ExitStack | None] = ContextVar("replaced", default=None)


@contextmanager
def replaced_until_gradient() -> Iterator[None]:
    """Keep layers replaced while a gradient is computed: torch.utils.checkpoint runs them again."""
    with ExitStack() as stack:
        token = _REPLACED.set(stack)
        try:
            yield
        finally:
            _REPLACED.reset(token)


class _Interrupted(SameModules):
    """A network that torch.fx can't trace, run to or from the output of one of its modules.

    Its modules are the network's own, under the same names.

    Args:
        network: the whole network.
        layer: the module's name.
        call: the call whose output is A: the module's last one in a pass, counted from 1.
        layout: the layout of that output; None for (N, K, h, w).
    """

    layer: str
    call: int
    layout: Layout | None

    def __init__(self, network: nn.Module, layer: str, call: int, layout: Layout | None) -> None:
        super().__init__(network)
        # Not as attributes, since a module of the network may have such a name.
        self.__dict__.update(layer=layer, call=call, layout=layout)

    def run(self, x: Tensor, change: Callable[[object], object]) -> object:
        """Run the network with the layer's output changed."""
        calls = 0

        def ended(module: nn.Module, _: object, out: object) -> object:
            nonlocal calls
            calls += 1
            return change(out) if self.call in (calls, 1) else None

        network = self.whole
        handle = network.get_submodule(self.layer).register_forward_hook(ended)
        with ExitStack() as stack:
            (_REPLACED.get() or stack).callback(handle.remove)
            return network(x)


class RunTo(_Interrupted):
    """The stem and the layer in one: from x to the layer's output, and x for the rest."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the network up to the layer.

        Args:
            x: inputs, shape (N, C, H, W).

        Returns:
            A, tokens that belong to no cell if there are any, and x, from which `RunFrom` runs.
        """
        found: list[Tensor] = []

        def stop(out: object) -> object:
            tensor = first_tensor(out)
            assert tensor is not None
            found.append(tensor)
            raise _Done

        with suppress(_Done):
            self.run(x, stop)
        if self.layout is None:
            return found[0], x
        own = (found[0], *self.layout)
        return (to_maps(*own), *([before_maps(*own)] if self.layout.prefix else []), x)


class RunFrom(_Interrupted):
    """The head: the whole network with another output of the layer."""

    def forward(self, activation: Tensor, *rest: Tensor) -> object:
        """Run the network with the layer's output replaced; takes what `RunTo` returns."""
        *before, x = rest
        # A copy: what follows may write into it.
        own = from_maps(activation, before, *self.layout) if self.layout else activation
        return self.run(x, lambda out: _replaced(out, own.clone()))


def _replaced(out: Any, tensor: Tensor) -> Any:  # noqa: ANN401 - whatever a module returns
    """Put a tensor in the place of the first one of what a module returned."""
    if isinstance(out, Tensor):
        return tensor
    if isinstance(out, Mapping):
        key = next(k for k, v in out.items() if first_tensor(v) is not None)
        changed = copy.copy(out)
        changed[key] = _replaced(out[key], tensor)  # type: ignore[index]
        return changed
    i = next(i for i, v in enumerate(out) if first_tensor(v) is not None)
    parts = [*out[:i], _replaced(out[i], tensor), *out[i + 1 :]]
    return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
