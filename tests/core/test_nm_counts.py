"""How many masks of N:M there are, and how often a group fits already: the numbers of a table."""

from itertools import combinations, product
from math import comb

import pytest

from sparse_callbacks.core.nm_counts import chance_of_nm, masks_of_tile


def test_masks_are_as_many_as_in_the_table() -> None:
    assert comb(16, 8) == 12870
    assert comb(64, 32) == 1832624140942590534
    assert masks_of_tile(2, 4, 4) == 1296
    assert masks_of_tile(2, 4, 4, transposable=True) == 90
    assert masks_of_tile(2, 4, 8) == 2821109907456
    assert masks_of_tile(4, 8, 8) == 576480100000000
    assert masks_of_tile(2, 4, 8, transposable=True) == 65610000
    assert masks_of_tile(4, 8, 8, transposable=True) == 116963796250


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (1, 2, 3, 4) for n in range(m + 1)])
def test_transposable_masks_are_as_many_as_rows_that_fit_together(n: int, m: int) -> None:
    rows = [[i in chosen for i in range(m)] for chosen in combinations(range(m), n)]
    found = sum(all(sum(column) == n for column in zip(*tile, strict=True)) for tile in product(rows, repeat=m))
    assert masks_of_tile(n, m, m, transposable=True) == found


def test_the_chance_of_a_group_is_that_of_the_table() -> None:
    assert chance_of_nm(0.7, 2, 4) == pytest.approx(0.9163, abs=1e-12)
    assert chance_of_nm(0.7, 4, 8) == pytest.approx(0.94203235, abs=1e-12)
    assert [chance_of_nm(s, 1, 4) for s in (0.0, 1.0)] == [0.0, 1.0]


def test_numbers_that_make_no_sense_are_refused() -> None:
    for n, m, size in ((2, 4, 6), (5, 4, 4), (-1, 4, 4), (2, 4, 0)):
        with pytest.raises(ValueError, match=r"such groups do not make up a tile of .* Give 0 <= n <= m"):
            masks_of_tile(n, m, size)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity=.* is not a fraction of zeros\. Give a number from 0 to 1"):
            chance_of_nm(share, 2, 4)
