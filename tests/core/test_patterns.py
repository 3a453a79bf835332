"""Patterns: which layers have one, how many columns, which are drawn and moved, and what is refused."""

from typing import Any

import pytest
import torch
from oracles import fan_in
from torch import Tensor, nn

from sparse_callbacks import CTRE, GMP, SET, SMCP, SNFS, ConstrainedL0, GaP, RigL, Static
from sparse_callbacks.core.growth import moved_mask
from sparse_callbacks.core.nm_masks import NMPattern
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.pattern_names import FanIn, asked_pattern, parsed
from sparse_callbacks.core.patterns import (
    as_mask,
    block_sums,
    columns_for,
    drawn_columns,
    largest_among,
    share_of,
    why_other_pattern,
)
from sparse_callbacks.core.selection import Entry


@pytest.mark.parametrize(
    "pattern",
    [
        *("fan_in/", "fan_in/0", "fan_in/-4", "fan_in/6.4", "fan_in/064", "fan-in/64", "", 64, True),
        *("4:2", "4:4", "0:4", "2:4:8", "2/4", "02:4", "transposable", "transposable2:4", "transposable fan_in"),
    ],
)
@pytest.mark.parametrize("make", [Static, SET, RigL, SNFS])
def test_other_words_than_those_of_a_pattern_are_refused(make: Any, pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"pattern=.* is not known\. Give '2:4', in which 2 of every 4 inputs"):
        make(0.5, pattern=pattern)


def test_what_yaml_makes_of_a_pattern_without_quotes_is_explained() -> None:
    with pytest.raises(
        ValueError, match=r"pattern=124 is not known\..* In a YAML file write it in quotes: pattern: '2:4'\."
    ):
        RigL(pattern=124)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [CTRE, GaP, ConstrainedL0, SMCP])
@pytest.mark.parametrize("pattern", ["2:4", "transposable 2:4", "fan_in/4", "no such word", 4])
def test_a_method_without_patterns_refuses_one_in_words(make: Any, pattern: Any) -> None:
    with pytest.raises(ValueError, match=rf"pattern={pattern!r}: {make.__name__} chooses .* and takes no pattern="):
        make(pattern=pattern)
    make(pattern=None)
    make(pattern="unstructured")


@pytest.mark.parametrize("make", [Static, SET, RigL])
def test_a_pattern_beside_a_storage_without_it_is_refused_in_words(make: Any) -> None:
    for storage in ("sparse", "auto", {"head.*": "sparse"}, {"a.*": "grouped", "*": "auto"}):
        with pytest.raises(
            ValueError,
            match=r"pattern='fan_in/4' is one of masked storage, and storage=.* has another\. .* give storage='grouped', group=4\.",
        ):
            make(0.5, pattern="fan_in/4", storage=storage, group=4)
        make(0.5, storage=storage, group=4)
    with pytest.raises(
        ValueError, match=r"pattern='fan_in/4' .*, and storage='grouped' with group=64 has another.* group=4\."
    ):
        make(0.5, pattern="fan_in/4", storage="grouped")
    make(0.5, pattern="fan_in/4", storage={"a.*": "grouped"}, group=4)
    make(0.5, pattern="fan_in/4", group=64)


def test_a_pattern_is_read_and_none_is_the_default() -> None:
    assert (parsed(None), parsed("unstructured")) == (None, None)
    assert [parsed(f"fan_in{x}") for x in ("", "/1", "/128")] == [FanIn(), FanIn(1), FanIn(128)]
    assert [parsed("2:4"), parsed("transposable 12:16")] == [NMPattern(2, 4), NMPattern(12, 16, transposable=True)]
    assert all(str(parsed(x)) == x for x in ("2:4", "transposable 2:4", "fan_in", "fan_in/64"))
    methods = [make(pattern=given) for make in (Static, SET, RigL, SNFS) for given in (None, "unstructured")]
    assert [asked_pattern(m) for m in [*methods, GMP()]] == [m.pattern for m in methods] + [None] == [None] * 9


@pytest.mark.parametrize(
    ("density", "inputs", "columns"),
    [(0.1, 784, 78), (0.1, 5, 1), (0.01, 20, 1), (0.0, 7, 1), (0.5, 5, 2), (0.5, 7, 4), (1.0, 9, 9), (0.999, 9, 9)],
)
def test_columns_are_rounded_as_python_rounds_and_at_least_one(density: float, inputs: int, columns: int) -> None:
    assert columns_for(density, inputs) == columns


