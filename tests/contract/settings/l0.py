"""Constrained L0 under the contract."""

from typing import Any

from torch import Tensor

promises_not_made = {
    "planned counts": "gates close until an expected density is met",
    "several updates": "gates move at every step",
    "growth": "gates open again by themselves",
    "pruned weights rest": "dense weights stand behind the gates",
    "updates at an interval": "gates move at every step",
}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """Nothing depends on the length of a run. It has a density in place of a sparsity."""
    return {"print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """Gates scale the gradient, which the tests of the method compare; the dense weights take the step."""
    return dense_gradient
