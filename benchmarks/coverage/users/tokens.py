"""Users' networks: transformers and others that mix tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage.checking import network
from benchmarks.coverage.users.cnn import LAST, C, Net, features

K = 16  # channels of tokens


class Attention(nn.Module):
    """Self-attention by hand."""

    def __init__(self, k, heads=2):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(k, 3 * k), nn.Linear(k, k)

    def forward(self, x):
        b, n, k = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, k // self.heads).permute(2, 0, 3, 1, 4)
        q, k_, v = qkv.unbind(0)
        mixed = (q @ k_.transpose(-2, -1) / 3).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, k))


class Block(nn.Module):
    """Attention and an MLP, norms before them."""

    def __init__(self, k=K, attn=Attention):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(k), attn(k), nn.LayerNorm(k)
        self.mlp = nn.Sequential(nn.Linear(k, 2 * k), nn.GELU(), nn.Linear(2 * k, k))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A vision transformer with tokens before those of the patches."""

    def __init__(self, prefix=1, block=Block):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, K, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, K)) if prefix else None
        self.pos = nn.Parameter(torch.randn(1, 16 + prefix, K) / 5)
        self.blocks = nn.Sequential(block(), block())
        self.norm, self.head = nn.LayerNorm(K), nn.Linear(K, C)

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        return self.norm(self.blocks(x + self.pos))

    def forward(self, x):
        return self.head(self.tokens(x)[:, 0])


# Where it may be cut: before the last attention, or behind it where the cells are pooled.
BEFORE = ("blocks.1.norm1", "blocks.0")
POOLED = (*BEFORE, "blocks.1", "norm", "blocks.1.norm2")


@network(*BEFORE, grid=(4, 4))
def vit():
    """A class token, all by hand."""
    return Vit()


@network(*BEFORE, grid=(4, 4))
def vit_with_registers():
    """A class token and four registers."""
    return Vit(5)


@network(*POOLED, grid=(4, 4))
def vit_mean():
    """No class token: tokens are averaged."""

    class Mean(Vit):
        def __init__(self):
            super().__init__(0)

        def forward(self, x):
            return self.head(self.tokens(x).mean(1))

    return Mean()


@network(*POOLED, grid=(4, 4))
def vit_class_and_mean():
    """The class token and the mean of the others, concatenated."""

    class Together(Vit):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2 * K, C)

        def forward(self, x):
            x = self.tokens(x)
            return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], 1))

    return Together()


@network(*BEFORE, grid=(4, 4))
def vit_distilled():
    """A class token and one for distillation, each with a head."""

    class Distilled(Vit):
        def __init__(self):
            super().__init__(2)
            self.head_dist = nn.Linear(K, C)

        def forward(self, x):
            x = self.tokens(x)
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2

    return Distilled()


@network(*POOLED, grid=(2, 4), size=(16, 32))
def vit_wide():
    """A grid that is no square."""

    class Wide(Vit):
        def __init__(self):
            super().__init__(0)
            self.pos = nn.Parameter(torch.randn(1, 8, K) / 5)

        def forward(self, x):
            return self.head(self.tokens(x).mean(1))

    return Wide()


class Torch(nn.Module):
    """Attention by nn.MultiheadAttention."""

    def __init__(self, k):
        super().__init__()
        self.attend = nn.MultiheadAttention(k, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]


@network(*BEFORE, grid=(4, 4))
def vit_multihead_attention():
    """Blocks by hand around nn.MultiheadAttention."""
    return Vit(1, lambda: Block(K, Torch))


