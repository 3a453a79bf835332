"""Grow-and-prune under the contract."""

from typing import Any

from torch import Tensor

promises_not_made = {
    "updates at an interval": "they end with its phases, of which there are as many as partitions in all rounds",
}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """Four phases of three steps, and fine-tuning."""
    return {"sparsity": sparsity, "every": 3, "partitions": 2, "rounds": 2, "print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """Gradients of pruned weights are zero before anybody reads them."""
    return dense_gradient * mask
