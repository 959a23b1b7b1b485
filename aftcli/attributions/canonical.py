"""A classifier as a graph of elementary modules, which rules for single layers need.

Relevance propagation (zennit), Guided Backpropagation and DeepLIFT (captum) replace the gradient
of each kind of layer. They need every non-linearity as a module that runs once and writes
nothing in place, batch normalisation folded into the convolution before it (Guillemot et al.
2020, "Breaking batch normalization for better explainability of deep neural networks through
layer-wise relevance propagation"), and sums of residual branches as modules. zennit's and
captum's own ways to this form know the classes of torchvision's networks only; tracing needs to
know none, and leaves the user's network as it is.
"""

from __future__ import annotations

import io
import operator
from collections import OrderedDict
from contextlib import redirect_stderr
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from aftcli.attributions.elements import (
    ADDITIONS,
    IDENTITIES,
    IDENTITY_NAMES,
    MEANS,
    MODULES,
    PRODUCTS,
    WEIGHTED,
    Product,
    Sum,
    fold_into,
    stack,
    weighted,
)
from aftcli.core.classifier import Classifier
from aftcli.core.outputs import BOTH, BothClasses, path_to_linear, rows_of_both
from aftcli.core.zero_level import without_constant
from aftcli.cutting.cut import flow_of
from aftcli.cutting.networks import computes_weights, copied, with_plain_weights
from aftcli.errors import AftError, first_line

Part = Literal["all", "head"]

INSTEAD = "use integratedgradients, occlusion, rise or a CAM, which need the network's passes only"


