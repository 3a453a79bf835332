"""Constant fan-in: tables worked by hand for one update, and a slow update in plain Python for any input."""

from typing import Any

import torch
from torch import Tensor

# fmt: off
TABLES: dict[str, Any] = {
    "with ablation": {
        "weights": [
            [-0.46, -0.55, 0.0, -0.39, 0.07, 0.0, 0.0, 0.57],
            [0.18, -0.83, 0.85, 0.0, -0.51, 0.0, 0.22, 0.0],
            [0.0, -0.63, 0.0, 0.06, -0.19, 0.0, -0.84, -0.76],
            [0.0, 0.0, -0.042, -0.192, -0.216, 0.102, 0.207, 0.0],
            [0.95, 0.0, 0.4, 0.24, -0.82, 0.0, 0.0, -0.62],
            [-0.8, 0.81, 0.0, 0.47, 0.0, 0.09, 0.41, 0.0],
        ],
        "dense_gradient": [
            [0.56, -0.08, -0.74, 0.05, 0.53, 0.47, 0.87, 0.21],
            [-0.78, -0.64, -0.31, -0.43, 0.76, -0.61, 0.07, 0.55],
            [0.65, 0.51, 0.24, 0.46, 0.79, -0.77, 0.92, 0.14],
            [0.066, -0.279, -0.105, 0.117, -0.189, 0.039, 0.267, -0.075],
            [0.91, -0.59, -0.72, 0.1, 0.18, 0.8, -0.88, -0.17],
            [-0.73, -0.71, -0.6, -0.5, 0.32, 0.68, 0.3, -0.95],
        ],
        "mask": [
            [1, 1, 0, 1, 1, 0, 0, 1],
            [1, 1, 1, 0, 1, 0, 1, 0],
            [0, 1, 0, 1, 1, 0, 1, 1],
            [0, 0, 1, 1, 1, 1, 1, 0],
            [1, 0, 1, 1, 1, 0, 0, 1],
            [1, 1, 0, 1, 0, 1, 1, 0],
        ],
        "drop_fraction": 0.3,
        "ablation": 0.5,
        "kept": [
            [1, 1, 0, 1, 0, 0, 0, 1],
            [0, 1, 1, 0, 1, 0, 1, 0],
            [0, 1, 0, 0, 0, 0, 1, 1],
            [0, 0, 0, 0, 1, 0, 0, 0],
            [1, 0, 1, 1, 1, 0, 0, 1],
            [1, 1, 0, 1, 0, 0, 1, 0],
        ],
        "moved": 9,
        "salient": [6, 5, 5, 1, 7, 6],
        "needed": 2.5,
        "ablated_rows": [3],
        "fan_in": 6,
        "mask_after": [
            [1, 1, 1, 1, 0, 0, 1, 1],
            [1, 1, 1, 0, 1, 1, 1, 0],
            [1, 1, 0, 0, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 1, 1, 1, 0, 1, 1],
            [1, 1, 0, 1, 0, 1, 1, 1],
        ],
        "effective_weights_after": [
            [-0.46, -0.55, 0.0, -0.39, 0.0, 0.0, 0.0, 0.57],
            [0.18, -0.83, 0.85, 0.0, -0.51, 0.0, 0.22, 0.0],
            [0.0, -0.63, 0.0, 0.0, -0.19, 0.0, -0.84, -0.76],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.95, 0.0, 0.4, 0.24, -0.82, 0.0, 0.0, -0.62],
            [-0.8, 0.81, 0.0, 0.47, 0.0, 0.09, 0.41, 0.0],
        ],
    },
    "ablation rounds down": {
        "weights": [
            [0.27, 0.0, -0.8, 0.0, -0.75, 0.0, -0.16, 0.0],
            [0.05, 0.0, 0.0, 0.25, 0.0, 0.0, -0.4, 0.45],
            [0.0, 0.0, 0.87, 0.5, 0.0, 0.99, 0.0, -0.65],
            [0.86, 0.53, 0.0, 0.0, -0.29, 0.0, -0.3, 0.0],
            [0.0, 0.0, -0.246, 0.099, 0.117, -0.105, 0.0, 0.0],
            [0.0, -0.2, 0.0, 0.0, 0.26, 0.0, 0.97, 0.64],
        ],
        "dense_gradient": [
            [0.72, 0.43, 0.47, 0.85, -0.42, -0.3, 0.2, 0.38],
            [0.84, 0.32, 0.98, -0.41, 0.15, -0.27, -0.09, 0.46],
            [-0.66, 0.16, 0.68, -0.39, -0.71, 0.49, -0.17, -0.19],
            [0.91, -0.07, 0.18, -0.45, 0.23, -0.82, -0.24, 0.67],
            [-0.243, 0.279, 0.156, -0.078, 0.099, -0.219, -0.27, -0.267],
            [-0.4, 0.63, 0.75, -0.78, 0.29, -0.14, -0.86, 0.61],
        ],
        "mask": [
            [1, 0, 1, 0, 1, 0, 1, 0],
            [1, 0, 0, 1, 0, 0, 1, 1],
            [0, 0, 1, 1, 0, 1, 0, 1],
            [1, 1, 0, 0, 1, 0, 1, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 1, 0, 0, 1, 0, 1, 1],
        ],
        "drop_fraction": 0.4,
        "ablation": 0.6,
        "kept": [
            [1, 0, 1, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 1],
            [0, 0, 1, 1, 0, 1, 0, 1],
            [1, 1, 0, 0, 1, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 1],
        ],
        "moved": 9,
        "salient": [4, 4, 6, 6, 0, 4],
        "needed": 2.4,
        "ablated_rows": [4],
        "fan_in": 4,
        "mask_after": [
            [1, 0, 1, 1, 1, 0, 0, 0],
            [1, 0, 1, 0, 0, 0, 1, 1],
            [0, 0, 1, 1, 0, 1, 0, 1],
            [1, 1, 0, 0, 1, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 1, 1],
        ],
        "effective_weights_after": [
            [0.27, 0.0, -0.8, 0.0, -0.75, 0.0, 0.0, 0.0],
            [0.05, 0.0, 0.0, 0.0, 0.0, 0.0, -0.4, 0.45],
            [0.0, 0.0, 0.87, 0.5, 0.0, 0.99, 0.0, -0.65],
            [0.86, 0.53, 0.0, 0.0, -0.29, 0.0, -0.3, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.97, 0.64],
        ],
    },
    "without ablation": {
        "weights": [
            [0.47, 0.0, -0.06, 0.0, 0.52, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 1.0, -0.49, 0.0, 0.72],
            [0.4, 0.0, 0.0, 0.0, 0.0, 0.0, -0.32, -0.91],
            [0.0, 0.0, 0.0, -0.46, -0.45, 0.0, 0.0, -0.88],
            [0.21, 0.0, -0.24, 0.0, 0.0, 0.73, 0.0, 0.0],
            [0.5, 0.0, 0.56, -0.63, 0.0, 0.0, 0.0, 0.0],
        ],
        "dense_gradient": [
            [0.62, 0.47, 0.89, 0.09, 0.46, -0.53, -0.42, -0.41],
            [0.38, 0.25, 0.69, -0.85, 0.32, 0.63, 0.97, 0.9],
            [0.91, -0.95, 0.49, 0.99, 0.17, -0.18, 0.74, 0.51],
            [0.19, 0.16, -0.52, 0.96, -0.43, -0.26, -0.77, 0.67],
            [0.44, 0.93, -0.35, -1.0, 0.13, -0.72, 0.21, -0.3],
            [0.64, -0.36, -0.75, -0.68, -0.54, -0.92, -0.39, -0.2],
        ],
        "mask": [
            [1, 0, 1, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 1],
            [1, 0, 0, 0, 0, 0, 1, 1],
            [0, 0, 0, 1, 1, 0, 0, 1],
            [1, 0, 1, 0, 0, 1, 0, 0],
            [1, 0, 1, 1, 0, 0, 0, 0],
        ],
        "drop_fraction": 0.4,
        "ablation": None,
        "kept": [
            [1, 0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 1, 0, 0],
            [1, 0, 1, 1, 0, 0, 0, 0],
        ],
        "moved": 7,
        "salient": [2, 4, 3, 2, 3, 4],
        "needed": 1.0,
        "ablated_rows": [],
        "fan_in": 3,
        "mask_after": [
            [1, 0, 1, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 1],
            [0, 1, 0, 1, 0, 0, 0, 1],
            [0, 0, 0, 1, 0, 0, 1, 1],
            [0, 1, 0, 1, 0, 1, 0, 0],
            [1, 0, 1, 1, 0, 0, 0, 0],
        ],
        "effective_weights_after": [
            [0.47, 0.0, -0.06, 0.0, 0.52, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 1.0, -0.49, 0.0, 0.72],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.91],
            [0.0, 0.0, 0.0, -0.46, 0.0, 0.0, 0.0, -0.88],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.73, 0.0, 0.0],
            [0.5, 0.0, 0.56, -0.63, 0.0, 0.0, 0.0, 0.0],
        ],
    },
}
# fmt: on


