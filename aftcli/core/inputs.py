"""Inputs x and classes c that callers give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aftcli.errors import AftError


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
