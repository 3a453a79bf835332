"""Static masks under the contract."""

from typing import Any

from torch import Tensor

promises_not_made = {
    "several updates": "its masks never move",
    "growth": "its masks never move",
    "updates at an interval": "its masks never move",
}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """Nothing depends on the length of a run."""
    return {"sparsity": sparsity, "print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """Gradients of pruned weights are zero before anybody reads them."""
    return dense_gradient * mask