@pytest.mark.parametrize("sparsity", [0.0, 0.07, 0.5, 0.9, 0.95, 0.999])
def test_the_plan_shows_the_sparsity_that_whole_columns_reach(sparsity: float) -> None:
    for inputs in (1, 3, 10, 49, 784):
        model = nn.Sequential(nn.Linear(inputs, 12))
        row = RigL(sparsity, distribution="uniform", pattern="fan_in/4").plan(model)["0.weight"]
        assert row.zeros == 12 * (inputs - max(1, round((1 - sparsity) * inputs)))
        assert row.sparsity == row.zeros / (12 * inputs)


def test_a_share_gives_back_its_zeros() -> None:
    for size in (1, 7, 49, 120, 9973):
        assert [zeros_for(share_of(zeros, size), size) for zeros in range(size)] == list(range(size))


def test_layers_of_other_kinds_stay_dense_and_the_plan_says_why() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.conv1d, self.up = nn.Conv2d(4, 8, 3), nn.Conv1d(4, 8, 1), nn.ConvTranspose2d(8, 8, 2)
            self.attention, self.lstm = nn.MultiheadAttention(16, 2), nn.LSTM(16, 8, proj_size=4)
            self.embedding, self.cell = nn.Embedding(16, 8), nn.RNNCell(8, 8)
            self.good, self.odd = nn.Linear(16, 8), nn.Linear(16, 10)

    include = ["*", "embedding.weight"]
    plan = Static(0.5, distribution="uniform", include=include, pattern="fan_in/8").plan(Net())
    assert {row.name: row.remark for row in plan if row.remark} == dict.fromkeys(
        ["good.weight", "attention.out_proj.weight"], "fan_in/8: 8 of 16 inputs"
    )
    why = {row.name: row.reason for row in plan if row.reason.startswith("not fan_in/8: ")}
    assert why.pop("odd.weight") == "not fan_in/8: 10 rows do not divide into groups of 8"
    for name in ("conv.weight", "conv1d.weight", "up.weight"):
        assert why.pop(name) == "not fan_in/8: a convolution"
    stacked = ["attention.in_proj_weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0"]
    assert why == dict.fromkeys(
        [*stacked, "embedding.weight", "cell.weight_ih", "cell.weight_hh"],
        "not fan_in/8: not the weight of a linear layer",
    )
    assert plan.total == 0.5  # of those two
    assert "fan_in/8: 8 of 16 inputs" in str(plan)
    unstructured = Static(0.5, distribution="uniform", include=include).plan(Net())
    assert not any(row.remark for row in unstructured)
    assert not any(row.remark for row in GMP(0.5).plan(Net()))


def test_a_linear_layer_that_shares_its_weight_with_an_embedding_stays_dense() -> None:
    for first in (True, False):
        linear, embedding = nn.Linear(8, 8, bias=False), nn.Embedding(8, 8)
        linear.weight = embedding.weight
        model = nn.Sequential(*((linear, embedding) if first else (embedding, linear)), nn.Linear(8, 8))
        plan = Static(0.5, include=["*.weight"], pattern="fan_in/4").plan(model)
        assert plan["0.weight"].reason == "not fan_in/4: not the weight of a linear layer"


def test_a_fan_in_that_is_stored_compactly_is_called_as_it_was_asked_for() -> None:
    row = RigL(0.8, distribution="uniform", pattern="fan_in", storage="grouped", group=1).plan(
        nn.Sequential(nn.Linear(64, 8))
    )["0.weight"]
    assert (row.storage, row.remark.split(";")[0]) == ("grouped", "fan_in: 12 of 64 inputs")


# ---------------------------------------------------------------------- columns


