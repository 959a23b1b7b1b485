"""Users' networks: several paths, from skips to ensembles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage.checking import network
from benchmarks.coverage.users.cnn import Block, C, Net, conv, features


@network("2.1")
def custom_resnet():
    """Residual blocks, written by hand."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, C)

        def forward(self, x):
            return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))

    stages = [
        nn.Sequential(Block(8, 8), Block(8, 8)),
        nn.Sequential(Block(8, 16, 2), Block(16, 16)),
    ]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *stages, Head())


@network("norm")
def preactivation_resnet():
    """Norm and ReLU before each convolution, a norm at the end."""

    class PreBlock(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(k), nn.Conv2d(k, k, 3, 1, 1)

        def forward(self, x):
            return x + self.conv(F.relu(self.norm(x)))

    class PreNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.blocks = nn.Sequential(PreBlock(8), PreBlock(8))
            self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, C)

        def forward(self, x):
            return self.fc(self.norm(self.blocks(self.stem(x))).mean((2, 3)))

    return PreNet()


@network("dense", "norm")
def densenet_like():
    """Each layer sees all before it."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, 1, 1) for i in range(3))

        def forward(self, x):
            for each in self.convs:
                x = torch.cat([x, F.relu(each(x))], 1)
            return x

    class DenseNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.dense = nn.Conv2d(3, 8, 3, 2, 1), Dense()
            self.norm, self.fc = nn.BatchNorm2d(20), nn.Linear(20, C)

        def forward(self, x):
            x = F.relu(self.norm(self.dense(self.stem(x))), inplace=True)
            return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))

    return DenseNet()


@network("stage2", "stage2.1", "stage2.2")
def skip_to_head():
    """The head sees the pooled features of two stages."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage1, self.stage2 = nn.Sequential(*conv(3, 8, 2)), nn.Sequential(*conv(8, 12, 2))
            self.fc = nn.Linear(20, C)

        def forward(self, x):
            low = self.stage1(x)
            high = self.stage2(low)
            return self.fc(torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1))

    return Skip()


@network("left", "left.2", "left.5", "right", "right.2", "right.5")
def two_paths():
    """Two paths from the image, pooled apart."""

    class Paths(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = features(3, 6), features(3, 10)
            self.fc = nn.Linear(16, C)

        def forward(self, x):
            left, right = self.left(x), self.right(x)
            return self.fc(torch.cat([left.mean((2, 3)), right.amax((2, 3))], 1))

    return Paths()


@network("a.features", "b.features", "a.features.5", "b.features.5")
def ensemble():
    """The mean of two networks' logits."""

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Net(), Net()

        def forward(self, x):
            return (self.a(x) + self.b(x)) / 2

    return Ensemble()


@network("mixed")
def inception_like():
    """Branches are concatenated within the last module."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 10, 3, padding=1)

        def forward(self, x):
            return torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)

    class Inception(Net):
        def __init__(self):
            super().__init__(k=12)
            self.mixed, self.fc = Mixed(), nn.Linear(16, C)

        def forward(self, x):
            return self.head(self.mixed(self.features(x)))

    return Inception()


@network("a", "b", "features", "features.5")
def open_branches():
    """Branches are concatenated in the network's own forward."""

    class Branches(Net):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 10, 3, padding=1)
            self.fc = nn.Linear(16, C)

        def forward(self, x):
            x = self.features(x)
            return self.head(F.relu(torch.cat([self.a(x), self.b(x)], 1)))

    return Branches()


@network("up", "last", "last.2", "last.1", "last.0")
def u_net():
    """An encoder and a decoder with skips, then pooling and a linear layer."""

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Sequential(*conv(3, 8, 2)), nn.Sequential(*conv(8, 12, 2))
            self.up = nn.ConvTranspose2d(12, 8, 2, 2)
            self.last, self.fc = nn.Sequential(*conv(16, 12)), nn.Linear(12, C)

        def forward(self, x):
            one = self.one(x)
            x = torch.cat([one, self.up(self.two(one))], 1)
            return self.fc(self.last(x).mean((2, 3)))

    return UNet()


@network("smooth")
def feature_pyramid():
    """Two scales are added, then smoothed."""

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Sequential(*conv(3, 8, 2)), nn.Sequential(*conv(8, 12, 2))
            self.lateral, self.top = nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 1)
            self.smooth, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, C)

        def forward(self, x):
            one = self.one(x)
            top = F.interpolate(self.top(self.two(one)), scale_factor=2, mode="nearest")
            return self.fc(self.smooth(self.lateral(one) + top).mean((2, 3)))

    return Pyramid()
