"""The logits in what a network returns: a tensor, or a tuple, dictionary or object of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from aftcli.cutting.networks import SameModules
from aftcli.errors import AftError, first_line, nearest

# Networks of these treat images alone.
PUBLISHED = ("torchvision.", "timm.", "transformers.", "aftcli.networks.lite")

FLAT = ".flatten"  # the last step to logits of shape (N, C, 1, 1); no name, which has no dot first

NESTED = 3  # structures in structures that are searched for logits


class Tried(NamedTuple):
    """An input x of a network, shape (1, C, H, W), and what the network returns for it."""

    x: Tensor
    out: Any


@torch.no_grad()
def run(model: nn.Module, shape: Sequence[int]) -> Tried:
    """Run a network on a random input of its dtype, on its device.

    Args:
        model: in eval mode.
        shape: C, H and W of the input.

    Raises:
        AftError: it does not take such inputs.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, generator=generator)
    x = x.to(next(model.parameters(), x))
    try:
        return Tried(x, model(x))
    except Exception as error:
        raise AftError(
            f"{type(model).__name__} can't run an input of shape {tuple(x.shape)} "
            f"({first_line(error)[:200]}); say what it takes: preprocessing=Preprocessing("
            "size=(H, W), mean=(...), std=(...)), or an attribute `preprocessing` of it"
        ) from error


@torch.no_grad()
def check_logits(model: nn.Module, tried: Tried, note: Callable[[str], None]) -> None:
    """Check that logits are finite numbers in floating point, a row for each image.

    Args:
        model: returns logits, or what only a target explains, which is not checked.
        tried: what it, or the network that it is of, returned of an input.
        note: is told where the rows depend on each other.

    Raises:
        AftError: they are not.
    """
    name, x = type(model).__name__, tried.x
    logits = at_path(tried.out, model.path) if isinstance(model, Logits) else tried.out
    if not isinstance(logits, Tensor) or (logits.dim() != 2 and logits.numel() != 1):
        if logits is None or isinstance(logits, str | int | float):
            raise AftError(f"{name} returns {logits!r}; its forward must return logits, (N, C)")
        return
    if not logits.is_floating_point():
        raise AftError(
            f"{name} returns {str(logits.dtype).removeprefix('torch.')} numbers, and maps need "
            "logits in floating point; let its forward return them"
        )
    if not logits.isfinite().all():
        raise AftError(
            f"{name} returns {'NaN' if logits.isnan().any() else 'infinity'} for a random input; "
            "look for a diverged training in its weights, and for divisions by 0 in its forward"
        )
    whole = model.whole if isinstance(model, Logits) else model
    if type(whole).__module__.startswith(PUBLISHED):
        return
    try:
        both = model(torch.cat([x, 2 * x.flip(-1)]))
    except Exception as error:
        raise AftError(
            f"{name} runs one image, but not two at once ({first_line(error)[:200]}); let its "
            "forward take any number of images"
        ) from error
    if both.numel() != 2 * logits.numel():
        if logits.numel() == 1:  # see core.outputs.output_of
            return
        raise AftError(
            f"{name} returns outputs of shape {tuple(both.shape)} for 2 images; let its forward "
            "return a row for each"
        )
    off = (both.reshape(2, -1)[0] - logits.reshape(-1)).abs().max()
    if off > torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max():
        again = at_path(whole(x), model.path) if isinstance(model, Logits) else model(x)
        if not torch.equal(again, logits):
            raise AftError(
                f"{name} returns different values each time for the same input: it draws random "
                "numbers (dropout in training mode?) or keeps state; switch that off in its "
                "forward"
            )
        note(
            f"the output of {name} depends on the other images of the batch (a batch norm in "
            "training mode?), so maps of several images differ from those of each alone; so do "
            "thresholds, which run masked copies of an image together"
        )


class Output(NamedTuple):
    """The place of logits in what a network returns.

    Attributes:
        path: keys, indices and attributes that lead to the logits, outermost first.
    """

    path: tuple[str | int, ...]

    @property
    def name(self) -> str:
        """The path as `--output-key` takes it."""
        return ".".join(str(key) for key in self.path if key != FLAT)


