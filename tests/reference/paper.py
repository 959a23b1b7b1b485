"""The paper again, slowly: literal float64 loops that share no code with aftcli.

Written from the equations (§2.4, §3.1, §4.1) and the methods' own papers. Everything runs on the
uncut network: a forward hook observes or replaces the output of the layer's last module. Images
go through one by one. Maps are numpy arrays.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


def with_layer_output(model, layer, x, change):
    """Logits of the whole network with the named module's output A replaced by change(A)."""
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, out: change(out))
    try:
        return model(x)[0]
    finally:
        handle.remove()


def activation_of(model, layer, x):
    """A, shape (K, h, w), of one image x, shape (1, 3, H, W)."""
    seen = []

    def keep(output):
        # What follows in the network may write into its input.
        seen.append(output.detach().clone())
        return output

    with torch.no_grad():
        with_layer_output(model, layer, x, keep)
    return seen[0][0].numpy()


def gradient_of(model, layer, x, c):
    """dy^c / dA, shape (K, h, w), y^c the score before softmax."""
    leaf = []

    def restart(output):
        leaf.append(output.detach().clone().requires_grad_())
        return leaf[0].clone()

    with torch.enable_grad():
        y = with_layer_output(model, layer, x, restart)[c]
        (gradient,) = torch.autograd.grad(y, leaf[0])
    return gradient[0].numpy()


def score(model, x, c):
    with torch.no_grad():
        return float(model(x)[0, c])


def probability(model, x, c):
    with torch.no_grad():
        logits = model(x)[0].double().tolist()
    top = max(logits)
    exponentials = [np.exp(z - top) for z in logits]
    return float(exponentials[c] / sum(exponentials))


def ablated_score(model, layer, x, c, k):
    """y_k^c: the whole network with channel k of A set to zero."""

    def ablate(output):
        output = output.clone()
        output[:, k] = 0
        return output

    with torch.no_grad():
        return float(with_layer_output(model, layer, x, ablate)[c])


# I_pre of each method, shape (h, w)


def weighted_sum(alpha, activation):
    """I_pre = ReLU(sum_k alpha_k A^k), cell by cell."""
    channels, height, width = activation.shape
    cells = activation.tolist()
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            total = 0.0
            for k in range(channels):
                total += alpha[k] * cells[k][i][j]
            result[i, j] = max(total, 0.0)
    return result


def cam(model, layer, x, c):
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return weighted_sum(linear.weight[c].tolist(), activation_of(model, layer, x))


def gradcam(model, layer, x, c):
    alpha = []
    for g in gradient_of(model, layer, x, c).tolist():
        values = [v for row in g for v in row]
        alpha.append(sum(values) / len(values))
    return weighted_sum(alpha, activation_of(model, layer, x))


def gradcam_plus_plus(model, layer, x, c):
    """alpha_k = sum_ij s_ij ReLU(g_ij), s = g^2 / (2 g^2 + (sum_ab A_ab^k) g^3), 0 where g = 0."""
    activation = activation_of(model, layer, x)
    alpha = []
    for a, g_k in zip(activation, gradient_of(model, layer, x, c).tolist(), strict=True):
        total = sum(a.flatten().tolist())
        alpha_k = 0.0
        for g in (v for row in g_k for v in row):
            s = g**2 / (2 * g**2 + total * g**3) if g != 0 else 0.0
            alpha_k += s * max(g, 0.0)
        alpha.append(alpha_k)
    return weighted_sum(alpha, activation)


def scorecam(model, layer, x, c):
    activation = activation_of(model, layer, x)
    scores = []
    for a in activation:
        mask = torch.from_numpy(upsample(scale(a), x.shape[-2:])).to(x)
        scores.append(score(model, mask * x, c))
    exponentials = [np.exp(s - max(scores)) for s in scores]
    return weighted_sum([e / sum(exponentials) for e in exponentials], activation)


