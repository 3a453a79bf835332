"""Sparsity of a network by its masks: of the whole network and of each parameter."""

from collections.abc import Sequence

from sparse_callbacks.core.weights import SparseWeights


def joint_sparsity(weights: Sequence[SparseWeights], model_size: int) -> dict[str, float]:
    """``sparsity/total`` over all weights under a mask and ``sparsity/model`` over all parameters of the model.

    Args:
        weights: the sparse weights of every method of the model.
        model_size: the number of all parameters of the model.
    """
    size = sum(w.size_of_all for w in weights)
    zeros = size - sum(sum(w.active_counts.values()) for w in weights)
    return {"sparsity/total": zeros / size, "sparsity/model": zeros / model_size}


def layer_sparsity(weights: SparseWeights) -> dict[str, float]:
    """``sparsity/<parameter>`` for each sparse parameter."""
    counts = weights.active_counts
    sizes = {name: weights.size(name) for name in weights.masks}
    return {f"sparsity/{name}": (size - counts[name]) / size for name, size in sizes.items()}
