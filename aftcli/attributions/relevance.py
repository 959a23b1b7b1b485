"""Relevance-CAM: channels weighted by their relevance.

Lee et al. 2021, "Relevance-CAM: your model already knows where to look" (CVPR).
"""

from __future__ import annotations

from torch import Tensor

from aftcli.attributions.canonical import canonical
from aftcli.attributions.decomposition import contrast
from aftcli.attributions.rules import named, relevance
from aftcli.core.cam import weighted_sum
from aftcli.core.classifier import Classifier


def relevance_cam(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """Relevance-CAM: alpha_k = sum_ij R_ij^k, R the relevance of A for c against the others.

    It starts from y^c at c and -y^c / (C - 1) at the other classes and follows z+ down to A.

    Args:
        f: the classifier.
        activation: A, shape (N, K, h, w).
        class_index: c, shape (N,).
        x: not used.

    Returns:
        I_pre, shape (N, h, w). One pass forward and backward through the head.

    Raises:
        AftError: the head has layers without a rule.
    """
    r = signed_relevance(f, activation, class_index)
    return weighted_sum(r.sum((2, 3)), activation)


def signed_relevance(f: Classifier, activation: Tensor, class_index: Tensor) -> Tensor:
    """R of A, shape (N, K, h, w), as `relevance_cam` has it: it sums to 0."""
    head = canonical(f, part="head")
    return relevance(f, head, class_index, activation, named(f, "z-plus"), contrast)
