"""Methods that keep N:M under the contract: each of them with 2:4, and one with tiles."""

from collections.abc import Mapping
from typing import Any

import pytest

from sparse_callbacks import SET, SNFS, RigL, Static
from sparse_callbacks.testing import Settings, contract
from sparse_callbacks.testing.library import LIBRARY

pytestmark = pytest.mark.combinations

FIXED = {"any share": "N of M is one share for all layers, and those whose inputs do not divide stay dense"}


def settings(name: str, pattern: str, **more: Any) -> Settings:
    """Those of the library with a pattern, which says how sparse layers are."""
    given: Mapping[str, Any] = LIBRARY[name].arguments
    arguments = {key: value for key, value in given.items() if key != "sparsity"}
    return Settings(
        {**arguments, "pattern": pattern, **more}, promises_not_made={**LIBRARY[name].promises_not_made, **FIXED}
    )


TestTwoOfFourStatic = contract(Static, settings("Static", "2:4"))

TestTwoOfFourSET = contract(SET, settings("SET", "2:4"))

TestTwoOfFourRigL = contract(RigL, settings("RigL", "2:4"))

TestTwoOfFourSNFS = contract(SNFS, settings("SNFS", "2:4"))

TestTilesOfRigL = contract(RigL, settings("RigL", "transposable 2:4"))
