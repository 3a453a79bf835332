"""GMP under the contract."""

from typing import Any

from torch import Tensor

promises_not_made = {
    "growth": "what is pruned stays pruned",
}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """Several updates in 16 steps."""
    return {"sparsity": sparsity, "every": 3, "stop": 14, "print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """Gradients of pruned weights are zero before anybody reads them."""
    return dense_gradient * mask
