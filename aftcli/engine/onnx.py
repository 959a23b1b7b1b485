"""ONNX Runtime: the frozen network as a graph of its own, exported once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn

from aftcli.core.classifier import Classifier
from aftcli.cutting.cut import flow_of
from aftcli.errors import AftError, Unfit, first_line, root_of
from aftcli.files import cache_folder, replacing, tensors_hash

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch.onnx import ONNXProgram


VERSION = 1  # of what is exported

KEPT = 4 * 2**30  # bytes of exported networks

# Images in one pass of a thread: what the first layers compute of more leaves the caches.
AT_ONCE = 4


class OnnxRuntime:
    """A classifier as one graph, x -> (A, logits)."""

    name, precision = "onnxruntime", "no"

    def __init__(self, f: Classifier, note: Callable[[str], None], precision: str) -> None:
        check_device(f)
        self.graph = Graph(_Whole(f), f.preprocessing.shape, ("activation", "logits"), f.name, note)

    def takes(self, x: Tensor) -> bool:
        """Take float32 inputs of the size that was exported, any number."""
        return self.graph.takes(x)

    def activation(self, x: Tensor) -> Tensor:
        """Return A of inputs x, shape (N, K, h, w)."""
        return self.graph.run(x, "activation")[0]

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of inputs x, shape (N, C)."""
        return self.graph.run(x, "logits")[0]


class _Whole(nn.Module):
    def __init__(self, f: Classifier) -> None:
        super().__init__()
        self.stem, self.layer, self.head = f.stem, f.layer, f.head
        # Exported in training mode, a wrapper would leave all that it wraps in it.
        self.training = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flow = flow_of(self.layer(self.stem(x)))
        return flow[0], self.head(*flow)


def check_device(f: Classifier) -> None:
    """Check that a classifier is where ONNX Runtime is used."""
    if f.device.type != "cpu":
        raise AftError(
            f"--engine onnxruntime runs on a CPU, the network is on {f.device}; use --engine "
            "torch, or --device cpu"
        )


class Graph:
    """A module with one input as an ONNX Runtime session.

    Args:
        module: from x, shape (N, C, H, W), to one tensor or a tuple of them.
        shape: C, H and W of x.
        outputs: their names.
        what: names the network to the user.
        note: is told that it is being exported.

    Raises:
        Unfit: it can't be exported, or not be run.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: tuple[int, int, int],
        outputs: Sequence[str],
        what: str,
        note: Callable[[str], None],
    ) -> None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise Unfit("it is not installed: pip install onnxruntime") from error
        if any(p.dtype != torch.float32 for p in module.parameters()):
            raise Unfit("its weights are not float32")
        if module.training:
            raise Unfit("it is in training mode")
        self.shape, self.outputs = shape, tuple(outputs)
        path = cache_folder() / f"{_key(module, self.shape, outputs)}.onnx"
        session = _session(path, 1)
        if session is None:
            note(f"exporting {what} for ONNX Runtime, once: some seconds")
            _export_to(path, module, self.shape, outputs)
            session = _session(path, 1)
        if session is None:
            raise Unfit("its exported graph can't be run")
        self.path, self.session, self.shared = path, session, session
        self.threads = torch.get_num_threads()
        self.lanes = ThreadPoolExecutor(self.threads)
        # Not where a tensor has no axis of images: each part would give it again.
        self.parted = all(o.shape and isinstance(o.shape[0], str) for o in session.get_outputs())

    def takes(self, x: Tensor) -> bool:
        """Take float32 inputs of the size that was exported, any number but none."""
        return x.dtype == torch.float32 and x.shape[1:] == self.shape and len(x) > 0

    def run(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        """Return outputs of inputs x, all or the named ones.

        Threads that each take a few images do not wait for one another. Threads that share each
        operation do, all the more while a process that decodes images takes a processor.
        """
        values, wanted = x.detach().contiguous(), names or self.outputs
        if not self.parted or len(x) < self.threads:
            return tuple(map(torch.from_numpy, _pass(self._shared(), wanted, values)))
        count = self.threads * -(-len(x) // (self.threads * AT_ONCE))
        passes = partial(_pass, self.session, wanted)
        parts = values.tensor_split(min(count, len(x)))
        found = self.lanes.map(passes, parts) if self.threads > 1 else map(passes, parts)
        return tuple(torch.from_numpy(np.concatenate(each)) for each in zip(*found, strict=True))

    def _shared(self) -> InferenceSession:
        """Open the session whose threads share each operation, where few images need one."""
        if self.shared is self.session and self.threads > 1:
            self.shared = _session(self.path, self.threads) or self.session
        return self.shared


def _pass(session: InferenceSession, names: Sequence[str], x: Tensor) -> list[np.ndarray]:
    return session.run(names, {"x": x.numpy()})  # type: ignore[no-any-return]


def _key(module: nn.Module, shape: tuple[int, ...], outputs: Sequence[str]) -> str:
    """Name a graph by all that it depends on."""
    code = [m.code for m in module.modules() if isinstance(m, fx.GraphModule)]
    parts = (VERSION, torch.__version__, shape, tuple(outputs), repr(module), *code)
    weights = tensors_hash(module.state_dict())
    return hashlib.sha256(f"{weights} {parts}".encode()).hexdigest()[:32]


def _export_to(
    path: Path, module: nn.Module, shape: tuple[int, ...], outputs: Sequence[str]
) -> None:
    x = torch.zeros(2, *shape)
    try:
        program = onnx_program(module, x, outputs)
    except Exception as error:
        raise Unfit(f"it can't be exported: {first_line(root_of(error))[:120]}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            program.save(str(temporary))
        _prune(path)
    except (OSError, RuntimeError) as error:
        raise Unfit(f"{path} can't be written: {first_line(error)[:120]}; set AFT_CACHE") from error


def _prune(newest: Path) -> None:
    """Keep the cache below its size; the least recently used graphs go first."""
    files = sorted(newest.parent.glob("*.onnx"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > KEPT and path != newest:
            path.unlink(missing_ok=True)


def _session(path: Path, threads: int) -> InferenceSession | None:
    """Open an exported graph; None if it is missing or damaged."""
    import onnxruntime

    if not path.is_file():
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would otherwise wait for work in a loop, at the cost of torch's between passes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    with contextlib.suppress(OSError):
        os.utime(path)
    try:
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - onnxruntime's errors have no common class
        return None


def onnx_program(module: nn.Module, x: Tensor, outputs: Sequence[str]) -> ONNXProgram:
    """Export a module for any number of images, without a word on the terminal.

    Args:
        module: in eval mode.
        x: an input, shape (N, 3, H, W), N > 1.
        outputs: names.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (x,),
                input_names=["x"],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    if not program.model_proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ValueError("it would take a fixed number of images only")
    return program
