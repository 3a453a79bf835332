"""The contract of every method that has a yaml in conf/method/."""

import pytest
from support.methods import CONTRACTS, METHODS, method

import sparse_callbacks

pytestmark = pytest.mark.combinations

# methods of one class that differ in their score alone share nearly all of their code: each case runs for one of them
SCORED = [name for name, made in CONTRACTS.items() if made.callback_class is sparse_callbacks.PruneAtStart]
for scored in SCORED:
    CONTRACTS[scored].pytestmark = [CONTRACTS[scored].pytestmark, pytest.mark.variants("PruneAtStart")]

globals().update({f"Test_{name}": made for name, made in CONTRACTS.items()})


def test_methods_are_found() -> None:
    assert len(METHODS) >= 5
    assert len(SCORED) >= 4
    assert all(isinstance(method(name), sparse_callbacks.SparsityCallback) for name in METHODS)
