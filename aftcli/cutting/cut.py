"""Cut a network at a layer: f(x) = head(layer(stem(x))), the paper's w0, w1, w2 (§4.2).

The network is traced by torch.fx with every module a leaf but the layer's ancestors, so what
lies off the cut runs as its authors wrote it, and the three parts hold the same modules as the
model, under the same names.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument

from aftcli.cutting.layouts import Layout, before_maps, from_maps, to_maps
from aftcli.cutting.networks import copied, input_channels, with_history
from aftcli.cutting.tracing import trace
from aftcli.cutting.watched import run_watched
from aftcli.errors import AftError, first_line, nearest


class Parts(NamedTuple):
    """The three parts of a network: w0, w1, w2."""

    stem: nn.Module
    layer: nn.Module
    head: nn.Module

    def flow(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run an input up to the layer, and return A and what bypasses the layer.

        Raises:
            Untraceable: one of these values is not a tensor.
        """
        flow = flow_of(self.layer(self.stem(x)))
        if not all(isinstance(each, Tensor) for each in flow):
            raise Untraceable("the layer returns a structure, not a tensor")
        if isinstance(self.head, fx.GraphModule):
            taken = sum(node.op == "placeholder" for node in self.head.graph.nodes)
            if taken != len(flow):
                raise Untraceable("the layer returns several tensors")
        return flow


def flow_of(out: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - a tensor or several
    """Return what a layer passes to the head: A, and what bypasses the layer."""
    return out if isinstance(out, tuple) else (out,)


class Untraceable(AftError):
    """A network that torch.fx can't follow, so that it must run as it is."""


class CutPoint(NamedTuple):
    """A module at whose output the network can be cut."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _upstream(nodes: list[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Find all that the nodes depend on, themselves included; stop at the nodes of `stop`."""
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
    model: nn.Module,
    graph: fx.Graph,
    nodes: set[fx.Node],
    inputs: list[fx.Node],
    outputs: Argument,
    sizes: Mapping[fx.Node, Any] | None = None,
) -> fx.GraphModule:
    """Make a module of the part of a graph that computes `outputs` from `inputs`.

    Several inputs are one tuple. Only a head, which has `sizes`, takes them one by one: `sizes` are
    values of nodes, where BATCH stands for the number of images.
    """
    part = fx.Graph()
    values: dict[fx.Node, Any] = {}
    if sizes is not None:
        values |= {node: part.placeholder(f"x_{i}") for i, node in enumerate(inputs)}
        batch = part.call_function(len, (values[inputs[0]],))
        values |= {node: _sized(size, batch) for node, size in sizes.items()}
    elif len(inputs) == 1:
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
    if sizes is not None and not batch.users:
        part.erase_node(batch)
    module = fx.GraphModule(model, part)
    module.train(model.training)
    return module


