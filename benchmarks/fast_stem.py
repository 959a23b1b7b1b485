"""Run the frozen layers w0 of every classifier by ONNX Runtime, for long studies on a CPU.

w0 is the same in a network and in all that are tuned from it, and takes most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from aftcli.aft import jobs as finetune_jobs
from aftcli.core.classifier import Classifier
from aftcli.core.models import load_classifier
from aftcli.engine.accelerate import fast_stem
from aftcli.evaluation import study as evaluate_jobs


def use_fast_stem(f: Classifier) -> Classifier:
    """Let a classifier's stem run by ONNX Runtime, with as many threads as PyTorch has."""
    run = fast_stem(f, f.stem, "onnxruntime")

    def forward(x: Tensor) -> Tensor:
        (out,) = run(x)
        return out

    f.stem.forward = forward
    return f


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
