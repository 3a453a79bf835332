"""Selection of the largest magnitudes against a stable full sort, and the reference numbers of a RigL update."""

import math

import pytest
import torch
from oracles.rigl import ACTIVE_ZEROS, DROP_COUNTS, MASK_COUNTS, SINGLE_UPDATE
from torch import Tensor

from sparse_callbacks import ops
from sparse_callbacks.core import largest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_full_sort(values: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Oracle: a stable sort of everything, slow and plain."""
    key = values.abs().double()
    key = torch.where(key.isnan(), -1.0, key).reshape(-1)
    if among is not None:
        key = torch.where(among.reshape(-1), key, -2.0)
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[torch.sort(key, descending=True, stable=True).indices[:count]] = True
    return mask.reshape(values.shape)


def values_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        values = (values * 2).round() / 2
    elif kind == "zeros":
        values = torch.zeros(shape)
        values.view(-1)[::2] = -0.0
    elif kind == "mostly zero":
        values = values * (torch.rand(shape, generator=generator) < 0.1)
    elif kind == "not finite":
        draw = torch.rand(shape, generator=generator)
        for bound, special in ((0.3, math.nan), (0.2, math.inf), (0.15, -math.inf), (0.1, -0.0), (0.05, 0.0)):
            values = torch.where(draw < bound, special, values)
    elif kind == "denormal":
        values = values * (1e-310 if dtype == torch.float64 else 1e-40)
    elif kind == "skewed":  # an evenly spaced sample sees nothing of the large ones
        values = torch.full(shape, 1e-3, dtype=torch.float64)
        values.view(-1)[: max(1, values.numel() // 50)] = 1.0 + torch.arange(max(1, values.numel() // 50)) / 1e3
    return values.to(dtype)


KINDS = ["normal", "ties", "zeros", "mostly zero", "not finite", "denormal", "skewed"]


def counts(size: int) -> list[int]:
    return sorted({0, min(1, size), size // 10, size // 2, max(size - 1, 0), size})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (33, 5), (8, 3, 3, 3), (260, 257)], ids=str)
def test_keep_largest_equals_a_stable_full_sort(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    values = values_of(kind, shape, dtype)
    among = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    for count in counts(values.numel()):
        mask = ops.keep_largest(values, count)
        assert mask.dtype == torch.bool
        assert mask.shape == values.shape
        assert torch.equal(mask, by_full_sort(values, count)), count
    for count in counts(int(among.sum())):
        assert torch.equal(ops.keep_largest(values, count, among=among), by_full_sort(values, count, among)), count


def strided(name: str) -> Tensor:
    base = values_of("ties", (16, 24, 20, 12), torch.float32)
    return {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.reshape(16 * 24, 240).t(),
        "every second": base[:, ::2],
        "expanded": base[:1].expand(7, -1, -1, -1),
        "permuted": base.permute(2, 0, 3, 1),
        "offset": base[3:, :, 1:, 2:],
        "size one": base[:, :1].to(memory_format=torch.channels_last),
    }[name]


@pytest.mark.parametrize(
    "name", ["channels_last", "transposed", "every second", "expanded", "permuted", "offset", "size one"]
)
def test_strides_change_neither_the_choice_nor_the_layout(name: str) -> None:
    values = strided(name)
    among = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    for count in counts(values.numel()):
        mask = ops.keep_largest(values, count)
        assert torch.equal(mask, by_full_sort(values, count)), count
        assert mask.stride() == torch.empty_like(values).stride()
    for count in counts(int(among.sum())):
        assert torch.equal(ops.keep_largest(values, count, among), by_full_sort(values, count, among)), count


BRACKETS = [
    (0.0, math.inf),
    (0.5, 1.0),
    (1.0, 1.0),
    (1.2, 1.3),
    (3.5, math.inf),
    (0.0, 0.25),
    (-1.0, -1.0),
    (math.nan, math.nan),
]


@pytest.mark.parametrize(("low", "high"), BRACKETS)
@pytest.mark.parametrize("kind", ["ties", "normal", "not finite"])
def test_neither_a_missed_bracket_nor_the_pieces_change_the_choice(
    low: float, high: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(largest, "_bracket", lambda *_: (low, high))
    monkeypatch.setattr(largest, "_CACHED", 48)
    values = values_of(kind, (33, 29), torch.float32)
    among = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    for allowed in (torch.ones_like(among), among):
        # ranks at the edges of the bracket, and next to them
        edges = [int((allowed & relation).sum()) for relation in (values.abs() > high, values.abs() >= low)]
        for count in {
            *counts(int(allowed.sum())),
            *(min(max(e + d, 0), int(allowed.sum())) for e in edges for d in (-1, 0, 1)),
        }:
            mask = ops.keep_largest(values, count, None if allowed.all() else allowed)
            assert torch.equal(mask, by_full_sort(values, count, allowed)), count


def test_an_active_zero_beats_every_inactive_position() -> None:
    values = torch.tensor([9.0, 0.0, 5.0, 0.0])
    among = torch.tensor([False, True, False, True])
    assert ops.keep_largest(values, 2, among).tolist() == [False, True, False, True]
    assert ops.keep_largest(values, 1, among).tolist() == [False, True, False, False]


def test_nan_ranks_below_zero_and_infinity_above_all() -> None:
    values = torch.tensor([math.nan, 0.0, -math.inf, 3e38, math.nan, -0.0, math.inf])
    order = [2, 6, 3, 1, 5, 0, 4]
    for count in range(8):
        assert ops.keep_largest(values, count).nonzero().squeeze(1).tolist() == sorted(order[:count])


def test_values_are_left_as_they_are_and_need_no_gradient() -> None:
    values = torch.nn.Parameter(torch.tensor([-3.0, 1.0, 2.0]))
    mask = ops.keep_largest(values, 1)
    assert values.tolist() == [-3.0, 1.0, 2.0]
    assert not mask.requires_grad
    assert mask.tolist() == [True, False, False]


@pytest.mark.parametrize("count", [-1, 4])
def test_a_count_that_cannot_be_kept_is_refused(count: int) -> None:
    values = torch.ones(5)
    among = torch.tensor([True, True, True, False, False])
    with pytest.raises(ValueError, match=f"count={count} positions cannot be kept: 3 are available. Give 0 to 3"):
        ops.keep_largest(values, count, among)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"scores of type torch.int64 cannot be ranked. Give float16"):
        ops.keep_largest(torch.arange(3), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_jointly_equals_one_long_tensor(kind: str, dtype: torch.dtype) -> None:
    shapes = [(40, 30), (3,), (0,), (200, 300), (7, 5, 3, 3)]
    values = [values_of(kind, shape, dtype, seed) for seed, shape in enumerate(shapes)]
    values[4] = values[4].to(memory_format=torch.channels_last)
    joined = torch.cat([v.reshape(-1) for v in values])
    for count in counts(joined.numel()):
        masks = ops.keep_largest_jointly(values, count)
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), by_full_sort(joined, count)), count
        assert [mask.shape for mask in masks] == [v.shape for v in values]


@pytest.mark.parametrize("kind", ["normal", "ties", "mostly zero"])
def test_jointly_among_some_positions_equals_one_long_tensor(kind: str) -> None:
    values = [values_of(kind, shape, torch.float32, seed) for seed, shape in enumerate([(7, 9), (40,), (3, 5)])]
    draw = torch.Generator().manual_seed(8)
    among = [torch.rand(v.shape, generator=draw) < 0.6 for v in values]
    whole, allowed = torch.cat([v.flatten() for v in values]), torch.cat([a.flatten() for a in among])
    for count in (0, 1, 30, int(allowed.sum())):
        masks = ops.keep_largest_jointly(values, count, among=among)
        assert torch.equal(torch.cat([m.flatten() for m in masks]), by_full_sort(whole, count, allowed))
    with pytest.raises(ValueError, match="count"):
        ops.keep_largest_jointly(values, int(allowed.sum()) + 1, among=among)
    with pytest.raises(ValueError, match=r"among= has 2 tensors, and values= has 3"):
        ops.keep_largest_jointly(values, 3, among=among[:2])


def test_jointly_each_tensor_keeps_its_least_among_its_positions_or_all_that_it_has() -> None:
    values = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([0.1, 0.3, 0.2]), torch.tensor([0.05])]
    among = [torch.tensor([True, True, False, True]), torch.tensor([True, False, True]), torch.tensor([True])]
    masks = ops.keep_largest_jointly(values, 6, least=2, among=among)
    assert [m.int().tolist() for m in masks] == [[1, 1, 0, 1], [1, 0, 1], [1]]
    masks = ops.keep_largest_jointly(values, 5, least=2, among=among)
    assert [m.int().tolist() for m in masks] == [[1, 1, 0, 0], [1, 0, 1], [1]]
    # one threshold alone
    masks = ops.keep_largest_jointly(values, 5, among=among)
    assert [m.int().tolist() for m in masks] == [[1, 1, 0, 1], [1, 0, 1], [0]]


def test_jointly_compares_types_by_value_and_the_earlier_tensor_wins() -> None:
    masks = ops.keep_largest_jointly([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0], dtype=torch.bfloat16)], 2)
    assert [mask.tolist() for mask in masks] == [[False, True], [False, True]]
    assert ops.keep_largest_jointly([], 0) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kth_largest_is_exact(kind: str, dtype: torch.dtype) -> None:
    values = values_of(kind, (300, 300), dtype)
    magnitude = values.abs().double()
    expected = torch.where(magnitude.isnan(), -1.0, magnitude).reshape(-1).sort(descending=True).values
    for count in (1, 100, 9000, 45000, 90000):
        found = ops.kth_largest(values, count)
        assert found.shape == ()
        assert found.dtype == dtype
        assert found.isnan() if expected[count - 1] < 0 else found.double() == expected[count - 1]


@pytest.mark.parametrize("count", [0, -1])
def test_kth_largest_refuses_ranks_below_one(count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count} has no magnitude: ranks start at 1"):
        ops.kth_largest(torch.ones(3), count)


def updated(case: dict[str, dict[str, list[float]]]) -> tuple[list[int], int]:
    given = case["inputs"]
    mask = torch.tensor(given["mask"], dtype=torch.bool)
    count = ops.drop_count(int(mask.sum()), given["drop_fraction"])  # type: ignore[arg-type]
    new = ops.drop_and_grow(mask, torch.tensor(given["weights"]).float(), torch.tensor(given["dense_grad"]), count)
    return new.int().tolist(), count


@pytest.mark.parametrize("case", [SINGLE_UPDATE, ACTIVE_ZEROS], ids=["ten weights", "active zeros"])
def test_one_update_as_in_the_reference(case: dict[str, dict[str, list[float]]]) -> None:
    given, expected = case["inputs"], case["expected"]
    assert updated(case) == (expected["mask_after"], expected["n_prune"])
    mask = torch.tensor(given["mask"], dtype=torch.bool)
    kept = ops.keep_largest(torch.tensor(given["weights"]).float(), int(mask.sum()) - updated(case)[1], among=mask)
    assert kept.int().tolist() == expected["mask_after_drop"]
    grown = ops.keep_largest(torch.tensor(given["dense_grad"]), updated(case)[1], among=~kept)
    assert grown.int().tolist() == expected["mask_grown"]


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(6, 4), (300, 280)], ids=str)
@pytest.mark.parametrize("gradient", ["normal", "zeros", "ties"])
def test_an_update_keeps_the_number_of_connections(shape: tuple[int, ...], density: float, gradient: str) -> None:
    size = math.prod(shape)
    mask = ops.random_mask(shape, int(density * size), torch.Generator().manual_seed(3))
    drop, grow = values_of("ties", shape, torch.float32, 4) * mask, values_of(gradient, shape, torch.float32, 5)
    active = int(mask.sum())
    for count in counts(active):
        kept = by_full_sort(drop, active - count, mask)
        new = ops.drop_and_grow(mask, drop, grow, count)
        assert int(new.sum()) == active
        assert torch.equal(new, kept | by_full_sort(grow, count, ~kept))


@pytest.mark.parametrize("count", [-1, 3])
def test_more_moves_than_connections_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count} connections cannot move: the mask has 2 active. Give 0 to 2"):
        ops.drop_and_grow(torch.tensor([True, True, False]), torch.ones(3), torch.ones(3), count)


def test_random_masks_have_the_count_and_no_favourites() -> None:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(4, 5)
    for _ in range(4000):
        mask = ops.random_mask((4, 5), 7, generator)
        assert int(mask.sum()) == 7
        total += mask
    # binomial with p = 0.35: a standard deviation is 0.0075, so 0.04 is beyond five of them
    assert (total / 4000 - 7 / 20).abs().max() < 0.04


def test_random_masks_are_those_of_a_permutation_of_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_callbacks.core.ops._INDICES", 7)
    mine, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    expected = torch.zeros(400, dtype=torch.bool).index_fill_(0, torch.randperm(400, generator=other)[:90], True)
    assert torch.equal(ops.random_mask((20, 20), 90, mine).flatten(), expected)
    assert torch.equal(mine.get_state(), other.get_state())


def test_random_masks_follow_the_generator() -> None:
    first, again, other = (ops.random_mask((30, 30), 90, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert ops.random_mask((), 1).tolist() is True
    assert ops.random_mask((3,), 3).all()


@pytest.mark.parametrize("count", [-1, 7])
def test_a_random_mask_larger_than_its_shape_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count} positions cannot be drawn from 6. Give 0 to 6"):
        ops.random_mask((2, 3), count)


@pytest.mark.parametrize("case", MASK_COUNTS, ids=str)
def test_zeros_as_in_the_reference(case: dict[str, float]) -> None:
    size = math.prod(case["shape"])  # type: ignore[arg-type]
    assert ops.zeros_for(case["sparsity"], size) == case["n_zeros"] == size - case["n_ones"]


@pytest.mark.parametrize("case", DROP_COUNTS, ids=str)
def test_drop_counts_are_float32_as_in_the_reference(case: dict[str, float]) -> None:
    assert ops.drop_count(int(case["n_ones"]), case["drop_fraction"]) == case["n_prune"]
