"""The selection of the largest magnitudes over shards: that of the whole, whatever the shards."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.simulated import Meeting, layouts, on_each, parts, random_lengths
from torch import Tensor

from sparse_callbacks.core.ops import drop_and_grow, keep_largest, keep_largest_jointly, kth_largest
from sparse_callbacks.core.shards import count_of, layout_of, lying_as, size_of

# fmt: off
VALUES = [0.5, -0.25, 1.0, 0.5, 0.125, -0.75, 0.25, 0.5, -0.5, 0.0, 0.375, 0.25, -0.25, 0.5, 1.5, -0.125, 0.5, 0.25]
KEPT: dict[int, list[list[int]]] = {
    0: [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    3: [[0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]],
    6: [[1, 0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]],
    9: [[1, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0]],
    14: [[1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0]],
    18: [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
}
THRESHOLDS = {3: 0.75, 6: 0.5, 9: 0.5, 14: 0.25, 18: 0.0}
COLUMNS = [[[1, 0, 1], [0, 1, 1], [0, 0, 1]], [[1, 0], [0, 0], [0, 0]], [[1], [0], [0]]]
# fmt: on
"""A table worked by hand: shards of 7, 5 and 6 entries, and of a 3x6 matrix with 3, 2 and 1 columns, 7 of which are kept."""


@pytest.mark.parametrize("count", KEPT)
def test_the_table_of_consecutive_entries(count: int) -> None:
    shards = parts(torch.tensor(VALUES), 0, [7, 5, 6], Meeting(3))
    masks = on_each(lambda part: keep_largest(part, count), shards)
    assert [m.int().tolist() for m in masks] == KEPT[count]
    assert [int(m.sum()) for m in masks] == [sum(row) for row in KEPT[count]]
    if count:
        assert [float(t) for t in on_each(lambda part: kth_largest(part, count), shards)] == [THRESHOLDS[count]] * 3


def test_the_table_of_columns() -> None:
    shards = parts(torch.tensor(VALUES).view(3, 6), 1, [3, 2, 1], Meeting(3))
    masks = on_each(lambda part: keep_largest(part, 7), shards)
    assert [m.int().tolist() for m in masks] == COLUMNS


def drawn(shape: Sequence[int], kind: str, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """Values with many ties, of which some kinds are special."""
    values = torch.randint(-4, 5, tuple(shape), generator=source).to(dtype) / 4
    if kind == "zeros":
        values.zero_()
    if kind == "distinct":
        values = torch.randn(tuple(shape), generator=source).to(dtype)
    if kind == "not finite":
        values[torch.rand(tuple(shape), generator=source) < 0.4] = math.nan
        values[torch.rand(tuple(shape), generator=source) < 0.1] = -math.inf
    return values


def cases() -> list[Any]:
    """Shapes, dimensions and numbers of processes."""
    shapes = [
        ((18,), 0, 3),
        ((7, 5), 0, 2),
        ((7, 6), 1, 3),
        ((4, 3, 2, 2), 1, 2),
        ((1, 9), 0, 4),
        ((5, 1), 1, 2),
        ((2, 3, 8), 2, 3),
    ]
    types = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    kinds = ["ties", "zeros", "distinct", "not finite"]
    return [(*s, types[(i + j) % 4], k) for i, s in enumerate(shapes) for j, k in enumerate(kinds)]


@pytest.mark.parametrize(("shape", "dim", "size", "dtype", "kind"), cases())
def test_shards_of_any_kind_keep_what_the_whole_keeps(
    shape: tuple[int, ...], dim: int, size: int, dtype: torch.dtype, kind: str
) -> None:
    source = torch.Generator().manual_seed(len(shape) + dim)
    total = math.prod(shape)
    for count in sorted({0, 1, total // 3, total // 2, total - 1, total}):
        values = drawn(shape, kind, dtype, source)
        among = torch.rand(shape, generator=source) < 0.7
        lengths = random_lengths(shape[dim], size, source)
        shards, allowed = (parts(t, dim, lengths, Meeting(size)) for t in (values, among))
        masks = on_each(lambda part, count=count: keep_largest(part, count), shards)
        assert torch.equal(torch.cat(masks, dim), keep_largest(values, count)), (count, lengths)
        some = min(count, int(among.sum()))
        masks = on_each(lambda part, a, some=some: keep_largest(part, some, among=a), shards, allowed)
        assert torch.equal(torch.cat(masks, dim), keep_largest(values, some, among=among)), (some, lengths)
        assert on_each(count_of, masks) == [some] * size
        assert on_each(size_of, shards) == [total] * size


@pytest.mark.parametrize("least", [0, 1, 3])
@pytest.mark.parametrize("kind", ["ties", "zeros", "not finite"])
def test_one_threshold_over_tensors_in_shards_is_that_over_whole_ones(kind: str, least: int) -> None:
    source = torch.Generator().manual_seed(least)
    wholes = [
        drawn((6, 5), kind, torch.float32, source),
        drawn((4, 3), kind, torch.bfloat16, source) * 4,
        drawn((8,), kind, torch.float32, source),
    ]
    meeting = Meeting(3)
    cuts = [(0, [1, 5, 0]), (1, [1, 1, 1]), (0, [3, 0, 5])]
    shards = [parts(w, dim, lengths, meeting) for w, (dim, lengths) in zip(wholes, cuts, strict=True)]
    for count in (9, 20, 33, 50):
        masks = on_each(lambda *p, count=count: keep_largest_jointly(p, count, least=least), *shards)
        joined = [torch.cat([m[i] for m in masks], dim) for i, (dim, _) in enumerate(cuts)]
        expected = keep_largest_jointly(wholes, count, least=least)
        assert all(map(torch.equal, joined, expected)), count


@pytest.mark.parametrize(("dim", "lengths"), [(0, [2, 0, 5]), (1, [1, 3, 2])])
def test_drop_and_grow_over_shards(dim: int, lengths: list[int]) -> None:
    source = torch.Generator().manual_seed(1)
    mask = torch.rand(7, 6, generator=source) < 0.4
    drop, grow = (drawn((7, 6), "ties", torch.float64, source) for _ in range(2))
    shards = [parts(t, dim, lengths, Meeting(3)) for t in (mask, drop, grow)]
    active = int(mask.sum())
    for count in (0, 1, active // 2, active):
        made = on_each(lambda m, d, g, count=count: drop_and_grow(m, d, g, count), *shards)
        assert torch.equal(torch.cat(made, dim), drop_and_grow(mask, drop, grow, count))
    with pytest.raises(ValueError, match=f"the mask has {active} active"):
        on_each(lambda m, d, g: drop_and_grow(m, d, g, active + 1), *shards)


def test_more_positions_than_all_shards_have_are_refused() -> None:
    shards = parts(torch.ones(6), 0, [2, 4], Meeting(2))
    with pytest.raises(ValueError, match="6 are available"):
        on_each(lambda part: keep_largest(part, 7), shards)


@pytest.mark.parametrize(("dim", "rows"), [(0, 0), (1, 1)])
def test_what_processes_tell_each_other_does_not_grow_with_the_layer(dim: int, rows: int) -> None:
    """Counts and histograms; for shards of columns one count for each row besides."""
    sent = []
    for height, width in ((10, 40), (10, 4000), (300, 40)):
        meeting = Meeting(2)
        values = torch.randint(0, 3, (height, width), generator=torch.Generator().manual_seed(0)).float()
        lengths = [values.shape[dim] // 2] * 2
        on_each(lambda part, v=values: keep_largest(part, v.numel() // 2), parts(values, dim, lengths, meeting))
        sent.append(sum(meeting.messages) - rows * height)
    assert sent[0] == sent[1] == sent[2] <= 1100


def test_parts_of_any_layout_are_collected_whole_on_the_first_process() -> None:
    source = torch.Generator().manual_seed(0)
    for shape, dim, lengths in [
        ((7, 3), 0, [4, 3]),
        ((1, 3), 0, [1, 0]),
        ((5, 6), 1, [2, 2, 2]),
        ((10, 2), 0, [4, 4, 2]),
    ]:
        for whole in (torch.rand(shape, generator=source), torch.rand(shape, generator=source) < 0.5):
            meeting = Meeting(len(lengths))
            found = on_each(lambda lay, w=whole: lay.collected(lay.part(w)), layouts(shape, dim, lengths, meeting))
            assert torch.equal(found[0], whole)
            assert found[1:] == [None] * (len(lengths) - 1)
            if whole.dtype == torch.bool:  # eight in a byte
                assert meeting.messages == [-(-lengths[0] * whole.numel() // shape[dim] // 8)]


def test_layers_that_are_stacked_in_a_parameter_are_cut_where_their_rows_lie() -> None:
    whole = torch.arange(36.0).view(9, 4)
    for dim, lengths in ((0, [5, 4]), (0, [5, 4, 0]), (1, [2, 2])):
        views = on_each(
            lambda lay, w=whole: lay.layers(lay.part(w), 3), layouts((9, 4), dim, lengths, Meeting(len(lengths)))
        )
        for index, layer in enumerate(whole.chunk(3)):
            assert torch.equal(torch.cat([v[index] for v in views], dim), layer)
            assert on_each(lambda v, i=index: size_of(v[i]), views) == [12] * len(lengths)
            sums = on_each(lambda v, i=index: count_of(lying_as(v[i] > 20, layout_of(v[i]))), views)
            assert sums == [int((layer > 20).sum())] * len(lengths)
