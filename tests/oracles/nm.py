"""N of M along the inputs: tables of masks and of layers that fit, and slow updates in plain Python for any weight."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from torch import Tensor

from oracles.fan_in import best, moved

Place = tuple[int, ...]

# fmt: off
TWO_OF_FOUR: Any = {
    "weight": [
        [0.1, -0.9, 0.4, 0.3, 0.5, 0.5, -0.5, 0.1],
        [1.0, 0.2, -0.3, 0.25, -0.8, 0.7, 0.6, -0.75],
    ],
    "2:4": [[0, 1, 1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0, 0, 1]],
    "4:8": [[0, 1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1, 0, 1]],
    "sum of 2:4": 5.15,
    "sum of 4:8": 5.65,
}
CONVOLUTION: Any = {
    "weight": [[[[1.0, 9.0], [3.0, 1.0]], [[5.0, 1.0], [7.0, 7.0]], [[9.0, 8.0], [11.0, 2.0]], [[13.0, 2.0], [15.0, 6.0]]]],
    "2:4": [[[[0, 1], [0, 0]], [[0, 0], [0, 1]], [[1, 1], [1, 0]], [[1, 0], [1, 1]]]],
    # groups along the flattened kernel, which no hardware has
    "flattened": [[[[0, 1], [1, 0]], [[0, 0], [1, 1]], [[1, 0], [1, 0]], [[1, 0], [1, 0]]]],
}
# kind, stored shape, groups of the convolution, transposable; what does not divide, and zeros at 2:4
LAYERS: list[tuple[str, tuple[int, ...], int, bool, str, int]] = [
    ("linear", (8, 8), 1, False, "", 32),
    ("linear", (8, 6), 1, False, "input", 0),
    ("conv", (4, 4, 3, 3), 1, False, "", 72),
    ("conv", (4, 3, 3, 3), 1, False, "input", 0),
    ("conv", (4, 6, 2, 2), 1, False, "input", 0),
    ("conv", (8, 1, 3, 3), 8, False, "input", 0),
    ("conv", (8, 4, 3, 3), 2, False, "", 144),
    ("linear", (6, 8), 1, True, "output", 0),
    ("linear", (8, 12), 1, True, "", 48),
    ("conv", (6, 8, 1, 1), 1, True, "output", 0),
]
# one update: half of the 8 active weights of the layer leave, all of them from the last three groups
UPDATE: Any = {
    "weights": [
        [0.9, 0.0, -0.8, 0.0, 0.1, 0.7, 0.0, 0.0],
        [0.0, -0.2, 0.0, 0.6, 0.0, 0.0, 0.3, -0.4],
    ],
    "dense_gradient": [
        [0.0, 5.0, 0.0, 5.0, -0.3, 0.1, 0.2, 0.25],
        [0.5, -0.6, 0.4, 0.0, -0.1, 0.9, 0.7, -0.8],
    ],
    "2:4": [[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0, 1, 1]],
    # of the first group none has left; of the second 0.1, which comes straight back; of the third -0.2, likewise; the fourth
    # has lost both, and takes the two of its four with the largest gradients
    "mask_after": [[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1]],
}
# fmt: on


def groups(shape: tuple[int, ...], m: int, axis: int) -> Iterator[list[Place]]:
    """Places of each group, in the order of its inputs."""
    others = [range(size) if dim != axis else range(0, size, m) for dim, size in enumerate(shape)]
    for first in product(*others):
        yield [(*first[:axis], first[axis] + i, *first[axis + 1 :]) for i in range(m)]


def largest(scores: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Mask of the ``n`` largest of each group, of equal ones the lower inputs."""
    found = scores != scores
    for places in groups(tuple(scores.shape), m, axis):
        for i in best([float(scores[p]) for p in places], n, range(m)):
            found[places[i]] = True
    return found


def update(mask: Tensor, weights: Tensor, scores: Tensor, fraction: float, m: int, axis: int = 1) -> Tensor:
    """The mask after an update, weight by weight: the smallest of the layer leave, and each group grows as many as it has
    lost, by the magnitudes of ``scores``."""
    every = list(product(*map(range, mask.shape)))
    active = [i for i, p in enumerate(every) if mask[p]]
    kept = best([abs(float(weights[p])) for p in every], len(active) - moved(len(active), fraction), active)
    after = mask.clone().zero_()
    for i in kept:
        after[every[i]] = True
    for places in groups(tuple(mask.shape), m, axis):
        lost = sum(bool(mask[p]) and not after[p] for p in places)
        free = [i for i, p in enumerate(places) if not after[p]]
        for i in best([abs(float(scores[p])) for p in places], lost, free):
            after[places[i]] = True
    return after
