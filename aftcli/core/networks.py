"""Users' networks: wrapped or hard to copy, their outputs, the x and c that callers give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from aftcli.core.classes import in_range, sum_to_one
from aftcli.errors import AftError, check_name, first_line
from aftcli.settings import AUTO, NONE, OUTPUTS, SIGMOID, SOFTMAX

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
    if isinstance(given, Sequence) and any(type(c).__name__.startswith("bool") for c in given):
        raise AftError("class_index must be integers, got torch.bool; use .long()")
    try:
        classes = torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
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
    classes = classes.long()
    wrong = classes[(classes < 0) | (classes >= len(f.classes))]
    if len(wrong):
        raise AftError(
            f"class {int(wrong[0])} is out of range: the classes of {f.name} are "
            f"0..{len(f.classes) - 1}"
        )
    return classes


class Meant(NamedTuple):
    """The meaning of a network's outputs.

    Attributes:
        output: of OUTPUTS without auto.
        single: there is one output, of a binary classifier.
        guess: what was assumed, or looks wrong, for the user to know; "" where nothing is.
    """

    output: str
    single: bool = False
    guess: str = ""


SIGMOIDS = ("SigmoidBackward", "HardsigmoidBackward")

# Operations of autograd that move values and compute none.
MOVING = (
    *("View", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Clone", "Alias", "ToCopy"),
    *("UnsafeView", "Permute", "Transpose", "T", "Expand", "AsStrided"),
)

SCALES = (0.1, 1.0, 10.0)  # of the random inputs that show if outputs are probabilities


def output_of(run: Callable[[Tensor], Tensor], x: Tensor, first: Tensor, wanted: str) -> Meant:
    """Find out what a network's outputs mean.

    Outputs are probabilities already where they lie in [0, 1] for random inputs of several
    scales, and either sum to 1 or come out of a sigmoid, as autograd tells. Logarithms of
    probabilities need no name: their softmax is these probabilities.

    Args:
        run: from inputs, shape (N, 3, H, W), to outputs.
        x: one random input.
        first: its outputs.
        wanted: of OUTPUTS.

    Raises:
        AftError: what is wanted does not fit, or one output comes out of a softmax.
    """
    check_name("output", wanted, OUTPUTS)
    single = first.numel() == 1
    if not (single or wanted == NONE or in_range(first)):
        return Meant(SOFTMAX if wanted == AUTO else wanted)
    if single and wanted == SOFTMAX:
        raise AftError(
            "the network has one output, and the softmax of one output is 1 for every image; pass "
            "--output sigmoid, or none if it is a probability already"
        )
    generator = torch.Generator().manual_seed(1)
    inputs = torch.cat([torch.randn(x.shape, generator=generator) * scale for scale in SCALES])
    found = run(inputs.to(x))
    if single and found.numel() != len(inputs):
        raise AftError(
            f"the network has one output for {len(inputs)} images, so it is none of a class; pass "
            "a network whose outputs have shape (N, C), (N, 1) or (N,)"
        )
    found = torch.cat([first.reshape(1, -1), found.reshape(len(inputs), -1)])
    if not in_range(found):
        if wanted == NONE:
            raise AftError(
                f"--output none is of probabilities, but the outputs reach from {found.min():.3g} "
                f"to {found.max():.3g}; pass --output softmax, or sigmoid for classes that do not "
                "exclude each other"
            )
        already = False
    else:
        last = last_operation(run, x)
        if single and wanted == AUTO and last.startswith("SoftmaxBackward"):
            raise AftError(
                "the network's only output comes out of a softmax, so it is 1 for every image; "
                "leave the softmax out"
            )
        already = last.startswith(SIGMOIDS) or (not single and sum_to_one(found))
    if wanted == AUTO and already:
        return Meant(NONE, single, f"{ALREADY}, so the score y^c of maps is the probability itself")
    if wanted == AUTO and single:
        return Meant(SIGMOID, True, ONE_LOGIT)
    again = f"{ALREADY}; --output {wanted} applies {wanted} to them; leave it out"
    doubled = already and wanted in (SOFTMAX, SIGMOID)
    return Meant(SOFTMAX if wanted == AUTO else wanted, single, again if doubled else "")


ALREADY = "its outputs are probabilities already"

ONE_LOGIT = (
    "its only output is taken for the logit of class 1, whose sigmoid is the probability; pass "
    "--output none if it is a probability already"
)


def last_operation(run: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Name autograd's last operation that computes; "" where it can't be known."""
    try:
        with torch.enable_grad():
            # A copy: the network may write into its input.
            node: Any = run(x.detach().requires_grad_().clone()).grad_fn
    except RuntimeError:
        return ""
    while node is not None and node.name().partition("Backward")[0] in MOVING:
        node = node.next_functions[0][0]
    return node.name() if node is not None else ""
