"""The contract of every method that has a yaml in conf/method/."""

import pytest
from support.methods import CONTRACTS, METHODS, method

import sparse_callbacks

pytestmark = pytest.mark.combinations

globals().update({f"Test_{name}": made for name, made in CONTRACTS.items()})


def test_methods_are_found() -> None:
    assert len(METHODS) >= 5
    assert all(isinstance(method(name), sparse_callbacks.SparsityCallback) for name in METHODS)
