"""A classifier and its plain map as one ONNX graph, for services without torch.

docs/guides/serving.md says how a service uses it.
The gradient of the head, which CAMs need, is traced into the graph like any other operation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from aftcli.core.cam import normalise, upsample
from aftcli.core.classifier import Classifier
from aftcli.core.head import attention_in_steps
from aftcli.core.methods import METHODS
from aftcli.core.methods import method as find_method
from aftcli.engine.onnx import onnx_program
from aftcli.errors import AftError, first_line, root_of
from aftcli.models.checkpoint import read_card
from aftcli.models.load import load_classifier

TRACED = 61  # images: unlike any usual size, or the tracer might take one for the other

CARD = ("model", "layer", "cam", "classes", "preprocessing", "digest")

aten = torch.ops.aten


def _max_pool_backward(grad: Tensor, x: Tensor, *settings: object) -> Tensor:
    *_, best = settings
    assert isinstance(best, Tensor)  # the indices of the maxima
    flat = torch.zeros_like(x).flatten(2)
    return flat.scatter_add(2, best.flatten(2), grad.flatten(2)).view_as(x)


def _adaptive_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    high, wide = (
        _bins(int(a), int(b), grad) for a, b in zip(x.shape[2:], grad.shape[2:], strict=True)
    )
    return high.mT @ grad @ wide


def _bins(size: int, bins: int, like: Tensor) -> Tensor:
    """Return the matrix of adaptive average pooling along a side, shape (bins, size)."""
    edges = [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]
    rows = [[(a <= j < b) / (b - a) for j in range(size)] for a, b in edges]
    return torch.tensor(rows, dtype=like.dtype)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: object,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor | None, None, None]:
    if transposed or any(wanted[1:]):
        raise NotImplementedError("a transposed convolution")
    back = [
        int(size) - ((int(out) - 1) * s - 2 * p + d * (int(k) - 1) + 1)
        for size, out, s, p, d, k in zip(
            x.shape[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    spread = aten.convolution(grad, weight, None, stride, padding, dilation, True, back, groups)
    return spread, None, None


# Operators that ONNX lacks, in terms of those that it has.
BACKWARD: dict[Any, Callable[..., Any]] = {
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_pool_backward,
    aten.convolution_backward.default: _convolution_backward,
}


def traced(f: Classifier, method: str) -> nn.Module:
    """Trace f and its plain map as one graph: x -> (logits, I of the predicted class).

    Args:
        f: the classifier.
        method: a key of METHODS.
    """
    from torch._decomp import core_aten_decompositions

    if find_method(method).family != "cam":
        raise _not_exportable(f, method, AftError("only CAMs can be part of the network's graph"))
    explain = find_method(method).load()
    # Cached before tracing, since finding it runs the head.
    _ = f.linear_head

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            g, activation = f.at(x)
            logits = g.head(activation)
        attribution = explain(g, activation, logits.argmax(1), x)
        return logits, upsample(normalise(attribution), x)

    x = next(f.parameters()).new_zeros(TRACED, *f.preprocessing.shape)
    rules: dict[Any, Callable[..., Any]] = {**core_aten_decompositions(), **BACKWARD}
    try:
        with attention_in_steps(True):  # ONNX has no gradient of torch's kernels
            graph = make_fx(both, rules, "symbolic", _allow_non_fake_inputs=True)(x)
    except Exception as error:
        raise _not_exportable(f, method, error) from error
    # Tensors of ONNX have none, and its exporters of older versions do not take it. Without it a
    # copy may keep its strides, which a view can't always have.
    for node in graph.graph.nodes:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    graph.recompile()
    return graph.eval()


def _not_exportable(f: Classifier, method: str, error: Exception) -> AftError:
    reason = first_line(root_of(error))[:120]
    others = ", ".join(m for m in ("gradcam", "gradcam++", "layercam") if m in METHODS)
    return AftError(
        f"{method} of {f.name} can't be written as one ONNX graph ({reason}); {others} can for "
        "most models"
    )


def check_onnx() -> None:
    """Check that networks can be exported, before anything is computed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 - torch.onnx says only much later that it is missing
    except ImportError as error:
        raise AftError(
            f"--export onnx needs {error.name}; install it with: pip install {error.name}"
        ) from error


def export_onnx(checkpoint: Path, path: Path, name: str | None = None) -> None:
    """Write a tuned classifier and its plain map as an ONNX file.

    Args:
        checkpoint: of `aft finetune`; a control's map is Grad-CAM.
        path: of the file. Its input is x, (N, 3, H, W), any N; its outputs are `logits`, (N, C),
            and `attribution`, I of the predicted class, (N, H, W), in [0, 1]. Its metadata has
            the checkpoint's classes, preprocessing and output (what makes probabilities of the
            logits) as JSON under `aft`.
        name: the model's, needed where it is code of the user's own.
    """
    check_onnx()

    import onnx

    card = read_card(checkpoint)
    if card is None:
        raise AftError(f"{checkpoint}: is no checkpoint of aft finetune")
    f = load_classifier(name, checkpoint)
    method, said = f.cam or "gradcam", {"output": f.output}
    graph = traced(f, method)
    x = next(f.parameters()).new_zeros(TRACED, *f.preprocessing.shape)
    try:
        model = onnx_program(graph, x, ("logits", "attribution")).model_proto
    except Exception as error:
        raise _not_exportable(f, method, error) from error
    onnx.helper.set_model_props(
        model, {"aft": json.dumps({key: card[key] for key in CARD} | {"cam": method} | said)}
    )
    path.write_bytes(model.SerializeToString())
