"""Counts of N:M: how many masks a tile can have, and how often a pruned group fits already."""

from collections import Counter
from functools import cache
from itertools import combinations
from math import comb, prod


def masks_of_tile(n: int, m: int, size: int, transposable: bool = False) -> int:
    """How many masks with exactly N of M a tile of ``size`` x ``size`` weights can have (mask diversity, Hubara et al., 2021).

    Args:
        n: active weights of a group.
        m: weights of a group; it divides ``size``.
        size: rows and columns of the tile.
        transposable: whether the columns have N of M too.

    Raises:
        ValueError: ``m`` does not divide ``size``, or ``n`` is not from 0 to ``m``.

    >>> masks_of_tile(2, 4, size=4), masks_of_tile(2, 4, size=4, transposable=True)
    (1296, 90)
    """
    if m < 1 or size < m or size % m or not 0 <= n <= m:
        raise ValueError(
            f"n={n}, m={m}: such groups do not make up a tile of {size} x {size}. Give 0 <= n <= m, and a size that m divides."
        )
    groups = size // m
    if transposable:
        return prod([_matrices(m, (n,) * m, n)] * (groups * groups))
    return prod([comb(m, n)] * (size * groups))


@cache
def _matrices(rows: int, room: tuple[int, ...], n: int) -> int:
    """Matrices of 0 and 1 whose ``rows`` have ``n`` ones each, and whose columns have as many as they have ``room``."""
    if not rows:
        return int(not any(room))
    found: Counter[tuple[int, ...]] = Counter()
    for chosen in combinations(range(len(room)), n):
        left = tuple(free - (i in chosen) for i, free in enumerate(room))
        if min(left) >= 0:
            found[tuple(sorted(left))] += 1  # columns in another order have as many matrices
    return sum(count * _matrices(rows - 1, left, n) for left, count in found.items())


def chance_of_nm(sparsity: float, n: int, m: int) -> float:
    """The probability that a group of M has at most N weights that are not zero.

    Args:
        sparsity: the probability of each weight to be zero, independent of the others.
        n: the most weights of a group that are not zero.
        m: weights of a group.

    Raises:
        ValueError: ``sparsity`` is not from 0 to 1.

    >>> round(chance_of_nm(0.7, 2, 4), 4)
    0.9163
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(
            f"sparsity={sparsity!r} is not a fraction of zeros. Give a number from 0 to 1, such as 0.7 for 70 % zeros."
        )
    return sum(comb(m, k) * (1 - sparsity) ** k * sparsity ** (m - k) for k in range(n + 1))
