"""Targets beyond a class: scores of a network's output, whatever it is.

A target takes the network's output for N images and returns one score for each, shape (N,). If it
returns a single score, it is called image by image. A network with a target is a classifier of one
class, whose logit is that score. So every method that needs no classes can explain it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.cutting.outputs import Logits
from aftcli.errors import AftError, first_line
from aftcli.networks.own import run_file
from aftcli.settings import NONE

Target = Callable[[Any], Tensor]


class Scored(nn.Module):
    """A head followed by a target: one logit, the score."""

    def __init__(self, head: nn.Module, target: Target, name: str, single: bool) -> None:
        super().__init__()
        self.inner, self.target, self.name, self.single = head, target, name, single
        self.training = head.training

    def forward(self, activation: Tensor, *rest: Tensor) -> Tensor:
        """Compute scores, shape (N, 1), of A, shape (N, K, h, w)."""
        output, count = self.inner(activation, *rest), len(activation)
        if self.single:  # the head has made columns of both classes of it
            output = output[:, 1:]
        scores = self._scores(output)
        if scores.numel() == 1 < count:
            # A target written for one image, as other libraries' are.
            alone = [self._scores(image_of(output, n, count)) for n in range(count)]
            scores = torch.cat([each.reshape(-1) for each in alone])
        if scores.numel() != count:
            raise AftError(
                f"target {self.name} gives {tuple(scores.shape)} for {count} images; it must "
                "return one score for each, shape (N,)"
            )
        if activation.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise AftError(
                f"target {self.name} gives a score without a gradient; leave .item(), .detach(), "
                "argmax and numpy out of it, or take a method without gradients: scorecam"
            )
        return scores.reshape(-1, 1)

    def _scores(self, output: object) -> Tensor:
        try:
            scores = self.target(output)
        except AftError:
            raise
        except Exception as error:
            raise AftError(
                f"target {self.name} fails on the output, {_described(output)}: {first_line(error)}"
            ) from error
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            what = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise AftError(f"target {self.name} gives {what}; it must return a tensor of floats")
        return scores


def image_of(output: Any, n: int, count: int) -> Any:  # noqa: ANN401 - whatever a network returns
    """Return the output of the n-th of `count` images: rows of tensors, an entry of a list."""
    if isinstance(output, Tensor):
        return output[n : n + 1]
    if isinstance(output, Mapping):
        return {key: image_of(value, n, count) for key, value in output.items()}
    if isinstance(output, list | tuple):
        if len(output) == count and not isinstance(output[0], Tensor):
            return [output[n]]
        return [image_of(value, n, count) for value in output]
    return output


def _described(output: object) -> str:
    shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
    return f"a {type(output).__name__}{shape}"


class Targeted(Classifier):
    """A network whose one class is a target; made by `with_target`."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the score itself, shape (N, 1), which need not be a probability."""
        return logits


def with_target(f: Classifier, target: Target, name: str = "") -> Targeted:
    """Return a classifier whose one class, 0, has a target's score as its logit.

    Args:
        f: the classifier, or a network cut with any output; its modules are shared.
        target: see the module.
        name: the class's name; default the function's.
    """
    if not callable(target):
        raise AftError(f"a target is a function of the output, got {type(target).__name__}")
    own = getattr(target, "__name__", type(target).__name__)
    name = name or ("target" if own == "<lambda>" else own)
    # A target is of all that the network returns, but for what was named.
    head = f.head.whole if isinstance(f.head, Logits) and not f.output_key else f.head
    return _of_score(f, Scored(head, target, name, f.single))


def contrasted(f: Classifier, class_index: int, other: int) -> Targeted:
    """Return a classifier whose one class, 0, has the logit y^A - y^B of two classes of f's."""
    target = contrast_target(class_index, other)
    return _of_score(f, Scored(f.head, target, target.__name__, False))


def _of_score(f: Classifier, head: Scored) -> Targeted:
    g: Any = copy.copy(f)
    g.__class__ = Targeted
    g._modules = {**f._modules, "head": head}
    g.classes, g.engine, g.output = Classes((head.name,)), None, NONE
    g.__dict__["linear_head"] = None  # what follows a linear layer is the user's
    return g  # type: ignore[no-any-return]


