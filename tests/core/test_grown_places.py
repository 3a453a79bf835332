"""Growth by the dense gradient in row blocks, or among candidates, against the gradient as a whole."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_callbacks import ops
from sparse_callbacks.core.randomness import generator
from sparse_callbacks.core.sparse_layers import drawn_places, grown_places, sparse_kernels
from sparse_callbacks.core.sparse_layers.best_units import Best
from sparse_callbacks.core.sparse_layers.drawn_places import drawn_units
from sparse_callbacks.core.sparse_layers.grown_places import candidate_units, largest_units
from sparse_callbacks.core.sparse_layers.moved_places import merged, surviving_units
from sparse_callbacks.core.sparse_layers.unit_gradients import UnitGradients

Records = list[tuple[Tensor, Tensor]]


def keys_of(mask: Tensor) -> Tensor:
    return mask.reshape(-1).nonzero().squeeze(1)


def whole_numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: their sums of products are exact in any order, and tie."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_records(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Records:
    """Two micro-batches; the inputs have dead columns."""
    pairs = []
    for number, width in enumerate((5, 3)):
        x = whole_numbers(inputs, width, seed=seed + number, dtype=dtype)
        x[: inputs // 3] = 0
        pairs.append((x, whole_numbers(outputs, width, seed=seed + 10 + number, dtype=dtype)))
    return pairs


def dense_gradient(records: Records) -> Tensor:
    return torch.stack([dy.double() @ x.double().t() for x, dy in records]).sum(0)


@pytest.fixture(params=[(2**20, 2**16), (64, 16)], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in zip(("LOOKED_AT", "SAMPLE"), request.param, strict=True):
        monkeypatch.setattr(grown_places, name, size)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (37, 30)], ids=str)
def test_rigl_grows_the_places_of_masked_storage(shape: tuple[int, int], dtype: torch.dtype) -> None:
    records = some_records(*shape, dtype)
    gradient = dense_gradient(records)
    for seed, density in enumerate((0.02, 0.1, 0.5, 0.9)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
        weight, keys = whole_numbers(*shape, seed=seed) * mask, keys_of(mask)
        for count in sorted({0, len(keys) // 3, len(keys)}):
            kept = surviving_units(weight.view(-1)[keys].abs(), count)
            grown = largest_units(records, shape, 1, keys[kept], count, dtype=dtype)
            expected = ops.drop_and_grow(mask, weight, gradient, count)
            assert torch.equal(merged(keys, kept, grown).keys, keys_of(expected))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_rank_as_in_masked_storage(bad: float) -> None:
    x, dy = some_records(20, 30)[0]
    dy[4:16] = bad
    x[5:] = x[5:].abs() + 1  # inf times 0 would be NaN
    for count in (10, 300, 500):
        gradient = dense_gradient([(x, dy)])
        grown = largest_units([(x, dy)], (20, 30), 1, torch.arange(50), count, dtype=torch.float32)
        free = torch.ones(20, 30, dtype=torch.bool).view(-1).index_fill_(0, torch.arange(50), False).view(20, 30)
        assert torch.equal(grown, keys_of(ops.keep_largest(gradient, count, free)))


def test_a_layer_without_records_grows_the_first_places() -> None:
    grown = largest_units([], (4, 5), 1, torch.tensor([0, 2]), 3, dtype=torch.float32)
    assert grown.tolist() == [1, 3, 4]


@pytest.mark.parametrize("count", [-1, 19])
def test_no_more_units_grow_than_are_free(count: int) -> None:
    with pytest.raises(ValueError, match="18 are free"):
        largest_units([], (4, 5), 1, torch.tensor([0, 2]), count, dtype=torch.float32)


def test_little_more_than_the_largest_is_held_and_no_block_is_larger_than_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, held = [], []
    add = Best.add

    def watched(best: Best, scores: Tensor, *rest: object) -> None:
        add(best, scores, *rest)
        sizes.append(scores.numel())
        held.append(best.held)

    monkeypatch.setattr(Best, "add", watched)
    monkeypatch.setattr(grown_places, "LOOKED_AT", 1000)
    monkeypatch.setattr(grown_places, "SAMPLE", 5000)
    source = torch.Generator().manual_seed(0)
    records = [(torch.randn(100, 4, generator=source), torch.randn(200, 4, generator=source))]
    for count in (50, 500):
        largest_units(records, (200, 100), 1, torch.arange(0), count, dtype=torch.float32)
        assert max(held) <= 4 * count
        assert max(sizes) <= 1000
        assert sum(sizes) == 200 * 100  # all is looked at once
        sizes.clear()
        held.clear()


def by_turns(other: Records, blocks: int) -> Callable[[Tensor], Tensor]:
    """A reduction over two processes, the other of which has its own records: row blocks come in their order."""
    rows = iter(range(0, 10**6, blocks))

    def reduce(block: Tensor) -> Tensor:
        start = next(rows)
        return block + dense_gradient(other)[start : start + len(block)].to(block.dtype)

    return reduce


def test_ranks_grow_by_the_sum_of_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grown_places, "ENTRIES", 90)
    own, other = some_records(20, 30), some_records(20, 30, seed=5)
    kept = torch.arange(3, 40)
    expected = largest_units(own + other, (20, 30), 1, kept, 25, dtype=torch.float32)
    for records, rest in ((own, other), ([], own + other)):
        grown = largest_units(records, (20, 30), 1, kept, 25, dtype=torch.float32, reduce=by_turns(rest, 3))
        assert torch.equal(grown, expected)


# ---------------------------------------------------------------------- groups of rows


def in_groups(matrix: Tensor, group: int) -> Tensor:
    return matrix.abs().view(-1, group, matrix.shape[1]).sum(1)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("group", [1, 3, 12])
def test_each_group_grows_the_inputs_with_the_largest_sums(group: int) -> None:
    records, inputs, k = some_records(12, 25), 25, 7
    scores = in_groups(dense_gradient(records), group)
    mask = torch.stack([ops.keep_largest(row, k) for row in torch.rand(12 // group, inputs)])
    weight = torch.rand(12 // group, inputs) * mask
    for count in range(k + 1):
        kept = surviving_units(weight.view(-1)[keys_of(mask)], count, per_block=k)
        keys = keys_of(mask)
        grown = largest_units(records, (12, inputs), group, keys[kept], count, dtype=torch.float32, per_block=True)
        rows = [ops.drop_and_grow(m, w, s, count) for m, w, s in zip(mask, weight, scores, strict=True)]
        assert torch.equal(merged(keys, kept, grown).keys, keys_of(torch.stack(rows)))


def test_the_table_of_a_group_shared_update() -> None:
    """Worked by hand: three groups of two rows, four inputs each, half of them move."""
    weight = torch.tensor(
        [
            [0.0, -0.12, 0.0, -0.52, 0.74, 0.0, 0.56, 0.0],
            [0.0, -0.15, 0.0, -0.38, -1.0, 0.0, 0.33, 0.0],
            [0.0, 0.96, 0.93, -0.83, 0.0, 0.0, 0.0, 0.49],
            [0.0, 0.73, 0.51, 0.59, 0.0, 0.0, 0.0, -0.39],
            [0.0, 0.0, 0.4, 0.41, 0.67, 0.0, -0.43, 0.0],
            [0.0, 0.0, 0.17, -0.47, 0.6, 0.0, -0.1, 0.0],
        ]
    )
    gradient = torch.tensor(
        [
            [-0.58, 0.5, 0.68, -0.83, 0.56, 0.94, -0.43, -0.26],
            [0.38, -0.23, -0.06, 0.54, 0.93, -0.78, 0.55, -0.1],
            [-0.69, 0.85, 0.48, 0.47, -0.33, 0.46, -0.52, 0.63],
            [0.09, 0.77, 0.14, 0.27, 0.19, -0.96, -0.08, 0.74],
            [0.35, 0.87, 0.62, -0.49, 0.51, 0.45, 0.9, 0.3],
            [0.86, 0.28, -0.98, -0.99, 0.21, 0.2, 0.05, 0.4],
        ]
    )
    keys = keys_of(in_groups(weight, 2) > 0)
    count = ops.drop_count(4, 0.5)
    kept = surviving_units(in_groups(weight, 2).view(-1)[keys], count, per_block=4)
    # the gradient of inputs that are unit vectors is the gradient of the outputs
    records = [(torch.eye(8), gradient)]
    grown = largest_units(records, (6, 8), 2, keys[kept], count, dtype=torch.float32, per_block=True)
    assert (keys[kept] % 8).tolist() == [3, 4, 1, 2, 3, 4]
    assert (grown % 8).tolist() == [5, 6, 5, 7, 0, 2]
    move = merged(keys, kept, grown)
    after, slots = move.keys, move.slots
    assert (after % 8).tolist() == [3, 4, 5, 6, 1, 2, 5, 7, 0, 2, 3, 4]
    assert slots.tolist() == [1, 2, -1, 3, 4, 5, -1, 7, -1, 8, 9, 10]


# ---------------------------------------------------------------------- among candidates


@pytest.mark.parametrize("mkl", [True, False])
def test_candidates_are_drawn_and_the_largest_of_them_grow(mkl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not mkl:
        monkeypatch.setattr(sparse_kernels, "has_sampled_product", lambda: False)
        monkeypatch.setattr(sparse_kernels, "MULTIPLIED", 50)
    shape, records = (20, 30), some_records(20, 30)
    kept, gradient = torch.arange(0, 90, 2), dense_gradient(records)
    for count, candidates in ((0, 0), (5, 5), (5, 60), (40, 555)):
        grown = candidate_units(
            records, shape, 1, kept, count, candidates, generator(0, count, ""), dtype=torch.float32
        )
        chosen = torch.zeros(600, dtype=torch.bool)
        chosen[drawn_units(shape, kept, candidates, generator(0, count, ""))] = True
        assert torch.equal(grown, keys_of(ops.keep_largest(gradient, count, chosen.view(shape))))


@pytest.mark.parametrize("group", [1, 4])
def test_each_group_grows_among_candidates_of_its_own(group: int) -> None:
    records, blocks = some_records(12, 30), 12 // group
    scores = in_groups(dense_gradient(records), group)
    kept = (torch.arange(blocks)[:, None] * 30 + torch.arange(4)).view(-1)
    grown = candidate_units(
        records, (12, 30), group, kept, 3, 10, generator(0, 0, ""), dtype=torch.float32, per_block=True
    )
    chosen = torch.zeros(blocks * 30, dtype=torch.bool)
    chosen[drawn_units((blocks, 30), kept, 10, generator(0, 0, ""), per_block=True)] = True
    rows = [ops.keep_largest(s, 3, among) for s, among in zip(scores, chosen.view(blocks, 30), strict=True)]
    assert torch.equal(grown, keys_of(torch.stack(rows)))


def test_more_cannot_grow_than_there_are_candidates() -> None:
    with pytest.raises(ValueError, match="count=5"):
        candidate_units([], (4, 5), 1, torch.arange(3), 5, 4, generator(0, 0, ""), dtype=torch.float32)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("per_block", [False, True])
def test_a_gradient_of_single_units_is_a_part_of_the_dense_one(group: int, per_block: bool) -> None:
    records, units = some_records(20, 30), 20 // group * 30
    live = torch.rand(units, generator=torch.Generator().manual_seed(1)).argsort()[: units // 4].sort().values
    extra = whole_numbers(len(live), group, seed=2) * 50
    direct = UnitGradients(live, extra, 30)
    dense = torch.zeros(units, group).index_copy_(0, live, extra).view(-1, 30, group).transpose(1, 2).reshape(20, 30)
    x = torch.cat([x for x, _ in records] + [torch.eye(30)], 1)
    dy = torch.cat([dy for _, dy in records] + [dense], 1)
    none = torch.arange(0)
    given = {"dtype": torch.float32, "per_block": per_block}
    expected = largest_units([(x, dy)], (20, 30), group, none, 9, **given)
    assert torch.equal(largest_units(records, (20, 30), group, none, 9, direct=direct, **given), expected)
    assert not torch.equal(largest_units(records, (20, 30), group, none, 9, **given), expected)

    def among(records: Records, direct: UnitGradients | None) -> torch.Tensor:
        drawn = 25 if per_block else 140
        source = generator(0, 0, "")
        return candidate_units(records, (20, 30), group, none, 9, drawn, source, direct=direct, **given)

    if group == 1 or per_block:
        assert torch.equal(among(records, direct), among([(x, dy)], None))
        assert not torch.equal(among(records, None), among([(x, dy)], None))


@pytest.mark.parametrize("fan_in", [1, 4, 9])
def test_rows_that_keep_different_numbers_are_filled_up(fan_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where few rows are looked at together."""
    if fan_in == 4:
        monkeypatch.setattr(drawn_places, "BLOCKS", 20)
        monkeypatch.setattr(grown_places, "LOOKED_AT", 20)
    source = torch.Generator().manual_seed(fan_in)
    x, dy = torch.randn(9, 30, generator=source), torch.randn(7, 30, generator=source)
    wanted = [min(n, fan_in) for n in (0, 4, 2, 9, 1, 3, 0)]
    kept = torch.cat([torch.randperm(9, generator=source)[:n].sort().values + 9 * row for row, n in enumerate(wanted)])
    grown = largest_units([(x, dy)], (7, 9), 1, kept, fan_in, dtype=torch.float32, full=True)
    expected = []
    for row, gradient in enumerate((dy @ x.t()).abs().tolist()):
        free = [c for c in range(9) if 9 * row + c not in kept.tolist()]
        best = sorted(free, key=lambda c: (-gradient[c], c))[: fan_in - wanted[row]]
        expected += sorted(9 * row + c for c in best)
    assert grown.tolist() == expected
    drawn = drawn_units((7, 9), kept, fan_in, generator(0, 3, ""), full=True)
    numbers = torch.rand(7, 9, dtype=torch.float64, generator=generator(0, 3, "")).tolist()
    expected = []
    for row, own in enumerate(numbers):
        free = [c for c in range(9) if 9 * row + c not in kept.tolist()]
        best = sorted(free, key=lambda c: (-own[c], c))[: fan_in - wanted[row]]
        expected += sorted(9 * row + c for c in best)
    assert drawn.tolist() == expected
