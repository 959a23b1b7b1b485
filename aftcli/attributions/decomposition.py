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

from typing import Any

import torch
from torch import Tensor, nn

from aftcli.attributions.canonical import canonical
from aftcli.attributions.rules import Named, Rules, by_magnitude, named, pixel_box, relevance
from aftcli.core.cam import class_score
from aftcli.core.classifier import Classifier


def signed_lrp(f: Classifier, class_index: Tensor, x: Tensor, rules: Named = "composite") -> Tensor:
    """LRP: relevance of the pixels for y^c, their sum but for biases' and epsilon's shares.

    composite: Kohlbrenner et al.'s, zennit's EpsilonPlusFlat. Epsilon in linear layers, z+ in
        convolutions, R_i = sum_j (a_i w_ij)^+ / (sum_i' (a_i' w_i'j)^+ + b_j^+) R_j, and evenly
        over the first one's window. A bias b_j keeps its share, as in zennit: without, maps are
        hazier.
    epsilon: R_i = sum_j a_i w_ij / (z_j + epsilon sign z_j) R_j, z_j the layer's output with its
        bias.
    gamma: Montavon et al.'s, zennit's EpsilonGammaBox. In convolutions
        R_i = sum_j a_i (w_ij + gamma w_ij^+) / sum_i' a_i' (w_i'j + gamma w_i'j^+) R_j, zennit's
        form of it where a_i or z_j is negative; the box rule in the first one, for pixels between
        black and white; epsilon in linear layers.
    alpha-beta: Bach et al., eq. 60, alpha = 2, beta = 1. In convolutions
        R_i = sum_j (2 (a_i w_ij)^+ / z_j^+ - (a_i w_ij)^- / z_j^-) R_j; epsilon in linear layers.
    """
    return relevance(f, canonical(f), class_index, x, named(f, rules), score_of_class)


def signed_clrp(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """Contrastive LRP (CLRP1 of Gu et al.): R - R_dual, whose sum is 0.

    R is the relevance of c by z+, the box rule in the first layer; R_dual is that of all other
    classes, over which the score of c is shared evenly.
    """
    # Each rule is linear in the relevance: the difference is propagated in one pass.
    return relevance(f, canonical(f), class_index, x, named(f, "z-plus-box"), contrast)


def score_of_class(logits: Tensor, class_index: Tensor) -> Tensor:
    """Return y^c at c and 0 elsewhere, shape (N, C)."""
    y = class_score(logits, class_index)
    return torch.zeros_like(logits).scatter(1, class_index[:, None], y[:, None])


def contrast(logits: Tensor, class_index: Tensor) -> Tensor:
    """Return |y^c| at c and -|y^c| / (C - 1) elsewhere, shape (N, C).

    The magnitude, as in the authors' code: otherwise a map of a class with a negative score would
    show what speaks for the others.
    """
    y = class_score(logits, class_index).abs()[:, None]
    others = (-y / max(logits.shape[1] - 1, 1)).expand_as(logits)
    return others.scatter(1, class_index[:, None], y)


def signed_rap(f: Classifier, class_index: Tensor, x: Tensor) -> Tensor:
    """RAP: R, the bipolar relevance of pixels, whose sum is |y^c|.

    With c_ij = a_i w_ij, without biases, P_j = sum_i c_ij^+ and N_j = sum_i |c_ij^-|:

    In the last layer, by absolute influence: R_i = |c_ij| / (P_j + N_j) |y^c|.

    In all others, relevance goes to what raises a neuron, irrelevance to what lowers it, and both
    by relative influence to what lowers it:
    Q_i = sum_j c_ij^+ / P_j R_j^+ + |c_ij^-| / N_j R_j^- + |c_ij^-| / (P_j + N_j) R_j.
    Then a uniform shift of the active neurons keeps the sum, and makes the least influential
    ones irrelevant: R_i = Q_i - (sum_i' Q_i' - sum_j R_j) / #{i': Q_i' != 0}, where Q_i != 0.

    In the first layer by the box rule. The magnitude of y^c: a class with a negative score would
    turn the map inside out.
    """
    return relevance(f, canonical(f), class_index, x, _rules(f), _magnitude)


def _magnitude(logits: Tensor, class_index: Tensor) -> Tensor:
    return score_of_class(logits, class_index).abs()


def _over(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0."""
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