def load_target(text: str) -> Target:
    """Load a target from the user's own code, FILE.py:NAME, which is run.

    Raises:
        AftError: there is no such file or function, or the code fails.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not file.endswith(".py") or not name:
        raise AftError(f"{text!r} names no function in a file; write FILE.py:NAME")
    if not path.is_file():
        raise AftError(f"{path}: there is no such file; --target-fn takes FILE.py:NAME")
    try:
        module = run_file(path, f"aft_target_{path.stem}")
    except Exception as error:
        raise AftError(f"{path}: can't be run ({first_line(error)})") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise AftError(f"{path}: has no function {name!r}; there are {', '.join(known) or 'none'}")
    return found  # type: ignore[no-any-return]


# Ready ones


def contrast_target(class_index: int, other: int) -> Target:
    """Return a target: y^A - y^B, one class against another, of logits, shape (N, C)."""

    def score(output: Tensor) -> Tensor:
        return output[:, class_index] - output[:, other]

    return _named(score, f"class {class_index} against {other}")


def output_target(index: int = 0) -> Target:
    """Return a target for a regression: one number of outputs, shape (N,) or (N, M)."""

    def score(output: Tensor) -> Tensor:
        return output if output.dim() == 1 else output[:, index]

    return _named(score, f"output {index}")


def similarity_target(embedding: Tensor) -> Target:
    """Return a target: the cosine between embeddings, shape (N, D), and a given one, shape (D,)."""

    def score(output: Tensor) -> Tensor:
        return F.cosine_similarity(output, embedding.to(output)[None], dim=1)

    return _named(score, "similarity")


def region_target(class_index: int, region: Tensor) -> Target:
    """Return a target: the mean logit of a class over a region of a segmentation.

    Args:
        class_index: c of the output, shape (N, C, H, W), or of its entry `out` (torchvision).
        region: shape (H, W), bool.
    """

    def score(output: Tensor | Mapping[str, Tensor]) -> Tensor:
        logits = output["out"] if isinstance(output, Mapping) else output
        if logits.dim() != 4 or logits.shape[2:] != region.shape or not region.any():
            raise AftError(
                f"a region of shape {tuple(region.shape)} with {int(region.sum())} pixels does not "
                f"fit an output of shape {tuple(logits.shape)}; give one of the same (H, W) with a "
                "pixel in it"
            )
        return logits[:, class_index, region.to(logits.device)].mean(1)

    return _named(score, f"region of class {class_index}")


def box_target(box: Sequence[float], label: int | None = None) -> Target:
    """Return a target: the score of the detected box that overlaps `box` most; 0 if none does.

    Args:
        box: left, top, right, bottom, pixels of the input.
        label: the boxes' label; default any.

    The output must be that of torchvision's detectors: for each image `boxes`, shape (n, 4),
    `scores` and `labels`, shape (n,).
    """

    def of_image(found: Mapping[str, Tensor]) -> Tensor:
        scores = found["scores"]
        overlaps = overlap(found["boxes"].detach(), torch.tensor(box).to(found["boxes"]))
        if label is not None:
            overlaps = torch.where(found["labels"] == label, overlaps, 0)
        # A sum over one box or none: without one the gradient is 0.
        return (scores * (overlaps > 0))[overlaps.argsort(descending=True)[:1]].sum()

    def score(output: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.stack([of_image(found) for found in output])

    return _named(score, "box" if label is None else f"box of class {label}")


def overlap(boxes: Tensor, box: Tensor) -> Tensor:
    """Return the intersection over union of boxes, shape (n, 4), with one, shape (n,)."""
    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = [(each[..., 2:] - each[..., :2]).clamp(min=0).prod(-1) for each in (boxes, box)]
    union = areas[0] + areas[1] - both
    return torch.where(union > 0, both / union, 0)


def _named(score: Target, name: str) -> Target:
    score.__name__ = name
    return score
