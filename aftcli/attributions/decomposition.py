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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from aftcli.attributions.canonical import INSTEAD, canonical
from aftcli.attributions.elements import Product, Sum
from aftcli.core.cam import ratio
from aftcli.core.classifier import Classifier
from aftcli.core.outputs import class_score
from aftcli.errors import AftError
from aftcli.settings import NONE

if TYPE_CHECKING:
    from zennit.core import Composite, Hook

Named = Literal["composite", "epsilon", "gamma", "alpha-beta", "z-plus", "z-plus-box"]

Start = Callable[[Tensor, Tensor], Tensor]

BATCH = 4  # images at a time: every rule keeps a layer's input beside what autograd keeps

EPSILON = 1e-6

GAMMA = 0.25

# Functions that only move relevance, as their gradient does; a constant added to an activation is
# a bias.
MOVES = (
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose"),
    *("cat", "chunk", "split", "getitem", "contiguous", "size", "getattr", "floordiv", "pad"),
    *("stack", "add", "iadd", "clone"),
)


class Rules(NamedTuple):
    """Rules of relevance propagation by kind of layer.

    Attributes:
        first: of the convolution that sees the pixels.
        convolution: of the others.
        linear: of linear layers.
        last: of the layer that makes the logits; None for that of its kind.
        sum: of sums of branches.
    """

    first: Hook
    convolution: Hook
    linear: Hook
    last: Hook | None
    sum: Hook


def relevance(
    f: Classifier, network: nn.Module, class_index: Tensor, x: Tensor, rules: Rules, start: Start
) -> Tensor:
    """Propagate relevance to a canonical network's input.

    One forward pass and one backward pass, in which a layer runs once more for each term of its
    rule (1 for epsilon, 2 for z+, 3 for the box rule, 4 for alpha-beta, 5 for gamma). Memory: for
    each of BATCH images about 0.15 GB for efficientnet_lite0 and 0.3 GB for resnet50; for each
    term a copy of one layer's weights, up to 0.4 GB in vgg16.

    Args:
        f: the classifier, for its name and its pixels' range.
        network: `canonical(f)` or, for A as the input, `canonical(f, part="head")`.
        class_index: c, shape (N,).
        x: the network's input, shape (N, ...).
        rules: from `named`; making them needs zennit.
        start: the relevance of the logits, shape (N, C), of logits and class_index; also where
            f's outputs are probabilities already.

    Returns:
        R, in the shape of x.
    """
    if f.output == NONE:
        before_probabilities(network)
    composite = composite_of(f, network, rules)
    parts = []
    with torch.enable_grad(), composite.context(network):
        for part, c in zip(x.split(BATCH), class_index.split(BATCH), strict=True):
            part = part.detach().requires_grad_()
            logits = network(part)
            r = start(logits.detach(), c)
            parts.append(torch.autograd.grad(logits, part, r)[0])
    return torch.cat(parts)


def before_probabilities(network: nn.Module) -> None:
    """Leave out what makes probabilities at a network's end: relevance starts from the scores."""
    graph: fx.Graph = network.graph  # type: ignore[assignment]
    (end,) = (node for node in graph.nodes if node.op == "output")
    last = end.all_input_nodes[0]
    layer = network.get_submodule(str(last.target)) if last.op == "call_module" else None
    what = type(layer).__name__ if layer else getattr(last.target, "__name__", last.target)
    if what in ("Softmax", "softmax", "Sigmoid", "Hardsigmoid"):
        end.args = (last.all_input_nodes[0],)
        graph.erase_node(last)
        network.recompile()  # type: ignore[operator]


def named(f: Classifier, name: Named) -> Rules:
    """Return rules by name; the box rule's pixels lie between f's black and white."""
    from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, ZPlus

    box, magnitudes, norm, epsilon = pixel_box(f), by_magnitude(), Norm(EPSILON), Epsilon(EPSILON)
    plus = ZPlus(EPSILON, zero_params="bias")
    two_one = AlphaBeta(2, 1, EPSILON)
    rules = {
        "composite": Rules(Flat(EPSILON), ZPlus(EPSILON), epsilon, None, magnitudes),
        "epsilon": Rules(epsilon, epsilon, epsilon, None, norm),
        "gamma": Rules(box, Gamma(GAMMA, EPSILON), epsilon, None, magnitudes),
        "alpha-beta": Rules(two_one, two_one, epsilon, None, magnitudes),
        "z-plus": Rules(plus, plus, plus, None, magnitudes),
        "z-plus-box": Rules(box, plus, plus, None, magnitudes),
    }
    return rules[name]


def pixel_box(f: Classifier) -> Hook:
    """Make the box rule: R_i = sum_j (x_i w_ij - l_i w_ij^+ - h_i w_ij^-) / sum_i' (...) R_j."""
    from zennit.rules import ZBox

    mean, std = f.preprocessing.channels(torch.empty(0, dtype=torch.float64))
    return ZBox((-mean / std)[None], ((1 - mean) / std)[None], EPSILON)


