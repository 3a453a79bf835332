"""Shared fan-in: a table worked by hand for one update, and slow updates in plain Python for any input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# fmt: off
UPDATE: Any = {
    "weights": [
        [0.0, -0.12, 0.0, -0.52, 0.74, 0.0, 0.56, 0.0],
        [0.0, -0.15, 0.0, -0.38, -1.0, 0.0, 0.33, 0.0],
        [0.0, 0.96, 0.93, -0.83, 0.0, 0.0, 0.0, 0.49],
        [0.0, 0.73, 0.51, 0.59, 0.0, 0.0, 0.0, -0.39],
        [0.0, 0.0, 0.4, 0.41, 0.67, 0.0, -0.43, 0.0],
        [0.0, 0.0, 0.17, -0.47, 0.6, 0.0, -0.1, 0.0],
    ],
    "dense_gradient": [
        [-0.58, 0.5, 0.68, -0.83, 0.56, 0.94, -0.43, -0.26],
        [0.38, -0.23, -0.06, 0.54, 0.93, -0.78, 0.55, -0.1],
        [-0.69, 0.85, 0.48, 0.47, -0.33, 0.46, -0.52, 0.63],
        [0.09, 0.77, 0.14, 0.27, 0.19, -0.96, -0.08, 0.74],
        [0.35, 0.87, 0.62, -0.49, 0.51, 0.45, 0.9, 0.3],
        [0.86, 0.28, -0.98, -0.99, 0.21, 0.2, 0.05, 0.4],
    ],
    "momentum": [
        [1.61, 0.36, -0.01, 0.46, -0.42, -0.22, -0.07, -0.75],
        [-0.47, 2.62, 0.46, 1.96, 1.93, 0.41, -0.91, 1.16],
        [-0.63, 0.03, -0.43, -0.88, -0.49, 1.21, -0.93, 1.16],
        [0.01, -0.16, 0.16, 0.92, -0.01, -0.07, 0.23, 0.29],
        [-0.08, 0.33, 0.58, -0.03, -0.31, 0.34, -1.29, -0.78],
        [0.47, 0.04, 0.67, -1.74, -0.16, 0.03, -0.5, 0.82],
    ],
    "mask": [
        [0, 1, 0, 1, 1, 0, 1, 0],
        [0, 1, 0, 1, 1, 0, 1, 0],
        [0, 1, 1, 1, 0, 0, 0, 1],
        [0, 1, 1, 1, 0, 0, 0, 1],
        [0, 0, 1, 1, 1, 0, 1, 0],
        [0, 0, 1, 1, 1, 0, 1, 0],
    ],
    "group": 2,
    "drop_fraction": 0.5,
    "columns_kept": [[3, 4], [1, 2], [3, 4]],
    "columns_grown": [[5, 6], [5, 7], [0, 2]],
    "mask_after": [
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 0, 1],
        [0, 1, 1, 0, 0, 1, 0, 1],
        [1, 0, 1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 0, 0],
    ],
    "effective_weights_after": [
        [0.0, 0.0, 0.0, -0.52, 0.74, 0.0, 0.56, 0.0],
        [0.0, 0.0, 0.0, -0.38, -1.0, 0.0, 0.33, 0.0],
        [0.0, 0.96, 0.93, 0.0, 0.0, 0.0, 0.0, 0.49],
        [0.0, 0.73, 0.51, 0.0, 0.0, 0.0, 0.0, -0.39],
        [0.0, 0.0, 0.4, 0.41, 0.67, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.17, -0.47, 0.6, 0.0, 0.0, 0.0],
    ],
    "momentum_after": [
        [1.61, 0.36, -0.01, 0.46, -0.42, 0.0, -0.07, -0.75],
        [-0.47, 2.62, 0.46, 1.96, 1.93, 0.0, -0.91, 1.16],
        [-0.63, 0.03, -0.43, -0.88, -0.49, 0.0, -0.93, 1.16],
        [0.01, -0.16, 0.16, 0.92, -0.01, 0.0, 0.23, 0.29],
        [0.0, 0.33, 0.58, -0.03, -0.31, 0.34, -1.29, -0.78],
        [0.0, 0.04, 0.67, -1.74, -0.16, 0.03, -0.5, 0.82],
    ],
}
# fmt: on


def moved(active: int, fraction: float) -> int:
    """Of ``active`` columns those that an update replaces."""
    return int(torch.tensor(active, dtype=torch.float32) * torch.tensor(fraction, dtype=torch.float32))


def best(scores: Sequence[float], count: int, among: Sequence[int]) -> list[int]:
    """The ``count`` of ``among`` with the largest scores; of equal ones the lower."""
    return sorted(sorted(among, key=lambda i: (-scores[i], i))[:count])


def update(
    mask: Tensor,
    weights: Tensor,
    fraction: float,
    group: int,
    gradient: Tensor | None = None,
    numbers: Tensor | None = None,
    candidates: float | None = None,
) -> Tensor:
    """The mask after an update, block by block and column by column.

    Args:
        mask: the mask before it.
        weights: the weights.
        fraction: the share of columns that it replaces.
        group: the rows of a block.
        gradient: the dense gradient; None: columns come by chance.
        numbers: a random number for each column of each block, where chance has a part.
        candidates: columns that may come, for each active one; None: all.
    """
    after, inputs = torch.zeros_like(mask), range(mask.shape[1])
    for block in range(len(mask) // group):
        rows = range(block * group, (block + 1) * group)
        before = [c for c in inputs if mask[rows[0], c]]
        count = moved(len(before), fraction)
        stays = [sum(abs(float(weights[r, c])) for r in rows) for c in inputs]
        kept = best(stays, len(before) - count, before)
        free = [c for c in inputs if c not in kept]
        chances = [] if numbers is None else numbers[block].tolist()
        if candidates is not None:
            free = best(chances, max(count, int(candidates * len(before))), free)
        comes = chances if gradient is None else [sum(abs(float(gradient[r, c])) for r in rows) for c in inputs]
        for c in kept + best(comes, count, free):
            after[rows.start : rows.stop, c] = True
    return after