def ablationcam(model, layer, x, c):
    """alpha_k = (y^c - y_k^c) / |y^c|: the paper's y^c is positive (its sign: see test_cam)."""
    activation = activation_of(model, layer, x)
    y = score(model, x, c)
    alpha = []
    for k in range(len(activation)):
        alpha.append((y - ablated_score(model, layer, x, c, k)) / (abs(y) or 1.0))
    return weighted_sum(alpha, activation)


def layercam(model, layer, x, c):
    """I_pre = ReLU(sum_k ReLU(g_ij^k) A_ij^k)."""
    return _cell_by_cell(model, layer, x, c, lambda g: max(g, 0.0))


def hirescam(model, layer, x, c):
    """I_pre = ReLU(sum_k g_ij^k A_ij^k)."""
    return _cell_by_cell(model, layer, x, c, lambda g: g)


def _cell_by_cell(model, layer, x, c, weight):
    activation = activation_of(model, layer, x)
    gradient = gradient_of(model, layer, x, c)
    channels, height, width = activation.shape
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            terms = [weight(gradient[k, i, j]) * activation[k, i, j] for k in range(channels)]
            result[i, j] = max(sum(terms), 0.0)
    return result


def xgradcam(model, layer, x, c):
    """alpha_k = sum_ij A_ij^k g_ij^k / sum_ab A_ab^k, 0 for an empty channel."""
    activation = activation_of(model, layer, x)
    alpha = []
    for a, g in zip(activation, gradient_of(model, layer, x, c), strict=True):
        total = sum(a.flatten().tolist())
        product = sum(p * q for p, q in zip(a.flatten(), g.flatten(), strict=True))
        alpha.append(product / total if total != 0 else 0.0)
    return weighted_sum(alpha, activation)


def eigencam(model, layer, x, c):
    """A, cells by channels, on its first right singular vector: eigenvector of the Gram matrix."""
    activation = activation_of(model, layer, x)
    channels, height, width = activation.shape
    gram = np.zeros((channels, channels))
    for p in range(channels):
        for q in range(channels):
            gram[p, q] = sum((activation[p] * activation[q]).flatten().tolist())
    values, vectors = np.linalg.eigh(gram)
    first = vectors[:, np.argmax(values)]
    projected = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            projected[i, j] = sum(first[k] * activation[k, i, j] for k in range(channels))
    sign = -1 if projected.sum() < 0 else 1
    return np.maximum(sign * projected, 0)


def finercam(model, layer, x, c):
    """Grad-CAM of y^c - .6 mean_d y^d over the 3 classes d of the scores nearest to y^c."""
    with torch.no_grad():
        y = model(x)[0].tolist()
    others = sorted((abs(y[d] - y[c]), d) for d in range(len(y)) if d != c)[:3]
    gradient = gradient_of(model, layer, x, c)
    for _, d in others:
        gradient = gradient - 0.6 / len(others) * gradient_of(model, layer, x, d)
    alpha = []
    for g in gradient.tolist():
        values = [v for row in g for v in row]
        alpha.append(sum(values) / len(values))
    return weighted_sum(alpha, activation_of(model, layer, x))


CAMS = {
    "cam": cam,
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "scorecam": scorecam,
    "ablationcam": ablationcam,
    "layercam": layercam,
    "xgradcam": xgradcam,
    "hirescam": hirescam,
    "eigencam": eigencam,
    "finercam": finercam,
}


# From I_pre to I


def scale(values):
    """S: to [0, 1]; a constant map becomes zero."""
    low, high = values.min(), values.max()
    result = np.zeros(values.shape, values.dtype)
    if high > low:
        for index in np.ndindex(*values.shape):
            result[index] = (values[index] - low) / (high - low)
    return result


def upsample(values, size):
    """Bilinear, pixel centres at half steps (align_corners=False), edges repeated."""
    height, width = values.shape
    cells = values.tolist()
    result = np.zeros(size, values.dtype)
    columns = [_neighbours(j, width, size[1]) for j in range(size[1])]
    for i in range(size[0]):
        top, bottom, v = _neighbours(i, height, size[0])
        for j, (left, right, u) in enumerate(columns):
            upper = (1 - u) * cells[top][left] + u * cells[top][right]
            lower = (1 - u) * cells[bottom][left] + u * cells[bottom][right]
            result[i, j] = (1 - v) * upper + v * lower
    return result


