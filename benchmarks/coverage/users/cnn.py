"""Users' networks: kinds of convolutional networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage.checking import network

C = 4  # classes
LAST = ("features.3", "features.4", "features.5")  # of `features`: convolution, norm, ReLU


def conv(k, out, stride=1, norm=nn.BatchNorm2d):
    """A convolution, its norm and activation."""
    return [nn.Conv2d(k, out, 3, stride, 1), norm(out), nn.ReLU()]


def features(channels=3, k=12):
    """(N, 3, 32, 32) to (N, 12, 8, 8)."""
    return nn.Sequential(*conv(channels, 8, 2), *conv(8, k, 2))


class Net(nn.Module):
    """Features, pooling, a linear layer: what most networks below change one thing of."""

    def __init__(self, channels=3, k=12, classes=C):
        super().__init__()
        self.features = features(channels, k)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(k, classes)

    def head(self, x):
        return self.fc(torch.flatten(self.pool(x), 1))

    def forward(self, x):
        return self.head(self.features(x))


class Block(nn.Module):
    """A residual block by hand, its ReLU called twice."""

    def __init__(self, k, out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(k, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(k, out, 1, stride) if stride > 1 or k != out else None

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


@network(*LAST)
def plain():
    """Features, global average pooling, a linear layer."""
    return Net()


@network("conv2")
def functional_relu():
    """Activations and pooling are functions."""

    class FunctionalNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
            self.fc = nn.Linear(12, C)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.relu(self.conv2(x))
            return self.fc(F.avg_pool2d(x, x.shape[2:]).squeeze(3).squeeze(2))

    return FunctionalNet()


@network("second")
def functional_convolutions():
    """Convolutions are functions of the module's own parameters."""

    class Layer(nn.Module):
        def __init__(self, k, out):
            super().__init__()
            self.w = nn.Parameter(torch.randn(out, k, 3, 3) / 5)

        def forward(self, x):
            return F.relu(F.conv2d(x, self.w, stride=2, padding=1))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Layer(3, 8), Layer(8, 12)
            self.w = nn.Parameter(torch.randn(C, 12))

        def forward(self, x):
            return F.linear(self.second(self.first(x)).mean((2, 3)), self.w)

    return Whole()


@network("block")
def in_place():
    """Activations, sums and products in place, by method and operator."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3, 2, 1), Block(8, 8)
            self.fc = nn.Linear(8, C)

        def forward(self, x):
            x = self.stem(x).relu_()
            x = self.block(x)
            x *= 0.5
            x = x.add_(0.1).clamp_(min=0.2)
            return self.fc(x.mean((2, 3)))

    return InPlace()


@network("block", "block.2")
def one_module_twice():
    """The same block is called twice."""

    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(*conv(12, 12))

        def forward(self, x):
            return self.head(self.block(self.block(self.features(x))))

    return Twice()


@network("loop", "loop.0", "loop.1")
def recurrent_convolution():
    """The same convolution is called in a loop, and adds to its input."""

    class Recurrent(Net):
        def __init__(self):
            super().__init__()
            self.loop = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1), nn.Tanh())

        def forward(self, x):
            x = self.features(x)
            for _ in range(3):
                x = self.loop(x) * 0.5
            return self.head(x)

    return Recurrent()


@network(*LAST)
def no_norm():
    """Convolutions and ReLUs only."""
    model = Net()
    for i in (1, 4):
        model.features[i] = nn.Identity()
    return model


@network(*LAST)
def group_norm():
    """Group norm in place of batch norm."""
    model = Net()
    model.features[1], model.features[4] = nn.GroupNorm(2, 8), nn.GroupNorm(3, 12)
    return model


@network("blocks", "blocks.1")
def convnext_like():
    """Norm and MLP channels-last within each block, which takes and returns maps."""

    class NextBlock(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.dwconv = nn.Conv2d(k, k, 7, padding=3, groups=k)
            self.norm, self.up, self.down = (
                nn.LayerNorm(k),
                nn.Linear(k, 4 * k),
                nn.Linear(4 * k, k),
            )
            self.gamma = nn.Parameter(0.5 * torch.ones(k))

        def forward(self, x):
            y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
            return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)

    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.Sequential(NextBlock(8), NextBlock(8))
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, C)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))

    return Next()


@network("last", "last.1", "last.2", "last.0")
def inverted_residuals():
    """Expanded, depthwise, projected; a wide 1x1 convolution at the end."""

    class Inverted(nn.Sequential):
        def __init__(self, k):
            super().__init__(
                nn.Conv2d(k, 3 * k, 1),
                nn.ReLU6(inplace=True),
                nn.Conv2d(3 * k, 3 * k, 3, 1, 1, groups=3 * k),
                nn.ReLU6(inplace=True),
                nn.Conv2d(3 * k, k, 1),
            )

        def forward(self, x):
            return x + super().forward(x)

    class Mobile(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 4, 1)
            self.blocks = nn.ModuleList([Inverted(8), Inverted(8)])
            self.last = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.Hardswish())
            self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, C))

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.last(x).mean((2, 3)))

    return Mobile()


@network(*LAST)
def spatial_transformer():
    """The image is warped by a small network first."""

    class Warped(Net):
        def __init__(self):
            super().__init__()
            self.locate = nn.Linear(3 * 64, 6)

        def forward(self, x):
            theta = self.locate(F.adaptive_avg_pool2d(x, 8).flatten(1)).view(-1, 2, 3) / 9
            theta = theta + torch.eye(2, 3, dtype=x.dtype)
            return super().forward(F.grid_sample(x, F.affine_grid(theta, x.size())))

    return Warped()


@network("attend", "attend.out")
def non_local_block():
    """Attention over cells, by 1x1 convolutions, at the end of the features."""

    class NonLocal(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.q, self.k, self.v = (nn.Conv2d(k, k, 1) for _ in range(3))
            self.out = nn.Conv2d(k, k, 1)

        def forward(self, x):
            q, k, v = (part(x).flatten(2) for part in (self.q, self.k, self.v))
            mixed = v @ (q.mT @ k).softmax(-1).mT
            return x + self.out(mixed.view_as(x))

    class Attended(Net):
        def __init__(self):
            super().__init__()
            self.attend = NonLocal(12)

        def forward(self, x):
            return self.head(self.attend(self.features(x)))

    return Attended()


@network("blocks.1", "blocks.1.2", "blocks.1.1", "blocks.1.0")
def module_dict():
    """Layers by name and by number."""

    class Named(Net):
        def __init__(self):
            super().__init__()
            self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3, 2, 1), "norm": nn.BatchNorm2d(8)})
            self.blocks = nn.ModuleList([nn.Sequential(*conv(8, 8)), nn.Sequential(*conv(8, 12))])

        def forward(self, x):
            for layer in self.stem.values():
                x = layer(x)
            for i in range(len(self.blocks)):
                x = self.blocks[i](x)
            return self.head(x)

    return Named()


@network()
def no_convolution():
    """Linear layers only: there are no cells to show."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, C))
