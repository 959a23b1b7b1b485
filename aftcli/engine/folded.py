"""PyTorch made faster: batch norms folded into convolutions, a good layout in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aftcli.core.classifier import Classifier
from aftcli.cutting.cut import Parts, flow_of
from aftcli.cutting.networks import copied, with_plain_weights

Pass = Callable[[Tensor], Tensor]

LOWER = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision


class _Before(nn.Module):
    """x to A."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.stem, self.layer, self.head = parts

    def forward(self, x: Tensor) -> Tensor:
        return flow_of(self.layer(self.stem(x)))[0]


class _Whole(_Before):
    """x to logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(*flow_of(self.layer(self.stem(x))))  # type: ignore[no-any-return]


class FoldedTorch:
    """Classifier parts, copied, folded and laid out for speed."""

    name = "torch"

    def __init__(self, f: Classifier, note: Callable[[str], None], precision: str) -> None:
        self.device, self.dtype = f.device, next(f.parameters()).dtype
        self.precision, self.lower = precision, LOWER[precision]
        # In float32 on a GPU channels last saves no time, and its first pass of each number of
        # images takes seconds.
        usual = self.device.type != "cpu" and self.lower is None
        self.layout = torch.contiguous_format if usual else torch.channels_last
        made = [_laid_out(folded(part), self.layout) for part in (f.stem, f.layer, f.head)]
        if self.lower:
            for part in made:
                _lowered(part, self.lower)
        parts = Parts(*made)
        self.before: Pass = _Before(parts)
        self.whole: Pass = _Whole(parts)

    def takes(self, x: Tensor) -> bool:
        """Take inputs of the weights' type, of any size."""
        return x.dtype == self.dtype

    def activation(self, x: Tensor) -> Tensor:
        """Return A of inputs x, shape (N, K, h, w)."""
        return self._run(self.before, x)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of inputs x, shape (N, C)."""
        return self._run(self.whole, x)

    def _run(self, part: Pass, x: Tensor) -> Tensor:
        count = len(x)
        if self.device.type != "cpu":
            x = padded(x)
        with torch.autocast(self.device.type, self.lower, enabled=self.lower is not None):
            out = part(x.contiguous(memory_format=self.layout) if x.dim() == 4 else x)
        # Maps, softmax and comparisons are in the weights' own precision.
        return out.to(self.dtype)[:count]


class CompiledTorch(FoldedTorch):
    """Folded parts compiled by torch.compile; the first passes take a minute or more."""

    name = "compile"

    def __init__(self, f: Classifier, note: Callable[[str], None], precision: str) -> None:
        super().__init__(f, note, precision)
        note(f"compiling {f.name} by torch.compile; the first images take long")
        self.before, self.whole = (
            torch.compile(part, dynamic=None) for part in (self.before, self.whole)
        )


def padded(x: Tensor) -> Tensor:
    """Repeat the last input until the number of inputs is a power of two.

    A GPU's library plans each layer again for each number of inputs.
    """
    count = len(x)
    more = (1 << (count - 1).bit_length()) - count if count else 0
    return torch.cat([x, x[-1:].expand(more, *x.shape[1:])]) if more else x


def _lowered(part: nn.Module, dtype: torch.dtype) -> None:
    """Round once the weights that autocast rounds in each pass."""
    for module in part.modules():
        if type(module) in (nn.Conv2d, nn.Linear):  # others may compute their weights
            module.to(dtype)


def _laid_out(part: nn.Module, layout: torch.memory_format) -> nn.Module:
    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.dim() == 4:  # not of any other, as Module.to would
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return part


class _Tracer(fx.Tracer):
    """Trace down to convolutions and batch norms, those of timm's too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _BatchNorm) or super().is_leaf_module(
            m, module_qualified_name
        )


def folded(part: nn.Module) -> nn.Module:
    """Copy a part of a network in eval mode, each batch norm after a convolution folded into it.

    If torch.fx can't trace it, the copy is not folded.
    """
    part = with_plain_weights(copied(part)).eval()
    try:
        graph = _Tracer().trace(part)
    except Exception:  # noqa: BLE001 - what can't be traced is run as it is
        return part
    whole = fx.GraphModule(part, graph)
    modules = dict(whole.named_modules())
    uses = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(node.args[0], fx.Node):
            continue
        (before, *_) = node.args
        name = str(before.target)
        convolution = modules.get(name) if before.op == "call_module" else None
        once = len(before.users) == 1 and uses.count(name) == uses.count(str(node.target)) == 1
        if isinstance(convolution, nn.Conv2d) and once and norm.track_running_stats:
            whole.set_submodule(name, fuse_conv_bn_eval(convolution, norm))
            whole.set_submodule(str(node.target), _what_follows(norm))
    return whole.eval()


def _what_follows(norm: nn.BatchNorm2d) -> nn.Module:
    """Return the activation that timm's batch norms hold."""
    inner = [getattr(norm, name, None) for name in ("drop", "act")]
    return nn.Sequential(*(module for module in inner if isinstance(module, nn.Module)))
