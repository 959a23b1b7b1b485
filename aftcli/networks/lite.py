"""EfficientNet-Lite in plain torch: the default network, without timm's imports.

Modules, their names and their values are those of timm's `tf_efficientnet_lite0` to `2`; importing
timm takes two seconds, more than all else that `aft explain` does of one photograph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Stage(NamedTuple):
    """A stage of EfficientNet-B0 (Tan and Le, ICML 2019, Table 1).

    Attributes:
        kernel: of the depthwise convolutions.
        stride: of the first of them.
        expansion: of the channels within a block.
        channels: that leave it.
        blocks: how many.
    """

    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)

STEM, FEATURES = 32, 1280  # channels, the same in all of Lite

# Width and depth relative to B0; Lite has neither squeeze-and-excitation nor Swish.
SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2))


class Conv2dSame(nn.Conv2d):
    """A convolution padded as TensorFlow does: by as much as the input's size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x, shape (N, K, h, w), with ceil(h / stride) rows."""
        high, wide = (
            max((math.ceil(side / s) - 1) * s + k - side, 0)
            for side, s, k in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        )
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch normalisation and what follows it: ReLU6, or nothing."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels, eps=1e-3)
        self.act: nn.Module = nn.ReLU6(inplace=True) if act else nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:
        """Check nothing: a tracer can't follow an `if` on the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised, shape (N, K, h, w)."""
        return self.act(super().forward(x))  # type: ignore[no-any-return]


def _convolution(before: int, after: int, kernel: int, stride: int, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return Conv2dSame(before, after, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=False)


class DepthwiseSeparableConv(nn.Module):
    """A block that does not expand its channels."""

    def __init__(self, before: int, after: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.has_skip = stride == 1 and before == after
        self.conv_dw = _convolution(before, before, kernel, stride, before)
        self.bn1 = BatchNormAct2d(before)
        self.conv_pw = _convolution(before, after, 1, 1)
        self.bn2 = BatchNormAct2d(after, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block of x, shape (N, K, h, w)."""
        shortcut = x
        x = self.bn1(self.conv_dw(x))
        x = self.bn2(self.conv_pw(x))
        return x + shortcut if self.has_skip else x


class InvertedResidual(nn.Module):
    """A block of MobileNetV2's kind, which expands its channels."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.has_skip = stride == 1 and before == after
        within = expansion * before
        self.conv_pw = _convolution(before, within, 1, 1)
        self.bn1 = BatchNormAct2d(within)
        self.conv_dw = _convolution(within, within, kernel, stride, within)
        self.bn2 = BatchNormAct2d(within)
        self.conv_pwl = _convolution(within, after, 1, 1)
        self.bn3 = BatchNormAct2d(after, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block of x, shape (N, K, h, w)."""
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x))
        x = self.bn3(self.conv_pwl(x))
        return x + shortcut if self.has_skip else x


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, 1 or 2.

    Args:
        number: which.
        num_classes: outputs.
    """

    def __init__(self, number: int, num_classes: int = 1000) -> None:
        super().__init__()
        width, depth = SCALES[number]
        self.conv_stem = _convolution(3, STEM, 3, 2)
        self.bn1 = BatchNormAct2d(STEM)
        self.blocks = nn.Sequential()
        channels = STEM
        for i, stage in enumerate(STAGES):
            fixed = i in (0, len(STAGES) - 1)  # Lite scales the depth of the inner stages alone
            count = stage.blocks if fixed else math.ceil(stage.blocks * depth)
            after = _rounded(stage.channels * width)
            blocks = nn.Sequential()
            for j in range(count):
                stride = 1 if j else stage.stride
                blocks.append(_block(stage, channels, after, stride))
                channels = after
            self.blocks.append(blocks)
        self.conv_head = _convolution(channels, FEATURES, 1, 1)
        self.bn2 = BatchNormAct2d(FEATURES)
        self.global_pool = nn.Sequential()
        self.global_pool.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.global_pool.add_module("flatten", nn.Flatten(1))
        self.classifier = nn.Linear(FEATURES, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of x, shape (N, 3, H, W): shape (N, C)."""
        x = self.bn1(self.conv_stem(x))
        x = self.blocks(x)
        x = self.bn2(self.conv_head(x))
        return self.classifier(self.global_pool(x))  # type: ignore[no-any-return]


def _block(stage: Stage, before: int, after: int, stride: int) -> nn.Module:
    if stage.expansion == 1:
        return DepthwiseSeparableConv(before, after, stage.kernel, stride)
    return InvertedResidual(before, after, stage.kernel, stride, stage.expansion)


def _rounded(channels: float) -> int:
    """Round to a multiple of 8, down by a tenth at the most.

    >>> _rounded(24 * 1.1), _rounded(40 * 1.1)
    (24, 48)
    """
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def _initialise(module: nn.Module) -> None:
    """Draw weights at random, as the authors of EfficientNet do."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
