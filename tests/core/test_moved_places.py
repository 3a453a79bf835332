"""Updates of sparse layers: which units stay, which are drawn, and where all lie afterwards, against dense masks."""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_callbacks import SparseLinear, ops
from sparse_callbacks.core.randomness import generator, uniform_like
from sparse_callbacks.core.sparse_layers import drawn_places, moved_places, quick_places
from sparse_callbacks.core.sparse_layers.drawn_places import drawn_units
from sparse_callbacks.core.sparse_layers.moved_places import Move, fill_columns, fill_rows, merged, surviving_units

SHAPES = [(1, 1), (1, 40), (13, 7), (40, 90), (120, 100)]


@pytest.fixture(params=["numpy", "torch alone"])
def with_or_without_numpy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch alone":
        monkeypatch.setattr(quick_places, "numpy_for", lambda tensor: None)


def some_mask(shape: tuple[int, int], density: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def keys_of(mask: Tensor) -> Tensor:
    return mask.reshape(-1).nonzero().squeeze(1)


def some_magnitudes(size: int, kind: str, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=source).abs()
    if kind == "ties":
        values = values.round()
    if kind == "not finite":
        values[torch.rand(size, generator=source) < 0.3] = math.nan
        values[torch.rand(size, generator=source) < 0.1] = math.inf
    return values


@pytest.mark.usefixtures("with_or_without_numpy")
@pytest.mark.parametrize("kind", ["plain", "ties", "not finite"])
@pytest.mark.parametrize("size", [0, 1, 50, 3000])
def test_those_stay_that_masked_storage_keeps(size: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_places, "SMALL", 0)
    for seed, share in enumerate((0.0, 0.01, 0.3, 0.99, 1.0)):
        magnitudes, count = some_magnitudes(size, kind, seed), round(share * size)
        assert torch.equal(surviving_units(magnitudes, count), keys_of(ops.keep_largest(magnitudes, size - count)))


def test_each_block_loses_its_own_smallest_units() -> None:
    for kind in ("plain", "ties", "not finite"):
        magnitudes = some_magnitudes(6 * 20, kind, 1)
        rows = [ops.keep_largest(row, 13) for row in magnitudes.view(6, 20)]
        assert torch.equal(surviving_units(magnitudes, 7, per_block=20), keys_of(torch.stack(rows)))


@pytest.mark.parametrize("count", [-1, 11])
def test_no_more_units_leave_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match="count="):
        surviving_units(torch.rand(10), count)
    with pytest.raises(ValueError, match="count="):
        surviving_units(torch.rand(20), count, per_block=10)


# ---------------------------------------------------------------------- draws that are those of masked storage


