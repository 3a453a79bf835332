"""Measures of comparisons, against tables worked by hand and a second way to compute them."""

import math
import random

import pytest
import torch
from torchmetrics.regression import SpearmanCorrCoef

from sparse_callbacks.reporting import measures

TOTAL = {"conv1.weight": 108, "conv1.bias": 4, "bn1.weight": 4, "bn1.bias": 4, "fc.weight": 640, "fc.bias": 10}
LEFT = TOTAL | {"conv1.weight": 30, "fc.weight": 50}
LOGITS = [
    [0.1, 2.0, 0.3, -1.0, 0.5, 0.2, 0.0],
    [1.0, 1.0, 0.5, 0.25, 0.25, 0.25, -1.0],
    [0.2, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    [-0.5, -0.1, -0.2, -0.3, -0.4, 3.0, 0.0],
    [0.3, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25],
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
]
LABELS = [1, 5, 6, 2, 4, 0]
POINTS = [(2, 0.91), (4, 0.92), (4, 0.9), (8, 0.88), (8, 0.88), (16, 0.85), (10, 0.85), (32, 0.7)]


def test_compression_counts_all_parameters_and_speedup_multiply_adds() -> None:
    assert measures.compression_ratio(TOTAL, LEFT) == pytest.approx(7.5490196078)
    positions = {"conv1.weight": 64, "fc.weight": 1}
    dense, left = (sum(count[name] * p for name, p in positions.items()) for count in (TOTAL, LEFT))
    assert (dense, left) == (7552, 1970)
    assert measures.theoretical_speedup(dense, left) == pytest.approx(3.8335025381)
    assert measures.theoretical_speedup(1_000_000, 320_000) == 3.125


@pytest.mark.parametrize(("k", "hits"), [(1, [1, 0, 0, 0, 0, 1]), (5, [1, 0, 0, 1, 1, 1])])
def test_of_equal_logits_the_lower_class_comes_first(k: int, hits: list[int]) -> None:
    assert measures.top_k_hits(torch.tensor(LOGITS), torch.tensor(LABELS), k).tolist() == [bool(hit) for hit in hits]


def test_top_k_is_the_sorted_order_for_random_logits_with_ties() -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (200, 8), generator=source).float()
    labels = torch.randint(0, 8, (200,), generator=source)
    for k in (1, 2, 5, 8):
        order = [sorted(range(8), key=lambda c: (-row[c], c))[:k] for row in logits.tolist()]
        expected = [label in best for label, best in zip(labels.tolist(), order, strict=True)]
        assert measures.top_k_hits(logits, labels, k).tolist() == expected


def test_logits_that_are_not_numbers_hit_nothing() -> None:
    logits = torch.tensor([[math.nan] * 7, [math.nan, 1.0, *[0.0] * 5]])
    assert not measures.top_k_hits(logits, torch.tensor([0, 1]), 1).any()
    assert measures.top_k_hits(logits, torch.tensor([0, 1]), 5).tolist() == [False, True]


def test_the_front_keeps_equal_points_and_drops_beaten_ones() -> None:
    assert measures.pareto_front(POINTS) == [1, 3, 4, 5, 7]
    assert measures.pareto_front([]) == []


def test_the_spread_divides_by_one_less_than_the_seeds() -> None:
    mean, spread = measures.mean_and_spread([0.912, 0.907, 0.918])
    assert mean == pytest.approx(0.9123333333)
    assert spread == pytest.approx(0.0055075705)
    assert measures.mean_and_spread([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no values"):
        measures.mean_and_spread([])


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    a, b = [0.91, 0.87, 0.83, 0.9, 0.72, 0.6], [0.88, 0.9, 0.8, 0.89, 0.75, 0.5]
    assert measures.spearman(a, b) == pytest.approx(0.7714285714)
    assert measures.ranks([1, 2, 2, 3, 5]) == [1, 2.5, 2.5, 4, 5]
    assert measures.spearman([1, 2, 2, 3, 5], [2, 1, 3, 3, 4]) == pytest.approx(0.7631578947)


@pytest.mark.filterwarnings("ignore:Metric .SpearmanCorrcoef. will save")
def test_rank_correlation_is_that_of_torchmetrics() -> None:
    source = random.Random(0)
    for count in (6, 10, 40):
        a, b = ([float(source.randrange(count // 2)) for _ in range(count)] for _ in range(2))
        reference = SpearmanCorrCoef()(torch.tensor(a), torch.tensor(b))
        assert measures.spearman(a, b) == pytest.approx(float(reference), abs=1e-5)  # float32 there


def test_rank_correlation_is_undefined_without_two_values() -> None:
    assert measures.spearman([1.0], [1.0]) is None
    assert measures.spearman([1.0, 2.0], [3.0, 3.0]) is None
    with pytest.raises(ValueError, match="2 and 1 values"):
        measures.spearman([1.0, 2.0], [3.0])


def test_the_share_to_keep_reaches_the_ratio_over_all_parameters() -> None:
    assert measures.share_to_keep(1000, 900, 4) == pytest.approx(0.1666666667)
    assert measures.share_to_keep(1000, 900, 1) == 1
    kept = measures.share_to_keep(1000, 900, 8) * 900
    assert measures.ratio(1000, 100 + kept, "parameters") == pytest.approx(8)
    assert measures.share_to_keep(900, 900, 100) == pytest.approx(0.01)


@pytest.mark.parametrize("compression", [10, 16])  # at 10 nothing prunable would be left
def test_a_ratio_that_what_cannot_be_pruned_exceeds_is_refused(compression: float) -> None:
    with pytest.raises(ValueError, match=r"100 of them cannot be pruned\. Give a ratio below 10"):
        measures.share_to_keep(1000, 900, compression)


@pytest.mark.parametrize("compression", [0.5, 0, -2, math.nan, math.inf])
def test_a_number_that_is_not_a_ratio_is_refused(compression: float) -> None:
    with pytest.raises(ValueError, match="not a compression ratio"):
        measures.share_to_keep(1000, 900, compression)


@pytest.mark.parametrize("prunable", [0, 1001])
def test_counts_that_cannot_be_are_refused(prunable: int) -> None:
    with pytest.raises(ValueError, match="prunable of 1000"):
        measures.share_to_keep(1000, prunable, 2)


def test_counts_of_different_parameters_and_empty_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only one of them has fc\.bias"):
        measures.compression_ratio(TOTAL, {name: n for name, n in LEFT.items() if name != "fc.bias"})
    for left in (0, 11):
        with pytest.raises(ValueError, match="give no ratio"):
            measures.theoretical_speedup(10, left)
