"""The zero level of a signed map, moved by a term that softmax does not see.

docs/method/zero-level.md has the derivation.

All logits of an image may move by the same s(x): no probability changes, but the maps of the
logits do. With s = v . mean(A) + t Z (1 - mean(O)), where O is one more channel of A, 1
everywhere, and Z its cells, no logit moves by t at all, and the signed map of Grad-CAM becomes
S = sum_k (alpha_k + v_k / Z) A^k - t.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftcli.core.classifier import Classifier
from aftcli.core.head import linear_head
from aftcli.core.methods import METHODS, method
from aftcli.cutting.cut import flow_of
from aftcli.cutting.watched import RunTo
from aftcli.errors import AftError
from aftcli.settings import RANGES, SOFTMAX

ROUNDING = 1e-4  # of the largest logit: a head that is rewritten must give the same ones

SHARPNESS = 20.0  # of the sigmoid that stands for the support, for a map with maximum 1

PREFIX = "zero_level."  # of its tensors' names in a checkpoint


class ZeroLevel(nn.Module):
    """The layer and the head that a classifier had before, and what moved its maps.

    Args:
        layer: w1.
        head: w2; all logits may have been moved by v already (`fold`), then v is None.
        t: the zero level, in the unit in which Grad-CAM's cells sum to about the logit, shape ().
        v: added to every class's weight of each channel's mean, shape (K,).
    """

    t: Tensor
    v: Tensor | None

    def __init__(self, layer: nn.Module, head: nn.Module, t: Tensor, v: Tensor | None) -> None:
        super().__init__()
        self.layer, self.head = layer, head
        self.register_buffer("t", t.detach().clone())
        self.register_buffer("v", None if v is None else v.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        """Return t, and v where there is one, by their names in a checkpoint."""
        found = {"t": self.t} | ({} if self.v is None else {"v": self.v})
        return {f"{PREFIX}{name}": value for name, value in found.items()}


class WithConstant(nn.Module):
    """A layer whose output has one channel more, 1 everywhere."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute A with the constant channel, shape (N, K + 1, h, w), and what else there is."""
        activation, *rest = flow_of(self.inner(x))
        widened = _with_ones(activation)
        return (widened, *rest) if rest else widened


class Levelled(nn.Module):
    """Any head, its logits moved by v . mean(A) + level (1 - mean of the constant channel)."""

    level: Tensor
    v: Tensor | None

    def __init__(self, head: nn.Module, level: Tensor, v: Tensor | None) -> None:
        super().__init__()
        self.inner = head
        self.register_buffer("level", level)
        self.register_buffer("v", v)

    def forward(self, activation: Tensor, *rest: Tensor) -> Tensor:
        """Compute logits, shape (N, C), of activations with the constant channel."""
        plain, constant = activation[:, :-1], activation[:, -1:]
        moved: Tensor = self.inner(plain, *rest) + self.level * (1 - constant.mean((2, 3)))
        if self.v is None:
            return moved
        return moved + (plain.mean((2, 3)) * self.v).sum(1, keepdim=True)


def give_zero_level(f: Classifier, t: Tensor, v: Tensor | None = None) -> None:
    """Replace a classifier's layer and head by ones with a zero level; its probabilities stay.

    A zero level that it has is replaced.

    Args:
        f: the classifier; it is changed.
        t: the zero level, see `ZeroLevel`.
        v: see `ZeroLevel`; None moves no weights.

    Raises:
        AftError: see `check_softmax`.
    """
    check_softmax(f)
    before = f.zero_level or f
    layer, head = before.layer, before.head
    channels, high, wide = f.activation_shape
    channels -= f.zero_level is not None
    f.zero_level = ZeroLevel(layer, head, t.to(next(f.parameters())), v).to(f.device).eval()
    level = f.zero_level.t * (high * wide)
    shape = (channels, high, wide)
    widened = None if f.bypassed else _widened(head, shape, level, f.zero_level.v)
    f.layer = WithConstant(layer).eval()
    f.head = (widened or Levelled(head, level, f.zero_level.v)).eval()
    f.activation_shape = (channels + 1, high, wide)
    f.__dict__.pop("linear_head", None)  # of the head before


def without_constant(f: Classifier, activation: Tensor) -> Tensor:
    """Take the constant channel of a zero level off A, where f has one."""
    return activation if f.zero_level is None else activation[:, :-1]


