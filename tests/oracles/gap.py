"""Worked numbers for GaP: pruning, partitions, calendars, one numeric cycle and the owners of a combination."""

from typing import Any

# weights, sparsity, threshold and mask of the released percentile rule, exact mask
PERCENTILE: list[tuple[list[float], float, float, list[int], list[int]]] = [
    (
        [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0],
        0.8,
        0.82,
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    ),
    ([0.1, -0.2, 0.3, -0.4, 0.5], 0.8, 0.42, [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]),
    (
        [-0.47, -0.37, -0.27, -0.17, -0.07, 0.03, 0.13, 0.23, 0.33, 0.43, 0.53],
        0.8,
        0.43,
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    ),
    (
        [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0],
        0.9,
        0.91,
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    ),
    (
        [0.0, 0.0, 0.0, 0.5, 0.0, -0.6, 0.7, 0.0, 0.9, 0.0],
        0.5,
        0.0,
        [0, 0, 0, 1, 0, 1, 1, 0, 1, 0],
        [1, 0, 0, 1, 0, 1, 1, 0, 1, 0],
    ),
    (
        [0.3, 0.3, 0.3, 0.3, 0.1, 0.1, 0.9, 0.9, 0.2, 0.2],
        0.5,
        0.3,
        [0, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 0, 0],
    ),
]

# where new partitions begin, layers, their indices in each partition
INDICES = [
    ("2-5", 8, [[0, 1], [2, 3, 4], [5, 6, 7]]),
    ("4", 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("2-4-6", 8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
]

# (partitions, rounds): for each phase its round, the partitions pruned at its start, dense and sparse in it; the last
# is fine-tuning
CYCLES: dict[tuple[int, int], list[tuple[int | None, list[int], list[int], list[int]]]] = {
    (2, 1): [
        (0, [1], [0], [1]),
        (0, [0], [1], [0]),
        (None, [1], [], [0, 1]),
    ],
    (3, 1): [
        (0, [1, 2], [0], [1, 2]),
        (0, [0], [1], [0, 2]),
        (0, [1], [2], [0, 1]),
        (None, [2], [], [0, 1, 2]),
    ],
    (4, 1): [
        (0, [1, 2, 3], [0], [1, 2, 3]),
        (0, [0], [1], [0, 2, 3]),
        (0, [1], [2], [0, 1, 3]),
        (0, [2], [3], [0, 1, 2]),
        (None, [3], [], [0, 1, 2, 3]),
    ],
    (3, 2): [
        (0, [1, 2], [0], [1, 2]),
        (0, [0], [1], [0, 2]),
        (0, [1], [2], [0, 1]),
        (1, [2], [0], [1, 2]),
        (1, [0], [1], [0, 2]),
        (1, [1], [2], [0, 1]),
        (None, [2], [], [0, 1, 2]),
    ],
}

# the dense partition in the released scripts: the first phase and two rounds of three partitions
RELEASED = [0, 1, 2, 0, 1, 2, 0]

# three partitions of one row; a step adds the increment and applies the masks
CYCLE_SPARSITY = 0.5
CYCLE_DENSE = [[0.1, -0.4, 0.3, 0.2], [-0.5, 0.05, 0.6, -0.1], [0.7, -0.2, 0.15, 0.25]]
CYCLE_START = [[0.0, -0.4, 0.3, 0.0], [-0.5, 0.0, 0.6, 0.0], [0.7, 0.0, 0.0, 0.25]]
CYCLE_INCREMENT = [[0.3, 0.0, -0.2, 0.1], [0.1, 0.4, 0.0, 0.0], [-0.6, 0.1, 0.3, 0.0]]
# masks and weights after each step, and after the last pruning
CYCLE_STEPS: list[tuple[list[list[int]], list[list[float]]]] = [
    ([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1]], [[0.3, -0.4, 0.1, 0.1], [-0.4, 0.0, 0.6, 0.0], [0.1, 0.0, 0.0, 0.25]]),
    (
        [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]],
        [[0.6, -0.4, 0.0, 0.0], [-0.3, 0.4, 0.6, 0.0], [-0.5, 0.0, 0.0, 0.25]],
    ),
    ([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], [[0.9, -0.4, 0.0, 0.0], [0.0, 0.8, 0.6, 0.0], [-1.1, 0.1, 0.3, 0.25]]),
    ([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]], [[0.9, -0.4, 0.0, 0.0], [0.0, 0.8, 0.6, 0.0], [-1.1, 0.0, 0.3, 0.0]]),
]

OWNERS = {
    "body.weight": 0,
    "body.bias": 0,
    "norm.weight": 0,
    "norm.running_mean": 0,
    "norm.num_batches_tracked": 0,
    "head.weight": 1,
    "head.bias": 1,
    "temperature": 0,
}
HELD = [["body", "norm"], ["head"]]
WORKERS: list[dict[str, Any]] = [
    {
        "body.weight": [1, 2],
        "body.bias": [0.5],
        "norm.weight": [1.1],
        "norm.running_mean": [0.3],
        "norm.num_batches_tracked": 7,
        "head.weight": [9, 9],
        "head.bias": [9],
        "temperature": [0.7],
    },
    {
        "body.weight": [8, 8],
        "body.bias": [8],
        "norm.weight": [8],
        "norm.running_mean": [8],
        "norm.num_batches_tracked": 8,
        "head.weight": [3, 4],
        "head.bias": [0.25],
        "temperature": [8],
    },
]
COMBINED: dict[str, Any] = {
    "body.weight": [1, 2],
    "body.bias": [0.5],
    "norm.weight": [1.1],
    "norm.running_mean": [0.3],
    "norm.num_batches_tracked": 7,
    "head.weight": [3, 4],
    "head.bias": [0.25],
    "temperature": [0.7],
}
