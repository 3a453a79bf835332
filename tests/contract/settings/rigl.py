"""RigL under the contract."""

from typing import Any

from torch import Tensor

promises_not_made: dict[str, str] = {}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """Several updates in 16 steps, which move enough weights for some to come straight back."""
    return {"sparsity": sparsity, "every": 3, "stop": 14, "drop_fraction": 0.5, "print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """Gradients of pruned weights are zero before anybody reads them."""
    return dense_gradient * mask
