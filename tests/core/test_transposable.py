"""Transposable masks: tables worked by hand, brute force over all masks of a tile, and properties over shapes."""

import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from sparse_callbacks.core import transposable
from sparse_callbacks.core.nm_counts import masks_of_tile
from sparse_callbacks.core.transposable import in_tiles, maximal_tiles, out_of_tiles, transposable_mask

BLOCK = [[8.0, 9.0, 16.0, 2.0], [14.0, 12.0, 15.0, 4.0], [11.0, 6.0, 10.0, 1.0], [3.0, 7.0, 13.0, 5.0]]
DEAD_END = [[3.0, 7.0, 5.0, 8.0], [9.0, 9.0, 7.0, 4.0], [9.0, 6.0, 7.0, 8.0], [9.0, 4.0, 1.0, 8.0]]
TWO_TILES_OF_4 = [
    [-1, -13, -14, 8, 560, 328, -216, 882],
    [-5, -7, 15, 10, -446, -497, 264, 480],
    [3, 2, -4, 12, 32, -186, -48, -14],
    [9, 11, -16, 6, -92, -762, -2, -373],
]
TWO_TILES_OF_8 = [
    [60, -44, -57, -59, -12, 45, 8, 15, -209, -10, -83, 2, 168, -518, -83, -412],
    [-43, -11, -38, -37, 10, -55, -30, 50, -29, -533, 666, -1, 364, -771, 2, 826],
    [61, 64, -51, 24, 33, -42, 29, -53, -773, 168, -295, 206, -631, 314, -143, 413],
    [2, -14, 9, -58, -34, 28, -35, -19, -534, -28, -104, 210, -241, 979, -6, -588],
    [-26, 62, -23, -31, -3, 1, 49, 40, 517, 54, 88, -25, -22, 674, 283, -329],
    [-56, 27, 13, 7, 17, -54, 63, -41, -643, 552, -889, -125, 12, -124, 112, -858],
    [36, -6, -4, -16, 20, 18, 48, -52, 1, -884, 300, 345, 505, 103, -15, -497],
    [-22, 5, 46, -32, -39, 25, -47, -21, 613, -733, -2, 356, -107, 162, -13, 195],
]


def sums_by_tile(weight: Tensor, mask: Tensor, m: int) -> list[float]:
    return [float(t.sum()) for t in in_tiles(weight.abs() * mask, m)]


def test_one_tile_has_the_masks_of_the_table() -> None:
    block = torch.tensor(BLOCK)
    best, greedy = transposable_mask(block, 2, 4), transposable_mask(block, 2, 4, method="greedy")
    assert best.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]
    assert greedy.int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1]]
    assert [float((block * mask).sum()) for mask in (best, greedy)] == [81.0, 78.0]


def test_the_greedy_choice_stops_where_nothing_has_room() -> None:
    block = torch.tensor(DEAD_END)
    greedy = transposable_mask(block, 2, 4, method="greedy")
    assert greedy.int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]]
    assert (int(greedy.sum()), float((block * greedy).sum())) == (7, 51.0)
    best = transposable_mask(block, 2, 4)
    assert float((block * best).sum()) == 64.0
    assert 51.0 / 64.0 == 0.796875


def test_two_tiles_of_4_have_the_masks_of_the_table() -> None:
    weight = torch.tensor(TWO_TILES_OF_4, dtype=torch.float32)
    best = transposable_mask(weight.abs(), 2, 4)
    assert best.int().tolist() == [
        [0, 1, 1, 0, 1, 0, 0, 1],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 0, 1],
    ]
    # seven weights of the second tile are worth more than the best eight with exactly two each, 3521
    assert sums_by_tile(weight, best, 4) == [87.0, 3568.0]
    greedy = transposable_mask(weight.abs(), 2, 4, method="greedy")
    assert greedy.int().tolist() == [
        [1, 1, 0, 0, 1, 0, 0, 1],
        [0, 0, 1, 1, 0, 1, 0, 1],
        [1, 0, 0, 1, 0, 0, 1, 0],
        [0, 1, 1, 0, 1, 1, 0, 0],
    ]
    assert sums_by_tile(weight, greedy, 4) == [81.0, 3321.0]


def test_two_tiles_of_8_have_the_masks_of_the_table() -> None:
    weight = torch.tensor(TWO_TILES_OF_8, dtype=torch.float32)
    greedy = transposable_mask(weight.abs(), 4, 8)
    assert greedy.int().tolist() == [
        [1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
        [1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1],
        [1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1],
        [0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1],
        [0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1],
        [0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0],
    ]
    assert sums_by_tile(weight, greedy, 8) == [1419.0, 15770.0]
    pytest.importorskip("scipy")
    best = transposable_mask(weight.abs(), 4, 8, method="exact")
    assert best.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1],
        [1, 1, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1],
        [0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0],
    ]
    assert sums_by_tile(weight, best, 8) == [1452.0, 16065.0]