def find_output(
    out: object, key: str | None = None, note: Callable[[str], None] = warnings.warn
) -> Output:
    """Find the logits in what a network returns.

    Args:
        out: a tensor, or tuples, lists, mappings and objects of tensors.
        key: the name of an entry, its number in a tuple, or several of them joined by dots;
            default `logits`, otherwise the first tensor of shape (N, C), or (N, C, 1, 1).
        note: is told which one was taken, if there are several.

    Raises:
        AftError: nothing has that name, or that shape.
    """
    tensors = dict(_tensors(out))
    if key is None and isinstance(out, Tensor):
        return Output(_flattened((), out))
    named = {Output(path).name: path for path in tensors}
    if key is not None:
        under = [path for name, path in named.items() if f"{name}.".startswith(f"{key}.")]
        if not under:
            known = nearest(key, named) if any(named) else "none, it returns one tensor"
            raise AftError(f"unknown output {key!r} of the network; nearest: {known}")
        return Output(_flattened(under[0], tensors[under[0]]))
    # A list of mappings has one for each image, as detectors give: none holds logits (N, C).
    for_each = isinstance(out, list) and all(isinstance(part, Mapping) for part in out)
    fit = [path for path, tensor in tensors.items() if tensor.dim() == 2 and not for_each]
    fit = fit or [path for path, tensor in tensors.items() if _has_sides(tensor) and not for_each]
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
    return Output(_flattened(chosen, tensors[chosen]))


def _has_sides(tensor: Tensor) -> bool:
    """Tell if a tensor has one cell a channel: (N, C, 1, 1), as of a convolution after pooling."""
    return tensor.dim() > 2 and all(side == 1 for side in tensor.shape[2:])


def _flattened(path: tuple[str | int, ...], tensor: Tensor) -> tuple[str | int, ...]:
    return (*path, FLAT) if _has_sides(tensor) else path


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
        if len(path) < NESTED:
            yield from _tensors(part, (*path, key))


def at_path(out: Any, path: Sequence[str | int]) -> Any:  # noqa: ANN401 - a structure of anything
    """Follow a path into what a network returns, which torch.fx may trace."""
    for i, key in enumerate(path):
        if key == FLAT:
            return out.flatten(1)
        if isinstance(out, fx.Proxy):
            return out.tracer.create_proxy("call_function", at_path, (out, tuple(path[i:])), {})
        inside = isinstance(out, Mapping) or (isinstance(out, list | tuple) and type(key) is int)
        out = out[key] if inside else getattr(out, str(key))
    return out


class Logits(SameModules):
    """A network, or a head, that returns only the logits of another one, with the same modules.

    Attributes:
        path: the place of the logits.
    """

    def __init__(self, network: nn.Module, path: tuple[str | int, ...]) -> None:
        super().__init__(network)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of inputs x, or of A."""
        # As torch.fx calls it: the network is no module of this one.
        return at_path(self.whole.forward(x), self.path)  # type: ignore[no-any-return]


class LogitsOfSeveral(Logits):
    """The same for a head that takes A and what bypasses the layer."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """Compute the logits of A and the rest."""
        return at_path(self.whole.forward(x, *rest), self.path)  # type: ignore[no-any-return]


@torch.no_grad()
def with_logits(
    model: nn.Module, tried: Tried, key: str | None, note: Callable[[str], None]
) -> nn.Module:
    """Return a network that returns only its logits; the model itself if it does so already.

    A model without logits is returned as it is: only a target of its output can be explained.

    Args:
        model: in eval mode.
        tried: what it returned for an input.
        key: see `find_output`.
        note: see `find_output`.

    Raises:
        AftError: there is no such entry, or hooks of the network change what it returns.
    """
    try:
        output = find_output(tried.out, key, note)
    except AftError:
        if key is not None:
            raise
        return model
    if not output.path:
        return model
    # Messages name its class.
    logits: nn.Module = type(type(model).__name__, (Logits,), {})(model, output.path)
    own = at_path(tried.out, output.path)
    if not torch.equal(logits(tried.x), own) and own.isfinite().all():
        raise AftError(
            f"{type(model).__name__} returns different values each time, or its own hooks change "
            "them; remove the hooks, or let its forward do what they do"
        )
    return logits
