"""Users' networks, wrapped or hard to copy, and the inputs x and classes c that callers give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from aftcli.errors import AftError, first_line, nearest

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


SHARDED = ("FullyShardedDataParallel", "FSDPModule")  # classes of FSDP, old and new


def unwrapped(model: nn.Module) -> nn.Module:
    """Take off what runs a network elsewhere: DataParallel, DistributedDataParallel, torch.compile.

    Raises:
        AftError: the network is scripted, or its weights lie on several processes (FSDP).
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    if any(kind.__name__ in SHARDED for m in model.modules() for kind in type(m).__mro__):
        raise AftError(
            f"{type(model).__name__}: its weights lie on several processes (FSDP), so it can't be "
            "cut; gather them (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "full_state_dict=True) and load them into the plain nn.Module"
        )
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


class Output(NamedTuple):
    """The place of logits in what a network returns.

    Attributes:
        path: keys, indices and attributes that lead to them, one in another.
    """

    path: tuple[str | int, ...]

    @property
    def name(self) -> str:
        """The path as `--output-key` takes it."""
        return ".".join(map(str, self.path))


def find_output(
    out: object, key: str | None = None, note: Callable[[str], None] = warnings.warn
) -> Output:
    """Find the logits in what a network returns.

    Args:
        out: a tensor, or tuples, lists, mappings and objects of tensors.
        key: the name of an entry, its number in a tuple, or several of them joined by dots;
            default `logits`, otherwise the first tensor of shape (N, C).
        note: is told what was taken where there are several.

    Raises:
        AftError: nothing is named so, or nothing has such a shape.
    """
    tensors = dict(_tensors(out))
    if key is None and isinstance(out, Tensor):
        return Output(())
    named = {Output(path).name: path for path in tensors}
    if key is not None:
        under = [path for name, path in named.items() if f"{name}.".startswith(f"{key}.")]
        if not under:
            known = nearest(key, named) if any(named) else "none, it returns one tensor"
            raise AftError(f"unknown output {key!r} of the network; nearest: {known}")
        return Output(under[0])
    fit = [path for path, tensor in tensors.items() if tensor.dim() == 2]
    if not fit:
        shapes = ", ".join(f"{name} {tuple(tensors[path].shape)}" for name, path in named.items())
        raise AftError(
            f"the network returns no logits of shape (N, C) (it returns {shapes or type(out)}); "
            "name the output that has them: --output-key KEY, or output_key= in Python"
        )
    chosen = ("logits",) if ("logits",) in fit else fit[0]
    if len(fit) > 1:
        others = ", ".join(Output(path).name for path in fit if path != chosen)
        note(
            f"the network returns several tensors: {Output(chosen).name} is taken for the logits, "
            f"not {others}; --output-key KEY takes another"
        )
    return Output(chosen)


def _tensors(out: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    """Yield the tensors in a structure, each with its path, in order."""
    parts: Any = ()
    if isinstance(out, Tensor):
        yield path, out
    elif isinstance(out, Mapping):
        parts = out.items()
    elif isinstance(out, tuple) and hasattr(out, "_fields"):
        parts = zip(out._fields, out, strict=True)
    elif isinstance(out, list | tuple):
        parts = enumerate(out)
    elif is_dataclass(out):
        parts = [(each.name, getattr(out, each.name)) for each in fields(out)]
    elif hasattr(out, "__dict__"):
        parts = vars(out).items()
    for key, part in parts:
        if len(path) < DEEPEST_OUTPUT:
            yield from _tensors(part, (*path, key))


DEEPEST_OUTPUT = 3  # structures in structures that are searched for logits


def at_path(out: Any, path: Sequence[str | int]) -> Any:  # noqa: ANN401 - a structure of anything
    """Follow a path into what a network returns, or into the nodes of a graph that makes it."""
    for key in path:
        inside = isinstance(out, Mapping) or (isinstance(out, list | tuple) and type(key) is int)
        out = out[key] if inside else getattr(out, str(key))
    return out


def logits_of(out: object, key: str | None = None) -> Tensor:
    """Take the logits, shape (N, C), out of what a network returns; see `find_output`."""
    return at_path(out, find_output(out, key).path)  # type: ignore[no-any-return]


class Cut(Protocol):
    """A network cut at layer l, as `Classifier` is, which stands above."""

    name: str
    classes: Any  # sized
    preprocessing: Any  # with a mean of each channel

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
            (f"{x.shape[1]} channels", f"{len(f.preprocessing.mean)} channels"),
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
