"""Run the frozen layers w0 by ONNX Runtime, for long studies on a CPU.

w0 is the same in a network and in all that are tuned from it, and takes most of the time. Its
outputs differ from PyTorch's by rounding only, which is checked on random inputs.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import onnxruntime
import torch
from torch import Tensor

from aftcli import evaluate_jobs, finetune_jobs
from aftcli.core.classifier import Classifier, tensors_hash
from aftcli.core.models import load_classifier

TOLERANCE = 1e-4  # of the largest output
_sessions: dict[str, onnxruntime.InferenceSession] = {}


def use_fast_stem(f: Classifier) -> Classifier:
    """Let a classifier's stem run by ONNX Runtime, with as many threads as PyTorch has."""
    key = tensors_hash(f.stem.state_dict())
    if key not in _sessions:
        _sessions[key] = _session(f)
    session = _sessions[key]

    def forward(x: Tensor) -> Tensor:
        (out,) = session.run(None, {"x": x.contiguous().numpy()})
        return torch.from_numpy(out)

    x = torch.randn(3, 3, *f.preprocessing.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = f.stem(x)
    error = float((forward(x) - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, error
    f.stem.forward = forward
    return f


def _session(f: Classifier) -> onnxruntime.InferenceSession:
    x = torch.zeros(2, 3, *f.preprocessing.size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "stem.onnx"
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.onnx.export(
            f.stem, (x,), input_names=["x"], dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        program.save(str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


@contextmanager
def fast_stems() -> Iterator[None]:
    """Let every classifier that aft loads run its stem by ONNX Runtime."""

    def load(*args: object, **options: object) -> Classifier:
        return use_fast_stem(load_classifier(*args, **options))

    with (
        mock.patch.object(evaluate_jobs, "load_classifier", load),
        mock.patch.object(finetune_jobs, "load_classifier", load),
    ):
        yield
