"""DPF under the contract."""

from typing import Any

from torch import Tensor

promises_not_made = {
    "growth": "pruned weights go on learning, so they come back by themselves",
    "pruned weights rest": "a dense copy takes the step",
}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """Several updates in 16 steps."""
    return {"sparsity": sparsity, "every": 3, "stop": 14, "print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """The dense weights take the step, with the gradient of the pruned network."""
    return dense_gradient