def composite_of(f: Classifier, network: nn.Module, rules: Rules) -> Composite:
    """Assign a rule to each module of a canonical network; a layer without one is an error."""
    from zennit.core import Composite
    from zennit.rules import Norm, Pass
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, MaxPool

    graph: fx.Graph = network.graph  # type: ignore[assignment]
    calls = {n.target: n for n in graph.nodes if n.op == "call_module"}
    weighted = [t for t in calls if isinstance(network.get_submodule(t), (Convolution, nn.Linear))]
    layers: list[tuple[type | tuple[type, ...], Hook | None]] = [
        (Convolution, rules.convolution),
        (nn.Linear, rules.linear),
        ((Activation, BatchNorm), Pass()),
        (Sum, rules.sum),
        (AvgPool, Norm(EPSILON)),
        (Product, signal_takes_all()),
        # The winner takes all, as of the gradient; flattening does not compute.
        ((MaxPool, nn.Flatten), None),
    ]

    def rule(context: object, name: str, module: nn.Module) -> Hook | None:
        if rules.last and name == weighted[-1]:
            return rules.last
        if isinstance(module, Convolution) and calls[name].all_input_nodes[0].op == "placeholder":
            return rules.first
        return next((hook for types, hook in layers if isinstance(module, types)), None)

    for node in graph.nodes:
        layer = network.get_submodule(node.target) if node.op == "call_module" else None
        function = getattr(node.target, "__name__", node.target)
        branches = [n for n in node.all_input_nodes if n.op != "get_attr"]
        moves = function in MOVES and (len(branches) < 2 or "add" not in function)
        unknown = node.op in ("call_function", "call_method") and not moves
        if unknown or layer and not any(isinstance(layer, types) for types, _ in layers):
            what = type(layer).__name__ if layer else f"{function}()"
            raise AftError(
                f"no rule of relevance propagation for {what} ({node.name}) of {f.name}; {INSTEAD}"
            )
    return Composite(module_map=rule)


def by_magnitude() -> Hook:
    """Share a sum's relevance among its branches by magnitude: R_i = |a_i| / sum_i' |a_i'| R.

    Ratio-based splitting (Otsuki et al. 2024, "Layer-wise relevance propagation with conservation
    property for ResNet"). zennit's own a_i / sum_i' a_i' explodes where branches cancel, which
    its authors have open as an issue (zennit 148) for ResNets.
    """
    from zennit.core import BasicHook, Stabilizer
    from zennit.rules import NoMod

    stabilise = Stabilizer(EPSILON)
    return BasicHook(
        input_modifiers=[torch.abs],
        param_modifiers=[NoMod(param_keys=[])],
        output_modifiers=[lambda output: output],
        gradient_mapper=lambda r, outputs: r / stabilise(outputs[0]),
        reducer=lambda inputs, gradients: inputs[0] * gradients[0],
    )


def signal_takes_all() -> Hook:
    """Give a product's relevance to the larger operand, none to the gate (Arras et al. 2017)."""
    from zennit.core import Hook

    class SignalTakesAll(Hook):  # type: ignore[misc]
        def forward(self, module: nn.Module, input: tuple[Tensor, ...], output: Tensor) -> None:
            self.stored_tensors["input"] = input

        def backward(
            self, module: nn.Module, grad_input: object, grad_output: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            signal, gate = (t.shape for t in self.stored_tensors["input"])
            if (signal.numel() > gate.numel()) == (gate.numel() > signal.numel()):
                raise AftError(
                    f"no rule of relevance propagation for the product of two activations of "
                    f"shape {tuple(signal)}: it is unclear which one is the gate; {INSTEAD}"
                )
            r = grad_output[0]
            zeros = [torch.zeros(shape).to(r) for shape in (signal, gate)]
            return (r, zeros[1]) if signal.numel() > gate.numel() else (zeros[0], r)

    return SignalTakesAll()


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


def _influence(r: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """R_j / (P_j + N_j), for |c_ij|."""
    raising, lowering = outputs[0] + outputs[1], -outputs[2] - outputs[3]
    share = ratio(r, raising + lowering)
    return [share, share, -share, -share]


def _relative(r: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """R_j^+ / P_j for c_ij^+, R_j^- / N_j + R_j / (P_j + N_j) for |c_ij^-|."""
    raising, lowering = outputs[0] + outputs[1], -outputs[2] - outputs[3]
    relevant = ratio(r.clamp(min=0), raising)
    irrelevant = ratio(r.clamp(max=0), lowering) + ratio(r, raising + lowering)
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
            shift = ratio(excess, active.flatten(1).sum(1).to(q))
            return (q - active * shift.view(-1, *[1] * (q.dim() - 1)),)

    relative = Shifted(gradient_mapper=_relative, **settings)
    last = BasicHook(gradient_mapper=_influence, **settings)
    return Rules(pixel_box(f), relative, relative, last, by_magnitude())