# ---------------------------------------------------------------------- against simple searches


def all_masks(n: int, m: int) -> Tensor:
    """Every mask of a tile with at most ``n`` in each row and column: [masks, M * M], bool."""
    rows = torch.tensor([row for row in product((0, 1), repeat=m) if sum(row) <= n])
    tiles = rows[torch.cartesian_prod(*[torch.arange(len(rows))] * m)]
    return tiles[(tiles.sum(1) <= n).all(1)].flatten(1).bool()


def largest_first(tile: list[list[float]], n: int) -> list[list[int]]:
    """The greedy choice, place by place."""
    m = len(tile)
    mask = [[0] * m for _ in range(m)]
    for place in sorted(range(m * m), key=lambda p: -tile[p // m][p % m]):
        row, column = divmod(place, m)
        if sum(mask[row]) < n and sum(line[column] for line in mask) < n:
            mask[row][column] = 1
    return mask


def has_room(tiles: Tensor, n: int) -> Tensor:
    """Whether a place of each tile could be active besides the others: bool [tiles]."""
    return ((tiles.sum(2) < n)[:, :, None] & (tiles.sum(1) < n)[:, None, :] & ~tiles).flatten(1).any(1)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_the_exact_mask_is_the_first_of_the_best_that_brute_force_finds(n: int, m: int) -> None:
    source = torch.Generator().manual_seed(m)
    # whole numbers: many sums are equal
    weight = torch.randint(0, 6, (3 * m, 5 * m), generator=source).float()
    masks = all_masks(n, m)
    # a number for each mask in which an earlier place weighs more than all later ones
    order = (masks * 2 ** torch.arange(m * m - 1, -1, -1)).sum(1)
    full = ~has_room(masks.view(-1, m, m), n)
    for tile, found in zip(in_tiles(weight, m), in_tiles(transposable_mask(weight, n, m), m), strict=True):
        sums = (masks * tile.flatten()).sum(1)
        best = (sums == sums.max()) & full
        assert torch.equal(masks[torch.where(best, order, -1).argmax()], found.flatten())


def test_the_tiles_that_are_tried_are_all_that_have_no_room() -> None:
    assert [len(maximal_tiles(n, 4)) for n in (1, 2, 3)] == [24, 186, 184]
    for n in (1, 2, 3):
        masks = all_masks(n, 4)
        full = {tuple(mask) for mask in masks[~has_room(masks.view(-1, 4, 4), n)].tolist()}
        assert {tuple(mask.tolist()) for mask in maximal_tiles(n, 4)} == full
        exactly = [t for t in maximal_tiles(n, 4).view(-1, 4, 4) if (t.sum(0) == n).all()]
        assert len(exactly) == masks_of_tile(n, 4, 4, transposable=True)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (2, 5), (3, 6), (4, 8)])
def test_the_greedy_mask_takes_the_largest_first(n: int, m: int) -> None:
    weight = torch.randint(0, 9, (2 * m, 6 * m), generator=torch.Generator().manual_seed(0)).float()
    masks = in_tiles(transposable_mask(weight, n, m, method="greedy"), m)
    for tile, mask in zip(in_tiles(weight, m), masks, strict=True):
        assert mask.int().tolist() == largest_first(tile.tolist(), n)


def test_a_linear_programme_finds_as_much_as_trying_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    source = torch.Generator().manual_seed(2)
    weight = torch.rand(16, 20, generator=source) * torch.tensor([1.0, 1e-6, 1e-3, 1e4]).repeat_interleave(4)[:, None]
    weight[:4, :4] = 0.0
    tried = transposable_mask(weight, 2, 4)
    monkeypatch.setattr(transposable, "_TRIED", 3)
    monkeypatch.setattr(transposable, "_TILES_OF_A_PROGRAMME", 7)
    assert torch.equal(transposable_mask(weight, 2, 4, method="exact"), tried)