def cut(
    model: nn.Module, layer: str, x: Tensor | None = None, layout: Layout | None = None
) -> Parts:
    """Cut a model into stem, layer and head (w0, w1, w2).

    The parts share the model's modules; in-place activations of the layer and the head are
    switched to out-of-place ones, which changes no value.

    Args:
        model: a network with one tensor input, its forward traceable by torch.fx outside the
            modules that do not contain the layer.
        layer: the name of a module, `layer3.5`, or of consecutive modules that together are
            w1, joined by `+`: `conv_head+bn2`. The last one's output is A.
        x: an input; with it, other paths than through the layer are allowed. Their values are
            further outputs of the layer and further inputs of the head.
        layout: where A has its channels and cells; default (N, K, h, w). Tokens that belong to no
            cell bypass the layer.

    Returns:
        Parts with head(layer(stem(x))) == model(x), bit for bit, or head(*layer(stem(x))) where
        something bypasses the layer.

    Raises:
        Untraceable: torch.fx can't follow the modules around the layer.
        AftError: the layer is unknown, or not the only path.
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
        graph = trace(model, set().union(*map(_ancestors, names)), x)
    except AftError:
        raise
    except Exception as error:
        raise Untraceable(
            f"layer {layer!r} can't be cut: torch.fx can't trace the modules around it "
            f"({first_line(error)}); layers that can: {_some_cut_points(model)}"
        ) from error
    calls = [n for n in graph.nodes if n.op == "call_module"]
    last = next((n for n in reversed(calls) if n.target == names[-1]), None)
    before = calls[: calls.index(last) + 1] if last else []
    first = next((n for n in reversed(before) if n.target == names[0]), None)
    alone = last is not None and _is_only_path(graph, last)
    if last is None or first is None or (x is None and not alone):
        missing = next((name for name in names if all(n.target != name for n in calls)), None)
        why = (
            f"{missing} is called nowhere in the network's forward"
            if missing
            else "its output is not the only path from the input to the logits"
        )
        raise AftError(
            f"layer {layer!r} can't be cut: {why}; layers that can: "
            f"{_some_cut_points(model, near=names[-1])}"
        )
    parts = (
        _cut_one_path(model, graph, first, last)
        if alone
        else _cut_all_paths(model, graph, first, last, x)  # type: ignore[arg-type]
    )
    for part in (parts.layer, parts.head):
        for module in part.modules():
            if getattr(module, "inplace", None) is True:
                module.inplace = False  # type: ignore[assignment]
    return _with_layout(parts, layout) if layout else parts


def _cut_one_path(model: nn.Module, graph: fx.Graph, first: fx.Node, last: fx.Node) -> Parts:
    behind_first = _upstream(list(first.all_input_nodes), stop=set())
    inside = _upstream([last], stop=behind_first) - behind_first
    entering = [n for n in graph.nodes if n in behind_first and any(u in inside for u in n.users)]
    (output,) = (n for n in graph.nodes if n.op == "output")
    after = _upstream([output], stop={last}) - {output}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    crossing = entering[0] if len(entering) == 1 else tuple(entering)
    stem = _part(model, graph, _upstream(entering, stop=set()), placeholders[:1], crossing)
    return Parts(
        stem,
        _part(model, graph, inside, entering, last),
        _part(model, graph, after, [last], output.args[0]),
    )


def _cut_all_paths(
    model: nn.Module, graph: fx.Graph, first: fx.Node, last: fx.Node, x: Tensor
) -> Parts:
    """Cut a graph where values bypass the layer: those that have a row for each image."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    input_ = next(n for n in graph.nodes if n.op == "placeholder")
    of_input, from_first = _downstream(graph, input_), _downstream(graph, first)
    behind = _downstream(graph, last) & _upstream([output], set()) - {last}
    passing = of_input - behind - {last}
    known, sizes = _known(model, graph, input_, [n for n in passing if behind & set(n.users)], x)
    past = [n for n in graph.nodes if n in known]
    # What does not depend on the input, such as a table of positions, is made where it is needed.
    # What only the stem needs of it is the stem's alone, so that the layer can be trained.
    inside = _upstream([last, *past], of_input - from_first)
    entering = [
        n
        for n in graph.nodes
        if n in of_input - from_first and (n in past or inside & from_first & set(n.users))
    ]
    after = _upstream([output], {last, *past, *sizes})
    head = {n for n in after if n in behind or n not in of_input}
    crossing = entering[0] if len(entering) == 1 else tuple(entering)
    try:
        return Parts(
            _part(model, graph, _upstream(entering, set()), [input_], crossing),
            _part(model, graph, inside, entering, (last, *past) if past else last),
            _part(model, graph, head - {output}, [last, *past], output.args[0], sizes),
        )
    except KeyError as error:  # a value of neither part
        raise Untraceable(f"{first_line(error)} is needed on both sides of the layer") from error


BATCH = object()  # stands for the number of images


