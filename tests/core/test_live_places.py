"""Patterns of truly sparse layers: random ones are uniform, and both forms of one describe the same places."""

import time
from collections import Counter
from itertools import combinations

import pytest
import torch

from sparse_callbacks import SparseLinear
from sparse_callbacks.core.sparse_layers import pattern_draws
from sparse_callbacks.core.sparse_layers.live_places import GroupPlaces, RowPlaces
from sparse_callbacks.core.sparse_layers.pattern_draws import fan_in_columns


@pytest.mark.parametrize(("inputs", "fan_in"), [(7, 3), (9, 2), (40, 1), (6, 6), (5, 0)])
def test_each_set_of_inputs_is_equally_likely(inputs: int, fan_in: int) -> None:
    """Where most inputs are read, where few are, and where fan-in squared exceeds the inputs."""
    rows = 20_000
    columns = fan_in_columns(rows, inputs, fan_in, torch.Generator().manual_seed(1))
    assert columns.shape == (rows, fan_in)
    assert fan_in < 2 or bool((columns.diff(dim=1) > 0).all())
    drawn = Counter(map(tuple, columns.tolist()))
    sets = list(combinations(range(inputs), fan_in))
    expected = rows / len(sets)
    # chi squared of len(sets) - 1 degrees of freedom: five deviations above its mean
    chi = sum((drawn[s] - expected) ** 2 / expected for s in sets)
    assert chi <= len(sets) - 1 + 5 * (2 * len(sets)) ** 0.5
    assert sum(drawn[s] for s in sets) == rows


@pytest.mark.parametrize("fan_in", [100, 249, 251, 990])
def test_fan_ins_whose_square_exceeds_the_inputs_end_soon(fan_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern_draws, "DRAWN", 7000)  # several blocks of rows, the last one smaller
    columns = fan_in_columns(33, 1000, fan_in, torch.Generator().manual_seed(0))
    assert bool((columns.diff(dim=1) > 0).all())
    assert 0 <= int(columns.min()) <= int(columns.max()) < 1000
    assert int((columns < 500).sum()) == pytest.approx(columns.numel() / 2, rel=0.1)


def test_a_layer_of_a_million_neurons_is_drawn_in_seconds() -> None:
    """Its dense matrix would have 4 TB."""
    start = time.process_time()
    layer = SparseLinear.random(10**6, 10**6, 5, generator=torch.Generator().manual_seed(0))
    assert time.process_time() - start < 20
    assert layer.live == 5 * 10**6
    rows = torch.randint(10**6, (4,))
    x = torch.randn(10**6)
    for row in rows.tolist():
        live = slice(5 * row, 5 * row + 5)
        assert bool((layer.places.col[live].diff() > 0).all())  # type: ignore[attr-defined]
    y = layer(x)
    assert y.shape == (10**6,)
    y.sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.shape == (1, 5 * 10**6)


def dense_of_rows(
    crow: torch.Tensor, col: torch.Tensor, values: torch.Tensor, outputs: int, inputs: int
) -> torch.Tensor:
    matrix = torch.zeros(outputs, inputs)
    for row in range(outputs):
        for place in range(int(crow[row]), int(crow[row + 1])):
            matrix[row, int(col[place])] = values[place]
    return matrix


def test_rows_and_columns_describe_the_same_matrix() -> None:
    torch.manual_seed(0)
    mask = torch.rand(6, 9) < 0.3
    places = RowPlaces(6, 9, mask.flatten().nonzero().flatten())
    values = torch.arange(1.0, places.units + 1)
    crow, col, crow_t, col_t, perm = places.rows
    matrix = dense_of_rows(crow, col, values, 6, 9)
    assert torch.equal(matrix != 0, mask)
    assert torch.equal(dense_of_rows(crow_t, col_t, values[perm.long()], 9, 6), matrix.t())
    assert torch.equal(places.dense(values.view(1, -1)), matrix)
    back = places.rows.transposed()
    assert torch.equal(values[perm.long()][back.perm.long()], values)
    assert {t.dtype for t in places.rows} == {torch.int32}


def test_groups_are_sorted_by_input_too() -> None:
    places = GroupPlaces(6, 5, 2, torch.tensor([1, 4, 5 + 0, 5 + 1, 10 + 1, 10 + 3]))
    assert places.idx.tolist() == [[1, 4], [0, 1], [1, 3]]
    assert places.offsets.tolist() == [0, 1, 4, 4, 5, 6]
    read = places.idx.flatten()[places.places.long()]
    assert read.tolist() == [0, 1, 1, 1, 3, 4]
    assert places.keys().tolist() == [1, 4, 5, 6, 11, 13]
    assert {t.dtype for t in places.groups} == {torch.int32}


def test_units_are_found_by_their_keys() -> None:
    places = RowPlaces(3, 4, torch.tensor([1, 2, 7, 11]))
    assert places.slots_of(torch.tensor([0, 1, 7, 8])).tolist() == [-1, 0, 2, -1]
    assert RowPlaces(3, 4, torch.tensor([], dtype=torch.int64)).slots_of(torch.tensor([3])).tolist() == [-1]


def test_a_unit_has_the_same_sum_whatever_lies_beside_it() -> None:
    """So that masks of grouped and of masked storage are the same to the bit; half precision is summed in float32."""
    torch.manual_seed(0)
    values = torch.rand(1, 64, 7)
    places = GroupPlaces(64, 20, 64, torch.arange(7))
    alone = [GroupPlaces(64, 20, 64, torch.tensor([3])).sums(values[:, :, [n]]) for n in range(7)]
    assert torch.equal(places.sums(values), torch.cat(alone))
    assert places.sums(values.bfloat16()).dtype == torch.float32
