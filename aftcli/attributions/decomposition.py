"""Layer-wise relevance propagation: the score y^c handed down to the pixels, layer by layer.

Bach et al. 2015, "On pixel-wise explanations for non-linear classifier decisions by layer-wise
relevance propagation"; rules from Montavon et al. 2019, "Layer-wise relevance propagation: an
overview"; which rule for which layer from Kohlbrenner et al. 2020, "Towards best practice in
explaining neural network decisions with LRP"; its contrast of classes from Gu, Yang and Tresp
2018, "Understanding individual decisions of CNNs via contrastive backpropagation".

The rules are zennit's, which its authors keep: captum's LRP refuses residual sums, ReLU6 and any
module that it does not know. Its canonizers, which know torchvision's classes by name, are
replaced by `canonical`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aftcli.attributions.canonical import canonical
from aftcli.attributions.gradient import positive
from aftcli.attributions.rules import Named, named, relevance
from aftcli.core.cam import class_score
from aftcli.core.classifier import Classifier


def lrp(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """LRP by the composite that Kohlbrenner et al. recommend, zennit's EpsilonPlusFlat.

    The epsilon rule in linear layers, z+ in convolutions, flat in the first one:
    R_i = sum_j (a_i w_ij)^+ / (sum_i' (a_i' w_i'j)^+ + b_j^+) R_j, and evenly over the first one's
    window. A bias b_j keeps its share, as in zennit: without, maps are hazier.

    Args:
        f: the classifier.
        activation: not used.
        class_index: c, shape (N,).
        x: shape (N, 3, H, W).

    Returns:
        I_pre, shape (N, H, W): ReLU of the relevance of pixels. One forward pass and one backward
        pass, in which a layer runs once more for each term of its rule (see `relevance`).

    Raises:
        AftError: the network has layers without a rule.
    """
    return positive(signed_lrp(f, class_index, x))


def lrp_epsilon(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """LRP by the epsilon rule: R_i = sum_j a_i w_ij / (z_j + epsilon sign z_j) R_j.

    z_j is the layer's output, its bias included. Arguments, result and cost as `lrp`.
    """
    return positive(signed_lrp(f, class_index, x, "epsilon"))


def lrp_gamma(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """LRP by the gamma rule of Montavon et al., zennit's EpsilonGammaBox.

    R_i = sum_j a_i (w_ij + gamma w_ij^+) / sum_i' a_i' (w_i'j + gamma w_i'j^+) R_j in
    convolutions, zennit's form of it where a_i or z_j is negative; the box rule in the first
    one, for pixels between black and white; the epsilon rule in linear layers. Arguments, result
    and cost as `lrp`.
    """
    return positive(signed_lrp(f, class_index, x, "gamma"))


def lrp_alpha_beta(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """LRP by the alpha-beta rule of Bach et al., eq. 60, alpha = 2, beta = 1.

    R_i = sum_j (2 (a_i w_ij)^+ / z_j^+ - (a_i w_ij)^- / z_j^-) R_j in convolutions, the epsilon
    rule in linear layers. Arguments, result and cost as `lrp`.
    """
    return positive(signed_lrp(f, class_index, x, "alpha-beta"))


def clrp(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Contrastive LRP (CLRP1 of Gu et al.): max(0, R - R_dual).

    R is the relevance of c by z+, the box rule in the first layer; R_dual is that of all other
    classes, over which the score of c is shared evenly. Both sum to it. Arguments, result and
    cost as `lrp`.
    """
    return positive(signed_clrp(f, class_index, x))


def signed_lrp(f: Classifier, class_index: Tensor, x: Tensor, rules: Named = "composite") -> Tensor:
    """Relevance of the input for the score y^c, which it starts from.

    It sums to y^c less the shares of biases and of epsilon.

    Args:
        f: the classifier.
        class_index: c, shape (N,).
        x: shape (N, 3, H, W).
        rules: which rules.

    Returns:
        R, shape (N, 3, H, W), of both signs.

    Raises:
        AftError: the network has layers without a rule.
    """
    return relevance(f, canonical(f), class_index, x, named(f, rules), score_of_class)


def signed_clrp(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """R - R_dual, shape (N, 3, H, W), of `clrp`; its sum is 0. Arguments as `signed_lrp`."""
    # Each rule is linear in the relevance: the difference is propagated in one pass.
    return relevance(f, canonical(f), class_index, x, named(f, "z-plus-box"), contrast)


def score_of_class(logits: Tensor, class_index: Tensor) -> Tensor:
    """y^c at c and 0 elsewhere, shape (N, C)."""
    y = class_score(logits, class_index)
    return torch.zeros_like(logits).scatter(1, class_index[:, None], y[:, None])


def contrast(logits: Tensor, class_index: Tensor) -> Tensor:
    """|y^c| at c and -|y^c| / (C - 1) elsewhere, shape (N, C).

    The magnitude, as in the authors' code: else a map of a class with a negative score would
    show what speaks for the others.
    """
    y = class_score(logits, class_index).abs()[:, None]
    others = (-y / max(logits.shape[1] - 1, 1)).expand_as(logits)
    return others.scatter(1, class_index[:, None], y)