def moved(planned: int, fraction: float) -> int:
    """Of ``planned`` active weights those that an update replaces."""
    return int(torch.tensor(planned, dtype=torch.float32) * torch.tensor(fraction, dtype=torch.float32))


def best(scores: dict[tuple[int, int], float], count: int) -> set[tuple[int, int]]:
    """The ``count`` positions with the largest scores by magnitude; of equal ones the lower."""
    return set(sorted(scores, key=lambda at: (-abs(scores[at]), at))[:count])


def update(
    mask: Tensor, weights: Tensor, grow: Tensor, planned: int, fraction: float, ablation: float | None
) -> tuple[Tensor, list[int]]:
    """The mask after an update, position by position, and the rows that it has left out.

    Args:
        mask: the mask before it, outputs by inputs.
        weights: the weights.
        grow: the scores to come.
        planned: planned active weights.
        fraction: the share of them that the update replaces.
        ablation: the share of the planned fan-in that a row must have in salient weights; None: any.
    """
    rows, columns = mask.shape
    everywhere = [(r, c) for r in range(rows) for c in range(columns)]
    active = [at for at in everywhere if mask[at]]
    count = moved(planned, fraction)
    kept = best({at: float(weights[at]) for at in active}, min(len(active), planned - count))
    hopeful = best({at: float(grow[at]) for at in everywhere if at not in kept}, count)
    salient = [sum(r == row for r, _ in kept | hopeful) for row in range(rows)]
    gone = [r for r in range(rows) if ablation is not None and salient[r] < max(1, ablation * planned / rows - 1e-9)]
    fan_in = min(columns, planned // (rows - len(gone)))
    after = torch.zeros_like(mask)
    for row in (r for r in range(rows) if r not in gone):
        own = best({at: float(weights[at]) for at in kept if at[0] == row}, fan_in)
        come = best({(row, c): float(grow[row, c]) for c in range(columns) if (row, c) not in own}, fan_in - len(own))
        for at in own | come:
            after[at] = True
    return after, gone


def fan_ins(rows: Tensor) -> list[int]:
    """The active weights of each row of a mask."""
    counts: list[int] = rows.sum(1).tolist()
    return counts
