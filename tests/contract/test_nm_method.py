"""NM with transposable masks, on a ramp, and with the soft projection under the contract."""

from collections.abc import Sequence
from typing import Any, Unpack

import pytest

from sparse_callbacks import NM, Options
from sparse_callbacks.testing import Settings, contract

pytestmark = pytest.mark.combinations

LEARNS_ON = {
    "any share": "N of M is one share for all layers",
    "growth": "pruned weights go on learning, so they come back by themselves",
    "pruned weights rest": "a dense copy takes the step",
}
SHORT: dict[str, Any] = {"every": 3, "decay": 0.0, "print_plan": False}

TestTransposableNM = contract(
    NM,
    Settings(
        {"pattern": "transposable 1:2", **SHORT},
        gradients="free",
        promises_not_made={**LEARNS_ON, "planned counts": "a tile may have room that no weight fills"},
    ),
)

TestRampingNM = contract(
    NM, Settings({"pattern": "1:2", "ramp": 6, **SHORT}, gradients="free", promises_not_made=LEARNS_ON)
)


class SoftNM(NM):
    """NM without the arguments that the soft projection does not have, which the cases would change."""

    def __init__(
        self,
        pattern: str = "1:2",
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(pattern, projection="soft", include=include, exclude=exclude, seed=seed, **options)


TestSoftNM = contract(
    SoftNM,
    Settings(
        {"print_plan": False},
        gradients="free",
        promises_not_made={
            **LEARNS_ON,
            "planned counts": "equal magnitudes all lie at the threshold",
            "several updates": "it moves in every step",
            "updates at an interval": "it moves in every step",
        },
    ),
)
