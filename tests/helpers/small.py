"""Small networks in float64 with random weights, one for each kind of head."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import Classifier, cut_classifier

SIZE = (20, 28)
CELLS = (5, 7)
CLASSES = 5
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)


class Small(NamedTuple):
    """An uncut network, the same one cut, and inputs for both."""

    model: nn.Module
    layer: str
    f: Classifier
    x: Tensor
    class_index: Tensor


def _features():
    return [
        ("conv1", nn.Conv2d(3, 6, 3, stride=2, padding=1)),
        ("bn1", nn.BatchNorm2d(6)),
        ("relu1", nn.ReLU(inplace=True)),
        ("conv2", nn.Conv2d(6, 8, 3, stride=2, padding=1)),
    ]


def _rectified():
    return [*_features(), ("bn2", nn.BatchNorm2d(8)), ("relu2", nn.ReLU(inplace=True))]


def _pooled():
    return [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(8, CLASSES)),
    ]


def _mlp():
    return [
        ("pool", nn.AdaptiveAvgPool2d((2, 3))),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(48, 16)),
        ("relu3", nn.ReLU(inplace=True)),
        ("dropout", nn.Dropout()),
        ("fc2", nn.Linear(16, CLASSES)),
    ]


def _convolutional():
    return [
        ("dropout", nn.Dropout()),
        ("classifier", nn.Conv2d(8, CLASSES, 1)),
        ("relu3", nn.ReLU(inplace=True)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
    ]


def _mixing():
    return [("mix", nn.Conv2d(8, 8, 1)), ("relu3", nn.ReLU(inplace=True)), *_pooled()]


# Kind of head: modules, layer l.
KINDS = {
    # Global average pooling and one linear layer, as in ResNets.
    "linear": (lambda: [*_rectified(), *_pooled()], "conv2+bn2+relu2"),
    # The same after activations of both signs.
    "signed": (lambda: [*_features(), *_pooled()], "conv2"),
    # Channel by channel up to the linear layer, but more than a mean: zero does not stay zero.
    "late norm": (lambda: [*_rectified(), *_pooled()], "conv2"),
    # As in VGG.
    "mlp": (lambda: [*_rectified(), *_mlp()], "conv2+bn2+relu2"),
    # A linear layer at the end, but channels are mixed before it.
    "mixing": (lambda: [*_rectified(), *_mixing()], "conv2+bn2+relu2"),
    # As in SqueezeNet.
    "conv": (lambda: [*_rectified(), *_convolutional()], "conv2+bn2+relu2"),
}
POOL_LINEAR = ("linear", "signed")


def small_model(kind, seed):
    """An uncut network in training mode, its batch norms not the identity."""
    torch.manual_seed(seed)
    modules, _ = KINDS[kind]
    model = nn.Sequential(OrderedDict(modules())).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.3, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            if isinstance(module, nn.Linear) or module is getattr(model, "classifier", None):
                module.weight.mul_(3)
    return model


def small(kind, seed=0):
    model = small_model(kind, seed)
    _, layer = KINDS[kind]
    preprocessing = Preprocessing(size=SIZE, mean=MEAN, std=STD)
    f = cut_classifier(model, layer, preprocessing=preprocessing)
    model.eval()
    x = torch.randn(3, 3, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        ranked = model(x).argsort(1, descending=True)
    # The first image's best class, the second one's second best, the third one's worst.
    class_index = torch.stack([ranked[0, 0], ranked[1, 1], ranked[2, -1]])
    return Small(model, layer.split("+")[-1], f, x, class_index)


class GradientPasses(nn.Module):
    """A head that counts its passes for gradients."""

    def __init__(self, head):
        super().__init__()
        self.inner, self.count = head, 0

    def forward(self, activation):
        self.count += torch.is_grad_enabled()
        return self.inner(activation)