def encoder(**options):
    """Two layers of torch's own encoder."""
    layer = nn.TransformerEncoderLayer(K, 2, 2 * K, 0.0, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


# Names in torch's encoder: norm1 is before the attention where norm_first, behind it otherwise.
FIRST = ("blocks.layers.1.norm1", "blocks.layers.0")
BEHIND = ("blocks.layers.0", "blocks.layers.0.norm2")


@network(*FIRST, grid=(4, 4))
def torch_encoder():
    """nn.TransformerEncoder, norms first."""
    model = Vit()
    model.blocks = encoder(batch_first=True, norm_first=True)
    return model


@network(*BEHIND, grid=(4, 4))
def torch_encoder_norms_behind():
    """nn.TransformerEncoder as it is by default, batch first."""
    model = Vit()
    model.blocks = encoder(batch_first=True)
    return model


@network(
    *BEHIND,
    "blocks",
    "blocks.layers.1",
    "norm",
    "blocks.layers.1.norm2",
    grid=(4, 4),
    tokens_first=True,
)
def torch_encoder_tokens_first():
    """nn.TransformerEncoder with tokens in the first dimension, averaged."""

    class First(Vit):
        def __init__(self):
            super().__init__(0)
            self.blocks = encoder()

        def forward(self, x):
            x = self.patch_embed(x).flatten(2).permute(2, 0, 1) + self.pos.transpose(0, 1)
            return self.head(self.norm(self.blocks(x)).mean(0))

    return First()


@network(*POOLED, grid=(4, 4))
def patches_by_view():
    """No convolution: patches by view and permute, then a linear layer."""

    class Viewed(Vit):
        def __init__(self):
            super().__init__(0)
            self.patch_embed = nn.Linear(3 * 64, K)

        def forward(self, x):
            b, c, h, w = x.shape
            x = x.view(b, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 3, 5, 1)
            x = self.patch_embed(x.reshape(b, (h // 8) * (w // 8), -1))
            return self.head(self.norm(self.blocks(x + self.pos)).mean(1))

    return Viewed()


class Windows(nn.Module):
    """Attention within windows of 2 x 2 cells, channels last."""

    def __init__(self, k):
        super().__init__()
        self.attend = Attention(k)

    def forward(self, x):
        b, h, w, k = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, k).transpose(2, 3).reshape(-1, 4, k)
        x = self.attend(x).view(b, h // 2, w // 2, 2, 2, k)
        return x.transpose(2, 3).reshape(b, h, w, k)


class Merge(nn.Module):
    """Four cells become one of twice the channels."""

    def __init__(self, k):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * k), nn.Linear(4 * k, 2 * k, bias=False)

    def forward(self, x):
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


@network(
    "layers.2.norm1",
    "layers.1",
    "layers.2",
    "norm",
    "layers.2.norm2",
    "layers.1.reduce",
    grid=(4, 4),
)
def swin_like():
    """Windows and patch merging, channels last."""

    class Swin(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 8, 4, 4)
            self.layers = nn.Sequential(Block(8, Windows), Merge(8), Block(16, Windows))
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, C)

        def forward(self, x):
            x = self.layers(self.patch_embed(x).permute(0, 2, 3, 1))
            return self.head(self.norm(x).mean((1, 2)))

    return Swin()


class Mix(nn.Module):
    """A linear layer over the tokens."""

    def __init__(self, k):
        super().__init__()
        self.over = nn.Linear(16, 16)

    def forward(self, x):
        return self.over(x.transpose(1, 2)).transpose(1, 2)


@network("blocks.1", "norm", "blocks", "blocks.1.norm2", "blocks.1.norm1", grid=(4, 4))
def mixer():
    """Linear layers over tokens in place of attention."""

    class Mixer(Vit):
        def __init__(self):
            super().__init__(0, lambda: Block(K, Mix))

        def forward(self, x):
            return self.head(self.tokens(x).mean(1))

    return Mixer()


@network(*LAST, *(f"blocks.{name}" for name in ("0.norm1", "0.norm2", "0")), "norm", grid=(8, 8))
def convolutions_then_attention():
    """Features of convolutions, then a block of attention over their cells, averaged."""

    class Hybrid(Net):
        def __init__(self):
            super().__init__()
            self.blocks, self.norm = nn.Sequential(Block(12)), nn.LayerNorm(12)

        def forward(self, x):
            x = self.features(x).flatten(2).mT
            return self.fc(self.norm(self.blocks(x)).mean(1))

    return Hybrid()


@network("fuse", "fuse.0", "fuse.1")
def attention_between_convolutions():
    """Attention over cells, back to maps, then a convolution."""

    class Mobile(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.block = features(), Block(12)
            self.fuse = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.SiLU())
            self.fc = nn.Linear(12, C)

        def forward(self, x):
            x = self.features(x)
            n, k, h, w = x.shape
            x = self.block(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(n, k, h, w)
            return self.fc(F.adaptive_avg_pool2d(self.fuse(x), 1).flatten(1))

    return Mobile()


@network(*POOLED, grid=(4, 4))
def sequence_pooling():
    """Tokens are weighted by a softmax over scores of their own."""

    class Pooled(Vit):
        def __init__(self):
            super().__init__(0)
            self.score = nn.Linear(K, 1)

        def forward(self, x):
            x = self.tokens(x)
            return self.head((self.score(x).softmax(1).transpose(1, 2) @ x).squeeze(1))

    return Pooled()


@network("blocks.1.norm1", "blocks.0", "blocks.1", "norm", "blocks.1.norm2", grid=(4, 4))
def class_attention():
    """A class token attends over the patches' tokens at the end, as in CaiT."""

    class Late(Vit):
        def __init__(self):
            super().__init__(0)
            self.token, self.late = nn.Parameter(torch.randn(1, 1, K)), Attention(K)

        def forward(self, x):
            x = self.tokens(x)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            return self.head(self.late(x)[:, 0])

    return Late()
