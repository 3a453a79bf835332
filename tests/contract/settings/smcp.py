"""SMCP under the contract."""

from typing import Any

from torch import Tensor

promises_not_made = {
    "planned counts": "its budget decides how many channels go",
    "growth": "pruned channels go on learning, so they come back by themselves",
    "pruned weights rest": "a dense copy takes the step",
}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """Several solves in 16 steps; the networks of the contract have few channels. It has a budget in place of a
    sparsity."""
    return {"budget": 0.6, "round_to": 1, "start": 1, "prune_stem": True, "every": 3, "stop": 14, "print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """The dense weights take the step, with the gradient of the pruned network."""
    return dense_gradient
