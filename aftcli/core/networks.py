"""Users' networks, wrapped or hard to copy, and the inputs x and classes c that callers give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

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


def same_output(one: object, two: object) -> bool:
    """Tell if two outputs of a network are equal bit for bit: tensors, or collections of them."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(same_output(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same_output, one, two))
    return type(one) is type(two) and bool(one == two)


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


class Cut(Protocol):
    """A network cut at layer l, as `Classifier` is, which stands above."""

    name: str
    classes: Any  # sized

    def at(self, x: Tensor) -> tuple[Any, Tensor]:
        """Compute A, and hold what passes layer l by."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights."""


def first_activation(f: Cut, x: Tensor, count: int | None = None) -> tuple[Any, Tensor]:
    """Compute f.at(x) of inputs that a caller gave, without gradients: f for them, and A."""
    check_shape(x, count)
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


def check_shape(x: Tensor, count: int | None = None) -> None:
    """Check that x is a batch of images."""
    if not isinstance(x, Tensor):
        raise AftError(
            f"x must be a tensor of shape (N, 3, H, W), got {type(x).__name__}; to_input makes one "
            "of an image"
        )
    if x.dim() != 4:
        single = "; for one image pass x[None]" if x.dim() == 3 else ""
        raise AftError(f"x must have shape (N, 3, H, W), got {tuple(x.shape)}{single}")
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
