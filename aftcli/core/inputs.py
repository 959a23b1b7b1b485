"""Inputs that a network takes, and checks of the inputs x and classes c that callers give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aftcli.core.classes import Preprocessing, recorded_preprocessing
from aftcli.cutting.networks import input_channels, takes_videos
from aftcli.cutting.outputs import run
from aftcli.errors import AftError

# Sides of square inputs, pixels, that are tried where a network of unknown input refuses 224.
SIDES = (32, 64, 96, 128, 192, 240, 256, 288, 299, 320, 384, 448, 512)


FRAMES = 8  # of the video that a cut is checked on, where none are said


@torch.no_grad()
def find_preprocessing(
    model: nn.Module, given: Preprocessing | None, note: Callable[[str], None]
) -> Preprocessing:
    """Find a preprocessing that fits a network: the one that it records, otherwise the usual one.

    Args:
        model: in eval mode.
        given: the user's; kept, except that mean and std are fitted to another number of channels
            if they are the default ones or the same for all channels.
        note: is told what was guessed.

    Raises:
        AftError: the network fails on every size that is tried.
    """
    channels, usual = input_channels(model), Preprocessing()
    if given:
        of_colours = (given.mean, given.std) != (usual.mean, usual.std) and not given.is_even
        if of_colours or channels == len(given.mean):
            return given
        try:
            run(model, given.shape)
        except AftError:
            return given.with_channels(channels)
        return given  # the first convolution is not the input's
    recorded, config = recorded_preprocessing(model), getattr(model, "config", None)
    found, side = recorded or usual, getattr(config, "image_size", None)
    if recorded is None and isinstance(side, int | list | tuple):
        found = found.with_size((side, side) if isinstance(side, int) else (side[0], side[-1]))
    sized = found.with_channels(channels)
    tried = [sized, found, *(sized.with_size((side, side)) for side in SIDES)]
    problem: AftError | None = None
    for each in tried:
        try:
            run(model, input_shape(model, each))
        except AftError as error:
            problem = problem or error
            continue
        if each != recorded:
            note(_guess(model, each, recorded is not None))
        return each
    assert problem
    raise problem


def input_shape(model: nn.Module, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the shape of an input of a network: (C, H, W), of videos (C, D, H, W).

    A volume's preprocessing may say D too, as size=(D, H, W).
    """
    channels, *size = preprocessing.shape
    frames = [FRAMES] if takes_videos(model) and len(size) == 2 else []
    return (channels, *frames, *size)


def _guess(model: nn.Module, guessed: Preprocessing, is_recorded: bool) -> str:
    depth, height, width = guessed.shape
    because = "takes other inputs than it records" if is_recorded else "records no preprocessing"
    colours = "the usual mean and std" if depth in (1, 3) else "mean 0 and std 1"
    return (
        f"{type(model).__name__} {because}; guessed: {depth} x {height} x {width} values, "
        f"{colours}; if that is wrong, give the network an attribute `preprocessing` "
        "(docs/guides/own-network.md)"
    )


class Cut(Protocol):
    """A network cut at layer l: what this module needs of `Classifier`, which imports it."""

    name: str
    classes: Any  # sized
    preprocessing: Any  # with a mean of each channel
    activation_shape: Any

    def at(self, x: Tensor) -> tuple[Any, Tensor]:
        """Compute A, and hold what bypasses layer l."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights."""


def first_activation(f: Cut, x: Tensor, count: int | None = None) -> tuple[Any, Tensor]:
    """Check inputs that a caller gave, and return f.at(x), without gradients: f for them, and A."""
    check_shape(x, count, len(f.activation_shape) == 4, len(f.preprocessing.mean))
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


def check_shape(
    x: Tensor, count: int | None = None, videos: bool = False, channels: int = 3
) -> None:
    """Check that x is a batch of images, or of videos."""
    shape = f"(N, {channels}, D, H, W)" if videos else f"(N, {channels}, H, W)"
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


def check_images(f: Cut) -> None:
    """Check that a network takes images, which commands read."""
    if len(f.activation_shape) == 4:
        raise AftError(
            f"{f.name} takes volumes or videos, (N, {len(f.preprocessing.mean)}, D, H, W), and "
            "commands read images; explain it in Python: attribution_map(f, x, class_index, "
            '"gradcam") (docs/guides/choose-a-method.md)'
        )


def check_classes(f: Cut) -> None:
    """Check that a network returns logits of classes."""
    if not len(f.classes):
        raise AftError(
            f"{f.name} returns no logits of shape (N, C), so it has no classes; explain a target, "
            "a function of its output (target=, --target-fn FILE.py:NAME)"
        )


def class_indices(
    f: Cut, given: Tensor | Sequence[int] | int, count: int, device: torch.device
) -> Tensor:
    """Check classes that a caller gave, and return a tensor, int64, shape (N,).

    Args:
        f: the classifier.
        given: c of each image; for one image a plain number too.
        count: N.
        device: the device of the tensor.
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


# Values of x in a pass of PyTorch on a CPU, for each thread: two images of 224 x 224 pixels. The
# system maps larger activations again in every layer (docs/method/decisions/search.md, Passes).
A_THREAD = 2 * 3 * 224 * 224

# Values of x in a pass of a GPU: 64 images of 224 x 224 pixels. Fewer leave it idle.
ON_A_GPU = 64 * 3 * 224 * 224


def at_once(engine: object, x: Tensor, most: int) -> int:
    """Return how many images of x's size share a pass without gradients; engines divide theirs.

    Args:
        engine: the classifier's; None for PyTorch alone.
        x: inputs, shape (N, 3, H, W).
        most: the largest number on a CPU, and the smallest on a GPU.

    Returns:
        The number; on a GPU a power of two, or `most`: to others its engine adds inputs.
    """
    if x.device.type != "cpu":
        fitting = max(ON_A_GPU // x[0].numel(), 1)
        return max(1 << fitting.bit_length() - 1, most)
    if engine:
        return most
    return min(max(A_THREAD * torch.get_num_threads() // x[0].numel(), 1), most)
