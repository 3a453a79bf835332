"""What pruning a layer by magnitude is taken to spoil, at each level of sparsity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_callbacks.core.ops import zeros_for


def magnitude_errors(weight: Tensor, levels: Sequence[float]) -> list[float]:
    """Share of a layer's squared weights that is removed at each level: the smallest floor(s * n) magnitudes go.

    For inputs x with uncorrelated entries of one variance v, the output W x changes by an expected squared norm of
    v * \\|\\|W - W_s\\|\\|^2, which is this share of its own, v * \\|\\|W\\|\\|^2. Layers whose outputs are normalised pass
    relative changes on, and to first order their squares add up if they are uncorrelated.

    Args:
        weight: the weight of one layer, of any shape.
        levels: sparsities in [0, 1).

    Returns:
        Numbers from 0 to 1, which ascend with the sparsity; all 0 where every weight is 0.

    >>> magnitude_errors(torch.tensor([1.0, -2.0, 0.0, 2.0]), [0.0, 0.5, 0.75])
    [0.0, 0.1111111111111111, 0.5555555555555556]
    """
    squares = weight.detach().to("cpu", torch.float64).flatten().square().sort().values
    removed = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    total = float(removed[-1])
    if not total:
        return [0.0] * len(levels)
    return [float(removed[zeros_for(s, len(squares))]) / total for s in levels]


def index_errors(levels: int) -> list[float]:
    """(i / (levels - 1))^2 for the level with index i: the error that SPDY gives every layer, before its coefficient.

    >>> index_errors(3)
    [0.0, 0.25, 1.0]
    """
    return [(i / max(1, levels - 1)) ** 2 for i in range(levels)]
