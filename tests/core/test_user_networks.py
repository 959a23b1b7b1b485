"""Networks as users write them are explained as plain PyTorch explains them, or refused."""

import pytest

from benchmarks.coverage.users import NETWORKS, checked


@pytest.mark.parametrize("name", NETWORKS)
def test_a_users_network_is_right(name):
    outcome = checked(NETWORKS[name])
    assert outcome.result == "right", outcome.why
