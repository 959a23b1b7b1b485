"""Meaning of a network's outputs, and their probabilities (docs/method/decisions/network.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from aftcli.cutting.networks import SameModules
from aftcli.errors import AftError, check_name
from aftcli.settings import AUTO, NONE, OUTPUTS, SIGMOID, SOFTMAX

BOTH = "both_classes"  # the module's name in a head


def class_score(logits: Tensor, class_index: Tensor) -> Tensor:
    """Pick the pre-softmax score y^c, shape (N,), of classes, shape (N,), from logits (N, C)."""
    return logits.gather(1, class_index[:, None]).squeeze(1)


def probabilities(logits: Tensor, output: str = SOFTMAX) -> Tensor:
    """Compute probabilities of classes, shape (N, C), from logits (§2.1).

    Args:
        logits: shape (N, C).
        output: softmax, sigmoid of each, or none if the logits are probabilities already.
    """
    if output == SIGMOID:
        return logits.sigmoid()
    return logits.clamp(0, 1) if output == NONE else logits.softmax(1)


def log_probabilities(logits: Tensor, output: str = SOFTMAX) -> Tensor:
    """Compute the logarithms of `probabilities`; 0 counts as the smallest positive number."""
    if output == SIGMOID:
        return F.logsigmoid(logits)
    return _log(logits) if output == NONE else logits.log_softmax(1)


def cross_entropy(logits: Tensor, labels: Tensor, output: str = SOFTMAX) -> Tensor:
    """Compute the cross-entropy of labels, shape (N,), mean over images.

    If classes do not exclude each other, it is the sum of each class's binary cross-entropy.
    """
    if excludes(logits, output):
        return F.nll_loss(log_probabilities(logits, output), labels)
    target = F.one_hot(labels, logits.shape[1]).to(logits)
    if output == SIGMOID:
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    else:
        each = -torch.where(target > 0, _log(logits), _log(1 - logits))
    return each.sum(1).mean()


def divergence(logits: Tensor, teacher: Tensor, output: str = SOFTMAX) -> Tensor:
    """Return KL(f_0(x) || f(x)), the distance of the teacher's probabilities, mean over images.

    If classes do not exclude each other, it is the sum of each class's binary divergence.

    Args:
        logits: f(x), shape (N, C).
        teacher: logits of f_0, the network before fine-tuning, shape (N, C).
        output: see `probabilities`.
    """
    pairs = [(log_probabilities(logits, output), log_probabilities(teacher, output))]
    if not excludes(teacher, output):
        # 1 - sigmoid(y) is sigmoid(-y), exactly also where it is small.
        other = [-y if output == SIGMOID else 1 - y for y in (logits, teacher)]
        pairs.append((log_probabilities(other[0], output), log_probabilities(other[1], output)))
    each = [F.kl_div(own, his, reduction="batchmean", log_target=True) for own, his in pairs]
    return torch.stack(each).sum()


def excludes(logits: Tensor, output: str) -> bool:
    """Tell if the classes exclude each other: their probabilities sum to 1."""
    return output == SOFTMAX or (output == NONE and sum_to_one(logits.detach()))


def has_chance(output: str, classes: int) -> bool:
    """Tell if 1 / classes is chance: not of labels, each of which has a sigmoid of its own.

    Two classes of sigmoids are taken for those of one output.
    """
    return output != SIGMOID or classes <= 2


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def in_range(outputs: Tensor) -> bool:
    """Tell if all outputs lie in [0, 1]."""
    return bool(((outputs >= 0) & (outputs <= 1)).all())


def sum_to_one(p: Tensor) -> bool:
    """Tell if probabilities of classes, shape (N, C), sum to 1, up to rounding."""
    tolerance = torch.finfo(p.dtype).eps ** 0.5
    total = (p.float() if p.itemsize < 4 else p).sum(1)
    return bool(((total - 1).abs() <= tolerance).all())


class BothClasses(nn.Module):
    """The columns of both classes, shape (N, 2), of a binary classifier's only output.

    Args:
        of_probability: the output is a probability p, and the columns are 1 - p and p. Otherwise
            it is a logit y, and the columns are -y and y; each one's sigmoid is its probability.
    """

    def __init__(self, of_probability: bool = False) -> None:
        super().__init__()
        self.of_probability = of_probability
        self.training = False

    def forward(self, y: Tensor) -> Tensor:
        """Compute the columns of y, shape (N,), (N, 1) or (N, 1, ..., 1)."""
        y = y.reshape(-1, 1)
        return torch.cat([1 - y if self.of_probability else -y, y], 1)

    def extra_repr(self) -> str:
        """Return text that tells both kinds apart: graphs are cached by what they print."""
        return "1 - p, p" if self.of_probability else "-y, y"


class _Behind(SameModules):
    """A head without a graph, followed by the columns; its modules are the head's own."""

    def __init__(self, head: nn.Module, both: BothClasses) -> None:
        super().__init__(head)
        self.__dict__[BOTH] = both  # not as a module: names would begin with it

    def forward(self, activation: Tensor, *rest: Tensor) -> Tensor:
        """Compute logits, shape (N, 2), from the head's arguments."""
        return self.__dict__[BOTH](self.whole(activation, *rest))  # type: ignore[no-any-return]


def with_both_classes(head: nn.Module, of_probability: bool) -> nn.Module:
    """Give a head with one output a column for each class; its weights keep their names.

    Args:
        head: w2; changed in place if it has a graph.
        of_probability: see `BothClasses`.
    """
    both = BothClasses(of_probability)
    if not isinstance(head, fx.GraphModule):
        return _Behind(head, both)
    head.add_module(BOTH, both)
    (end,) = (node for node in head.graph.nodes if node.op == "output")
    with head.graph.inserting_before(end):
        end.args = (head.graph.call_module(BOTH, (end.args[0],)),)
    head.recompile()
    return head


