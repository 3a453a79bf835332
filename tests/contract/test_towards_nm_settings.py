"""GMP and DPF on their way to 2:4 under the contract."""

from typing import Any

import pytest

from sparse_callbacks import DPF, GMP
from sparse_callbacks.testing import Settings, contract
from sparse_callbacks.testing.library import LIBRARY

pytestmark = pytest.mark.combinations

FIXED = {"any share": "N of M is one share for all layers, and those whose inputs do not divide stay dense"}


def towards(name: str) -> Settings:
    """Settings of the library for a method that arrives at 2:4."""
    known = LIBRARY[name]
    arguments: dict[str, Any] = {k: v for k, v in known.arguments.items() if k != "sparsity"} | {"pattern": "2:4"}
    return Settings(arguments, known.gradients, {**known.promises_not_made, **FIXED})


TestGMPTowardsTwoOfFour = contract(GMP, towards("GMP"))

TestDPFTowardsTwoOfFour = contract(DPF, towards("DPF"))
