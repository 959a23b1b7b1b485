"""A head split at its first linear layer.

Most heads end in channel-wise operations (pooling, activations, flattening), a linear layer, and
perhaps more of an MLP. Split at that layer, the effect of one channel of A on its output is known
without running the head again, which makes CAM and Ablation-CAM cheap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from aftcli.core.outputs import BOTH
from aftcli.cutting.cut import cut, cut_modules


class LinearHead(NamedTuple):
    """head(A) = rest(linear(pool(A))), where pool mixes no channels.

    Attributes:
        pool: from A, shape (N, K, h, w), to features, shape (N, K * m), channel by channel.
        linear: the first linear layer, K * m features in.
        rest: from the linear layer's output to the logits.
        is_last: the linear layer's outputs are the logits: rest is the identity, or turns the only
            output into the columns of both classes.
        is_mean: pool is global average pooling.
    """

    pool: nn.Module
    linear: nn.Linear
    rest: nn.Module
    is_last: bool
    is_mean: bool

    @property
    def weight(self) -> Tensor:
        """The weights of each class, shape (C, K * m), if the linear layer is last."""
        own = self.linear.weight
        return torch.cat([-own, own]) if _is_both(self.rest, self.linear) else own


def linear_head(head: nn.Module, shape: tuple[int, int, int]) -> LinearHead | None:
    """Split a head at its first linear layer; return None if what is before it mixes channels."""
    was_training = head.training
    head.eval()
    try:
        name = _first_linear(head)
        if name is None:
            return None
        pool, _, rest = cut(head, name)
        linear: nn.Linear = head.get_submodule(name)  # type: ignore[assignment]
        is_last = _is_identity(rest) or _is_both(rest, linear)
        split = LinearHead(pool, linear, rest, is_last, False)
        if not _is_channelwise(split, shape):
            return None
        return split._replace(is_mean=_is_mean(split, shape))
    finally:
        head.train(was_training)


def _first_linear(head: nn.Module) -> str | None:
    try:
        return next((n for n, m in cut_modules(head) if isinstance(m, nn.Linear)), None)
    except Exception:  # noqa: BLE001 - a head that fx can't open has no linear form
        return None


def _is_identity(rest: nn.Module) -> bool:
    return isinstance(rest, fx.GraphModule) and all(
        isinstance(rest.get_submodule(str(node.target)), nn.Identity | nn.Dropout)
        if node.op == "call_module"
        else node.op in ("placeholder", "output")
        for node in rest.graph.nodes
    )


@torch.no_grad()
def _is_both(rest: nn.Module, linear: nn.Linear) -> bool:
    """Tell if rest turns the linear layer's only output y into columns -y and y."""
    if linear.out_features != 1 or not hasattr(rest, BOTH):
        return False
    y = torch.linspace(-9, 9, 19)[:, None].to(linear.weight)
    return torch.equal(rest(y), torch.cat([-y, y], 1))


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