def _neighbours(i, cells, pixels):
    position = max((i + 0.5) * cells / pixels - 0.5, 0.0)
    before = int(position)
    return before, min(before + 1, cells - 1), position - before


def attribution_map(model, layer, x, c, method):
    """I, shape (H, W), of one image."""
    return upsample(scale(CAMS[method](model, layer, x, c)), x.shape[-2:])


# Algorithm 1


class Found(NamedTuple):
    """Result of Algorithm 1 for one image; x_hat holds all masked images."""

    tau: float
    rpi: np.ndarray
    y_hat: np.ndarray
    y: float
    attribution: np.ndarray
    mask: np.ndarray
    x_hat: list


def blur(x, sigma=10):
    """Gaussian, separable, its reach three sigma or as far as one reflection at the border goes."""
    reach = min(3 * sigma, x.shape[-1] - 1, x.shape[-2] - 1)
    steps = range(-reach, reach + 1)
    kernel = [np.exp(-0.5 * (d / sigma) ** 2) for d in steps]
    kernel = [v / sum(kernel) for v in kernel]
    result = np.array(x, dtype=np.float64)
    for axis in (-2, -1):
        length, source = x.shape[axis], np.moveaxis(result, axis, 0)
        rows = []
        for i in range(length):
            row = 0.0
            for d, weight in zip(steps, kernel, strict=True):
                at = abs(i + d)
                at = at if at < length else 2 * (length - 1) - at
                row = row + weight * source[at]
            rows.append(row)
        result = np.moveaxis(np.array(rows), 0, axis)
    return result


def fill_of(x, fill, mean, std):
    """Return what muted pixels show: the mean colour is zero after normalisation."""
    if fill == "mean":
        return np.zeros_like(x)
    if fill == "black":
        black = np.zeros_like(x)
        for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
            black[channel] = (0 - m) / s
        return black
    return {"blur": blur}[fill](x)


def thresholded(attribution, tau, mode):
    """Eq. 4; by rank, tau is the share of the map's pixels below the cut.

    A score less than 2^-20 below the cut is at it (docs/method/decisions/search.md, Rounding).
    """
    cut = {"value": tau, "percentile": np.percentile(attribution, 100 * tau)}[mode]
    kind = attribution.dtype.type
    return np.where(attribution >= kind(kind(cut) - kind(2**-20)), attribution, 0)


def masked_images(x, attribution, thresholds, masking, fill, mode, mean, std):
    """x_hat for each threshold: eq. 5, 6."""
    background = fill_of(x, fill, mean, std)
    images = []
    for tau in thresholds:
        i_tau = thresholded(attribution, tau, mode)
        m_tau = np.where(i_tau != 0, 1, 0).astype(i_tau.dtype)
        weight = {"binary": m_tau, "soft": i_tau}[masking]
        images.append(weight * x + (1 - weight) * background)
    return images


def rounding(y):
    """By how much probabilities around y may be wrong (docs/method/decisions/search.md)."""
    return y * (1e-4 * (1 - y) + 2**-21)


def first_maximum(y_hat, y):
    """The first threshold that is as good as the best up to rounding; the first if none helps."""
    largest = max(*y_hat, y)
    for t, p in enumerate(y_hat):
        if max(p, y) >= largest - rounding(largest):
            return t
    raise AssertionError


def log_odds(p):
    """log(p / (1 - p)); float32 ends a rounding's width below 1, and above 0."""
    p = min(max(p, 2.0**-126), 1 - 2**-21)
    return math.log(p) - math.log(1 - p)