def by_masked_storage(mask: Tensor, weight: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Keys after an update of SET: the oracle draws the whole matrix."""
    return keys_of(ops.drop_and_grow(mask, weight, uniform_like(weight, source), count))


def by_units(mask: Tensor, weight: Tensor, count: int, source: torch.Generator) -> Tensor:
    keys = keys_of(mask)
    kept = surviving_units(weight.view(-1)[keys].abs(), count)
    return merged(keys, kept, drawn_units(tuple(mask.shape), keys[kept], count, source)).keys


@pytest.mark.usefixtures("with_or_without_numpy")
@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_set_draws_the_places_of_masked_storage(
    shape: tuple[int, int], integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_places, "DRAWN_AT_ONCE", 512)
    monkeypatch.setattr(drawn_places, "integers_are_same", lambda: integers)
    for seed, density in enumerate((0.02, 0.1, 0.5, 0.9, 1.0)):
        mask = some_mask(shape, density, seed)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * mask
        for count in sorted({0, int(mask.sum()) // 3, int(mask.sum())}):
            one, other = (by(mask, weight, count, generator(seed, 1, "a")) for by in (by_units, by_masked_storage))
            assert torch.equal(one, other)


def test_the_same_places_are_drawn_where_denormal_numbers_are_flushed() -> None:
    mask = some_mask((40, 90), 0.1, 0)
    plain, expected = (by(mask, mask.float(), 100, generator(0, 1, "a")) for by in (by_units, by_masked_storage))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormal numbers")
    try:
        flushed = by_units(mask, mask.float(), 100, generator(0, 1, "a"))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain, expected)
    assert torch.equal(flushed, expected)


def test_random_integers_have_the_bits_of_random_floats() -> None:
    assert drawn_places.integers_are_same()  # otherwise updates are slower, and still the same


def test_a_bound_that_too_few_numbers_exceed_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, numbers_above = [], drawn_places.numbers_above
    monkeypatch.setattr(drawn_places, "SPREAD", 1e-3)
    monkeypatch.setattr(drawn_places, "numbers_above", lambda b, *rest: bounds.append(b) or numbers_above(b, *rest))
    mask = some_mask((40, 90), 0.1, 0)
    for seed in range(10):
        one, other = (by(mask, mask.float(), 100, generator(seed, 0, "")) for by in (by_units, by_masked_storage))
        assert torch.equal(one, other)
    assert len(bounds) > 10


@pytest.mark.parametrize("entries", [2**22, 100])
def test_each_block_draws_the_largest_of_its_row(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_places, "BLOCKS", entries)
    for seed, (free, count) in enumerate(((30, 0), (30, 1), (30, 30), (7, 5))):
        scores = torch.rand(9, 30, dtype=torch.float64, generator=generator(seed, 0, ""))
        kept = torch.stack([ops.keep_largest(row, 30 - free) for row in torch.rand(9, 30)])
        expected = torch.stack([ops.keep_largest(s, count, ~k) for s, k in zip(scores, kept, strict=True)])
        drawn = drawn_units((9, 30), keys_of(kept), count, generator(seed, 0, ""), per_block=True)
        assert torch.equal(drawn, keys_of(expected))


@pytest.mark.parametrize("count", [-1, 6])
@pytest.mark.parametrize("per_block", [False, True])
def test_no_more_units_are_drawn_than_are_free(count: int, per_block: bool) -> None:
    kept = keys_of(torch.tensor([[True] * 5 + [False] * 5] * 3)) if per_block else torch.arange(25)
    with pytest.raises(ValueError, match="5 are free"):
        drawn_units((3, 10), kept, count, torch.Generator(), per_block)


# ---------------------------------------------------------------------- draws by rejection


@pytest.fixture
def too_large_for_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_places, "LARGEST_SAME", 0)


@pytest.mark.usefixtures("too_large_for_numbers")
@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (30, 50)], ids=str)
def test_rejection_draws_as_many_free_units_as_are_asked_for(shape: tuple[int, int], per_block: bool) -> None:
    for seed in range(20):
        stay = seed % (shape[1] + 1)
        kept = torch.stack([ops.keep_largest(row, stay) for row in torch.rand(shape)])
        free = shape[1] - stay if per_block else kept.numel() - int(kept.sum())
        for count in sorted({0, 1 % (free + 1), free // 2, free}):
            drawn = drawn_units(shape, keys_of(kept), count, generator(seed, count, ""), per_block)
            assert (drawn.diff() > 0).all()
            assert not kept.view(-1)[drawn].any()
            assert drawn.numel() == count * (shape[0] if per_block else 1)
            if per_block:
                assert (torch.bincount(drawn // shape[1], minlength=shape[0]) == count).all()


@pytest.mark.usefixtures("too_large_for_numbers")
@pytest.mark.parametrize("count", [2, 3])
def test_each_choice_is_equally_likely(count: int) -> None:
    draws = 4000
    found = Counter(
        tuple(drawn_units((2, 3), torch.tensor([1]), count, generator(0, n, "")).tolist()) for n in range(draws)
    )
    choices = math.comb(5, count)
    expected = draws / choices
    # chi-square with 9 degrees of freedom exceeds 27.9 once in a thousand; the seeds are fixed
    assert len(found) == choices
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 27.9


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


def test_a_layer_of_a_million_squared_is_drawn_in_the_memory_of_its_live_weights() -> None:
    neurons, live = 10**6, 10**5
    kept = torch.randint(neurons**2, (live,), generator=torch.Generator().manual_seed(0)).unique()
    with LargestTensor() as seen:
        drawn = drawn_units((neurons, neurons), kept, live // 2, generator(0, 0, ""))
        keys = merged(kept, torch.arange(len(kept)), drawn).keys
    assert keys.numel() == len(kept) + live // 2
    assert (keys.diff() > 0).all()
    assert seen.bytes <= 2 * 8 * live


# ---------------------------------------------------------------------- where units lie afterwards


@pytest.mark.usefixtures("with_or_without_numpy")
@pytest.mark.parametrize("cached", [2**17, 16])
def test_units_keep_their_slots_also_where_they_leave_and_come_back(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved_places, "JOINED_AT_ONCE", cached)
    for seed, (density, share, grown) in enumerate(((0.0, 0, 0.1), (0.1, 0.5, 0.1), (0.5, 0.9, 0.9), (1.0, 0.3, 0.5))):
        keys = keys_of(some_mask((30, 20), density, seed))
        kept = keys_of(some_mask((1, len(keys)), 1 - share, seed))
        free = torch.ones(600, dtype=torch.bool).index_fill_(0, keys[kept], False)
        new = keys_of(free & (torch.rand(600) < grown))
        move = merged(keys, kept, new)
        where = {key: slot for slot, key in enumerate(keys.tolist())}
        assert move.keys.tolist() == sorted([*keys[kept].tolist(), *new.tolist()])
        assert move.slots.tolist() == [where.get(key, -1) for key in move.keys.tolist()]
        assert move.coming.tolist() == new.tolist()
        assert move.leaving.tolist() == sorted(set(keys.tolist()) - set(keys[kept].tolist()))
        same = Move.between(keys, move.keys, move.slots)
        assert same.coming.tolist() == sorted(set(move.keys.tolist()) - set(keys.tolist()))
        assert same.leaving.tolist() == sorted(set(keys.tolist()) - set(move.keys.tolist()))


@pytest.mark.usefixtures("with_or_without_numpy")
@pytest.mark.parametrize("inputs", [1, 30, 2**15 - 1, 2**15, 70_000, 10**9])
def test_rows_and_columns_of_keys(inputs: int) -> None:
    outputs = 9
    keys = torch.randint(outputs * inputs, (300,), generator=torch.Generator().manual_seed(0)).unique()
    crow, col = torch.empty(outputs + 1, dtype=torch.int32), torch.empty(len(keys), dtype=torch.int32)
    rows = fill_rows(keys, inputs, crow, col)
    places = [divmod(key, inputs) for key in keys.tolist()]
    assert list(zip(rows.tolist(), col.tolist(), strict=True)) == places
    assert crow.tolist() == [sum(row < r for row, _ in places) for r in range(outputs + 1)]


@pytest.mark.usefixtures("with_or_without_numpy")
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("pieces", [2**17, 16])
# the last one has more bits in its columns and slots than an int32
@pytest.mark.parametrize(
    ("inputs", "live"), [(1, 300), (30, 300), (2**15 - 1, 300), (2**15, 300), (70_000, 300), (70_000, 34_000)]
)
def test_columns_of_rows(inputs: int, live: int, pieces: int, vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved_places, "JOINED_AT_ONCE", pieces)
    if not vectors:
        monkeypatch.setattr(moved_places, "sorts_by_vectors", lambda numbers: False)
    keys = torch.randint(9 * inputs, (live,), generator=torch.Generator().manual_seed(0)).unique()
    places = [divmod(key, inputs) for key in keys.tolist()]
    rows, col = torch.tensor(places, dtype=torch.int32).unbind(1)
    crow_t = torch.empty(inputs + 1, dtype=torch.int32)
    col_t, perm = (torch.empty(len(keys), dtype=torch.int32) for _ in range(2))
    fill_columns(rows, col, crow_t, col_t, perm)
    by_column = sorted(range(len(keys)), key=lambda slot: (places[slot][1], slot))
    assert perm.tolist() == by_column
    assert col_t.tolist() == [places[slot][0] for slot in by_column]
    columns = torch.tensor([column for _, column in places]).sort().values
    assert torch.equal(crow_t.long(), torch.searchsorted(columns, torch.arange(inputs + 1)))


def updates(layer: SparseLinear) -> Iterator[Move]:
    """Updates that drop a third and draw as many."""
    per_block = layer.live // layer.group // layer.block_rows if layer.storage == "grouped" else None
    units = layer.keys().numel() if per_block is None else per_block
    for number in range(3):
        old = layer.keys()
        kept = surviving_units(layer.unit_magnitudes(), units // 3, per_block)
        shape = (layer.block_rows, layer.in_features)
        new = drawn_units(shape, old[kept], units // 3, generator(0, number, ""), per_block is not None)
        yield merged(old, kept, new)


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_values_and_states_move_with_their_units(storage: str) -> None:
    layer = SparseLinear.random(40, 24, 9, storage=storage, group=4, generator=torch.Generator().manual_seed(0))
    state, pattern = torch.rand(layer.values.shape), dict(layer.places.tensors())
    for move in updates(layer):
        mask, weight = layer.mask, layer.weight.detach().clone()
        dense_state, version = layer.places.dense(state), layer.values._version
        born = layer.move_to(move.keys, [state], move.slots)
        assert torch.equal(layer.keys(), move.keys)
        assert layer.values._version > version
        assert torch.equal(layer.weight, weight * layer.mask)
        assert torch.equal(born, ~layer.places.read(mask))
        assert torch.equal(layer.places.dense(state), dense_state * layer.mask)
    assert all(tensor is pattern[name] for name, tensor in layer.places.tensors())