def test_one_of_each_row_and_column_is_an_assignment() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    weight = torch.rand(12, 18, generator=torch.Generator().manual_seed(3))
    masks = in_tiles(transposable_mask(weight, 1, 6, method="exact"), 6)
    for tile, mask in zip(in_tiles(weight, 6), masks, strict=True):
        rows, columns = optimize.linear_sum_assignment(tile.numpy(), maximize=True)
        assert mask.nonzero().tolist() == [[int(r), int(c)] for r, c in zip(rows, columns, strict=True)]


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("shape", [(8, 12), (4, 4, 3, 3), (12, 8, 2), (8, 4, 1, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_row_and_column_of_every_tile_has_at_most_n(method: str, shape: tuple[int, ...], axis: int) -> None:
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))
    for n in (1, 2, 3):
        mask = transposable_mask(weight, n, 4, axis=axis, method=method)
        assert (mask.shape, mask.dtype) == (weight.shape, torch.bool)
        # along both axes, at every position of the kernel: sums over groups of four
        for along in (0, 1):
            groups = mask.movedim(along, -1).unflatten(-1, (-1, 4)).sum(-1)
            assert int(groups.max()) <= n
        assert not has_room(in_tiles(mask, 4, axis), n).any()


@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_a_convolution_is_tiled_at_each_position_of_its_kernel(method: str) -> None:
    weight = torch.rand(8, 12, 2, 3, generator=torch.Generator().manual_seed(5))
    mask = transposable_mask(weight, 2, 4, method=method)
    swapped = transposable_mask(weight.transpose(0, 1).contiguous(), 2, 4, axis=0, method=method)
    assert torch.equal(swapped.transpose(0, 1), mask)
    for i, j in product(range(2), range(3)):
        assert torch.equal(mask[:, :, i, j], transposable_mask(weight[:, :, i, j], 2, 4, method=method))


def test_tiles_come_back_to_their_places() -> None:
    for shape, axis in product([(8, 12), (12, 8, 3, 2)], (0, 1)):
        weight = torch.arange(float(torch.Size(shape).numel())).view(shape)
        assert torch.equal(out_of_tiles(in_tiles(weight, 4, axis), weight.shape, axis), weight)


def test_the_greedy_choice_keeps_at_least_half_and_most_of_the_best() -> None:
    source = torch.Generator().manual_seed(11)
    tiles = {
        "uniform": torch.rand(4, 4 * 5000, generator=source),
        "normal": torch.randn(4, 4 * 5000, generator=source).abs(),
    }
    for name, weight in tiles.items():
        best, greedy = (
            in_tiles(weight * transposable_mask(weight, 2, 4, method=method), 4).sum((1, 2))
            for method in ("exact", "greedy")
        )
        shares = greedy / best
        print(
            f"greedy 2:4 of {name} tiles keeps {shares.mean():.4f} of the best on average, {shares.min():.4f} at least"
        )
        assert float(shares.min()) >= 0.5
        assert float(shares.max()) <= 1 + 1e-6
        assert 0.96 < float(shares.mean()) < 0.99


def test_pieces_and_half_precision_give_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.rand(16, 24, generator=torch.Generator().manual_seed(6)).bfloat16()  # many are equal
    whole = [transposable_mask(weight, 2, 4, method=method) for method in ("exact", "greedy")]
    monkeypatch.setattr(transposable, "_TILES", 5)
    monkeypatch.setattr(transposable, "_WEIGHTS", 50)
    assert all(
        torch.equal(transposable_mask(dtype_of, 2, 4, method=method), mask)
        for method, mask in zip(("exact", "greedy"), whole, strict=True)
        for dtype_of in (weight, weight.float(), weight.double())
    )


def test_what_is_not_a_number_counts_as_zero_and_infinity_is_the_largest() -> None:
    tile = torch.tensor(BLOCK)
    tile[0, 3] = torch.inf
    tile[1, 0] = torch.nan
    for method in ("exact", "greedy"):
        mask = transposable_mask(tile, 2, 4, method=method)
        assert mask[0, 3]
        zeroed = torch.where(tile.isnan(), 0.0, tile)
        assert torch.equal(mask, transposable_mask(zeroed, 2, 4, method=method))


def test_all_and_none_of_a_tile() -> None:
    weight = torch.rand(4, 4)
    assert transposable_mask(weight, 4, 4).all()
    assert not transposable_mask(weight, 0, 4).any()


# ---------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"method='best' is not a way to choose .* Give 'auto', 'exact' or 'greedy'"):
        transposable_mask(torch.rand(4, 4), 2, 4, method="best")
    for n, m in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=r"n=.* of m=.* weights cannot be active .* Give numbers with 0 <= n <= m"):
            transposable_mask(torch.rand(4, 4), n, m)
    for shape in ((4, 6), (6, 4), (4,)):
        with pytest.raises(ValueError, match=r"scores of shape .* do not divide into tiles of 4 x 4\. Give a weight"):
            transposable_mask(torch.rand(shape), 2, 4)


def test_an_exact_mask_of_large_tiles_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ImportError, match=r"scipy.optimize is needed here .* pip install 'sparse-callbacks\[patterns\]'"
    ):
        transposable_mask(torch.rand(8, 8), 4, 8, method="exact")


def test_a_programme_without_a_solution_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    failed = optimize.OptimizeResult(success=False, message="no time left")
    monkeypatch.setattr(optimize, "linprog", lambda *args, **kwargs: failed)
    with pytest.raises(
        RuntimeError, match=r"scipy found no transposable 4:8 mask \(no time left\)\. Give method='greedy'"
    ):
        transposable_mask(torch.rand(8, 8), 4, 8, method="exact")
