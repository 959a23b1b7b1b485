"""The graph of a network, by torch.fx."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from aftcli.errors import AftError


def trace(model: nn.Module, opened: set[str], x: Tensor | None = None) -> fx.Graph:
    """Trace a network of one input; optional arguments of its forward take their defaults.

    Args:
        model: the network.
        opened: names of the modules that are traced too; all others are leaves.
        x: an input; with one, the network may ask for sizes and types, but for the number of
            images, to choose what it runs.
    """
    root = _Plain.__new__(_Plain)
    root.__dict__.update(vars(model), network=model)
    graph = _Tracer(model, opened, x).trace(root)
    for name, value in vars(root).items():
        if name.startswith("_tensor_constant"):  # which torch.fx found in forward
            setattr(model, name, value)
    return graph


class _Plain(nn.Module):
    """A network as a function of x alone, whatever other arguments it takes; all is shared."""

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401 - whatever the network returns
        return self.__dict__["network"].forward(x)


class _Tracer(fx.Tracer):
    """A tracer of the named modules only."""

    def __init__(self, model: nn.Module, opened: set[str], x: Tensor | None) -> None:
        super().__init__()
        self.opened, self.x = opened, x
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer a question about sizes and types, the same for any number of images."""
        if self.x is not None:
            try:
                answers = {bool(self._known(obj.node, count)) for count in (1, 2, 3)}
            except (RuntimeError, KeyError, AftError):
                answers = set()  # it is about values
            if len(answers) == 1:
                return answers.pop()
        return super().to_bool(obj)

    def _known(self, node: fx.Node, count: int) -> Any:  # noqa: ANN401 - of any operation
        """Compute a node without numbers: a question about values raises an error."""
        if node.op == "placeholder":
            assert self.x is not None
            return self.x.new_empty(count, *self.x.shape[1:], device="meta")
        if node.op == "get_attr":
            # Not by getattr, which gives proxies while a network is traced.
            return self.tensors[str(node.target)].detach().to("meta")
        if node.op not in ("call_function", "call_method"):
            raise AftError(f"{node} is what a module computes")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._known(n, count))
        if node.op == "call_method":
            own: Any = args[0]
            return getattr(own, str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
