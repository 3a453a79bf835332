"""Methods with a constant fan-in of each row, and of sixteen rows together, under the contract."""

from typing import Any

import pytest

from sparse_callbacks import DPF, GMP, SET, SNFS, RigL, Static
from sparse_callbacks.testing import Settings, contract
from sparse_callbacks.testing.library import LIBRARY

pytestmark = pytest.mark.combinations

SHORT: dict[str, Any] = {"sparsity": 0.8, "every": 3, "stop": 14, "drop_fraction": 0.5, "print_plan": False}
SIXTEEN = {
    "any layer": "only linear layers have rows that share their inputs",
    "any share": "layers whose rows 16 does not divide stay dense",
}
# so few columns move only if there are some, and the last update moves its share of them too
MOVING = {**SHORT, "sparsity": 0.6, "drop_fraction": "constant(0.5)"}


def towards(name: str) -> Settings:
    """Settings of the library for a method that arrives at shared inputs."""
    known = LIBRARY[name]
    arguments = {**known.arguments, "pattern": "fan_in/16", "distribution": "uniform"}
    return Settings(arguments, known.gradients, {**known.promises_not_made, **SIXTEEN})


TestFanInRigL = contract(RigL, Settings({**SHORT, "pattern": "fan_in"}))

TestSharedFanInRigL = contract(RigL, Settings({**MOVING, "pattern": "fan_in/16"}, promises_not_made=SIXTEEN))

TestSharedFanInSET = contract(SET, Settings({**MOVING, "pattern": "fan_in/16"}, promises_not_made=SIXTEEN))

TestSharedFanInSNFS = contract(SNFS, Settings({**MOVING, "pattern": "fan_in/16"}, promises_not_made=SIXTEEN))

TestSharedFanInStatic = contract(
    Static,
    Settings(
        {"sparsity": 0.8, "print_plan": False, "pattern": "fan_in/16"},
        promises_not_made={**LIBRARY["Static"].promises_not_made, **SIXTEEN},
    ),
)

TestGMPTowardsSharedFanIn = contract(GMP, towards("GMP"))

TestDPFTowardsSharedFanIn = contract(DPF, towards("DPF"))

TestAblatingRigL = contract(
    RigL,
    Settings(
        {**SHORT, "pattern": "fan_in", "ablation": 0.95},
        promises_not_made={"planned counts": "the rows that are left cannot always share out all weights evenly"},
    ),
)
