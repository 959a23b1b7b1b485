"""Judge how one network is cut: its logits, its layer, its Grad-CAM, against the plain network.

The judge knows nothing of how a network is cut. It hooks into the plain network instead.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftcli import AftError, Classifier, Preprocessing, attribution_map, cut_classifier

TOLERANCE = 1e-4  # between two maps in [0, 1]
CANDIDATES = 5  # classes, of which one with a map that is not empty is compared
TOWARDS = 0.2  # the least that quarters of A differ in what moves them; 2 at the most
ALIKE = 0.01  # the least that cells differ, of all there is
SHARED = 0.1  # the least share of what two cells change, that both change, where they are mixed
USED = 0.1  # the least share of a tensor that has a gradient, if its cells count
POOLS = re.compile("attn|attention|pool")  # modules that look at cells for a head
EXPLAINED = {  # parts of names of networks where pytorch-grad-cam's map is another one
    "densenet": "theirs weights A behind the ReLU, which is in place, by gradients before it"
}
LARGE = 100e6  # weights; larger networks are cut themselves, not a copy


@dataclass(frozen=True)
class Verdict:
    """Findings on one network.

    Attributes:
        name: the network's.
        refused: the reason; "" where it was cut.
        crashed: an error that is not AftError's; "" without.
        layer: the chosen layer.
        shape: (K, h, w) of A.
        said: what was said about the choice.
        equal: the logits equal the plain network's bit for bit.
        difference: the largest between normalised maps, ours and pytorch-grad-cam's; None where
            theirs can't run.
        unmatched: the reason why theirs can't run.
        silent: the reason why the layer is wrong; "" where it is right.
        other: the layer that `load_classifier` chooses, where it is another.
    """

    name: str
    refused: str = ""
    crashed: str = ""
    layer: str = ""
    shape: tuple[int, ...] = ()
    said: str = ""
    equal: bool = False
    difference: float | None = None
    unmatched: str = ""
    silent: str = ""
    other: str = ""

    @property
    def result(self) -> str:
        """The finding in a word: right, refused, crash, or what is wrong."""
        findings = {
            "crash": self.crashed,
            "refused": self.refused,
            "logits differ": not self.equal,
            "silent": self.silent,
            "two layers": self.other,
            "map differs": (self.difference or 0) > TOLERANCE and not self.explained,
        }
        return next((finding for finding, there in findings.items() if there), "right")

    @property
    def explained(self) -> str:
        """The reason why theirs is another map, where it is known."""
        return next((why for part, why in EXPLAINED.items() if part in self.name), "")

    @property
    def why(self) -> str:
        """The reason of the finding, or a remark on it."""
        differs = self.explained if (self.difference or 0) > TOLERANCE else ""
        chosen = f"load_classifier chooses {self.other}" if self.other else ""
        parts = (self.crashed, self.refused, self.silent, self.said, differs, chosen)
        return "; ".join(filter(None, (*parts, self.unmatched)))


def first_line(error: BaseException) -> str:
    """Return an error's type, unless it is ours, and its first line."""
    line = str(error).strip().partition("\n")[0][:160]
    return line if isinstance(error, AftError) else f"{type(error).__name__}: {line}"


