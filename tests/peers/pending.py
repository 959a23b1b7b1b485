"""What peers do and aft does not yet: the reasons, and the mark of tests that wait for it.

The marks are strict: a test that begins to pass fails until its mark is taken off.
"""

import pytest

from aftcli.errors import AftError

PENDING = {
    "tokens": "layers whose output is tokens: cut_classifier(vit, layer) and its maps",
    "structured": "the logits in an output of several tensors: the first",
    "binary": "one logit: cut_classifier(..., output='sigmoid') with classes 0 and 1",
    "probabilities": "outputs that are probabilities already are not put through softmax again",
    "channels": "inputs of one channel: the first convolution tells how many",
    "layers": "`--layer A --layer B` with `--model FILE.py:NAME`: maps of two layers, fused",
    "smooth": "`--smooth aug|eigen` with `--model FILE.py:NAME`",
    "convolution": "cam where a 1x1 convolution is the linear layer (core/cut.py::linear_head)",
    "layer types": "a layer given as a module, or as what is neither name nor module",
    "bool": "True and False in a list of classes are refused, as in a tensor of them",
}


def pending(key, *raises):
    """Mark a test that waits for a key of PENDING; by other errors it fails."""
    expected = raises or (AftError, AssertionError, TypeError, KeyError)
    return pytest.mark.xfail(strict=True, reason=PENDING[key], raises=expected)