@torch.no_grad()
def _widened(
    head: nn.Module, shape: tuple[int, int, int], level: Tensor, v: Tensor | None
) -> nn.Module | None:
    """Rewrite a head of mean pooling and one linear layer with one channel more; None otherwise.

    So it stays such a head, and whatever is cheap for those stays cheap.
    """
    split = linear_head(head, shape)
    if split is None or not (split.is_last and split.is_mean):
        return None
    weight, bias = split.linear.weight, split.linear.bias
    wide = nn.Linear(shape[0] + 1, len(weight)).to(weight)
    wide.weight.copy_(torch.cat([_moved(weight, v), -level.expand(len(weight), 1)], 1))
    wide.bias.copy_(level + (0 if bias is None else bias))
    found = nn.Sequential(split.pool, wide).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *shape, generator=generator).to(weight)
    with suppress(RuntimeError):  # a pooling may be written for K channels only
        expected = Levelled(head, level, v)(_with_ones(sample))
        if (found(_with_ones(sample)) - expected).abs().max() <= ROUNDING * expected.abs().max():
            return found
    return None


def _with_ones(activation: Tensor) -> Tensor:
    return torch.cat([activation, torch.ones_like(activation[:, :1])], 1)


def _moved(weight: Tensor, v: Tensor | None) -> Tensor:
    return weight if v is None else weight + v


@torch.no_grad()
def fold(f: Classifier, v: Tensor) -> bool:
    """Add v to every class's weights, where the head is mean pooling and one linear layer.

    Args:
        f: the classifier; its head is changed, its probabilities stay.
        v: shape (K,).

    Returns:
        False where the head has no place for v; f is as it was then.
    """
    split = f.linear_head
    if split is None or not (split.is_last and split.is_mean):
        return False
    split.linear.weight.add_(v)
    return True


def signed_map(f: Classifier, activation: Tensor, class_index: Tensor, cam: str) -> Tensor:
    """Compute a CAM before its ReLU, shape (N, h, w), in one unit for all methods.

    The unit is Grad-CAM's, where the cells of a linear head's map sum to the logit but for its
    bias: CAM is Z times that, Ablation-CAM Z / |y^c| times.

    Args:
        f: the classifier.
        activation: A, shape (N, K, h, w).
        class_index: c, shape (N,).
        cam: a method with a sign.
    """
    signed = method(cam).load_signed()(f, activation, class_index, activation)
    cells = signed[0].numel()
    if cam == "cam":
        return signed / cells
    if cam == "ablationcam":
        with torch.no_grad():
            y = f.head(activation).gather(1, class_index[:, None])[:, :, None]
        return signed * torch.where(y != 0, y.abs(), 1) / cells
    return signed


def moved_by(v: Tensor, activation: Tensor, cam: str) -> Tensor:
    """Compute what v . mean(A), added to the logit, adds to a signed map, shape (N, h, w).

    Ablation-CAM weighs a channel by what its zero takes from the logit, v_k mean(A^k); the others
    by the gradient, v_k / Z.

    Args:
        v: shape (K,).
        activation: A, shape (N, K, h, w).
        cam: the method.
    """
    cells = activation[0, 0].numel()
    if cam == "ablationcam":
        weights = v * activation.mean((2, 3))
        return torch.einsum("nk,nkhw->nhw", weights, activation) / cells
    return torch.einsum("k,nkhw->nhw", v, activation) / cells


def support(signed: Tensor) -> Tensor:
    """Return L, shape (N, h + 1, w + 1): above 0 where the map stretched between cells is.

    A piece is what lies between four neighbouring centres of cells, or beyond the outermost ones,
    where the map repeats them: the stretched ReLU is above 0 there if one of its cells is. Pixels
    exactly on a centre, if there are any, count to the piece after it.

    Args:
        signed: S, shape (N, h, w).
    """
    padded = F.pad(signed[:, None], (1, 1, 1, 1), mode="replicate")
    return F.max_pool2d(padded, 2, 1)[:, 0]


