"""Relevance propagation as its equations say, one neuron at a time, on a small residual network."""

from itertools import product

import torch
from torch import nn

EPSILON = 1e-6


class Residual(nn.Module):
    """Convolution, a residual block, both poolings and a linear layer."""

    def __init__(self, classes=4, bias=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(4) if bias else nn.Identity()
        self.act = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=bias)
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, classes, bias=bias)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        out = self.conv3(self.relu(self.conv2(x)))
        out += x
        return self.fc(self.mean(self.pool(self.relu(out))).flatten(1))


def stable(z):
    return z + (EPSILON if z >= 0 else -EPSILON)


def plus(values):
    return [max(v, 0.0) for v in values]


def minus(values):
    return [min(v, 0.0) for v in values]


def epsilon(c, bias, w):
    z = sum(c) + bias
    return [v / stable(z) for v in c]


def z_plus(c, bias, w):
    z = sum(plus(c)) + max(bias, 0.0)
    return [v / stable(z) for v in plus(c)]


def z_plus_without_bias(c, bias, w):
    return z_plus(c, 0.0, w)


def alpha_beta(c, bias, w):
    up, down = sum(plus(c)) + max(bias, 0.0), sum(minus(c)) + min(bias, 0.0)
    return [2 * p / stable(up) - m / stable(down) for p, m in zip(plus(c), minus(c), strict=True)]


def gamma(c, bias, w, gamma=0.25):
    z = sum(c) + bias
    if z == 0:
        return [0.0] * len(c)
    kept = plus if z > 0 else minus
    raised = [v + gamma * k for v, k in zip(c, kept(c), strict=True)]
    total = sum(raised) + bias + gamma * kept([bias])[0]
    return [v / stable(total) for v in raised]


def flat(c, bias, w):
    return [1 / stable(float(len(c)))] * len(c)


def box(low, high):
    """low, high: of each channel; w comes with its channel. The bias has no share."""

    def share(c, bias, w):
        v = [
            ci - low[k] * max(wi, 0.0) - high[k] * min(wi, 0.0)
            for ci, (k, wi) in zip(c, w, strict=True)
        ]
        return [vi / stable(sum(v)) for vi in v]

    return share


def absolute(c, bias, w):
    return [abs(v) / sum(map(abs, c)) for v in c]


def ratio(a, b):
    return a / b if b else 0.0


def relevant(c, bias, w):
    """Return the share of each input of a neuron with positive relevance (RAP)."""
    up, down = sum(plus(c)), -sum(minus(c))
    return [ratio(max(v, 0.0), up) + ratio(max(-v, 0.0), up + down) for v in c]


def irrelevant(c, bias, w):
    up, down = sum(plus(c)), -sum(minus(c))
    return [ratio(max(-v, 0.0), down) + ratio(max(-v, 0.0), up + down) for v in c]


RELATIVE = (relevant, irrelevant)


def through_convolution(a, layer, r, share):
    """Relevance of a convolution's input a, shape (K, h, w), of that of its output r."""
    if share is RELATIVE:
        raised = through_convolution(a, layer, r.clamp(min=0), relevant)
        q = raised + through_convolution(a, layer, r.clamp(max=0), irrelevant)
        return torch.where(q != 0, q - (q.sum() - r.sum()) / max((q != 0).sum(), 1), 0)
    weight, (stride, _), (padding, _) = layer.weight, layer.stride, layer.padding
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias
    _, height, width = a.shape
    out = torch.zeros_like(a)
    per_group, ins = len(weight) // layer.groups, weight.shape[1]
    for j, y, x in product(*map(range, r.shape)):
        cells = [
            (
                i + j // per_group * ins,
                stride * y + dy - padding,
                stride * x + dx - padding,
                i,
                dy,
                dx,
            )
            for i, dy, dx in product(*map(range, weight.shape[1:]))
        ]
        cells = [c for c in cells if 0 <= c[1] < height and 0 <= c[2] < width]
        w = [(c[0], weight[j, c[3], c[4], c[5]].item()) for c in cells]
        c = [a[i, u, v].item() * wi for (i, u, v, *_), (_, wi) in zip(cells, w, strict=True)]
        for (i, u, v, *_), part in zip(cells, share(c, bias[j].item(), w), strict=True):
            out[i, u, v] += part * r[j, y, x]
    return out


def through_linear(a, layer, r, share):
    """Relevance of a linear layer's input a, shape (K,), of that of its output r."""
    out = torch.zeros_like(a)
    bias = torch.zeros(len(r)) if layer.bias is None else layer.bias
    for j, row in enumerate(layer.weight):
        w = [(k, v.item()) for k, v in enumerate(row)]
        c = [ai.item() * wi for ai, (_, wi) in zip(a, w, strict=True)]
        out += torch.tensor(share(c, bias[j].item(), w), dtype=a.dtype) * r[j]
    return out


def through_mean(a, r):
    """Global average pooling: by each cell's part of the mean."""
    out = torch.zeros_like(a)
    for k in range(len(a)):
        mean = a[k].mean().item()
        out[k] = a[k] / a[k].numel() / stable(mean) * r[k]
    return out


def through_max(a, r):
    """Max pooling of 2 x 2 cells: the winner takes all."""
    out = torch.zeros_like(a)
    for k, y, x in product(*map(range, r.shape)):
        u, v = max(product((2 * y, 2 * y + 1), (2 * x, 2 * x + 1)), key=lambda c: a[k, c[0], c[1]])
        out[k, u, v] += r[k, y, x]
    return out


def through_sum(branches, r, by_magnitude):
    parts = [b.abs() if by_magnitude else b for b in branches]
    total = sum(parts)
    total = total + torch.where(total >= 0, EPSILON, -EPSILON)
    return [part / total * r for part in parts]


def folded(conv, bn):
    """The convolution followed by the batch normalisation, as one."""
    if isinstance(bn, nn.Identity):
        return conv
    one = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    for j in range(len(conv.weight)):
        gain = bn.weight[j] / (bn.running_var[j] + bn.eps) ** 0.5
        one.weight[j] = conv.weight[j] * gain
        one.bias[j] = bn.bias[j] + (conv.bias[j] - bn.running_mean[j]) * gain
    return one


@torch.no_grad()
def propagated(model, x, start, first, convolution, linear, by_magnitude=True):
    """R of one input x, shape (3, h, w), of the relevance of logits, `start`, shape (C,)."""
    conv1 = folded(model.conv1, model.bn1)
    a1 = conv1(x[None]).clamp(0, 6)[0]
    a2 = model.conv2(a1[None]).relu()[0]
    a3 = model.conv3(a2[None])[0]
    a4 = (a1 + a3).relu()
    a5 = model.pool(a4[None])[0]
    r = through_linear(a5.mean((1, 2)), model.fc, start, linear)
    r = through_max(a4, through_mean(a5, r))
    r3, skipped = through_sum([a3, a1], r, by_magnitude)
    r2 = through_convolution(a2, model.conv3, r3, convolution)
    r1 = through_convolution(a1, model.conv2, r2, convolution) + skipped
    return through_convolution(x, conv1, r1, first)