def judged(name: str, model: nn.Module, size: tuple[int, int]) -> Verdict:
    """Cut a network with its default layer and judge it.

    Args:
        name: the network's.
        model: from (1, 3, H, W) to logits (1, C), in eval mode, without gradients of weights.
        size: (H, W), pixels.
    """
    large = sum(weight.numel() for weight in model.parameters()) > LARGE
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            f = cut_classifier(model, preprocessing=Preprocessing(size=size), own=large)
        except AftError as error:
            return Verdict(name, refused=first_line(error))
        except Exception as error:  # noqa: BLE001 - a crash is a finding
            return Verdict(name, crashed=first_line(error))
    said = "; ".join(str(w.message) for w in caught if w.category is UserWarning)
    found = Verdict(name, layer=f.layer_name, shape=tuple(f.activation_shape), said=said)
    try:
        with torch.no_grad():
            found = replace(found, equal=torch.equal(f(x), model(x)))
        modules = dict(model.named_modules())
        module = modules.get(f.layer_name.split("+")[-1])
        if not _defines_layout(modules, f.layer_name):
            # Tokens can only be turned, and random attention hides where they are from.
            tokens = module is not None and _dimensions(model, module, x) == 3
            found = replace(found, silent=misplaced(f, x, 0.0 if tokens else TOWARDS))
        if module is None:
            return replace(found, unmatched="the layer is no module")
        found = _compared(found, f, model, module, x)
        if not found.silent and "not the last" not in found.said:
            later = later_mixing(model, f.layer_name, x, found.shape)
            found = replace(found, silent=later)
    except Exception as error:  # noqa: BLE001 - a crash is a finding
        return replace(found, crashed=first_line(error))
    return found


