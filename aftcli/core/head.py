"""A head split at its first linear layer.

Most heads end in channel-wise operations (pooling, activations, flattening), a linear layer, and
perhaps more of an MLP. Split at that layer, the effect of one channel of A on its output is known
without running the head again, which makes CAM and Ablation-CAM cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from aftcli.core.outputs import BOTH, class_score
from aftcli.cutting.cut import cut, cut_modules
from aftcli.errors import AftError


def attention_in_steps(trained: bool) -> AbstractContextManager[None]:
    """Run attention step by step where its gradient is trained: torch's kernels have no second."""
    return sdpa_kernel(SDPBackend.MATH) if trained else nullcontext()


def gradient_of(layer: str, y: Tensor, activation: Tensor, create_graph: bool) -> Tensor:
    """Compute the gradient of scores y, shape (N,), by A; a layer's name is for messages.

    Raises:
        AftError: the scores have no gradient, or the network breaks it.
    """
    if not y.requires_grad:
        raise AftError(
            f"the score does not depend on layer {layer}, or the network computes it without "
            "gradients; name another --layer, or a method without gradients, such as scorecam"
        )
    try:
        return torch.autograd.grad(y.sum(), activation, create_graph=create_graph)[0]
    except CheckpointError as error:
        raise AftError(
            "the network computes its activations again for gradients (torch.utils.checkpoint), "
            f"which layer {layer} can't follow; do so only `if self.training`, or switch it off as "
            "timm's set_grad_checkpointing(False) does; methods without gradients, such as "
            "scorecam, take the network as it is"
        ) from error


Score = Callable[[Tensor, Tensor], Tensor]  # of logits (N, C) and class_index (N,), shape (N,)


class Gradients(NamedTuple):
    """Gradients of scores in one A, which maps that are made together share.

    Attributes:
        head: w2.
        activation: A, shape (N, K, h, w).
        class_index: c, shape (N,).
        known: those computed so far, shape (N, K, h, w), by their scores.
    """

    head: nn.Module
    activation: Tensor
    class_index: Tensor
    known: dict[Score, Tensor]


class Pointwise(nn.Module):
    """A convolution of one cell as the linear layer that it is; the weights are the same tensor."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    @property
    def weight(self) -> Tensor:
        """The weights, a view of shape (D, K)."""
        return self.convolution.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The bias, shape (D,)."""
        return self.convolution.bias

    @property
    def out_features(self) -> int:
        """The number of outputs, D."""
        return self.convolution.out_channels

    def forward(self, features: Tensor) -> Tensor:
        """Return its outputs of features, shape (N, K): shape (N, D)."""
        return functional.linear(features, self.weight, self.bias)


class LinearHead(NamedTuple):
    """head(A) = rest(linear(pool(A))), where pool mixes no channels.

    Attributes:
        pool: from A, shape (N, K, h, w), to features, shape (N, K * m), channel by channel.
        linear: the first linear layer, K * m features in; or a convolution of one cell.
        rest: from the linear layer's output to the logits.
        is_last: the linear layer's outputs are the logits: rest is the identity, or turns the only
            output into the columns of both classes.
        is_mean: pool is global average pooling.
    """

    pool: nn.Module
    linear: nn.Linear | Pointwise
    rest: nn.Module
    is_last: bool
    is_mean: bool

    @property
    def weight(self) -> Tensor:
        """The weights of each class, shape (C, K * m), if the linear layer is last."""
        own = self.linear.weight
        return torch.cat([-own, own]) if _is_both(self) else own


def linear_head(head: nn.Module, shape: tuple[int, int, int]) -> LinearHead | None:
    """Split a head at its first linear layer; return None if what is before it mixes channels."""
    was_training = head.training
    head.eval()
    try:
        name = _first_linear(head)
        if name is None:
            return None
        pool, _, rest = cut(head, name)
        linear: nn.Module = head.get_submodule(name)
        if isinstance(linear, nn.Conv2d):
            pool, linear = nn.Sequential(pool, nn.Flatten()), Pointwise(linear)
            rest = nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), rest)
        split = LinearHead(pool, linear, rest, False, False)  # type: ignore[arg-type]
        if not _is_channelwise(split, shape):
            return None
        is_last = _is_identity(rest) or _is_both(split) or _changes_nothing(split)
        split = split._replace(is_last=is_last)
        return split._replace(is_mean=_is_mean(split, shape))
    finally:
        head.train(was_training)


def _first_linear(head: nn.Module) -> str | None:
    try:
        return next((n for n, m in cut_modules(head) if _is_linear(m)), None)
    except Exception:  # noqa: BLE001 - a head that fx can't open has no linear form
        return None


