"""Users' networks, wrapped, hard to copy or to cut, and what callers give: x, c."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from contextlib import nullcontext, suppress
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from aftcli.core.classes import Layout, before_maps, from_maps, to_maps
from aftcli.errors import AftError, first_line

P = ParamSpec("P")

R = TypeVar("R")

Copied = TypeVar("Copied")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function or generator outside torch.inference_mode(), which knows no gradients.

    Tensors that were made in that mode are copied: autograd does not take them.
    """
    leaving = torch.inference_mode(False)(function)

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        # Leaving the mode switches gradients on, also inside torch.no_grad(): only where it is on.
        inside = torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inside else nullcontext():
            usual: Any = [_usual(value) for value in args]
            named: Any = {name: _usual(value) for name, value in kwargs.items()}
        return (leaving if inside else function)(*usual, **named)

    return outside


def _usual(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def unwrapped(model: nn.Module) -> nn.Module:
    """Take off what runs a network elsewhere: DataParallel, torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise AftError(
            f"{type(model).__name__}: a scripted or traced network can't be cut; pass the "
            "nn.Module that it was made of, with the weights of its state_dict()"
        )
    return model


def copied(what: Copied, memo: dict[int, Any] | None = None) -> Copied:
    """Copy modules with the tensors that deepcopy refuses: those that autograd computed.

    Weight norm, spectral norm and pruning keep their weights so, networks their activations. The
    copies are values without a history.
    """
    computed = {id(tensor): tensor.detach().clone() for tensor in with_history(what)}
    try:
        # A ScriptModule's copy would be a result of gradients itself.
        with torch.no_grad():
            return copy.deepcopy(what, {**computed, **(memo or {})})
    except Exception as error:
        raise AftError(
            f"{type(what).__name__} can't be copied ({first_line(error)[:120]}); remove the "
            "attribute that can't be, or cut the network itself: "
            "cut_classifier(network, LAYER, own=True)"
        ) from error


def with_history(what: object) -> Iterator[Tensor]:
    """Find tensors that autograd computed in modules, their attributes and collections there."""
    seen: set[int] = set()
    todo = [what]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, nn.Module | dict):
            todo += (vars(value) if isinstance(value, nn.Module) else value).values()
        elif isinstance(value, list | tuple | set):
            todo += value


def computes_weights(module: nn.Module) -> bool:
    """Tell if weights are computed at each pass: by parametrizations, norms or pruning."""
    return is_parametrized(module) or any(map(_remaking, module.modules()))


def _remaking(module: nn.Module) -> list[tuple[int, Any]]:
    kinds = (WeightNorm, SpectralNorm, BasePruningMethod)
    return [(key, h) for key, h in module._forward_pre_hooks.items() if isinstance(h, kinds)]


def with_plain_weights(module: nn.Module) -> nn.Module:
    """Put values in place of weights that are made of others, as rules of layers read them.

    Args:
        module: changed in place; its tensors must be its own.
    """
    for part in module.modules():
        if is_parametrized(part):
            # Not torch's remove_parametrizations: it changes the class, which copies share.
            values = {name: getattr(part, name) for name in part.parametrizations}  # type: ignore[union-attr]
            part.__class__ = type(part).__bases__[0]
            del part.parametrizations
            for name, value in values.items():
                setattr(part, name, nn.Parameter(value.detach().clone(), False))
        for key, remaking in _remaking(part):
            remaking.remove(part)
            del part._forward_pre_hooks[key]
    return module


class Ran(NamedTuple):
    """A call of a module in a pass of a network.

    Attributes:
        name: the module's.
        module: that ran.
        output: what it returned; of a tuple or dict the first tensor.
    """

    name: str
    module: nn.Module
    output: Tensor


def first_tensor(out: object) -> Tensor | None:
    """Find the first tensor of what a module returned; None without."""
    if isinstance(out, Tensor):
        return out
    parts = out.values() if isinstance(out, Mapping) else out
    if isinstance(parts, list | tuple | ValuesView):
        return next((t for part in parts if (t := first_tensor(part)) is not None), None)
    return None


def run_watched(model: nn.Module, x: Tensor) -> tuple[list[Ran], object]:
    """Run a network and return the calls of its modules, in the order in which they end.

    Args:
        model: the network; it has no hooks of ours afterwards.
        x: its input.
    """
    calls: list[Ran] = []
    handles = []
    for name, module in model.named_modules():

        def ended(module: nn.Module, _: object, out: object, name: str = name) -> None:
            if name and (tensor := first_tensor(out)) is not None:
                calls.append(Ran(name, module, tensor))

        handles.append(module.register_forward_hook(ended))
    try:
        out = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls, out


class _Done(Exception):  # noqa: N818 - it is no error
    """The layer's output is there, the rest of the network need not run."""


class _Interrupted(nn.Module):
    """A network that torch.fx can't trace, run to or from the output of one of its modules.

    Its modules are the network's own, under the same names.

    Args:
        network: the whole.
        layer: the module's name.
        call: the number of its calls in a pass.
        layout: where its output has its cells; None for (N, K, h, w).
    """

    def __init__(self, network: nn.Module, layer: str, call: int, layout: Layout | None) -> None:
        super().__init__()
        self._modules, self._parameters = network._modules, network._parameters
        self._buffers = network._buffers
        self.__dict__["network"] = network  # not as a module: names would begin with it
        self.layer, self.call, self.layout = layer, call, layout
        self.training = network.training

    def run(self, x: Tensor, change: Callable[[object], object]) -> object:
        """Run the network with the layer's output changed."""
        calls = 0

        def ended(module: nn.Module, _: object, out: object) -> object:
            nonlocal calls
            calls += 1
            return change(out) if calls == self.call else None

        network = self.__dict__["network"]
        handle = network.get_submodule(self.layer).register_forward_hook(ended)
        try:
            return network(x)
        finally:
            handle.remove()


class RunTo(_Interrupted):
    """The stem and the layer in one: from x to the layer's output, and x for the rest."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the network up to the layer.

        Args:
            x: inputs, shape (N, C, H, W).

        Returns:
            A, tokens of no cell where there are any, and x, from which `RunFrom` runs the rest.
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
        """Run the network with the layer's output replaced; arguments as `RunTo` returns them."""
        *before, x = rest
        # A copy: what follows may write into it.
        own = from_maps(activation, before, *self.layout) if self.layout else activation.clone()
        return self.run(x, lambda out: _replaced(out, own))


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


class Cut(Protocol):
    """A network cut at layer l, as `Classifier` is, which stands above."""

    name: str
    classes: Any  # sized
    activation_shape: Any

    def at(self, x: Tensor) -> tuple[Any, Tensor]:
        """Compute A, and hold what passes layer l by."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights."""


def first_activation(f: Cut, x: Tensor, count: int | None = None) -> tuple[Any, Tensor]:
    """Compute f.at(x) of inputs that a caller gave, without gradients: f for them, and A."""
    check_shape(x, count, len(f.activation_shape) == 4)
    try:
        with torch.no_grad():
            return f.at(x)
    except (RuntimeError, ValueError) as error:
        weight = next(f.parameters())
        pairs = [
            (f"{x.shape[1]} channels", "3 channels"),
            (str(x.dtype), str(weight.dtype)),
            (str(x.device), str(weight.device)),
        ]
        wrong = [f"{has} instead of {needed}" for has, needed in pairs if has != needed]
        if not wrong:
            raise
        raise AftError(
            f"x can't pass {f.name}: it has {' and '.join(wrong)}; to_input makes x of an image, "
            "x.to(next(f.parameters())) gives it the type and the device of the weights"
        ) from error


def takes_videos(model: nn.Module) -> bool:
    """Tell if a network's first convolution is over frames too."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((m for m in model.modules() if isinstance(m, kinds)), None)
    return isinstance(first, nn.Conv3d)


def check_shape(x: Tensor, count: int | None = None, videos: bool = False) -> None:
    """Check that x is a batch of images, or of videos."""
    shape = "(N, 3, D, H, W)" if videos else "(N, 3, H, W)"
    if not isinstance(x, Tensor):
        raise AftError(
            f"x must be a tensor of shape {shape}, got {type(x).__name__}; to_input makes one "
            "of an image"
        )
    if x.dim() != 4 + videos:
        single = "; for one image pass x[None]" if x.dim() == 3 + videos else ""
        raise AftError(f"x must have shape {shape}, got {tuple(x.shape)}{single}")
    if count is not None and len(x) != count:
        raise AftError(f"x must hold {count} image, got {len(x)}; pass one after the other")


def check_classes(f: Cut) -> None:
    """Check that a network's output is logits of classes."""
    if not len(f.classes):
        raise AftError(
            f"the output of {f.name} is no logits of shape (N, C), so it has no classes; explain a "
            "target, a function of the output (target=, --target-fn FILE.py:NAME)"
        )


def class_indices(
    f: Cut, given: Tensor | Sequence[int] | int, count: int, device: torch.device
) -> Tensor:
    """Turn classes that a caller gave into a tensor, int64, shape (N,).

    Args:
        f: the classifier.
        given: c of each image; a plain number where there is one image.
        count: N.
        device: where the tensor is needed.
    """
    check_classes(f)
    try:
        classes = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AftError(
            f"class_index must be integers, got {type(given).__name__}; f.classes.index(NAME) "
            "finds one by its name"
        ) from error
    if classes.dtype == torch.bool or classes.is_floating_point() or classes.is_complex():
        raise AftError(f"class_index must be integers, got {classes.dtype}; use .long()")
    if not classes.dim() and count == 1:
        classes = classes[None]
    if classes.shape != (count,):
        raise AftError(
            f"class_index must have shape {(count,)}, one class for each map, got "
            f"{tuple(classes.shape)}; for one class everywhere use torch.full(({count},), c)"
        )
    wrong = classes[(classes < 0) | (classes >= len(f.classes))]
    if len(wrong):
        raise AftError(
            f"class {int(wrong[0])} is out of range: the classes of {f.name} are "
            f"0..{len(f.classes) - 1}"
        )
    return classes.long()