def numbers_with_ties(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(0, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).double() / 4


def test_the_largest_in_each_row_are_those_of_a_sort_with_ties_to_the_lower_column() -> None:
    for seed in range(30):
        scores, among = numbers_with_ties(3, 9, seed), numbers_with_ties(3, 9, seed + 100) > 0.25
        scores[1, seed % 9] = torch.nan  # below zero
        scores[2, seed % 9] = torch.inf
        ranked = scores.nan_to_num(-1.0, torch.inf).tolist()
        for given, count in ((None, 4), (among, int(among.sum(1).min())), (among, 0)):
            found = largest_among(scores, count, given)
            for row in range(3):
                allowed = [c for c in range(9) if given is None or given[row, c]]
                assert found[row].nonzero().flatten().tolist() == fan_in.best(ranked[row], count, allowed)


def test_draws_are_the_largest_of_uniform_numbers_and_each_choice_is_equally_likely() -> None:
    numbers = torch.rand(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = drawn_columns(4, 10, 3, torch.Generator().manual_seed(3))
    assert [row.nonzero().flatten().tolist() for row in drawn] == [
        fan_in.best(row.tolist(), 3, range(10)) for row in numbers
    ]
    often = drawn_columns(20_000, 5, 2, torch.Generator().manual_seed(0))
    pairs = (often.double() @ torch.tensor([1.0, 2, 4, 8, 16], dtype=torch.float64)).long().bincount(minlength=32)
    counts = pairs[pairs > 0]
    assert len(counts) == 10  # pairs of five columns
    assert float(((counts - 2000.0) ** 2 / 2000).sum()) < 9 + 5 * 18**0.5


def test_a_column_has_the_same_sum_whatever_lies_beside_it() -> None:
    """Sums of a grouped layer, which has the active columns alone, are those of the whole matrix bit for bit."""
    blocks = torch.randn(3, 64, 101, generator=torch.Generator().manual_seed(0))
    sums = block_sums(blocks)
    for columns in (slice(0, 1), slice(3, 50), slice(7, 101, 9)):
        assert torch.equal(block_sums(blocks[:, :, columns].contiguous()), sums[:, columns])
    slow = torch.zeros(3, 101)
    for row in range(64):
        slow += blocks[:, row].abs()
    assert torch.equal(sums, slow)
    assert block_sums(blocks.half()).dtype == torch.float32


def test_masks_that_are_not_of_the_pattern_are_found() -> None:
    entry = Entry("w", 40, (4, 10), (4, 10), linear=True)
    method = Static(pattern="fan_in/2")
    good = as_mask(drawn_columns(2, 10, 3, torch.Generator().manual_seed(0)), 2)
    assert why_other_pattern(method, {"w": good}, [entry]) == ""
    unequal_rows, unequal_counts = good.clone(), good.clone()
    unequal_rows[3] = unequal_rows[3].roll(1)
    unequal_counts[:2] = True
    assert (
        why_other_pattern(method, {"w": unequal_rows}, [entry])
        == "w has groups of 2 rows that do not read the same inputs"
    )
    assert "has groups of 2 rows that read from 3 to 10 inputs" in why_other_pattern(
        method, {"w": unequal_counts}, [entry]
    )
    for other in (Static(), Static(pattern="fan_in/3")):  # without a pattern, for this layer at least
        assert why_other_pattern(other, {"w": unequal_rows}, [entry]) == ""


# ---------------------------------------------------------------------- one update


def test_one_update_of_the_table() -> None:
    case = {k: torch.tensor(v, dtype=torch.float64) for k, v in fan_in.UPDATE.items() if not k.startswith("columns")}
    found = moved_mask(case["mask"].bool(), case["weights"], case["dense_gradient"], 0.5, 2)
    assert torch.equal(found, case["mask_after"].bool())
    slow = fan_in.update(case["mask"].bool(), case["weights"], 0.5, 2, case["dense_gradient"])
    assert torch.equal(found, slow)


@pytest.mark.parametrize("group", [1, 2, 4, 12])
@pytest.mark.parametrize("candidates", [None, 0.1, 1.0, 2.0, 50.0])
def test_updates_are_those_of_plain_python(group: int, candidates: float | None) -> None:
    for seed in range(12):
        source = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 10, (), generator=source))
        mask = as_mask(drawn_columns(12 // group, 9, count, source), group)
        weights = torch.randint(-3, 4, (12, 9), generator=source).double() * mask  # sums that tie
        gradient = torch.randint(-3, 4, (12, 9), generator=source).double()
        numbers = torch.rand(12 // group, 9, generator=source, dtype=torch.float64)
        for fraction in (0.0, 0.3, 0.5, 1.0):
            slow = fan_in.update(mask, weights, fraction, group, gradient, numbers, candidates)
            assert torch.equal(moved_mask(mask, weights, gradient, fraction, group, candidates, numbers), slow)
            by_chance = fan_in.update(mask, weights, fraction, group, None, numbers)
            assert torch.equal(moved_mask(mask, weights, numbers, fraction, group), by_chance)