class _Tracer(fx.Tracer):
    """Trace down to torch's own modules; what is computed of weights alone becomes a constant."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        tensors = [*root.named_parameters(), *root.named_buffers()]
        self.names = {id(tensor): name for name, tensor in tensors}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # timm's modules with TensorFlow's padding: how much they pad depends on the input's size.
        padded = isinstance(m, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d))
        own = isinstance(m, BothClasses) or (padded and type(m).__name__.endswith("Same"))
        return own or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: object) -> object:
        return attr_val

    def create_arg(self, a: object) -> Argument:
        if isinstance(a, Tensor) and id(a) in self.names:
            return self.create_node("get_attr", self.names[id(a)], (), {})
        return super().create_arg(a)


def canonical(f: Classifier, *, part: Part = "all", split_relu6: bool = False) -> nn.Module:
    """Build a network of elementary modules with the logits of f, or of its head.

    Modules are copies, which take hooks that f must not have; weights that no batch
    normalisation is folded into are shared with f. Each call builds it again, since f's weights
    may have been trained in place.

    Args:
        f: the classifier, in eval mode.
        part: "all" takes x, shape (N, 3, H, W), "head" takes A, shape (N, K, h, w), without the
            constant channel of a zero level.
        split_relu6: write ReLU6 as ReLU(x) - ReLU(x - 6), for methods that know ReLU alone.

    Returns:
        A module from x or A to logits, shape (N, C), without gradients of its weights.
    """
    if any(module.training for module in f.modules()):
        raise AftError(f"{f.name} is in training mode; call its eval() before it is explained")
    # A zero level's term has no rules of its own: what it was given to is taken apart.
    plain = f.zero_level or f
    parts = {"stem": f.stem, "layer": plain.layer, "head": plain.head}
    chosen = parts if part == "all" else {"head": plain.head}
    try:
        with redirect_stderr(io.StringIO()):  # torch.fx prints where its code fails
            builder = _Builder(nn.Sequential(OrderedDict(chosen)), split_relu6)
            network = builder.build()
            x, logits = _sample(f, part)
            with torch.no_grad():
                found = network(x)
    except Exception as error:
        raise AftError(
            f"{f.name} can't be taken apart into elementary layers, which this method needs: "
            f"{first_line(error)}; {INSTEAD}"
        ) from error
    tolerance = 1e3 * torch.finfo(logits.dtype).eps
    if found.shape != logits.shape or (found - logits).abs().max() > tolerance * logits.abs().max():
        raise AftError(
            f"{f.name} changes its logits when it is taken apart into elementary layers, which "
            f"this method needs; {INSTEAD}"
        )
    return network


def _sample(f: Classifier, part: Part) -> tuple[Tensor, Tensor]:
    """Return a random x or A and its logits; a small x if the network takes it, for speed."""
    weight, plain = next(f.parameters()), f.zero_level or f

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(weight)

    with torch.no_grad():
        if part == "head":
            activation = without_constant(f, noise(*f.activation_shape))
            return activation, plain.head(activation)
        depth, *size = f.preprocessing.shape
        try:
            x = noise(depth, *(min(side, max(64, side // 4)) for side in size))
            return x, plain.head(*flow_of(plain.layer(f.stem(x))))
        except RuntimeError:
            x = noise(depth, *size)
            return x, plain.head(*flow_of(plain.layer(f.stem(x))))


class _Builder:
    """Rewrite a traced graph node by node."""

    def __init__(self, root: nn.Sequential, split_relu6: bool) -> None:
        self.root, self.split_relu6 = root, split_relu6
        self.shared: dict[int, Tensor] = {
            id(t): nn.Parameter(t.detach(), False) for t in root.parameters()
        }
        self.shared |= {id(t): t for t in root.buffers()}
        self.modules: dict[str, Any] = {}

    def build(self) -> nn.Module:
        with torch.no_grad():
            self.graph = _Tracer(self.root).trace(self.root)
        weights = [n for n in self.graph.nodes if n.op == "get_attr"]
        self.constants = {n: operator.attrgetter(n.target)(self.root) for n in weights}
        for node in list(self.graph.nodes):
            if node.target is torch._assert:
                self.graph.erase_node(node)
            elif node in self.constants:
                self.modules[node.target] = self.constants[node]
            elif node.op == "call_module":
                self._copy(node)
            elif node.op in ("call_function", "call_method"):
                self._as_module(node)
        self._both()
        # fx keeps what it takes for impure, and asserting the input's shape needs its shape.
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        self._fold()
        if self.split_relu6:
            self._split()
        self._separate()
        used = {node.target for node in self.graph.nodes}
        modules = {name: module for name, module in self.modules.items() if name in used}
        return fx.GraphModule(modules, self.graph).eval()

    def _copy(self, node: fx.Node) -> None:
        module = self.root.get_submodule(str(node.target))
        if isinstance(module, IDENTITIES):
            return self._skip(node)
        if computes_weights(module):
            module = with_plain_weights(copied(module)).requires_grad_(False)
        else:
            module = copied(module, dict(self.shared)).requires_grad_(False)
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        node.target = node.name
        self.modules[node.name] = module

    def _skip(self, node: fx.Node) -> None:
        node.replace_all_uses_with(node.all_input_nodes[0])
        self.graph.erase_node(node)

    def _as_module(self, node: fx.Node) -> None:
        """Give a module to a function or method that rules know as a layer."""
        target, (x, *rest) = node.target, node.args or (None,)
        varying = [n for n in node.all_input_nodes if n not in self.constants]
        if getattr(target, "__name__", None) in IDENTITY_NAMES:
            self._skip(node)
        elif target in MODULES and len(node.all_input_nodes) == 1:
            class_, names = MODULES[target]
            settings = {**node.kwargs, **dict(zip(names, rest, strict=False))}
            settings.pop("inplace", None)
            self._replace(node, class_(**settings), x)
        elif target in ADDITIONS and len(node.args) == 2 and not node.kwargs:
            if all(n in varying for n in node.args):
                self._branch(node)
        elif target in PRODUCTS and len(varying) == 2:
            self._replace(node, Product(), *node.args)
        elif target in MEANS:
            self._mean(node)
        elif target in WEIGHTED:
            self._weighted(node)
        elif isinstance(target, str) and target.endswith("_") and not target.endswith("__"):
            node.target = target.rstrip("_")

    def _replace(self, node: fx.Node, module: nn.Module, *inputs: Argument) -> fx.Node:
        with self.graph.inserting_before(node):
            new = self.graph.call_module(node.name, inputs)
        self.modules[node.name] = module.eval()
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def _branch(self, node: fx.Node) -> None:
        with self.graph.inserting_before(node):
            branches = self.graph.call_function(stack, node.args)
        self._replace(node, Sum(), branches)

    def _mean(self, node: fx.Node) -> None:
        """Write a mean over height and width as global average pooling."""
        x, dim, keep, *_ = (*node.args, None, None)
        dim, keep = node.kwargs.get("dim", dim), node.kwargs.get("keepdim", keep)
        if isinstance(dim, (tuple, list)) and sorted(d % 4 for d in dim) == [2, 3]:  # type: ignore[operator]
            pool = self._replace(node, nn.AdaptiveAvgPool2d(1), x)
            if not keep:
                with self.graph.inserting_after(pool):
                    flat = self.graph.call_function(torch.flatten, (pool, 1))
                pool.replace_all_uses_with(flat, lambda user: user is not flat)

    def _weighted(self, node: fx.Node) -> None:
        """Make a module of a call with weights, as subclasses of torch's layers do."""
        x, *rest = node.args
        given = dict(zip(WEIGHTED[node.target], rest, strict=False)) | node.kwargs
        settings: Any = fx.map_arg(given, lambda n: self.constants[n])
        module = weighted(node.target, settings)
        if module is not None:
            self._replace(node, module, x)

    def _both(self) -> None:
        """Write the columns of both classes as rows of the last linear layer: -w and w."""
        for node in [n for n in self.graph.nodes if BOTH in str(n.target)]:
            *path, y = path_to_linear(node, self.modules)
            self._replace(y, rows_of_both(self.modules[str(y.target)]), y.args[0])
            for passed in path:
                if not isinstance(self.modules.get(str(passed.target)), nn.Sigmoid):
                    self._skip(passed)

    def _fold(self) -> None:
        """Fold batch normalisation into the convolution or linear layer before it."""
        for node in list(self.graph.nodes):
            norm = self._layer(node)
            if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
                continue
            (before,) = node.all_input_nodes
            layer = self._layer(before)
            if isinstance(layer, (_ConvNd, nn.Linear)) and len(before.users) == 1:
                fold_into(layer, norm)
                self._skip(node)

    def _separate(self) -> None:
        """Give each non-linearity an input of its own.

        captum replaces the gradient of the tensor that goes in, for all that read it. A
        non-linearity that made this tensor has noted its gradient before that.
        """
        for node in self.graph.nodes:
            layer = self._layer(node)
            kind = type(layer).__module__
            if kind in (nn.modules.activation.__name__, nn.modules.pooling.__name__):
                (x,) = node.all_input_nodes
                if len(x.users) > 1 or _is_hooked(layer) and _is_hooked(self._layer(x)):
                    with self.graph.inserting_before(node):
                        node.replace_input_with(x, self.graph.call_function(torch.clone, (x,)))

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _split(self) -> None:
        """Write each ReLU6(x) as ReLU(x) - ReLU(x - 6)."""
        for node in list(self.graph.nodes):
            module = self._layer(node)
            # ReLU6 is a Hardtanh from 0 to 6.
            if isinstance(module, nn.Hardtanh) and module.min_val == 0:
                self.modules |= {f"{node.name}.{i}": nn.ReLU() for i in range(2)}
                (x,) = node.args
                with self.graph.inserting_before(node):
                    above = self.graph.call_function(operator.sub, (x, module.max_val))
                    low, high = (
                        self.graph.call_module(f"{node.name}.{i}", (part,))
                        for i, part in enumerate((x, above))
                    )
                    whole = self.graph.call_function(operator.sub, (low, high))
                node.replace_all_uses_with(whole)
                self.graph.erase_node(node)


def _is_hooked(layer: nn.Module | None) -> bool:
    """Tell if captum changes the gradient at a layer."""
    activation = type(layer).__module__ == nn.modules.activation.__name__
    return activation or isinstance(layer, nn.MaxPool2d)