def as_cells(activation: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bring a layer's output to (N, K, h, w): tokens and channels-last ones, too.

    Args:
        activation: shape (N, K, h, w), (N, h, w, K) or (N, T, K), the cells' tokens last.
        shape: (K, h, w).
    """
    k, h, w = shape
    if activation.dim() == 4:
        return activation if tuple(activation.shape[1:]) == shape else activation.movedim(3, 1)
    if activation.dim() == 3 and activation.shape[2] == k and activation.shape[1] >= h * w:
        return activation[:, activation.shape[1] - h * w :].mT.unflatten(2, (h, w))
    raise ValueError(f"no cells in an output of shape {tuple(activation.shape)}")


@contextmanager
def leaf_at(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Make a module's output the leaf of the graph, and collect it at each call."""
    leaves: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaves.append(change(output.detach().clone()).requires_grad_())
        with torch.enable_grad():
            return leaves[-1].clone()

    handle = module.register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()


def _compared(
    found: Verdict, f: Classifier, model: nn.Module, module: nn.Module, x: Tensor
) -> Verdict:
    """Compare Grad-CAM with pytorch-grad-cam's at the same layer."""
    try:
        c = _telling_class(model, module, x, found.shape)
    except Exception as error:  # noqa: BLE001 - said in the table
        return replace(found, unmatched=first_line(error))
    if c is None:
        return replace(found, silent=found.silent or "the gradient at the layer is zero")
    difference = _difference(f, model, module, x, c, found.shape)
    if difference > TOLERANCE and sum(w.numel() for w in model.parameters()) < LARGE:
        # Rounding, or truly another map?
        parts = f.double(), model.double(), module, x.double()
        difference = _difference(*parts, c, found.shape)
        f.float(), model.float()
    return replace(found, difference=difference)


def _telling_class(
    model: nn.Module, module: nn.Module, x: Tensor, shape: tuple[int, ...]
) -> int | None:
    """Find a class whose map is not empty; None where there is no gradient."""
    with leaf_at(module, lambda a: a) as leaves:
        logits = model(x)
    best, found = -1.0, None
    for c in logits[0].topk(min(CANDIDATES, logits.shape[1])).indices.tolist():
        (gradient,) = torch.autograd.grad(logits[0, c], leaves[-1], retain_graph=True)
        g, a = as_cells(gradient, shape), as_cells(leaves[-1].detach(), shape)
        if not g.any():
            return None
        signed = (g.mean((2, 3), keepdim=True) * a).sum(1)
        if (share := float(signed.max() / signed.abs().max())) > best:
            best, found = share, c
    return found


def _difference(
    f: Classifier,
    model: nn.Module,
    module: nn.Module,
    x: Tensor,
    c: int,
    shape: tuple[int, ...],
) -> float:
    from pytorch_grad_cam import GradCAM

    def reshape(activation: Tensor) -> Tensor:
        return as_cells(activation, shape)

    ours = attribution_map(f, x, torch.tensor([c]), "gradcam")
    with GradCAM(model, [module], reshape_transform=reshape) as tool:
        recorded = tool.activations_and_grads
        recorded(x.clone().requires_grad_())[0, c].backward()
        # The map as theirs is before it is scaled, which rounds it to 1e-7 of its range.
        raw = tool.get_cam_image(
            x, module, [], recorded.activations[0].numpy(), recorded.gradients[0].numpy()
        )
    cells = torch.from_numpy(raw).clamp(min=0)
    cells = cells - cells.min()
    cells = cells / cells.max().clamp(min=1e-30)
    theirs = F.interpolate(cells[:, None], x.shape[-2:], mode="bilinear")[:, 0]
    return float((ours - theirs).abs().max())


def misplaced(f: Classifier, x: Tensor, towards: float = TOWARDS) -> str:
    """Tell what is wrong where the rows and columns of A are not those of the image."""
    shape = tuple(f.activation(x[:1]).shape[1:])
    if len(shape) != 3 or min(shape[1:]) < 2:
        return f"A has no cells: its shape is {shape}"
    wrong = turned(f, x, towards)
    if wrong and sum(weight.numel() for weight in f.parameters()) < LARGE:
        # Random networks may pass on less than float32 resolves.
        wrong = turned(f.double(), x.double(), towards)
        f.float()
    return wrong


@torch.no_grad()
def turned(f: Classifier, x: Tensor, towards: float = TOWARDS) -> str:
    """Change the first, then the last quarter of the rows; A must follow; columns likewise."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    a = f.activation(x)[0]
    if (a - a.mean((1, 2), keepdim=True)).norm() < ALIKE * a.norm():
        return ""  # cells that attention made alike, as random weights do, can't be told apart
    for axis, what in ((2, "rows"), (3, "columns")):
        side = x.shape[axis]
        first, last = (
            _change(f, x, noise.narrow(axis, start, side // 4), axis, start, a)
            for start in (0, side - side // 4)
        )
        # What each cell is moved by changes near it, of all: borders and weak cells cancel out.
        share = (first - last) / (first + last)
        some = max(len(share) // 4, 1)
        if not share[:some].mean() - share[-some:].mean() > towards:
            return f"dimension {axis} of A is not the {what} of the image"
    return ""


def _change(f: Classifier, x: Tensor, noise: Tensor, axis: int, start: int, a: Tensor) -> Tensor:
    """Compute how much noise in some rows, or columns, of the image moves each one of A."""
    moved = x.clone()
    moved.narrow(axis, start, noise.shape[axis]).add_(noise)
    return (f.activation(moved)[0] - a).norm(dim=0).mean(3 - axis)


@torch.no_grad()
def _dimensions(model: nn.Module, module: nn.Module, x: Tensor) -> int:
    """Count the dimensions of a module's output."""
    with leaf_at(module, lambda a: a) as leaves:
        model(x)
    return leaves[-1].dim()


def _defines_layout(modules: dict[str, nn.Module], layer: str) -> bool:
    """Tell if a layer has (N, K, h, w) by its definition: no test is needed."""
    kinds = nn.Conv2d | nn.BatchNorm2d
    return any(isinstance(modules.get(name), kinds) for name in layer.split("+"))


def later_mixing(model: nn.Module, layer: str, x: Tensor, shape: tuple[int, ...]) -> str:
    """Find a later module with weights whose cells see several of A's, or which is A's successor.

    A single cell of A is changed, five times. A norm before the attention of the last block is
    where the peers' guides cut transformers: mixing within its own block is no finding.
    """
    modules = dict(model.named_modules())
    target = modules[layer.split("+")[-1]]
    cells = _some_cells(shape)
    started: list[nn.Module] = []
    found: list[tuple[str, str, Tensor]] = []
    raw: list[torch.Size] = []
    names = {module: name for name, module in modules.items()}

    def change(output: Tensor) -> Tensor:
        copies = output[:1].repeat(len(cells) + 1, *[1] * (output.dim() - 1))
        view = as_cells(copies, shape)
        for n, (i, j) in enumerate(cells):
            noise = torch.randn(view.shape[1], generator=torch.Generator().manual_seed(n))
            view[n + 1, :, i, j] += 3 * output.std() * noise
        started.clear()
        raw[:] = [copies.shape[1:]]
        return copies

    def before(module: nn.Module, _inputs: object) -> None:
        started.append(module)

    def after(module: nn.Module, _inputs: object, output: object) -> None:
        weights = next(module.parameters(), None) is not None
        if not raw or not weights or module not in started or "Norm" in type(module).__name__:
            return
        for tensor in _tensors(output):
            if _mixed(tensor, len(cells) + 1):
                found.append((names[module], "mixes cells", tensor))
            elif _is_successor(module, tensor, raw[0], shape[0], names[module]):
                found.append((names[module], "changes cells", tensor))

    handles = [m.register_forward_pre_hook(before) for m in modules.values() if m is not target]
    handles += [m.register_forward_hook(after) for m in modules.values() if m is not target]
    try:
        with leaf_at(target, change):
            try:
                logits = model(x)
            except (RuntimeError, ValueError):  # it remembers the number of images
                found.clear(), raw.clear(), started.clear()
                logits = model(x.expand(len(cells) + 1, -1, -1, -1))
    finally:
        for handle in handles:
            handle.remove()
    block = layer.split("+")[-1].rpartition(".")[0]
    attends = block and any(
        "ttention" in type(part).__name__ or name.endswith("attn")
        for name, part in modules[block].named_modules()
    )
    if "Norm" in type(target).__name__ and attends:
        found = [each for each in found if not each[0].startswith(f"{block}.")]
    for name, what, tensor in reversed(found):
        if _counts(logits, tensor):
            return f"{name} {what} behind it"
    return ""


def _is_successor(
    module: nn.Module, tensor: Tensor, raw: torch.Size, channels: int, name: str
) -> bool:
    """Tell if an output is like A, made by more than a factor and a bias of each channel."""
    weights = sum(weight.numel() for weight in module.parameters())
    return tensor.shape[1:] == raw and weights > 2 * channels and not POOLS.search(name)


def _some_cells(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Choose four cells side by side in the middle, and a corner."""
    i, j = max(shape[1] // 2 - 1, 0), max(shape[2] // 2 - 1, 0)
    return [(i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1), (0, 0)]


def _tensors(output: Any) -> list[Tensor]:  # noqa: ANN401 - modules return anything
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output
    return [t for t in values if isinstance(t, Tensor)] if isinstance(values, list | tuple) else []


def _mixed(output: Tensor, copies: int) -> bool:
    """Tell if a tensor has cells, of which some see several cells of A."""
    if output.dim() < 3 or output.shape[0] % copies:
        return False
    by_copy = output.detach().unflatten(0, (copies, -1))
    if sum(side > 1 for side in by_copy.shape[1:]) < 2:
        return False
    changed = (by_copy[1:] - by_copy[:1]).abs() > 1e-5 * by_copy.abs().max()
    common = changed.all(0)  # all cells: attention; a few: tokens that stand for the whole
    if common.float().mean() > 0.5:
        return True
    own = (changed & ~common)[:4].flatten(1).float()
    shared, alone = own @ own.mT, own.sum(1)
    # Some of the tokens that stand for the whole are moved too little by single cells.
    pairs = shared > SHARED * torch.minimum(alone[:, None], alone)
    return bool((pairs & ~torch.eye(len(own), dtype=torch.bool)).any())


def _counts(logits: Tensor, output: Tensor) -> bool:
    """Tell if most of a tensor has a gradient: not only a token that stands for the whole."""
    with suppress(RuntimeError):
        (g,) = torch.autograd.grad(
            logits.square().sum(), output, retain_graph=True, allow_unused=True
        )
        return g is not None and float((g != 0).float().mean()) > USED
    return True