def _known(
    model: nn.Module, graph: fx.Graph, input_: fx.Node, nodes: list[fx.Node], x: Tensor
) -> tuple[set[fx.Node], dict[fx.Node, Any]]:
    """Tell tensors with a row for each image from sizes, by running two and three images.

    Raises:
        Untraceable: a value is neither.
    """
    run = _part(model, graph, _upstream(nodes, set()), [input_], tuple(nodes))
    with torch.no_grad():
        two, three = (run(x[:1].repeat(n, 1, 1, 1)) for n in (2, 3))
    tensors, sizes = set(), {}
    for node, a, b in zip(nodes, two, three, strict=True):
        if isinstance(a, Tensor):
            rows = a.shape[:1] + b.shape[:1]
            if rows != (2, 3) or a.shape[1:] != b.shape[1:]:
                raise Untraceable(f"{node} bypasses the layer without a row for each image")
            tensors.add(node)
        else:
            sizes[node] = _size(a, b)
    return tensors, sizes


def _sized(size: Any, batch: fx.Node) -> Any:  # noqa: ANN401 - numbers, nested
    if isinstance(size, tuple):
        return tuple(_sized(each, batch) for each in size)
    return batch if size is BATCH else size


def _size(two: Any, three: Any) -> Any:  # noqa: ANN401 - numbers, nested
    """Return a size, known for two and three images, with BATCH in place of their number."""
    if isinstance(two, tuple) and len(two) == len(three):
        return tuple(_size(a, b) for a, b in zip(two, three, strict=True))
    if isinstance(two, int | float | str | None) and two == three:
        return two
    if isinstance(two, int) and (two, three) == (2, 3):
        return BATCH
    raise Untraceable(f"a {type(two).__name__} bypasses the layer")


def _with_layout(parts: Parts, layout: Layout) -> Parts:
    """Turn the layer's output into maps, and maps back into that output before the head."""
    layer, head = parts.layer, parts.head
    assert isinstance(layer, fx.GraphModule)
    assert isinstance(head, fx.GraphModule)
    (output,) = (n for n in layer.graph.nodes if n.op == "output")
    given = output.args[0]
    out, *past = given if isinstance(given, tuple) else (given,)
    with layer.graph.inserting_before(output):
        found = [layer.graph.call_function(to_maps, (out, *layout))]
        if layout.prefix:
            found.append(layer.graph.call_function(before_maps, (out, *layout)))
    output.args = ((*found, *past) if len(found) + len(past) > 1 else found[0],)
    first, *others = (n for n in head.graph.nodes if n.op == "placeholder")
    with head.graph.inserting_after(first):
        maps = [first]
        if layout.prefix:
            maps.append(head.graph.placeholder("before"))
    with head.graph.inserting_after((others or maps)[-1]):
        made = head.graph.call_function(from_maps, (first, tuple(maps[1:]), *layout))
    first.replace_all_uses_with(made, lambda user: user is not made)
    layer.recompile()
    head.recompile()
    return parts


def _downstream(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    """Find all that depends on a node, itself included."""
    seen = {node}
    for each in graph.nodes:
        if seen & set(each.all_input_nodes):
            seen.add(each)
    return seen


def on_meta(model: nn.Module) -> nn.Module:
    """Copy a model without its numbers, to get shapes at no cost."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    for tensor in with_history(model):
        memo[id(tensor)] = tensor.detach().to("meta")
    return copied(model, memo).eval()


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    graph = trace(model, set())
    for node in graph.nodes:
        if node.op != "call_module" or not _is_only_path(graph, node):
            continue
        name, module = f"{prefix}{node.target}", model.get_submodule(str(node.target))
        if len(node.all_input_nodes) == 1 and any(module.children()):
            # A module that fx can't open is just a leaf.
            with suppress(Exception):
                yield from list(_walk(module, f"{name}."))
        yield name, module


def cut_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the names and modules of `cut_points`, found by structure alone."""
    return list(_walk(model))


def cut_points(model: nn.Module, size: tuple[int, int] = (224, 224)) -> list[CutPoint]:
    """List the modules at whose output the model can be cut, in the order in which they run.

    The modules inside a container come before it.
    """
    weight = next(model.parameters(), torch.empty(0))
    x = torch.empty(1, input_channels(model), *size, dtype=weight.dtype, device="meta")
    calls, _ = run_watched(on_meta(model), x)
    shapes = {ran.name: tuple(ran.output.shape) for ran in calls if ran.alone}
    return [CutPoint(name, m, shapes.get(name, ())) for name, m in dict(_walk(model)).items()]


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
