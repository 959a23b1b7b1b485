"""Users' networks: unwrapped, copied, and with plain values for computed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from aftcli.errors import AftError, first_line

P = ParamSpec("P")

R = TypeVar("R")

Copied = TypeVar("Copied")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function or generator outside torch.inference_mode(), where there are no gradients.

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
    """Take a network out of DataParallel, DistributedDataParallel and torch.compile.

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
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise AftError(
            f"{type(model).__name__}: has lazy layers, whose weights get their shapes from a first "
            "input; run it once on an input before it is explained (a function named by --model: "
            "before it returns)"
        )
    return model


def input_channels(model: nn.Module) -> int:
    """Return the number of channels of a network's input: its first convolution's, otherwise 3."""
    for module in model.modules():
        # A scripted one knows its class by name alone.
        kind = getattr(module, "original_name", "")
        if isinstance(module, nn.Conv2d | nn.Conv3d) or kind in ("Conv2d", "Conv3d"):
            return int(module.in_channels)  # type: ignore[arg-type]
    return 3


def name_of(layer: object, model: nn.Module) -> str:
    """Find the name of a module of a network.

    Raises:
        AftError: it is not a module of the network.
    """
    found = next((name for name, module in model.named_modules() if module is layer), "")
    if not found:
        what = type(layer).__name__
        raise AftError(
            f"layer must be the name of a module of {type(model).__name__}, or one of its modules; "
            f"this {what} is neither"
        )
    return found


def copied(what: Copied, memo: dict[int, Any] | None = None) -> Copied:
    """Copy modules, also with tensors that autograd computed, which deepcopy refuses.

    Weight norm, spectral norm and pruning keep such weights, some networks such activations. The
    copies of these tensors are values without a history.
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


class SameModules(nn.Module):
    """A module whose modules and weights are another network's, under the same names.

    Args:
        network: the other; it is no module of this one, or names would begin with it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters = network._modules, network._parameters
        self._buffers = network._buffers
        self.__dict__["network"] = network
        self.training = network.training

    @property
    def whole(self) -> nn.Module:
        """The other network."""
        return self.__dict__["network"]  # type: ignore[no-any-return]


def computes_weights(module: nn.Module) -> bool:
    """Tell if weights are computed at each pass: by parametrizations, norms or pruning."""
    return is_parametrized(module) or any(map(_remaking, module.modules()))


def _remaking(module: nn.Module) -> list[tuple[int, Any]]:
    kinds = (WeightNorm, SpectralNorm, BasePruningMethod)
    return [(key, h) for key, h in module._forward_pre_hooks.items() if isinstance(h, kinds)]


def with_plain_weights(module: nn.Module) -> nn.Module:
    """Replace computed weights by their values, since rules of layers read plain weights.

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


def takes_videos(model: nn.Module) -> bool:
    """Tell if a network takes videos: its first convolution runs over frames too."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((m for m in model.modules() if isinstance(m, kinds)), None)
    return isinstance(first, nn.Conv3d)
