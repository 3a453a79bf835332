"""Parallel grow-and-prune under the contract."""

from typing import Any

from torch import Tensor

promises_not_made = {
    "one network": "each worker trains a partition of its own",
    "several updates": "its phases are whole epochs, and there are two",
    "growth": "workers' networks are joined in place of that",
    "updates at an interval": "its phases are whole epochs",
}


def short_run(sparsity: float = 0.8) -> dict[str, Any]:
    """One round of two workers: its phases are whole epochs, and a short run has two."""
    return {"sparsity": sparsity, "partitions": 2, "rounds": 1, "print_plan": False}


def gradient_rule(mask: Tensor, dense_gradient: Tensor) -> Tensor:
    """Gradients of pruned weights are zero before anybody reads them."""
    return dense_gradient * mask
