"""Maps from the score of inputs with parts hidden: Occlusion, RISE, LIME, Kernel SHAP; and XRAI.

What is hidden is 0 after normalisation, the data set's mean colour. LIME, Kernel SHAP and XRAI
score superpixels or regions. core/methods.py names the papers, and how many passes a map takes;
BATCH of them run at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from aftcli.attributions.gradient import seeded
from aftcli.core.cam import BATCH, wide
from aftcli.core.classifier import Classifier
from aftcli.core.outputs import class_score
from aftcli.errors import AftError

WINDOW = 1 / 7  # of the side: 32 of 224 pixels, one cell of a 7 x 7 activation

STRIDE = 1 / 4  # of the window: 625 passes; a half takes 169, but its map correlates 0.91 only

# N, even: two halves' maps of a photo correlate 0.98 with masks in pairs, 0.77 without.
MASKS = 2000

CELLS = 7  # s, the paper's

KEPT = 0.5  # p = E[M], the paper's; pairs need it

SEED = 0


@torch.no_grad()
def signed_occlusion(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """Occlusion: the mean of y^c(x) - y^c(x with W hidden) over the windows W that cover a pixel.

    Zeiler and Fergus §4.2 show the score at each place of the window; captum averages over the
    windows of a pixel, so does this.
    """
    from captum.attr import Occlusion

    height, width = (max(1, round(side * WINDOW)) for side in x.shape[-2:])
    strides = (x.shape[1], max(1, round(height * STRIDE)), max(1, round(width * STRIDE)))
    maps = [
        Occlusion(f).attribute(
            x_n[None],
            sliding_window_shapes=(x.shape[1], height, width),
            strides=strides,
            target=c,
            perturbations_per_eval=BATCH,
        )
        for x_n, c in zip(x, class_index.tolist(), strict=True)
    ]
    # The window hides all channels at once, which each get its whole drop; in float32.
    return torch.cat(maps)[:, 0].to(x)


@torch.no_grad()
def rise(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """RISE: S = 1 / (E[M] N) sum_i p^c(x * M_i) M_i over random masks M_i (eq. 6).

    As in the paper the score is the probability p^c, after softmax or sigmoid. The masks are the
    same for every image; 64 are held (17 MB stretched, 13 MB cut). S needs no ReLU.
    """
    total = torch.zeros_like(wide(x[:, 0]))
    for masks in rise_masks(total[:, None]):
        for n, c in enumerate(class_index.tolist()):
            p = f.probabilities(wide(f(x[n] * masks[:, None].to(x))))[:, c]
            total[n] += torch.einsum("i,ihw->hw", p, masks)
    return total / (KEPT * MASKS)


def rise_masks(x: Tensor) -> Iterator[Tensor]:
    """Draw masks M_i, shape (at most BATCH, H, W), in [0, 1], for inputs of x's size (§3.2).

    Cells of an s x s grid are kept with probability p; the grid is stretched bilinearly to s + 1
    cells a side and an H x W window of it, at random up to one cell from the corner, is taken.
    After each mask comes 1 - M, which p = 1/2 makes as likely, so that the masks of a pixel add
    up to E[M] N, as eq. 6 supposes; where they do not, that error is most of the map.
    """
    height, width = x.shape[-2:]
    cell = (math.ceil(height / CELLS), math.ceil(width / CELLS))
    size = ((CELLS + 1) * cell[0], (CELLS + 1) * cell[1])
    generator = torch.Generator().manual_seed(SEED)
    pairs = MASKS // 2
    kept = torch.rand(pairs, CELLS, CELLS, generator=generator) < KEPT
    kept = torch.stack([kept, ~kept], 1).flatten(0, 1)
    tops, lefts = (
        torch.randint(side, (pairs,), generator=generator).repeat_interleave(2).tolist()
        for side in cell
    )
    for start in range(0, MASKS, BATCH):
        grids = kept[start : start + BATCH, None].to(x)
        large = F.interpolate(grids, size, mode="bilinear", align_corners=False)[:, 0]
        corners = zip(tops[start : start + BATCH], lefts[start : start + BATCH], strict=True)
        yield torch.stack(
            [
                m[top : top + height, left : left + width]
                for m, (top, left) in zip(large, corners, strict=True)
            ]
        )


# Asked of SLIC, which gives about 40 for a photograph, as quickshift does for the lime package.
SUPERPIXELS = 50

SAMPLES = 1000  # z of LIME; the lime package's default: maps of two seeds correlate 0.87

# Of Kernel SHAP, with which two seeds correlate 0.96; with 50 superpixels 0.76, 1000 z 0.64.
PLAYERS, COALITIONS = 25, 2000

KERNEL_WIDTH = 0.25  # sigma; the lime package's default for images

RIDGE = 1.0  # penalty; the lime package's default

STEPS = 25  # of each integral

GRADIENT_BATCH = 16  # passes with gradients at a time

SAMPLES_SEED = 0

Floats = NDArray[np.float64]


@torch.no_grad()
def signed_lime(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """LIME: w of each pixel's superpixel, argmin_w sum_z pi(z) (p^c(x_z) - w.z - w_0)^2 + |w|^2.

    Eq. 1 and 2. z says which superpixels are shown; pi(z) = sqrt(exp(-D^2 / sigma^2)) with the
    cosine distance D of z and the whole picture. As in the paper the score is the probability
    p^c, after softmax.
    """

    def weights(show: Callable[[Floats], Floats], count: int) -> Floats:
        from sklearn.linear_model import Ridge

        z = np.random.RandomState(SAMPLES_SEED).randint(0, 2, (SAMPLES, count)).astype(float)
        z[0] = 1
        cosine = np.sqrt(z.mean(1))
        pi = np.sqrt(np.exp(-((1 - cosine) ** 2) / KERNEL_WIDTH**2))
        return Ridge(alpha=RIDGE).fit(z, show(z), sample_weight=pi).coef_  # type: ignore[no-any-return]

    return _by_superpixels(f, class_index, x, SUPERPIXELS, weights, probability=True)


@torch.no_grad()
def signed_kernel_shap(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """Kernel SHAP: Shapley values phi of superpixels, sum_i phi_i = y^c(x) - y^c(0) (theorem 2).

    They minimise sum_z pi(z) (y^c(x_z) - y^c(0) - phi.z)^2 under that constraint, with
    pi(z) = (M - 1) / ((M choose |z|) |z| (M - |z|)) for M superpixels, and are not divided by the
    superpixel's area. All 2^M z are taken where they are no more than COALITIONS, and phi is exact;
    otherwise those sizes of z that fit, and of the others pairs of z and its complement at random.
    """

    def shapley_values(show: Callable[[Floats], Floats], count: int) -> Floats:
        import shap

        # Not captum's: it draws z one by one with repeats and without complements, which leaves
        # 20 % of error where all z could be taken, and meets the constraint roughly.
        # shap draws from numpy's global generator.
        with seeded(x.device, SAMPLES_SEED):
            explainer = shap.KernelExplainer(show, np.zeros((1, count)))
            values = explainer.shap_values(
                np.ones((1, count)), nsamples=COALITIONS, l1_reg=False, silent=True
            )
        return values[0]  # type: ignore[no-any-return]

    return _by_superpixels(f, class_index, x, PLAYERS, shapley_values)


def _by_superpixels(
    f: Classifier,
    class_index: Tensor,
    x: Tensor,
    asked: int,
    values: Callable[[Callable[[Floats], Floats], int], Floats],
    probability: bool = False,
) -> Tensor:
    """Map each image, shape (N, H, W), by a function that values its superpixels.

    That function gets M, and a function from z, shape (n, M), to the scores, shape (n,), of the
    image with the superpixels shown where z is 1.
    """
    maps = []
    for x_n, c in zip(x, class_index.tolist(), strict=True):
        parts = superpixels(f, x_n, asked)

        def show(z: Floats, x_n: Tensor = x_n, c: int = c, parts: Tensor = parts) -> Floats:
            batches = torch.from_numpy(z).to(x_n).split(BATCH)
            logits = torch.cat([f(x_n * part[:, parts][:, None]) for part in batches])
            scores = (f.probabilities(logits) if probability else logits)[:, c]
            _check_finite(f, scores)
            return scores.double().cpu().numpy()

        of_parts = torch.from_numpy(values(show, int(parts.max()) + 1)).to(x_n)
        maps.append(of_parts[parts])
    return torch.stack(maps)


def _check_finite(f: Classifier, values: Tensor) -> None:
    if not values.isfinite().all():
        raise AftError(
            f"{f.name} gives scores or gradients that are not finite: check its weights and the "
            "input"
        )


def picture(f: Classifier, x: Tensor) -> Floats:
    """Return the picture, shape (H, W, 3), black 0 and white 1, of an input, shape (3, H, W)."""
    mean, std = f.preprocessing.channels(x)
    return (x * std + mean).permute(1, 2, 0).double().cpu().numpy()


def superpixels(f: Classifier, x: Tensor, asked: int) -> Tensor:
    """Find each pixel's superpixel 0..M-1, (H, W), of an input, (3, H, W); M is about `asked`.

    SLIC with scikit-image's compactness: as many as quickshift, lime's default, finds in a
    photograph, in an eighth of its time.
    """
    from skimage.segmentation import slic

    labels = slic(picture(f, x), n_segments=asked, sigma=1, start_label=0)
    _, labels = np.unique(labels, return_inverse=True)
    return torch.from_numpy(labels.reshape(x.shape[-2:])).to(x.device)


@torch.no_grad()
def signed_xrai(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """XRAI: the density of the region that a pixel came with, by PAIR's saliency package.

    Algorithm 1. Regions are Felzenszwalb's at six scales, dilated. Step by step the one is added
    whose new pixels have the greatest mean attribution; that mean is their value. The attribution
    is the mean of integrated gradients of y^c from black and from white, the greatest of the
    channels. A map takes 50 passes with gradients, 16 at a time, and 2 to 3 s for the regions of a
    224 x 224 picture, with about 150 masks (8 MB).
    """
    maps = [_signed_xrai(f, c, x_n) for x_n, c in zip(x, class_index, strict=True)]
    return torch.stack(maps)


def _signed_xrai(f: Classifier, c: Tensor, x: Tensor) -> Tensor:
    from saliency.core import INPUT_OUTPUT_GRADIENTS, XRAI, XRAIParameters

    image = picture(f, x)
    mean, std = f.preprocessing.channels(x)

    def gradients(images: Floats, **_: object) -> dict[str, Floats]:
        with torch.enable_grad():
            inputs = torch.from_numpy(images).to(x).requires_grad_()
            y = class_score(f((inputs.permute(0, 3, 1, 2) - mean) / std), c.expand(len(inputs)))
            gradient = torch.autograd.grad(y.sum(), inputs)[0]
        _check_finite(f, gradient)
        return {INPUT_OUTPUT_GRADIENTS: wide(gradient).cpu().numpy()}

    # The package would stretch a picture of one colour by 1 / 0 before it looks for regions.
    flat = image.min() == image.max()
    attribution = XRAI().GetMask(
        image,
        gradients,
        baselines=[np.zeros_like(image), np.ones_like(image)],
        segments=[np.ones(image.shape[:2], bool)] if flat else None,
        batch_size=GRADIENT_BATCH,
        extra_parameters=XRAIParameters(steps=STEPS),
    )
    return torch.from_numpy(attribution).to(x)
