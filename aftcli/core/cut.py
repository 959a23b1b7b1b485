"""Cut a network at a layer: f(x) = head(layer(stem(x))), the paper's w0, w1, w2 (§4.2).

The network is traced by torch.fx with every module a leaf but the layer's ancestors, so what
lies off the cut runs as its authors wrote it, and the three parts hold the same modules as the
model, under the same names.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument

from aftcli.core.classes import input_channels
from aftcli.core.networks import copied, with_history
from aftcli.errors import AftError, first_line, nearest


class Parts(NamedTuple):
    """The three parts of a network: w0, w1, w2."""

    stem: nn.Module
    layer: nn.Module
    head: nn.Module


class CutPoint(NamedTuple):
    """A module at whose output the network can be cut."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]


class _Tracer(fx.Tracer):
    """A tracer of the named modules only; all others are leaves."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def _trace(model: nn.Module, opened: set[str]) -> fx.Graph:
    # Optional arguments of forward take their defaults: as proxies they would break `if flag:`.
    _, *optional = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in optional if p.default is not p.empty}
    return _Tracer(opened).trace(model, concrete_args=defaults)


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _upstream(nodes: list[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Find all that the nodes depend on, themselves included, without looking behind `stop`."""
    seen: set[fx.Node] = set()
    todo = [node for node in nodes if node not in stop]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [n for n in node.all_input_nodes if n not in stop]
    return seen


def _is_only_path(graph: fx.Graph, node: fx.Node) -> bool:
    (output,) = (n for n in graph.nodes if n.op == "output")
    upstream = _upstream([output], stop={node})
    return not any(n.op == "placeholder" for n in upstream)


def _without_in_place(node: fx.Node) -> None:
    """Keep a part from writing into its input: cached activations and A must not change."""
    if node.op == "call_function" and node.target is operator.iadd:
        node.target = operator.add
    if node.op == "call_function" and node.target is operator.imul:
        node.target = operator.mul
    if node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
    if node.op == "call_method" and isinstance(node.target, str):
        node.target = node.target.rstrip("_") if node.target[-2:] != "__" else node.target


def _part(
    model: nn.Module, graph: fx.Graph, nodes: set[fx.Node], inputs: list[fx.Node], outputs: Argument
) -> fx.GraphModule:
    """Make a module of the part of a graph that computes `outputs` from `inputs`."""
    part = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    if len(inputs) == 1:
        values[inputs[0]] = part.placeholder("x")
    else:
        several = part.placeholder("x")
        for i, node in enumerate(inputs):
            values[node] = part.call_function(operator.getitem, (several, i))
    for node in graph.nodes:
        if node in nodes and node not in values:
            values[node] = part.node_copy(node, lambda n: values[n])
            _without_in_place(values[node])
    part.output(fx.map_arg(outputs, lambda n: values[n]))
    module = fx.GraphModule(model, part)
    module.train(model.training)
    return module


