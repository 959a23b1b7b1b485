"""What peers do and aft does not yet: the reasons, and the mark of tests that wait for it.

The marks are strict: a test that begins to pass fails until its mark is taken off.
"""

import pytest

from aftcli.errors import AftError

PENDING = {
    "target": "explain(..., target=callable): a scalar of the output in place of a class",
    "structured": "outputs that are no logits (dicts, lists): explain(..., target=callable)",
    "segmentation": "outputs (N, C, H, W): explain(..., target=callable)",
    "detection": "boxes, labels and scores: explain(..., target=callable)",
    "video": "Conv3d: maps (N, d, h, w) by attribution_map",
    "layers": "`--layer A --layer B` with `--model FILE.py:NAME`: maps of two layers, fused",
    "smooth": "`--smooth aug|eigen` with `--model FILE.py:NAME`",
    "finer": "Finer-CAM as the method finercam: contrast to the nearest classes",
    "convolution": "cam where a 1x1 convolution is the linear layer (cutting/cut.py::linear_head)",
}


def pending(key, *raises):
    """Mark a test that waits for a key of PENDING; by other errors it fails."""
    expected = raises or (AftError, AssertionError, TypeError, KeyError)
    return pytest.mark.xfail(strict=True, reason=PENDING[key], raises=expected)
