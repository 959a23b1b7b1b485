"""Users' networks: kinds of outputs."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.checking import as_they_are, both, network, sigmoid, softmax
from benchmarks.coverage.users.cnn import LAST, C, Net, conv


class Ending(Net):
    """A network whose logits pass one function more."""

    def __init__(self, end, classes=C):
        super().__init__(classes=classes)
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


@network(*LAST, y=lambda out: out[0])
def tuple_output():
    """(logits, features)."""

    class Two(Net):
        def forward(self, x):
            x = self.features(x)
            return self.head(x), x

    return Two()


@network(*LAST, y=lambda out: out[0])
def list_of_tasks():
    """[logits, box]: two tasks."""

    class Tasks(Net):
        def __init__(self):
            super().__init__()
            self.box = nn.Linear(12, 4)

        def forward(self, x):
            x = self.pool(self.features(x)).flatten(1)
            return [self.fc(x), self.box(x)]

    return Tasks()


@network(*LAST, y=lambda out: out["logits"])
def dict_output():
    """{"features": ..., "logits": ...}."""

    class Dict(Net):
        def forward(self, x):
            x = self.features(x)
            return {"features": x, "logits": self.head(x)}

    return Dict()


@network(*LAST, y=lambda out: out["out"])
def ordered_dict_output():
    """OrderedDict(out=..., aux=...), as torchvision's segmentation networks."""

    class Ordered(Net):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(8, C)

        def forward(self, x):
            low = self.features[:3](x)
            return OrderedDict(
                out=self.head(self.features[3:](low)), aux=self.aux(low.mean((2, 3)))
            )

    return Ordered()


@dataclass
class Result:
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple = ()


@network(*LAST, y=lambda out: out.logits)
def dataclass_output():
    """A dataclass with loss, logits and hidden states."""

    class Data(Net):
        def forward(self, x):
            x = self.features(x)
            return Result(logits=self.head(x), hidden=(x,))

    return Data()


class ModelOutput(OrderedDict):
    """An object as transformers returns: a dict with attributes."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


@network(*LAST, y=lambda out: out.logits)
def model_output():
    """A dict with attributes, as transformers returns."""

    class Hugging(Net):
        def forward(self, pixel_values, labels=None, return_dict=None):
            x = self.features(pixel_values)
            return ModelOutput(logits=self.head(x), hidden_states=(x,))

    return Hugging()


Outputs = namedtuple("Outputs", ["logits", "aux_logits"])


@network(*LAST, y=lambda out: out.logits)
def namedtuple_output():
    """A namedtuple of logits and auxiliary logits, in eval mode too."""

    class Named(Net):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(8, C)

        def forward(self, x):
            low = self.features[:3](x)
            return Outputs(self.head(self.features[3:](low)), self.aux(low.mean((2, 3))))

    return Named()


@network(*LAST)
def auxiliary_head():
    """A second head that only training sees."""

    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(8, C)

        def forward(self, x):
            low = self.features[:3](x)
            y = self.head(self.features[3:](low))
            return (y, self.aux(low.mean((2, 3)))) if self.training else y

    return Auxiliary()


@network(*LAST, y=lambda out: out[:, :, 0, 0])
def logits_with_sides():
    """Logits of shape (N, C, 1, 1), from a convolution that nothing flattens."""

    class Sides(Net):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(12, C, 1)

        def forward(self, x):
            return self.fc(self.pool(self.features(x)))

    return Sides()


@network(*LAST, y=both, probabilities=lambda y: softmax(y / 2))
def single_logit():
    """Logits of shape (N, 1): a binary classifier."""
    return Net(classes=1)


@network(*LAST, y=both, probabilities=lambda y: softmax(y / 2))
def flat_logit():
    """Logits of shape (N,): a binary classifier."""
    return Ending(nn.Flatten(0), 1)


@network(*LAST, y=lambda p: torch.cat([1 - p, p], 1), probabilities=as_they_are)
def single_probability():
    """A binary classifier that ends in a sigmoid."""
    return Ending(nn.Sigmoid(), 1)


@network(*LAST, probabilities=sigmoid, options={"output": "sigmoid"})
def multi_label():
    """Classes that do not exclude each other; the sigmoid is in the loss."""
    return Net()


@network(*LAST, probabilities=as_they_are)
def ends_in_softmax():
    """The network returns probabilities, by a module."""
    return Ending(nn.Softmax(dim=1))


@network(*LAST, probabilities=as_they_are)
def ends_in_softmax_function():
    """The network returns probabilities, by a function."""

    class Soft(Net):
        def forward(self, x):
            return F.softmax(super().forward(x), dim=-1)

    return Soft()


@network(*LAST, probabilities=as_they_are)
def ends_in_sigmoid():
    """Classes that do not exclude each other; the sigmoid is in the network."""
    return Ending(nn.Sigmoid())


@network(*LAST, probabilities=lambda y: y.exp())
def ends_in_log_softmax():
    """Logarithms of probabilities, for NLLLoss."""
    return Ending(nn.LogSoftmax(dim=1))


@network(*LAST)
def two_classes():
    """A binary classifier with two logits."""
    return Net(classes=2)


@network(*LAST, probabilities=as_they_are, options={"output": "none"}, may_refuse=True)
def regression():
    """Two numbers that are no classes."""
    return Ending(nn.Softplus(), 2)


@network()
def segmentation():
    """Logits of each pixel, (N, C, H, W): a target has to be named."""

    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*conv(3, 8, 2), *conv(8, 8), nn.Conv2d(8, C, 1))

        def forward(self, x):
            return F.interpolate(self.body(x), x.shape[2:], mode="bilinear")

    return Pixels()
