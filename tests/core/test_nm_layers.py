"""N:M: which layers fit, tables of masks, what the plan says, moves within groups and tiles, and what is refused."""

import math
from typing import Any

import pytest
import torch
from oracles import nm
from support import loops
from torch import Tensor, nn

from sparse_callbacks import SET, SNFS, RigL, Static
from sparse_callbacks.core.growth import moved_in_groups
from sparse_callbacks.core.nm_layers import inputs_axis, nm_of
from sparse_callbacks.core.nm_masks import NMPattern, in_groups, nm_mask, out_of_groups
from sparse_callbacks.core.nm_selection import chosen_in_groups, chosen_on_the_way
from sparse_callbacks.core.patterns import why_other_pattern
from sparse_callbacks.core.selection import Entry, entries
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.tiles import full_tiles, moved_tiles
from sparse_callbacks.core.transposable import in_tiles, transposable_mask

METHODS = [Static, SET, RigL, SNFS]
each_method = pytest.mark.parametrize("make", METHODS, ids=lambda m: m.__name__)
TRANSPOSABLE = NMPattern(2, 4, transposable=True)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- tables


def test_masks_of_the_table() -> None:
    weight = torch.tensor(nm.TWO_OF_FOUR["weight"])
    for name in ("2:4", "4:8"):
        mask = nm_mask(weight.abs(), *map(int, name.split(":")))
        assert torch.equal(mask, torch.tensor(nm.TWO_OF_FOUR[name]).bool())
        assert float((weight.abs() * mask).sum()) == pytest.approx(nm.TWO_OF_FOUR[f"sum of {name}"], abs=1e-6)
        method = Static(pattern=name, initial_mask="magnitude")
        assert method.target_sparsity == 0.5


def test_groups_of_a_convolution_lie_along_its_input_channels() -> None:
    weight = torch.tensor(nm.CONVOLUTION["weight"])
    assert torch.equal(nm_mask(weight, 2, 4), torch.tensor(nm.CONVOLUTION["2:4"]).bool())
    flattened = nm_mask(weight.flatten(1), 2, 4).view(weight.shape)
    assert torch.equal(flattened, torch.tensor(nm.CONVOLUTION["flattened"]).bool())


@pytest.mark.parametrize(("kind", "shape", "groups", "transposable", "what", "zeros"), nm.LAYERS)
def test_layers_of_the_table_that_do_not_divide_stay_dense(
    kind: str, shape: tuple[int, ...], groups: int, transposable: bool, what: str, zeros: int
) -> None:
    layer: nn.Module = nn.Linear(shape[1], shape[0], bias=False)
    if kind == "conv":
        layer = nn.Conv2d(shape[1] * groups, shape[0], shape[2], groups=groups, bias=False)
    model = nn.ModuleDict({"it": layer, "other": nn.Linear(4, 4, bias=False)})  # a model has a layer that fits
    assert layer.weight.shape == shape
    pattern = "transposable 2:4" if transposable else "2:4"
    row = Static(pattern=pattern).plan(model)["it.weight"]
    assert (row.zeros, bool(row.reason)) == (zeros, bool(what))
    if what:
        count = shape[1] if what == "input" else shape[0]
        does = f"{what} does" if count == 1 else f"{what}s do"
        assert row.reason == f"not {pattern}: {count} {does} not divide into groups of 4"
    else:
        assert row.sparsity == 0.5
        assert row.remark == f"{pattern}: 2 of every 4 inputs" + (" and outputs" if transposable else "")


def test_outputs_of_a_grouped_convolution_divide_within_each_group() -> None:
    grouped, plain = nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(8, 12, 1)
    plan = Static(pattern="transposable 2:4").plan(nn.Sequential(grouped, plain))
    assert plan["0.weight"].reason == "not transposable 2:4: 6 outputs do not divide into groups of 4"
    assert plan["1.weight"].zeros == 48
    assert Static(pattern="2:4").plan(nn.Sequential(grouped))["0.weight"].zeros == 24


# ---------------------------------------------------------------------- plan


