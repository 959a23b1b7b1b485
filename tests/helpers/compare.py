"""Comparisons of the tests."""

import torch


def uncut(f, model):
    """Give a fresh model the weights of a cut one; the parts hold them under the same names."""
    weights = {name.split(".", 1)[1]: value for name, value in f.state_dict().items()}
    missing, foreign = model.load_state_dict(weights, strict=False, assign=True)
    assert not foreign
    # An auxiliary head runs in training only, so no part of the cut network holds it.
    assert all(name.startswith("AuxLogits.") for name in missing)
    return model.eval()


def assert_near(actual, expected, tolerance=1e-9):
    """Check equality within a tolerance, relative to the largest expected magnitude."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    largest = expected.abs().max().item() or 1.0
    error = (actual - expected).abs().max().item() / largest
    assert error <= tolerance, f"differs by {error:g} of the largest value"