def pieces_of(mask: Tensor, cells: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Average masks over the pieces of `support`.

    Args:
        mask: shape (N, H, W).
        cells: (h, w).

    Returns:
        Means, shape (N, h + 1, w + 1), 0 where a piece has no pixel, and the pieces' areas as
        shares of the input, shape (h + 1, w + 1).
    """
    rows, columns = (
        _membership(size, count).to(mask.device)
        for size, count in zip(mask.shape[1:], cells, strict=True)
    )
    pixels = rows.sum(1)[:, None] * columns.sum(1)
    kept = rows @ mask.to(rows) @ columns.T / pixels.clamp(min=1)
    return kept, pixels / pixels.sum()


def _membership(size: int, cells: int) -> Tensor:
    """Return which piece each pixel of a side lies in, shape (cells + 1, size), 0 or 1."""
    # Pixel p's centre is at (p + 1/2) cells / size - 1/2, counted in centres of cells.
    piece = ((2 * torch.arange(size) + 1) * cells + size) // (2 * size)
    return F.one_hot(piece, cells + 1).T.float()


class Learned(NamedTuple):
    """Maps and masks to learn a zero level from, of all training images that could be read.

    Attributes:
        signed: S, shape (N, h, w), in the unit of `signed_map`.
        maximum: of each S, shape (N,); images without a cell above 0 teach nothing.
        kept: mean of M_tau* over each piece, shape (N, h + 1, w + 1).
        area: of each piece, shape (h + 1, w + 1), summing to 1.
    """

    signed: Tensor
    maximum: Tensor
    kept: Tensor
    area: Tensor

    def rows(self, rows: Tensor) -> Learned:
        """Take some images."""
        return Learned(self.signed[rows], self.maximum[rows], self.kept[rows], self.area)


def zero_level_loss(signed: Tensor, of: Learned) -> Tensor:
    """Compare the support of maps with masks: cross-entropy, mean over the input, shape (N,).

    sum over pieces of area * BCE(sigmoid(20 L / max S), mean of M_tau*), where S is the map
    before training and L the support of the map now.

    Args:
        signed: the map now, shape (N, h, w).
        of: the same images' masks, and their maps before.
    """
    some = of.maximum > 0
    maximum = torch.where(some, of.maximum, 1)[:, None, None]
    logits = SHARPNESS * support(signed) / maximum
    losses = F.binary_cross_entropy_with_logits(logits, of.kept, reduction="none")
    return torch.where(some, (of.area * losses).sum((1, 2)), 0)


def mean_maximum(maxima: Tensor) -> float:
    """Return the mean maximum of maps after their ReLU; 1 where none has a cell above 0.

    Args:
        maxima: of maps before their ReLU, shape (N,).
    """
    return float(maxima.relu().mean()) or 1.0


def above(attribution: Tensor, share: float, activation: Tensor, name: str) -> Tensor:
    """Subtract a share of each map's maximum and apply ReLU; 0 leaves maps as they are.

    Args:
        attribution: I_pre, 0 or more, shape (N, h, w).
        share: in [0, 1).
        activation: A, shape (N, K, h, w), whose cells the maps must have.
        name: names the maps in the error.

    Raises:
        AftError: the share is out of range, or the maps are not of cells.
    """
    if not share:
        return attribution
    RANGES["zero_level"].check(share)
    if attribution.shape[1:] != activation.shape[2:]:
        raise AftError(
            f"{name}: a zero level needs a map of cells, and this one is of pixels; average it "
            "over the layer's cells (--cells), or mute scores by --threshold"
        )
    maximum = attribution.amax(tuple(range(1, attribution.dim())), keepdim=True)
    return (attribution - share * maximum).relu()


def check_plain(f: Classifier) -> None:
    """Check that a classifier can be trained: it is cut by its graph, and has no zero level."""
    if isinstance(f.layer, RunTo):
        raise AftError(
            f"{f.name} can't be fine-tuned at {f.layer_name}: torch.fx can't follow the network "
            "there; name a --layer where it can"
        )
    if f.zero_level is not None:
        raise AftError(
            f"{f.checkpoint or f.name}: has a zero level, which training would lose; tune the "
            "network that it was made from"
        )


def no_softmax(f: Classifier) -> str:
    """Say why a network's maps have no zero level that its probabilities do not see; "" if so."""
    if f.output == SOFTMAX:
        return ""
    return (
        f"the network's output is {f.output}, and only softmax does not see a term that all "
        "logits share"
    )


def check_softmax(f: Classifier) -> None:
    """Check that a network's probabilities do not see a zero level.

    Raises:
        AftError: they do.
    """
    if why := no_softmax(f):
        raise AftError(
            f"{f.name} can have no zero level: {why}; take --objective tuner or cam, or cut the "
            "map without training: aft explain --zero-level T"
        )


def check_learnable(f: Classifier) -> None:
    """Check that a classifier can learn a zero level: it has none, and softmax does not see it."""
    check_plain(f)
    check_softmax(f)


def check_signed(cam: str) -> None:
    """Check that a method's map moves with a term that all logits share.

    Raises:
        AftError: it does not.
    """
    if not METHODS[cam].signed:
        able = ", ".join(name for name, entry in METHODS.items() if entry.signed)
        raise AftError(
            f"the map of {cam} has no sign, so it has no zero level to learn; take one of {able}, "
            "or cut the map without training: aft explain "
            "--zero-level T"
        )