class Kinds(nn.Module):
    """Layers of every kind, of 12 inputs where not said otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv1d, self.up = (
            nn.Conv2d(12, 8, 3),
            nn.Conv1d(12, 8, 1),
            nn.ConvTranspose2d(12, 8, 2),
        )
        self.attention, self.lstm, self.cell = (
            nn.MultiheadAttention(12, 2),
            nn.LSTM(12, 8, proj_size=4),
            nn.RNNCell(12, 8),
        )
        self.linear, self.odd, self.odd_up = nn.Linear(12, 8), nn.Linear(10, 12), nn.ConvTranspose2d(12, 6, 2, groups=6)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4", "1:3", "2:6"])
def test_every_layer_that_fits_has_the_sparsity_of_the_pattern(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    plan = RigL(pattern=pattern).plan(Kinds())
    fitting = [row for row in plan if row.zeros]
    for row in fitting:
        assert row.zeros * m == row.size * (m - n)
        assert row.remark == f"{pattern}: {n} of every {m} inputs"
    names = {row.name for row in fitting}
    assert names >= {
        "conv.weight",
        "conv1d.weight",
        "up.weight",
        "attention.in_proj_weight",
        "lstm.weight_ih_l0",
        "linear.weight",
    }
    assert plan["odd.weight"].reason == (
        "" if 10 % m == 0 else f"not {pattern}: 10 inputs do not divide into groups of {m}"
    )
    assert plan["odd_up.weight"].reason == (
        "" if 2 % m == 0 else f"not {pattern}: 2 inputs do not divide into groups of {m}"
    )
    assert plan.total == pytest.approx(1 - n / m, abs=1e-12)


@each_method
def test_n_of_m_fixes_the_sparsity(make: Any) -> None:
    for given in (None, 0.5, 1 - 2 / 4):
        assert make(given, pattern="2:4").target_sparsity == 0.5
    assert make(0.6667, pattern="1:3").target_sparsity == 1 - 1 / 3
    assert make(0.75, pattern="transposable 1:4", distribution="erdos_renyi_kernel").target_sparsity == 0.75
    for other in (0.9, 0.51, 0, "0.5", math.nan):
        with pytest.raises(
            ValueError, match=r"pattern='2:4' is a sparsity of 0.5, and sparsity=.* another one\. Leave"
        ):
            make(other, pattern="2:4")
    for other in ("uniform", "lamp", {"*": 0.5}):
        with pytest.raises(
            ValueError, match=r"pattern='2:4' gives every layer the same share of weights, and distribution="
        ):
            make(pattern="2:4", distribution=other)


@pytest.mark.parametrize("make", [Static, SET, RigL])
def test_other_storage_than_masks_is_refused(make: Any) -> None:
    for storage in ("sparse", "grouped", "auto", {"*": "sparse"}):
        with pytest.raises(
            ValueError, match=r"pattern='2:4' is one of masked storage, and .* Leave storage= out, or pattern="
        ):
            make(pattern="2:4", storage=storage)
    make(pattern="2:4", storage="masked")


def test_arguments_that_count_otherwise_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"candidates=2.0 draws positions of a whole layer, and under pattern='2:4' each group"
    ):
        RigL(pattern="2:4", candidates=2.0)
    with pytest.raises(
        ValueError, match=r"neuron_importance=0.2 with pattern='2:4': the number of active weights falls"
    ):
        SET(pattern="2:4", neuron_importance=0.2)
    with pytest.raises(ValueError, match=r"drop='signed' with pattern='fan_in/4'"):
        SET(pattern="fan_in/4", drop="signed")
    SET(pattern="2:4", drop="signed")


def test_a_model_of_which_no_layer_fits_is_refused_with_the_reasons() -> None:
    message = (
        r"pattern='2:4' fits no layer, so nothing would be sparse: 0.weight \(not 2:4: 6 inputs do not divide into groups of 4\), "
        r"1.weight \(not 2:4: 10 inputs .*\)\. Give another pattern=, or leave it out"
    )
    with pytest.raises(ValueError, match=message):
        SET(pattern="2:4").plan(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)))


def test_a_layer_of_live_weights_alone_stays_as_it_is() -> None:
    sparse = SparseLinear.from_dense(nn.Linear(8, 8), torch.eye(8, dtype=torch.bool))
    plan = Static(pattern="2:4").plan(nn.Sequential(sparse, nn.Linear(8, 8)))
    assert plan["0.weight"].reason == "not 2:4: its layer holds live weights alone"
    assert plan["1.weight"].zeros == 32


# ---------------------------------------------------------------------- first masks


@pytest.mark.parametrize(("shape", "axis"), [((6, 12), 1), ((3, 8, 2, 3), 1), ((8, 5, 3), 0), ((16, 2), 0)])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 4)])
def test_groups_are_those_of_plain_python(shape: tuple[int, ...], axis: int, n: int, m: int) -> None:
    for seed in range(3):
        scores = (4 * seeded(*shape, seed=seed)).round().abs()  # with ties
        assert torch.equal(chosen_in_groups(scores, NMPattern(n, m), axis), nm.largest(scores, n, m, axis))
        assert torch.equal(out_of_groups(in_groups(scores, m, axis), axis), scores)


@pytest.mark.parametrize("m", [4, 20])
def test_a_number_for_each_group_takes_as_many(m: int) -> None:
    scores = seeded(5, 2 * m).abs().mul(8).round()
    counts = torch.arange(10).view(5, 2) % (m + 1)
    mask = nm_mask(scores, counts, m)
    for row in range(5):
        for group in range(2):
            count = int(counts[row, group])
            piece = slice(group * m, group * m + m)
            assert torch.equal(mask[row, piece], nm_mask(scores[row : row + 1, piece], count, m)[0])


def test_masks_have_the_memory_format_of_the_scores() -> None:
    scores = seeded(8, 8, 3, 3).abs().to(memory_format=torch.channels_last)
    for pattern in (NMPattern(2, 4), TRANSPOSABLE):
        mask = chosen_in_groups(scores, pattern)
        assert mask.stride() == scores.stride()
        moved = moved_in_groups(mask, scores * mask, scores, 0.5, pattern)
        assert moved.stride() == scores.stride()


def test_every_choice_of_a_group_is_equally_likely() -> None:
    layer = nn.Linear(4, 60_000)
    method = Static(pattern="2:4", seed=3, print_plan=False)
    run = loops.begin(method, layer, loops.sgd(layer))
    codes = (run.masks["weight"].long() @ torch.tensor([1, 2, 4, 8])).bincount(minlength=16)
    counts = codes[codes > 0].double()
    assert len(counts) == 6  # pairs of four
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 5 + 5 * 10**0.5


def test_on_the_way_to_a_pattern_what_it_keeps_is_never_lost() -> None:
    scores = seeded(6, 8, 2).abs()
    for pattern in (NMPattern(2, 4), NMPattern(1, 2)):
        mask = torch.ones_like(scores, dtype=torch.bool)
        final = chosen_in_groups(scores, pattern)
        for zeros in (0, 10, 30, 48):
            before, mask = mask, chosen_on_the_way(scores, zeros, pattern, 1, mask)
            assert int((~mask).sum()) == zeros
            assert bool((mask >= final).all())
            assert bool((mask <= before).all())
            stays = scores[mask & ~final]
            assert not len(stays) or bool((scores[before & ~mask] <= stays.min()).all())
        assert torch.equal(mask, final)


# ---------------------------------------------------------------------- moves


def table(key: str) -> Tensor:
    return torch.tensor(nm.UPDATE[key])


def test_one_update_of_the_table() -> None:
    found = moved_in_groups(table("2:4").bool(), table("weights"), table("dense_gradient"), 0.5, NMPattern(2, 4))
    assert torch.equal(found, table("mask_after").bool())
    slow = nm.update(table("2:4").bool(), table("weights"), table("dense_gradient"), 0.5, 4)
    assert torch.equal(found, slow)


@pytest.mark.parametrize(("shape", "axis"), [((6, 12), 1), ((3, 8, 2, 3), 1), ((8, 5, 3), 0), ((4, 40), 1)])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (7, 20)])
def test_updates_are_those_of_plain_python(shape: tuple[int, ...], axis: int, n: int, m: int) -> None:
    if shape[axis] % m:
        shape = tuple(m if dim == axis else size for dim, size in enumerate(shape))
    for seed in range(3):
        mask = chosen_in_groups(seeded(*shape, seed=seed).abs(), NMPattern(n, m), axis)
        weights = (3 * seeded(*shape, seed=seed + 10)).round() * mask  # with ties
        scores = (3 * seeded(*shape, seed=seed + 20)).round()
        for fraction in (0.0, 0.3, 1.0):
            found = moved_in_groups(mask, weights, scores, fraction, NMPattern(n, m), axis)
            assert torch.equal(found, nm.update(mask, weights, scores, fraction, m, axis))


def test_signs_leave_separately_and_groups_grow_what_they_lost() -> None:
    mask = chosen_in_groups(seeded(8, 16).abs(), NMPattern(2, 4))
    weights = seeded(8, 16, seed=1) * mask
    weights[weights < 0] *= 100  # by magnitude alone none of these would leave
    found = moved_in_groups(mask, weights, torch.zeros(8, 16), 0.3, NMPattern(2, 4), by_sign=True)
    assert bool((in_groups(found, 4).sum(-1) == 2).all())
    assert int((mask & ~found & (weights < 0)).sum()) > 0
    by_magnitude = moved_in_groups(mask, weights, torch.zeros(8, 16), 0.3, NMPattern(2, 4))
    assert int((mask & ~by_magnitude & (weights < 0)).sum()) == 0


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (2, 5), (4, 8), (2, 8)])
@pytest.mark.parametrize(("blocks", "kernel", "axis"), [((3, 2), (), 1), ((2, 3), (2, 2), 1), ((2, 3), (3,), 0)])
def test_tiles_are_full_from_the_first_mask_on(
    n: int, m: int, blocks: tuple[int, int], kernel: tuple[int, ...], axis: int
) -> None:
    pattern, shape = NMPattern(n, m, transposable=True), (blocks[0] * m, blocks[1] * m, *kernel)
    mask, changed = chosen_in_groups(seeded(*shape).abs(), pattern, axis), 0
    for seed in range(6):
        tiles = in_tiles(mask, m, axis)
        assert bool((tiles.sum(1) == n).all())
        assert bool((tiles.sum(2) == n).all())
        weights, scores = seeded(*shape, seed=seed + 1) * mask, seeded(*shape, seed=seed + 50)
        fraction = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)[seed]
        after = moved_in_groups(mask, weights, scores, fraction, pattern, axis)
        assert int((mask & ~after).sum()) <= int(fraction * int(mask.sum()) + 1e-3)
        assert fraction or torch.equal(after, mask)
        changed, mask = changed + int((after ^ mask).sum()), after
    assert changed > 0


def test_full_tiles_of_the_table_are_the_best_of_exactly_n() -> None:
    """Of the second tile at most N would keep 3568, with 7 weights."""
    weight = torch.tensor(
        [
            [-1.0, -13.0, -14.0, 8.0, 560.0, 328.0, -216.0, 882.0],
            [-5.0, -7.0, 15.0, 10.0, -446.0, -497.0, 264.0, 480.0],
            [3.0, 2.0, -4.0, 12.0, 32.0, -186.0, -48.0, -14.0],
            [9.0, 11.0, -16.0, 6.0, -92.0, -762.0, -2.0, -373.0],
        ]
    )
    mask = full_tiles(weight.abs(), TRANSPOSABLE)
    assert [float((weight.abs() * mask)[:, part].sum()) for part in (slice(4), slice(4, 8))] == [87.0, 3521.0]
    at_most = transposable_mask(weight.abs(), 2, 4)
    assert [int(at_most[:, part].sum()) for part in (slice(4), slice(4, 8))] == [8, 7]


def test_a_tile_grows_in_the_order_of_scores_where_rows_and_columns_have_room() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    kept = mask.clone()
    kept[0, 0] = kept[3, 3] = False
    scores = torch.zeros(4, 4)
    scores[0, 1], scores[0, 2], scores[1, 2], scores[0, 0], scores[0, 3], scores[3, 0] = 9, 8, 7, 4, 3, 2
    after = moved_tiles(mask, kept, scores, TRANSPOSABLE)
    # (0, 1) is active, (0, 2) and (1, 2) have no room in column 2; (0, 0) comes back, and (3, 3) with it
    assert torch.equal(after, mask)
    scores[0, 0] = 1
    after = moved_tiles(mask, kept, scores, TRANSPOSABLE)
    assert after.nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 1], [2, 2], [2, 3], [3, 0], [3, 2]]


def test_a_tile_that_growth_leaves_short_is_filled_by_the_best_exchange() -> None:
    mask = torch.eye(3).bool()
    kept = mask.clone()
    kept[0, 0] = kept[1, 1] = False
    pattern = NMPattern(1, 3, transposable=True)
    scores = torch.tensor([[5.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(moved_tiles(mask, kept, scores, pattern), mask)
    wide = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]).bool()
    stay = torch.zeros(4, 4).bool()
    stay[0, 1] = stay[1, 0] = stay[3, 3] = True
    # the order of some of these scores ends with a row and a column that have room where they cross a weight that stays
    for seed in range(200):
        scores = seeded(4, 4, seed=seed).abs()
        after = moved_tiles(wide, stay, scores, TRANSPOSABLE)
        assert bool((after >= stay).all())
        assert bool((after.sum(0) == 2).all())
        assert bool((after.sum(1) == 2).all())


def test_scores_that_are_not_finite_move_what_they_can() -> None:
    mask = full_tiles(seeded(16, 16).abs(), TRANSPOSABLE)
    scores = seeded(16, 16, seed=1)
    scores[::3], scores[1::5] = torch.nan, torch.inf
    for pattern in (TRANSPOSABLE, NMPattern(2, 4)):
        after = moved_in_groups(mask, seeded(16, 16, seed=2) * mask, scores, 0.5, pattern)
        assert bool((in_groups(after, 4).sum(-1) == 2).all())


# ---------------------------------------------------------------------- masks that are not of the pattern


@pytest.mark.parametrize("transposed", [False, True])
def test_masks_that_are_not_of_the_pattern_are_found(transposed: bool) -> None:
    stored = (8, 12, 3)
    shape = (12, 8, 3) if transposed else stored
    entry = Entry("w", 288, stored, shape, transposed=transposed)
    axis = inputs_axis(entry)
    for text in ("2:4", "transposable 2:4"):
        method = Static(pattern=text)
        pattern = nm_of(method, entry)
        assert pattern is not None
        good = chosen_in_groups(seeded(*stored).abs(), pattern, axis)
        assert why_other_pattern(method, {"w": good}, [entry]) == ""
        fewer = good.clone()
        fewer[:4] = False
        assert why_other_pattern(method, {"w": fewer}, [entry]) == ""
        more = good.clone()
        place = in_groups(more, 4, axis)[0, 0, 0].logical_not().nonzero()[0].item()
        more.movedim(axis, -1)[0, 0, place] = True
        expected = f"w has 3 active weights in a group of 4 inputs, and {text} allows 2"
        assert why_other_pattern(method, {"w": more}, [entry]) == expected
    rows = nm_mask(torch.ones(stored), 2, 4, axis)
    assert why_other_pattern(Static(pattern="2:4"), {"w": rows}, [entry]) == ""
    found = why_other_pattern(Static(pattern="transposable 2:4"), {"w": rows}, [entry])
    assert found == "w has 4 active weights in a group of 4 outputs, and transposable 2:4 allows 2"


def test_a_parameter_that_cannot_have_the_pattern_has_none() -> None:
    found = {e.name: nm_of(SET(pattern="2:4"), e) for e in entries(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)))}
    assert found["0.weight"] is None
    assert found["1.weight"] == NMPattern(2, 4)
    assert nm_of(SET(), entries(nn.Linear(4, 4))[0]) is None