def first_for_all(y_hats, ys):
    """The first threshold with the largest least rise of log-odds, and each one's least rise.

    One list of y_hat and one y for each judge; None for one who does not know the class.
    """
    least = []
    for t in range(len(y_hats[0])):
        rises = [
            (max(log_odds(y_hat[t]) - log_odds(y), 0.0), y_hat[t])
            for y_hat, y in zip(y_hats, ys, strict=True)
            if y is not None
        ]
        least.append(min(rises))
    largest, reached = max(least, key=lambda each: each[0])
    error = 1e-4 + 2**-21 / max(1 - reached, 2**-21)
    first = next(t for t, (rise, _) in enumerate(least) if rise >= largest - error)
    return first, [rise for rise, _ in least]


def algorithm_1(
    model, x, attribution, c, thresholds, masking, fill, mode, mean=(0, 0, 0), std=(1, 1, 1)
):
    """Algorithm 1 for one image x, shape (1, 3, H, W), one masked image at a time."""
    y = probability(model, x, c)
    images = masked_images(x[0].numpy(), attribution, thresholds, masking, fill, mode, mean, std)
    y_hat = [probability(model, torch.from_numpy(image)[None].to(x), c) for image in images]
    rpi = [max(p - y, 0) / y for p in y_hat]
    best = first_maximum(y_hat, y)
    i_tau = thresholded(attribution, thresholds[best], mode)
    return Found(thresholds[best], np.array(rpi), np.array(y_hat), y, i_tau, i_tau != 0, images)


# §4.2, equation 8


def aft_loss(logits, labels, tuned, masks, lam):
    """Total, cross-entropy and mask term, each a mean over the images."""
    cross_entropy = mask_term = 0.0
    for scores, label, t, m in zip(logits, labels, tuned, masks, strict=True):
        largest = max(scores)
        log_sum = largest + math.log(sum(math.exp(s - largest) for s in scores))
        cross_entropy += log_sum - scores[label]
        for i in range(t.shape[0]):
            for j in range(t.shape[1]):
                mask_term += (t[i, j] - (1.0 if m[i, j] else 0.0)) ** 2
    count = len(logits)
    cross_entropy, mask_term = cross_entropy / count, mask_term / count
    return cross_entropy + lam * mask_term, cross_entropy, mask_term


def tuner(activation, w1, b1, w2, b2):
    """Two 1x1 convolutions, cell by cell."""
    _, height, width = activation.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            hidden = [
                sum(w1[n, k, 0, 0] * activation[k, i, j] for k in range(w1.shape[1])) + b1[n]
                for n in range(w1.shape[0])
            ]
            out[i, j] = sum(w2[0, n, 0, 0] * hidden[n] for n in range(len(hidden))) + b2[0]
    return out


def aft_objective(features, labels, masks, values, lam):
    """Eq. 8 of the "linear" small network from the stem's output on, weights by name."""
    logits, tuned = [], []
    for x in features:
        activation = convolve(x, values["layer.conv2.weight"], values["layer.conv2.bias"])
        for k in range(len(activation)):
            mean, var = (values[f"layer.bn2.running_{what}"][k] for what in ("mean", "var"))
            scaled = (activation[k] - mean) / math.sqrt(var + 1e-5)
            scaled = scaled * values["layer.bn2.weight"][k] + values["layer.bn2.bias"][k]
            activation[k] = np.maximum(scaled, 0)
        pooled = [channel.sum() / channel.size for channel in activation]
        weight, bias = values["head.fc.weight"], values["head.fc.bias"]
        logits.append(
            [
                sum(w * p for w, p in zip(row, pooled, strict=True)) + b
                for row, b in zip(weight, bias, strict=True)
            ]
        )
        names = ("reduce.weight", "reduce.bias", "combine.weight", "combine.bias")
        tuned.append(tuner(activation, *(values[f"tuner.{name}"] for name in names)))
    return aft_loss(logits, labels, tuned, masks, lam)[0]


def convolve(x, weight, bias):
    """A 3x3 convolution of stride 2 with padding 1."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    height, width = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    out = np.zeros((len(weight), height, width))
    for k in range(len(weight)):
        for i in range(height):
            for j in range(width):
                patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                out[k, i, j] = (patch * weight[k]).sum() + bias[k]
    return out