def _is_linear(module: nn.Module) -> bool:
    """Tell a linear layer, or a convolution that is one where its input is one cell."""
    if not isinstance(module, nn.Conv2d):
        return isinstance(module, nn.Linear)
    single = module.kernel_size == module.stride == module.dilation == (1, 1)
    return single and module.groups == 1 and module.padding in (0, (0, 0))


@torch.no_grad()
def _changes_nothing(split: LinearHead) -> bool:
    """Tell if what follows a convolution hands on all outputs as they are, negative ones too."""
    if not isinstance(split.linear, Pointwise):
        return False
    outputs = torch.randn(5, split.linear.out_features, generator=torch.Generator().manual_seed(0))
    outputs = outputs.to(split.linear.weight)
    return torch.equal(split.rest(outputs), outputs)


def _is_identity(rest: nn.Module) -> bool:
    return isinstance(rest, fx.GraphModule) and all(
        isinstance(rest.get_submodule(str(node.target)), nn.Identity | nn.Dropout)
        if node.op == "call_module"
        else node.op in ("placeholder", "output")
        for node in rest.graph.nodes
    )


@torch.no_grad()
def _is_both(split: LinearHead) -> bool:
    """Tell if rest turns the linear layer's only output y into columns -y and y."""
    if split.linear.out_features != 1 or not hasattr(split.rest, BOTH):
        return False
    y = torch.linspace(-9, 9, 19)[:, None].to(split.linear.weight)
    return torch.equal(split.rest(y), torch.cat([-y, y], 1))


@torch.no_grad()
def _is_channelwise(split: LinearHead, shape: tuple[int, int, int]) -> bool:
    """Test on random activations that zeroing channels moves only those channels' features."""
    weight = split.linear.weight
    channels = shape[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        activation = torch.randn(1, *shape, generator=generator).to(weight)
        kept = (torch.rand(channels, generator=generator) < 0.5).to(weight.device)
        zero = split.pool(torch.zeros_like(activation))
        features = split.pool(activation)
        if features.dim() != 2 or features.shape[1] % channels:
            return False
        if isinstance(split.linear, Pointwise) and features.shape[1] != channels:
            return False  # it is applied to several cells
        blocks = features.view(channels, -1), zero.view(channels, -1)
        expected = torch.where(kept[:, None], *blocks).view(1, -1)
        ablated = split.pool(activation * kept.view(-1, *[1] * (len(shape) - 1)))
        if not torch.allclose(ablated, expected, rtol=1e-4, atol=1e-5):
            return False
    return True


@torch.no_grad()
def _is_mean(split: LinearHead, shape: tuple[int, int, int]) -> bool:
    activation = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    activation = activation.to(split.linear.weight)
    features = split.pool(activation)
    mean = activation.flatten(2).mean(2)
    return features.shape == mean.shape and torch.allclose(features, mean, rtol=1e-4, atol=1e-5)


def _channel_features(head: LinearHead, activation: Tensor) -> Tensor:
    """Compute what zeroing each channel takes from the linear layer's input, shape (N, K, m)."""
    taken = head.pool(activation) - head.pool(torch.zeros_like(activation[:1]))
    # Not len(), which engine/export.py would take for a fixed number.
    return taken.view(*activation.shape[:2], -1)  # type: ignore[no-any-return]


def ablated_in_closed_form(head: LinearHead, activation: Tensor, class_index: Tensor) -> Tensor:
    """y_k^c = y^c - W_ck . pool(A^k): for a head of pooling and one linear layer."""
    taken = _channel_features(head, activation)
    y = class_score(head.rest(head.linear(head.pool(activation))), class_index)
    weight = head.weight[class_index].view_as(taken)
    return y[:, None] - (weight * taken).sum(2)


def ablated_before_mlp(head: LinearHead, activation: Tensor, class_index: Tensor) -> Tensor:
    """y_k^c = rest(z - W_k pool(A^k)): subtract each channel's part of the first linear layer."""
    taken = _channel_features(head, activation)
    z = head.linear(head.pool(activation))
    y = class_score(head.rest(z), class_index)
    scores = []
    for n, c in enumerate(class_index.tolist()):
        alive = taken[n].any(1).nonzero().squeeze(1)
        y_k = y[n].repeat(taken.shape[1])
        if len(alive):
            without = z[n] - _contributions(head.linear.weight, taken[n], alive)
            y_k[alive] = torch.cat([head.rest(part)[:, c] for part in torch.split(without, 512)])
        scores.append(y_k)
    return torch.stack(scores)


def _contributions(weight: Tensor, taken: Tensor, alive: Tensor) -> Tensor:
    """Compute W_k pool(A^k) for the channels that are not empty, shape (len(alive), D)."""
    by_channel = weight.view(len(weight), *taken.shape)
    # Row by row of W: the product of all at once would be as large as W itself.
    rows = (torch.einsum("dkm,km->dk", w, taken) for w in by_channel.split(256))
    return torch.cat(list(rows))[:, alive].mT