# Between the last linear layer and the columns of both classes.
SHAPING = ("flatten", "Flatten", "squeeze", "reshape", "view", "getitem", "Sigmoid")


def path_to_linear(node: fx.Node, modules: Mapping[str, Any]) -> list[fx.Node]:
    """Return the nodes from the columns of both classes back to the last linear layer's.

    Args:
        node: the node of the columns.
        modules: the graph's modules, by name.

    Raises:
        ValueError: something other than a sigmoid or a change of shape lies between them.
    """
    path = [node]
    while not path[1:] or not isinstance(modules.get(str(path[-1].target)), nn.Linear):
        (y,) = path[-1].all_input_nodes
        layer = modules.get(str(y.target))
        what = type(layer).__name__ if layer else getattr(y.target, "__name__", y.target)
        if what not in SHAPING and not isinstance(layer, nn.Linear):
            raise ValueError("its only output is not that of a linear layer")
        path.append(y)
    return path


def rows_of_both(linear: nn.Linear) -> nn.Linear:
    """Turn a linear layer with one output into one with both classes' rows, -w and w."""
    rows: nn.Linear = skip_init(nn.Linear, linear.in_features, 2, bias=linear.bias is not None)
    for name, w in linear.named_parameters():
        setattr(rows, name, nn.Parameter(torch.cat([-w, w]), False))
    return rows


class Meant(NamedTuple):
    """The meaning of a network's outputs.

    Attributes:
        output: a word of OUTPUTS, never auto.
        single: the network has one output: it is a binary classifier.
        guess: a note for the user: what was assumed, or looks wrong; "" without one.
    """

    output: str
    single: bool = False
    guess: str = ""


SIGMOIDS = ("SigmoidBackward", "HardsigmoidBackward")

# Operations of autograd that move values and compute none.
MOVING = (
    *("View", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Clone", "Alias", "ToCopy"),
    *("UnsafeView", "Permute", "Transpose", "T", "Expand", "AsStrided"),
)

SCALES = (0.1, 1.0, 10.0)  # of the random inputs that show if outputs are probabilities


def output_of(run: Callable[[Tensor], Tensor], x: Tensor, first: Tensor, wanted: str) -> Meant:
    """Find out what a network's outputs mean.

    Outputs are probabilities already if they lie in [0, 1] for random inputs of several scales, and
    sum to 1 or come out of a sigmoid, as autograd tells. Log-probabilities need no case of their
    own: their softmax is the probabilities.

    Args:
        run: the network, from inputs, shape (N, C, H, W), to outputs.
        x: one random input, shape (1, C, H, W).
        first: its outputs.
        wanted: a word of OUTPUTS.

    Raises:
        AftError: `wanted` does not fit the outputs, or the only output comes out of a softmax.
    """
    check_name("output", wanted, OUTPUTS)
    single = first.numel() == 1
    if not (single or wanted == NONE or in_range(first)):
        return Meant(SOFTMAX if wanted == AUTO else wanted)
    if single and wanted == SOFTMAX:
        raise AftError(
            "the network has one output, and the softmax of one output is 1 for every image; pass "
            "--output sigmoid, or none if it is a probability already"
        )
    generator = torch.Generator().manual_seed(1)
    inputs = torch.cat([torch.randn(x.shape, generator=generator) * scale for scale in SCALES])
    found = run(inputs.to(x))
    if single and found.numel() != len(inputs):
        raise AftError(
            f"the network returns one number for {len(inputs)} images, not one for each; pass a "
            "network whose outputs have shape (N, C), (N, 1) or (N,)"
        )
    found = torch.cat([first.reshape(1, -1), found.reshape(len(inputs), -1)])
    if not in_range(found):
        if wanted == NONE:
            raise AftError(
                f"--output none needs probabilities, but the outputs range from {found.min():.3g} "
                f"to {found.max():.3g}; pass --output softmax, or sigmoid for classes that do not "
                "exclude each other"
            )
        already = False
    else:
        last = last_operation(run, x)
        if single and wanted == AUTO and last.startswith("SoftmaxBackward"):
            raise AftError(
                "the network's only output comes out of a softmax, so it is 1 for every image; "
                "leave the softmax out"
            )
        already = last.startswith(SIGMOIDS) or (not single and sum_to_one(found))
    if wanted == AUTO and already:
        return Meant(NONE, single, f"{ALREADY}, so maps explain the probability itself")
    if wanted == AUTO and single:
        return Meant(SIGMOID, True, ONE_LOGIT)
    again = f"{ALREADY}; --output {wanted} applies {wanted} to them; leave it out"
    doubled = already and wanted in (SOFTMAX, SIGMOID)
    return Meant(SOFTMAX if wanted == AUTO else wanted, single, again if doubled else "")


ALREADY = "its outputs are probabilities already"

ONE_LOGIT = (
    "its only output is taken for the logit of class 1, whose sigmoid is the probability; pass "
    "--output none if it is a probability already"
)


def last_operation(run: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Return the name of autograd's last operation that computes; "" if it can't be known."""
    try:
        with torch.enable_grad():
            # A copy: the network may write into its input.
            node: Any = run(x.detach().requires_grad_().clone()).grad_fn
    except RuntimeError:
        return ""
    while node is not None and node.name().partition("Backward")[0] in MOVING:
        node = node.next_functions[0][0]
    return node.name() if node is not None else ""
