"""Rules of relevance propagation on a network of elementary layers, by zennit's hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from aftcli.attributions.canonical import INSTEAD, Product, Sum
from aftcli.core.classifier import Classifier
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

    box, ratio, norm, epsilon = pixel_box(f), by_magnitude(), Norm(EPSILON), Epsilon(EPSILON)
    plus = ZPlus(EPSILON, zero_params="bias")
    two_one = AlphaBeta(2, 1, EPSILON)
    rules = {
        "composite": Rules(Flat(EPSILON), ZPlus(EPSILON), epsilon, None, ratio),
        "epsilon": Rules(epsilon, epsilon, epsilon, None, norm),
        "gamma": Rules(box, Gamma(GAMMA, EPSILON), epsilon, None, ratio),
        "alpha-beta": Rules(two_one, two_one, epsilon, None, ratio),
        "z-plus": Rules(plus, plus, plus, None, ratio),
        "z-plus-box": Rules(box, plus, plus, None, ratio),
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
                    f"shape {tuple(signal)}: which of them is the gate?; {INSTEAD}"
                )
            r = grad_output[0]
            zeros = [torch.zeros(shape).to(r) for shape in (signal, gate)]
            return (r, zeros[1]) if signal.numel() > gate.numel() else (zeros[0], r)

    return SignalTakesAll()
