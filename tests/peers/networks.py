"""Small networks like those of the peers' tests, and the peers' own maps of them."""

import numpy as np
import torch
import torchcam.methods
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from aftcli import METHODS, Preprocessing, cut_classifier

SIDE = 4


class OneConvolution(nn.Module):
    """captum's convolution of ones, fully connected: two channels of 2 x 2 cells, four logits."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 3)
        self.relu1 = nn.ReLU(inplace)
        self.fc1 = nn.Linear(8, 4)
        self.relu2 = nn.ReLU(inplace)
        with torch.no_grad():
            self.conv1.weight.fill_(1)
            self.conv1.bias.copy_(torch.tensor([-50.0, -75.0]))
            self.fc1.weight.copy_(torch.tensor([1.0] * 5 + [-1.0] * 3).expand(4, 8))
            self.fc1.bias.zero_()

    def forward(self, x):
        return self.relu2(self.fc1(self.relu1(self.conv1(x)).flatten(1)))


def one_convolution(layer="conv1", inplace=False):
    """The network, cut; and 0..15 as an input's first channel, the other two black."""
    model = OneConvolution(inplace).double().eval()
    f = cut_classifier(model, layer, preprocessing=plain(SIDE, SIDE))
    x = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.double)
    x[0, 0] = torch.arange(16.0).view(SIDE, SIDE)
    return model, f, x


def pixel(*layers, channels=3):
    """A network of one pixel and its layer 0, a copy of the pixel's channels."""
    copy = nn.Conv2d(3, channels, 1, bias=False)
    copy.weight.data = torch.eye(3)[:channels, :, None, None]
    model = nn.Sequential(copy, *layers).double().eval()
    return model, cut_classifier(model, "0", preprocessing=plain(1, 1))


def weighted(*rows, bias=None, flat=False):
    """A linear layer, or a convolution of one pixel, of given weights."""
    weight = torch.tensor(rows, dtype=torch.double)
    layer = nn.Linear(*weight.T.shape) if flat else nn.Conv2d(*weight.T.shape, 1)
    layer.weight.data = weight if flat else weight[:, :, None, None]
    layer.bias.data = torch.tensor(bias or [0.0] * len(rows), dtype=torch.double)
    return layer


def pixels(*values):
    """Inputs of one pixel."""
    return torch.tensor(values, dtype=torch.double)[:, :, None, None]


def plain(high, wide):
    """Inputs of a size that are not normalised."""
    return Preprocessing(size=(high, wide), resize=None, mean=(0.0,) * 3, std=(1.0,) * 3)


def tiny(classes=3, seed=0, head=None):
    """torchcam's tiny network, in float64: layers 0 and 2 of 8 x 8 cells."""
    torch.manual_seed(seed)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)]
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        *(pooled if head is None else head),
    ).double()


def tiny_cut(classes=3, seed=0, layer="2"):
    """The same uncut and cut, and two inputs."""
    model = tiny(classes, seed).eval()
    f = cut_classifier(model, layer, preprocessing=plain(8, 8))
    return model, f, torch.rand(2, 3, 8, 8, dtype=torch.double)


class Residual(nn.Module):
    """A block with a skip, as in ResNets."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(inner)) + x)


def resnet(high, wide, seed=0):
    """A small ResNet in float64 with statistics and large weights of the last layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        Residual(8),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        Residual(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 6),
    ).double()
    with torch.no_grad():
        model[-1].weight.mul_(400)
    # A pass in training mode gives the norms statistics of their own.
    model.train()(torch.randn(16, 3, high, wide, dtype=torch.double))
    return model.eval()


def raw(f, x, c, method):
    """I_pre of a method, before it is scaled."""
    classes = torch.as_tensor(c).expand(len(x)) if isinstance(c, int) else torch.as_tensor(c)
    with torch.no_grad():
        return METHODS[method].load()(f, f.activation(x), classes, x)


def scaled(maps):
    """Maps, shape (N, ...), each from 0 to 1."""
    maps = torch.as_tensor(np.asarray(maps)).double()
    flat = maps.flatten(1)
    flat = flat - flat.amin(1, keepdim=True)
    return (flat / flat.amax(1, keepdim=True).clamp(min=1e-300)).view_as(maps)


def of_grad_cam(extractor, model, layer, x, classes=None, target=ClassifierOutputTarget, **how):
    """pytorch-grad-cam's maps at the input's size."""
    layers = [model.get_submodule(name) for name in layer.split("+")]
    given = {key: how.pop(key) for key in ("reshape_transform",) if key in how}
    targets = None if classes is None else [target(c) for c in classes]
    with extractor(model, layers, **given) as extract:
        return torch.from_numpy(extract(x, targets, **how))


def of_torchcam(name, model, layer, x, classes, **given):
    """torchcam's raw maps of one layer, after a ReLU."""
    with getattr(torchcam.methods, name)(model, layer, **given) as extract:
        (found,) = extract(classes, model(x), normalized=False)
    return found.detach().relu()


def smooth_of_torchcam(model, layer, x, classes):
    """torchcam's smooth Grad-CAM++: its weights by A of x, where it takes the last noisy copy's."""
    kept = []
    with torchcam.methods.SmoothGradCAMpp(model, layer) as extract:
        model(x)
        kept += [extract.hook_a[0].clone(), extract._get_weights(classes, eps=0)[0]]
    return torch.einsum("nk...,nk->n...", *kept).relu()
