"""SET with the arguments of its papers under the contract: signs and random values, and neurons that go."""

from typing import Any

import pytest

from sparse_callbacks import SET
from sparse_callbacks.testing import Settings, contract

pytestmark = pytest.mark.combinations

SHORT: dict[str, Any] = {"sparsity": 0.8, "every": 3, "stop": 14, "drop_fraction": 0.5, "print_plan": False}
PUBLISHED: dict[str, Any] = {**SHORT, "drop": "signed", "new_weights": "uniform"}
AT_RANDOM = {"grown weights start from zero": "they are drawn from the uniform distribution of He's initialisation"}

TestPublishedSET = contract(SET, Settings(PUBLISHED, promises_not_made=AT_RANDOM))

TestRemovingSET = contract(
    SET,
    Settings(
        # neurons go at the updates of steps 4, 7, 10 and 13
        {**PUBLISHED, "neuron_importance": 0.2, "importance_start": 4, "importance_every": 3},
        promises_not_made={
            **AT_RANDOM,
            "planned counts": "active weights get fewer where neurons go",
            "any layer": "hidden neurons are those of linear layers",
        },
    ),
)
