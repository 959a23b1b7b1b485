"""Users' networks: kinds of inputs, precisions and wrappers."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.coverage.checking import network
from benchmarks.coverage.users.cnn import LAST, C, Net

INNER = tuple(f"model.{name}" for name in LAST)


@network()
def two_inputs():
    """A Siamese network of two images: its forward needs both."""

    class Siamese(Net):
        def forward(self, a, b):
            return self.head((self.features(a) - self.features(b)).abs())

    return Siamese()


@network()
def scripted():
    """A scripted network: it can't be cut, its source can."""
    return torch.jit.script(Net().eval())


@network(*LAST, channels=1)
def grey():
    """One channel."""
    return Net(channels=1)


@network(*LAST, channels=4)
def four_channels():
    """Four channels, as RGB and depth."""
    return Net(channels=4)


@network(*LAST, channels=13)
def thirteen_channels():
    """Thirteen channels, as Sentinel-2."""
    return Net(channels=13)


@network(*LAST, size=(24, 48))
def wide_input():
    """An input that is no square."""
    return Net()


@network(*LAST, size=(299, 299))
def large_input():
    """An input of 299 pixels a side, convolutions without padding."""
    model = Net()
    model.features[0], model.features[3] = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 12, 3, 4)
    return model


@network(*LAST, size=(48, 48), size_known=True)
def configured_size():
    """The network knows its input, as timm's do, and takes no other."""

    class Configured(Net):
        pretrained_cfg = {
            "input_size": (3, 48, 48),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12 * 144, C)

        def forward(self, x):
            return self.fc(self.features(x).flatten(1))

    return Configured()


@network(*LAST, size=(8, 16, 16))
def volumes():
    """Conv3d over volumes or videos."""

    class Volumes(Net):
        def __init__(self):
            super().__init__()
            first, second = nn.Conv3d(3, 6, 3, 2, 1), nn.Conv3d(6, 12, 3, 2, 1)
            norms = nn.BatchNorm3d(6), nn.BatchNorm3d(12)
            self.features = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())
            self.pool = nn.AdaptiveAvgPool3d(1)

    return Volumes()


@network(*LAST, dtype=torch.float64)
def double():
    """Weights in float64."""
    return Net().double()


@network(*LAST, dtype=torch.float16, tolerance=0.02)
def half():
    """Weights in float16."""
    return Net().half()


@network(*LAST, dtype=torch.bfloat16, tolerance=0.05)
def bfloat16():
    """Weights in bfloat16."""
    return Net().bfloat16()


@network(*LAST, plain=lambda model: model.module)
def data_parallel():
    """Wrapped by DataParallel, which takes the network to a GPU if there is one."""
    return nn.DataParallel(Net()).cpu()


@network(*LAST, plain=lambda model: model._orig_mod)
def compiled():
    """Wrapped by torch.compile."""
    return torch.compile(Net(), backend="eager")


class Lightning(nn.Module):
    """A module as Lightning's: the network is an attribute, steps and metrics beside it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()
        self.hparams = {"lr": 0.1}
        self.trainer = None

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _index):
        x, y = batch
        return self.loss(self(x), y)


@network(*INNER)
def lightning():
    """A Lightning module around a network."""
    return Lightning(Net())


@network(*(f"model.{name}" for name in INNER), plain=lambda model: model.module)
def lightning_in_data_parallel():
    """DataParallel around a wrapper around a Lightning module."""
    return nn.DataParallel(Lightning(Lightning(Net()))).cpu()


@network(*(f"backbone.{i}" for i in (3, 4, 5)))
def backbone_and_head():
    """A backbone with its own head taken off, and a new head."""

    class Transfer(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(*Net().features, nn.AdaptiveAvgPool2d(1))
            self.head = nn.Linear(12, C)

        def forward(self, x):
            x = self.backbone(x)
            return self.head(torch.flatten(x, 1))

    return Transfer()


@network(*LAST)
def frozen():
    """Nothing has a gradient, and it is in eval mode."""
    return Net().requires_grad_(False).eval()