def _pick(graph: fx.Graph, pick: partial[Any]) -> None:
    """Let a graph return what `pick` takes out of its output."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    made: Any = output.args[0]
    if isinstance(made, fx.Node) and isinstance(made.target, type):  # a named tuple, a dataclass
        names = getattr(made.target, "_fields", ())
        made = {**dict(zip(names, made.args, strict=False)), **made.kwargs}
    if isinstance(made, fx.Node):
        with graph.inserting_before(output):
            output.args = (graph.call_function(pick.func, (made, *pick.args), pick.keywords),)
    else:
        output.args = (pick(made),)


def cut(model: nn.Module, layer: str, pick: partial[Any] | None = None) -> Parts:
    """Cut a model into stem, layer and head (w0, w1, w2).

    The parts share the model's modules; in-place activations of the layer and the head are
    switched to out-of-place ones, which changes no value.

    Args:
        model: a network with one tensor input, its forward traceable by torch.fx outside the
            modules that do not contain the layer.
        layer: the name of a module, `layer3.5`, or of consecutive modules that together are
            w1, joined by `+`: `conv_head+bn2`. The last one's output is A.
        pick: a function of a module, which takes the logits out of a structure that the model
            returns; None where it returns them.

    Returns:
        Parts with head(layer(stem(x))) == pick(model(x)), bit for bit.
    """
    names = layer.split("+")
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise AftError(
                f"unknown layer {name!r}; nearest: {nearest(name, list(modules)[1:])}; "
                f"layers that can be cut: {_some_cut_points(model)}"
            )
    try:
        graph = _trace(model, set().union(*map(_ancestors, names)))
    except AftError:
        raise
    except Exception as error:
        raise AftError(
            f"layer {layer!r} can't be cut: torch.fx can't trace the modules around it "
            f"({first_line(error)}); layers that can: {_some_cut_points(model)}"
        ) from error
    if pick:
        _pick(graph, pick)
    calls = [n for n in graph.nodes if n.op == "call_module"]
    last = next((n for n in reversed(calls) if n.target == names[-1]), None)
    before = calls[: calls.index(last) + 1] if last else []
    first = next((n for n in reversed(before) if n.target == names[0]), None)
    if last is None or first is None or not _is_only_path(graph, last):
        raise AftError(
            f"layer {layer!r} can't be cut: its output is not the only path from the input to "
            f"the logits; layers that can: {_some_cut_points(model, near=names[-1])}"
        )
    behind_first = _upstream(list(first.all_input_nodes), stop=set())
    inside = _upstream([last], stop=behind_first) - behind_first
    entering = [n for n in graph.nodes if n in behind_first and any(u in inside for u in n.users)]
    (output,) = (n for n in graph.nodes if n.op == "output")
    after = _upstream([output], stop={last}) - {output}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    crossing = entering[0] if len(entering) == 1 else tuple(entering)
    stem = _part(model, graph, _upstream(entering, stop=set()), placeholders[:1], crossing)
    parts = Parts(
        stem,
        _part(model, graph, inside, entering, last),
        _part(model, graph, after, [last], output.args[0]),
    )
    for part in (parts.layer, parts.head):
        for module in part.modules():
            if getattr(module, "inplace", None) is True:
                module.inplace = False  # type: ignore[assignment]
    return parts


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy the model without its numbers: shapes for free."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    for tensor in with_history(model):
        memo[id(tensor)] = tensor.detach().to("meta")
    return copied(model, memo).eval()


class _Recorder(fx.Interpreter):
    """A run of a graph that keeps the tensors that go into and out of each module."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.op == "call_module":
            (input_, *_), _ = self.fetch_args_kwargs_from_env(n)
            if isinstance(input_, Tensor):
                self.seen[n.name] = (input_, value if isinstance(value, Tensor) else None)
        return value


def _walk(model: nn.Module, x: Tensor | None, prefix: str = "") -> Iterator[CutPoint]:
    graph = _trace(model, set())
    recorder = _Recorder(fx.GraphModule(model, graph))
    if x is not None:
        recorder.run(x)
    for node in graph.nodes:
        if node.op != "call_module" or not _is_only_path(graph, node):
            continue
        name, module = f"{prefix}{node.target}", model.get_submodule(str(node.target))
        input_, output = recorder.seen.get(node.name, (None, None))
        if len(node.all_input_nodes) == 1 and any(module.children()):
            # A module that fx can't open is just a leaf.
            with suppress(Exception):
                yield from list(_walk(module, input_, f"{name}."))
        yield CutPoint(name, module, tuple(output.shape) if output is not None else ())


def cut_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the names and modules of `cut_points`, found by structure alone."""
    return [(point.name, point.module) for point in _walk(model, None)]


def cut_points(model: nn.Module, size: tuple[int, int] = (224, 224)) -> list[CutPoint]:
    """List the modules at whose output the model can be cut, in the order in which they run.

    The modules inside a container come before it.
    """
    weight = next(model.parameters(), torch.empty(0))
    shape = (1, input_channels(model), *size)
    points = _walk(_on_meta(model), torch.empty(shape, dtype=weight.dtype, device="meta"))
    return list({point.name: point for point in points}.values())


def _some_cut_points(model: nn.Module, near: str = "", n: int = 12) -> str:
    try:
        spatial = [p.name for p in cut_points(model) if is_spatial(p.shape)]
    except Exception:  # noqa: BLE001 - this only decorates the error that is on its way
        return "unknown"
    if near:
        return nearest(near, spatial, n)
    return ", ".join(spatial[-n:])


def is_spatial(shape: tuple[int, ...]) -> bool:
    """Tell if a shape is that of channels of more than one cell, (N, K, h, w)."""
    return len(shape) == 4 and shape[2] * shape[3] > 1
