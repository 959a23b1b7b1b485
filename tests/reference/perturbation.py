"""Slow literal versions of the perturbation and superpixel methods, for one input in float64."""

import math
from itertools import product

import numpy as np
import torch
from scipy import ndimage
from skimage import segmentation, transform


def probability(f, x, c):
    with torch.no_grad():
        return float(f(x[None]).softmax(1)[0, c])


def score(f, x, c):
    with torch.no_grad():
        return float(f(x[None])[0, c])


def occlusion(f, x, c, window, stride):
    """The mean drop of the score over the windows that cover a pixel."""
    height, width = x.shape[-2:]
    drop, windows = torch.zeros(height, width).double(), torch.zeros(height, width)
    for i in range(math.ceil((height - window[0]) / stride[0]) + 1):
        for j in range(math.ceil((width - window[1]) / stride[1]) + 1):
            rows = slice(i * stride[0], i * stride[0] + window[0])
            columns = slice(j * stride[1], j * stride[1] + window[1])
            hidden = x.clone()
            hidden[:, rows, columns] = 0
            drop[rows, columns] += score(f, x, c) - score(f, hidden, c)
            windows[rows, columns] += 1
    return drop / windows


def rise_mask(cells, top, left, height, width):
    """One mask, pixel by pixel: bilinear interpolation between the centres of an s x s grid."""
    s = len(cells)
    tall, wide = math.ceil(height / s), math.ceil(width / s)
    mask = torch.zeros(height, width).double()
    for row, column in product(range(height), range(width)):
        # A pixel's centre, in cells, on a grid stretched to s + 1 cells of tall x wide.
        i = (row + top + 0.5) / ((s + 1) * tall) * s - 0.5
        j = (column + left + 0.5) / ((s + 1) * wide) * s - 0.5
        i, j = min(max(i, 0), s - 1), min(max(j, 0), s - 1)
        for a, b in product(range(s), range(s)):
            weight = max(0, 1 - abs(i - a)) * max(0, 1 - abs(j - b))
            mask[row, column] += weight * cells[a, b]
    return mask


def rise(f, x, c, masks, p):
    """Eq. 6: 1 / (E[M] N) times the sum of p^c(x * M_i) M_i."""
    total = torch.zeros(x.shape[-2:]).double()
    for mask in masks:
        total += probability(f, x * mask, c) * mask
    return total / (p * len(masks))


def show(x, parts, z):
    """x with the superpixels shown where z is 1."""
    shown = x.clone()
    for i, kept in enumerate(z):
        if not kept:
            shown[:, parts == i] = 0
    return shown


def ridge(z, p, weight, penalty):
    """The weights of a linear model with an intercept that is not penalised, from its equations."""
    rows = np.column_stack([np.ones(len(z)), z])
    penalties = np.diag([0.0] + [penalty] * z.shape[1])
    return np.linalg.solve(rows.T * weight @ rows + penalties, rows.T * weight @ p)[1:]


def shapley(f, x, c, parts):
    """Shapley values by their definition, from all 2^M coalitions."""
    count = int(parts.max()) + 1
    v = {z: score(f, show(x, parts, z), c) for z in product((0, 1), repeat=count)}
    phi = np.zeros(count)
    for z in v:
        size = sum(z)
        for i in (i for i in range(count) if not z[i]):
            with_i = (*z[:i], 1, *z[i + 1 :])
            orders = math.factorial(size) * math.factorial(count - size - 1)
            phi[i] += orders / math.factorial(count) * (v[with_i] - v[z])
    return phi


def integrated_gradients(f, x, c, baseline, steps):
    """The mean of the gradients on the way from a baseline, times the way, by channel."""
    total = torch.zeros_like(x)
    for alpha in np.linspace(0, 1, steps):
        with torch.enable_grad():
            point = (baseline + alpha * (x - baseline)).requires_grad_()
            (gradient,) = torch.autograd.grad(f(point[None])[0, c], point)
        total += gradient
    return (x - baseline) * total / steps


def regions(picture):
    """Felzenszwalb's regions at six scales, each dilated by a disk of five pixels."""
    low, high = picture.min(), picture.max()
    image = transform.resize(
        2 * (picture - low) / (high - low) - 1, (224, 224), order=3, mode="constant"
    )
    rows, columns = np.mgrid[-5:6, -5:6]
    disk = rows**2 + columns**2 <= 25
    masks = []
    for scale in (50, 100, 150, 250, 500, 1200):
        labels = segmentation.felzenszwalb(image, scale=scale, sigma=0.8, min_size=150)
        labels = transform.resize(
            labels, picture.shape[:2], order=0, preserve_range=True, anti_aliasing=False
        ).astype(int)
        for label in range(labels.max() + 1):
            masks.append(ndimage.binary_dilation(labels == label, disk))
    return masks


def xrai(attribution, masks, least=50):
    """Algorithm 1: add the region of the greatest mean attribution, until none adds much."""
    taken = np.zeros(attribution.shape, bool)
    gains = np.zeros(attribution.shape)
    while True:
        new = [mask & ~taken for mask in masks]
        best = max(
            (n for n in new if n.sum() >= least),
            key=lambda n: attribution[n].mean(),
            default=None,
        )
        if best is None:
            break
        gains[best] = attribution[best].mean()
        taken |= best
    if not taken.all():
        gains[~taken] = attribution[~taken].mean()
    return gains


def check_alone_and_clean(method, f, x, class_index):
    """A batch's maps are those of its images alone; generators and the model stay as they are."""
    before = {k: v.clone() for k, v in f.state_dict().items()}
    modes = [m.training for m in f.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in f.modules()]
    original = x.clone()
    with torch.no_grad():
        activation = f.activation(x)
        maps = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            np.random.seed(seed)
            state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
            maps.append(method(f, activation, class_index, x))
            assert torch.equal(torch.get_rng_state(), state)
            assert (np.random.get_state()[1] == numpy_state).all()
        alone = [
            method(f, activation[n : n + 1], class_index[n : n + 1], x[n : n + 1])
            for n in range(len(x))
        ]
    assert torch.equal(*maps)
    assert maps[0].shape == (len(x), *x.shape[-2:]) and maps[0].dtype == x.dtype
    assert (maps[0] >= 0).all() and not maps[0].requires_grad
    torch.testing.assert_close(maps[0], torch.cat(alone))
    torch.testing.assert_close(f.state_dict(), before, rtol=0, atol=0)
    assert modes == [m.training for m in f.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in f.modules()]
    assert torch.equal(x, original)
    return maps[0]
