"""The tuner f_tuner: from activations to masks by two 1x1 convolutions (§4.2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# What is between the tuner's two convolutions.
TUNERS: dict[str, type[nn.Module]] = {"linear": nn.Identity, "relu": nn.ReLU}


class Tuner(nn.Module):
    """Two 1x1 convolutions, K -> 3 -> 1, with weights w'; space keeps its size.

    The paper names no activation function between them, so by default there is none: f_tuner(A)
    is linear in A (docs/decisions.md).

    Args:
        channels: K of A.
        hidden: channels between the two convolutions.
        kind: a key of TUNERS: what is between them.
        seed: of the initial weights; the global random state stays as it is.
    """

    def __init__(
        self, channels: int, hidden: int = 3, kind: str = "linear", *, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reduce = nn.Conv2d(channels, hidden, 1)
            self.combine = nn.Conv2d(hidden, 1, 1)
        self.between = TUNERS[kind]()

    def forward(self, activation: Tensor) -> Tensor:
        """f_tuner(A), shape (N, h, w), of activations A, shape (N, K, h, w)."""
        return self.combine(self.between(self.reduce(activation))).squeeze(1)  # type: ignore[no-any-return]
