"""Networks as users write them are explained as plain PyTorch explains them, or refused."""

import pytest

from benchmarks.coverage.users import NETWORKS, checked

# What is not right yet: networks by name, and the reason.
KNOWN = {
    "volumes": "A needs two dimensions",
    "checkpointed": "its activations, computed again, are not those that a hook has replaced",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(reason=KNOWN[name])) if name in KNOWN else name
        for name in NETWORKS
    ],
)
def test_a_users_network_is_right(name):
    outcome = checked(NETWORKS[name])
    assert outcome.result == "right", outcome.why


def test_known_failures_are_networks():
    assert set(KNOWN) <= set(NETWORKS)
