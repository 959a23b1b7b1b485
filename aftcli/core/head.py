"""The head w2, split at its first linear layer.

Most CNNs end in channel-wise operations (pooling, activations, flattening), a linear layer, and
perhaps more of an MLP. Then the effect of one channel of A on the linear layer's output z is
known without running the head again, which is what makes CAM and Ablation-CAM cheap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx, nn

from aftcli.core.cut import cut, cut_modules


class LinearHead(NamedTuple):
    """head(A) = rest(linear(pool(A))), where pool mixes no channels.

    Attributes:
        pool: from A, shape (N, K, h, w), to features, shape (N, K * m), channel by channel.
        linear: the first linear layer, K * m features in.
        rest: from the linear layer's output to the logits.
        is_last: the linear layer's outputs are the logits: rest is the identity.
        is_mean: pool is global average pooling.
    """

    pool: nn.Module
    linear: nn.Linear
    rest: nn.Module
    is_last: bool
    is_mean: bool


def linear_head(head: nn.Module, shape: tuple[int, int, int]) -> LinearHead | None:
    """Split a head at its first linear layer, if what is before it mixes no channels.

    Returns:
        The split, or None where the head has no such form (a convolutional head, say).
    """
    was_training = head.training
    head.eval()
    try:
        name = _first_linear(head)
        if name is None:
            return None
        pool, linear, rest = cut(head, name)
        split = LinearHead(pool, head.get_submodule(name), rest, _is_identity(rest), False)  # type: ignore[arg-type]
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
        ablated = split.pool(activation * kept[:, None, None])
        if not torch.allclose(ablated, expected, rtol=1e-4, atol=1e-5):
            return False
    return True


@torch.no_grad()
def _is_mean(split: LinearHead, shape: tuple[int, int, int]) -> bool:
    activation = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    activation = activation.to(split.linear.weight)
    features = split.pool(activation)
    mean = activation.mean((2, 3))
    return features.shape == mean.shape and torch.allclose(features, mean, rtol=1e-4, atol=1e-5)
