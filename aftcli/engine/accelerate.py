"""Engines: what runs a classifier's passes without gradients (Algorithm 1's masked images).

An engine changes the time, not the results: the classifier it is given stays as it is, and what
an engine computes is compared with it before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from aftcli.errors import AftError, Unfit, check_name, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from aftcli.core.classifier import Classifier, Engine


# From a classifier, and how many images will pass it (None for many), to a faster classifier.
Accelerate = Callable[["Classifier", int | None], "Classifier"]

# Module and class of each; importing one must not import another's library.
ENGINES = {
    "torch": "aftcli.engine.folded:FoldedTorch",
    "compile": "aftcli.engine.folded:CompiledTorch",
    "onnxruntime": "aftcli.engine.onnx:OnnxRuntime",
}

CHOICES = ("auto", *ENGINES)

ENOUGH = 500  # passes of the network from which an engine pays (docs/method/decisions/network.md)

TOLERANCES = {"no": 1e-4, "bf16": 0.1, "fp16": 0.1}  # of the largest value, by precision

CHECKED = 3  # random inputs


def as_it_is(f: Classifier, passes: int | None) -> Classifier:
    """Return the classifier without an engine."""
    return f


def accelerated(
    f: Classifier,
    engine: str = "auto",
    passes: int | None = None,
    note: Callable[[str], None] = warnings.warn,
    precision: str = "no",
) -> Classifier:
    """Run a classifier's passes without gradients faster.

    Args:
        f: the classifier, on its device; its weights must not change afterwards.
        engine: "torch" (batch norms folded into convolutions), "compile" (torch.compile),
            "onnxruntime" (on a CPU), or "auto": for many passes onnxruntime on a CPU and torch on
            a GPU, for few f as it is.
        passes: images that will pass the network, None for many; only "auto" looks.
        note: is told what a user should know: an export that takes time, an engine that can't
            be used and what is used instead.
        precision: "bf16" or "fp16" runs the passes by autocast, for GPUs and CPUs that have
            bf16; results then differ by more than rounding. "no" does not.

    Returns:
        A classifier that shares f's modules. Its results are f's up to rounding.

    Raises:
        AftError: there is no such engine, or it can't be used on this device at all.
    """
    check_engine(engine, precision)
    if precision == "bf16" and f.device.type == "cpu" and not has_bf16():
        note("this CPU has no bf16 instructions, so --precision bf16 saves no time here")
    name = choose(f, passes, precision) if engine == "auto" else engine
    if name is None:
        return f
    module, _, kind = ENGINES[name].partition(":")
    try:
        made = getattr(import_module(module), kind)(f, note, precision)
        return checked(f, made, TOLERANCES[precision])
    except Unfit as unfit:
        note(f"{f.name} can't run by {name} ({unfit}); plain torch runs it")
        return f


def check_engine(engine: str, precision: str = "no") -> None:
    """Check the names of an engine and a precision, before a network is loaded."""
    check_name("engine", engine, CHOICES)
    if precision not in TOLERANCES:
        raise AftError(f"unknown precision {precision!r}; there are {', '.join(TOLERANCES)}")
    if engine == "onnxruntime" and precision != "no":
        raise AftError(f"--engine onnxruntime has no --precision {precision}; use --engine torch")


def has_bf16() -> bool:
    """Tell if this CPU has instructions for bf16; True where PyTorch can't say."""
    import torch

    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return not known or any("bf16" in name and has for name, has in known.items())


def choose(f: Classifier, passes: int | None, precision: str) -> str | None:
    """Choose the engine of "auto"; None for none."""
    if precision != "no":
        return "torch"
    if passes is not None and passes < ENOUGH:
        return None
    return "onnxruntime" if f.device.type == "cpu" else "torch"


def checked(f: Classifier, engine: Engine, tolerance: float) -> Classifier:
    """Return f with an engine, after checking that the engine gives f's results.

    Raises:
        Unfit: it gives other results, or fails.
    """
    import torch

    x = _random_inputs(f)
    fast = f.with_engine(engine)
    with torch.no_grad():
        expected = f.activation(x), f(x)
        try:
            given = fast.activation(x), fast(x)
        except Exception as error:
            # Such as a missing compiler, or an unknown operator.
            raise Unfit(first_line(error)[:120]) from error
    for what, a, b in zip(("activations", "scores"), given, expected, strict=True):
        _compare(what, a, b, tolerance)
    return fast


def _random_inputs(f: Classifier) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CHECKED, *f.preprocessing.shape, generator=generator)
    return x.to(next(f.parameters()))


def _compare(what: str, given: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((given - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise Unfit(f"its {what} differ by {error:.1e} of the largest")


def fast_stem(
    f: Classifier,
    stem: nn.Module,
    engine: str = "auto",
    passes: int | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    """Make the frozen layers w0 of a classifier that is fine-tuned faster.

    Args:
        f: the classifier.
        stem: w0, f's own or one that ends earlier.
        engine: see `accelerated`; by torch the stem runs as it is.
        passes: images that will pass it; None for many.
        note: see `accelerated`.

    Returns:
        A function from x, shape (N, 3, H, W), to what the stem gives of it.
    """
    check_engine(engine)
    name = choose(f, passes, "no") if engine == "auto" else engine
    if name != "onnxruntime":
        return stem

    import torch

    from aftcli.engine.onnx import Graph, check_device

    check_device(f)
    x = _random_inputs(f)
    with torch.no_grad():
        expected = stem(x)
    several = isinstance(expected, tuple)
    outputs = tuple(f"stem_{i}" for i in range(len(expected) if several else 1))
    try:
        graph = Graph(stem, f.preprocessing.shape, outputs, f"the frozen layers of {f.name}", note)
        for given, wanted in zip(graph.run(x), expected if several else [expected], strict=True):
            _compare("features", given, wanted, TOLERANCES["no"])
    except Unfit as unfit:
        note(f"the frozen layers of {f.name} can't run by onnxruntime ({unfit}); torch runs them")
        return stem
    return lambda x: graph.run(x) if graph.takes(x) else stem(x)
