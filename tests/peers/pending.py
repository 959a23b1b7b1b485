"""Features of peers that aft lacks: the reasons, and the mark of tests that wait for them.

The marks are strict: a test that begins to pass fails until its mark is taken off.
"""

import pytest

from aftcli.errors import AftError

PENDING = {
    "convolution": "cam where a 1x1 convolution is the linear layer (core/head.py::linear_head)",
}


def pending(key, *raises):
    """Mark a test that waits for a key of PENDING; by other errors it fails."""
    expected = raises or (AftError, AssertionError, TypeError, KeyError)
    return pytest.mark.xfail(strict=True, reason=PENDING[key], raises=expected)
