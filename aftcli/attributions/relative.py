"""Relative attributing propagation: relevant and irrelevant neurons, by relative influence.

Nam et al. 2020, "Relative attributing propagation: interpreting the comparative contributions of
individual units in deep neural networks" (AAAI). The authors' code rewrites torchvision's VGG and
ResNet and is no package; these are its equations as rules on any network taken apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aftcli.attributions.canonical import canonical
from aftcli.attributions.decomposition import score_of_class
from aftcli.attributions.gradient import positive
from aftcli.attributions.rules import Rules, by_magnitude, pixel_box, relevance
from aftcli.core.classifier import Classifier


def rap(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
    """RAP: I_pre = ReLU(R), R the bipolar relevance of pixels.

    With c_ij = a_i w_ij, without biases, P_j = sum_i c_ij^+ and N_j = sum_i |c_ij^-|:

    In the last layer, by absolute influence: R_i = |c_ij| / (P_j + N_j) |y^c|.

    In all others, relevance goes to what raises a neuron, irrelevance to what lowers it, and both
    by relative influence to what lowers it:
    Q_i = sum_j c_ij^+ / P_j R_j^+ + |c_ij^-| / N_j R_j^- + |c_ij^-| / (P_j + N_j) R_j.
    Then a uniform shift of the active neurons keeps the sum, and makes the least influential
    ones irrelevant: R_i = Q_i - (sum_i' Q_i' - sum_j R_j) / #{i': Q_i' != 0}, where Q_i != 0.

    In the first layer by the box rule.

    Args:
        f: the classifier.
        activation: not used.
        class_index: c, shape (N,).
        x: shape (N, 3, H, W).

    Returns:
        I_pre, shape (N, H, W). One forward pass and one backward pass, in which a layer runs
        four times more; memory as `lrp`.

    Raises:
        AftError: the network has layers without a rule.
    """
    return positive(signed_rap(f, class_index, x))


def signed_rap(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """R of `rap`, shape (N, 3, H, W), of both signs; it sums to |y^c|.

    The magnitude: a class with a negative score would turn the map inside out.
    """
    return relevance(f, canonical(f), class_index, x, _rules(f), _magnitude)


def _magnitude(logits: Tensor, class_index: Tensor) -> Tensor:
    return score_of_class(logits, class_index).abs()


def _over(a: Tensor, b: Tensor) -> Tensor:
    """A / b, and 0 where b is 0."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1), 0)


def _influence(r: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """R_j / (P_j + N_j), for |c_ij|."""
    raising, lowering = outputs[0] + outputs[1], -outputs[2] - outputs[3]
    share = _over(r, raising + lowering)
    return [share, share, -share, -share]


def _relative(r: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """R_j^+ / P_j for c_ij^+, R_j^- / N_j + R_j / (P_j + N_j) for |c_ij^-|."""
    raising, lowering = outputs[0] + outputs[1], -outputs[2] - outputs[3]
    relevant = _over(r.clamp(min=0), raising)
    irrelevant = _over(r.clamp(max=0), lowering) + _over(r, raising + lowering)
    return [relevant, relevant, -irrelevant, -irrelevant]


def _rules(f: Classifier) -> Rules:
    from zennit.core import BasicHook
    from zennit.rules import ClampMod

    def negative(a: Tensor) -> Tensor:
        return a.clamp(max=0)

    raised, lowered = (ClampMod(**side, zero_params="bias") for side in ({"min": 0}, {"max": 0}))
    settings: dict[str, Any] = {
        # c_ij^+ of inputs of both signs, then c_ij^- of both.
        "input_modifiers": [torch.relu, negative, torch.relu, negative],
        "param_modifiers": [raised, lowered, lowered, raised],
        "output_modifiers": [lambda output: output] * 4,
        "reducer": lambda inputs, gradients: sum(
            a * g for a, g in zip(inputs, gradients, strict=True)
        ),
    }

    class Shifted(BasicHook):  # type: ignore[misc]
        def backward(
            self, module: nn.Module, grad_input: tuple[Tensor, ...], grad_output: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            (q,) = super().backward(module, grad_input, grad_output)
            active = q != 0
            excess = q.flatten(1).sum(1) - grad_output[0].flatten(1).sum(1)
            shift = _over(excess, active.flatten(1).sum(1).to(q))
            return (q - active * shift.view(-1, *[1] * (q.dim() - 1)),)

    relative = Shifted(gradient_mapper=_relative, **settings)
    last = BasicHook(gradient_mapper=_influence, **settings)
    return Rules(pixel_box(f), relative, relative, last, by_magnitude())
