"""SMCP's importance of channels, and how channels are ranked by it."""

import pytest
import torch
from oracles.smcp import (
    BY_4,
    BY_8,
    CUMULATIVE,
    GRADIENT,
    MAGNITUDE,
    ORDER,
    SCORES,
    TAYLOR,
    TAYLOR_OUT_IN,
    WEIGHT,
)

from sparse_callbacks.channels.groups import Member
from sparse_callbacks.methods.channels.allocation import best_units, options_of, ranking, values_of
from sparse_callbacks.methods.smcp.scores import input_scores, magnitude, taylor, unit_scores

# ---------------------------------------------------------------------- importance


def member(inputs: int) -> Member:
    return Member("layer", "layer.weight", 1, "in", torch.arange(inputs))


@pytest.mark.parametrize(("active", "expected"), TAYLOR)
def test_taylor_importance(active: list[int], expected: list[float]) -> None:
    scores = taylor(torch.tensor(WEIGHT), torch.tensor(GRADIENT))
    assert torch.allclose(scores, torch.tensor(TAYLOR_OUT_IN))
    found = unit_scores(input_scores(scores, 1, torch.tensor(active).bool()), member(3), 3).abs()
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_absolute_value_comes_after_the_sum_over_layers() -> None:
    scores = input_scores(taylor(torch.tensor(WEIGHT), torch.tensor(GRADIENT)), 1)
    both = unit_scores(scores, member(3), 3) + unit_scores(-scores, member(3), 3)
    assert both.abs().tolist() == [0.0, 0.0, 0.0]


def test_magnitude_importance() -> None:
    assert unit_scores(input_scores(magnitude(torch.tensor(WEIGHT)), 1), member(3), 3).tolist() == MAGNITUDE


def test_half_precision_is_summed_in_float32() -> None:
    weight = torch.tensor([[300.0, 300.0]], dtype=torch.float16)
    assert taylor(weight, weight).dtype == torch.float32
    assert taylor(weight, weight).tolist() == [[-9e4, -9e4]]
    assert magnitude(weight.double()).dtype == torch.float64


def test_slices_of_other_groups_count_for_none_and_several_of_one_unit_for_it() -> None:
    scores = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [100.0] * 5])
    flattened = Member("layer", "layer.weight", 1, "in", torch.tensor([0, 0, -1, 1, 1]))
    assert unit_scores(input_scores(scores, 1, torch.tensor([True, False])), flattened, 2).tolist() == [3.0, 24.0]
    transposed = Member("layer", "layer.weight", 0, "in", torch.tensor([1, 0]))
    assert unit_scores(input_scores(scores, 0, torch.tensor([1, 0, 0, 0, 1]).bool()), transposed, 2).tolist() == [
        200.0,
        17.0,
    ]


# ---------------------------------------------------------------------- ranking


def test_ranking_and_options() -> None:
    scores = torch.tensor(SCORES)
    assert ranking(scores).tolist() == ORDER
    assert values_of(scores, torch.arange(1, 17)).tolist() == pytest.approx(CUMULATIVE, abs=1e-6)
    units, values, mask = BY_8
    assert options_of(16, 8).tolist() == units
    assert values_of(scores, options_of(16, 8)).tolist() == pytest.approx(values, abs=1e-6)
    assert best_units(scores, 8).int().tolist() == mask
    assert options_of(10, 8).tolist() == list(range(1, 11))


def test_ranking_in_chunks() -> None:
    scores = torch.tensor(SCORES)
    sums, order, values, kept = BY_4
    assert scores.view(4, 4).sum(1).tolist() == pytest.approx(sums, abs=1e-6)
    assert ranking(scores, 4)[::4].tolist() == [4 * i for i in order]
    assert options_of(16, 8, 4).tolist() == [8, 16]
    assert values_of(scores, options_of(16, 8, 4), 4).tolist() == pytest.approx(values, abs=1e-6)
    assert best_units(scores, 8, 4).nonzero()[:, 0].tolist() == kept
    assert options_of(12, 8, 4).tolist() == [4, 8, 12]


def test_of_equal_units_the_first_is_kept() -> None:
    assert best_units(torch.zeros(4), 2).tolist() == [True, True, False, False]


def test_chunks_that_do_not_divide_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match=r"10 units cannot be ranked in chunks of 4\. Give a chunk that divides"):
        ranking(torch.rand(10), 4)
