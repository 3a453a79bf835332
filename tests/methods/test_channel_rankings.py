"""Rankings of ChannelPruning: equal to trying every choice, within the capacity, and what they refuse."""

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from support.costs import Block, network, rng
from torch import Tensor, nn

from sparse_callbacks.channels.costs import flops, parameters
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.methods.channels.allocation import best_units, fits, options_of, smallest_cost
from sparse_callbacks.methods.channels.knapsack import InfeasibleError
from sparse_callbacks.methods.channels.rankings import (
    RANKINGS,
    Offer,
    by_global_order,
    by_knapsack,
    equal_shares,
    removals,
)


def small() -> nn.Sequential:
    """Three groups of 4, 6 and 5 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.Flatten(),
        nn.Linear(180, 2),
    )


def offered(found: Network, share: float, round_to: int = 1, chunk: int = 1) -> Offer:
    options = [options_of(size, round_to, chunk) for size in found.sizes]
    return Offer(found, options, [chunk] * len(options), found.sizes, share * found.dense)


def drawn(found: Network, seed: int) -> list[Tensor]:
    return [torch.rand(size, generator=rng(seed + i)) for i, size in enumerate(found.sizes)]


def counts(keeps: Sequence[Tensor]) -> list[int]:
    return [int(keep.sum()) for keep in keeps]


def lowest_first(offer: Offer, scores: Sequence[Tensor]) -> list[int]:
    """The numbers of units that are left when single units go, the lowest score of the network first."""
    units = sorted((float(s), group, index) for group, own in enumerate(scores) for index, s in enumerate(own))
    kept = list(offer.network.sizes)
    for _, group, _ in units:
        if fits(offer.network.realised(kept), offer.capacity):
            break
        kept[group] -= kept[group] > 1
    return kept


def share_of(offer: Offer) -> Fraction:
    """The least upper bound of the shares whose nearest options fit, by trying shares that lie close together."""
    sizes, steps = offer.network.sizes, 480  # half a unit of 4, 5, 6, 8, 16 and 24 is a whole number of these
    for step in range(steps, -1, -1):
        kept = [
            min(o.tolist(), key=lambda n, size=size: (abs(steps * n - step * size), -n))
            for o, size in zip(offer.options, sizes, strict=True)
        ]
        if fits(offer.network.realised(kept), offer.capacity):
            return min(Fraction(1), Fraction(step + 1, steps))
    raise AssertionError


def most_valuable(offer: Offer, scores: Sequence[Tensor]) -> float:
    """The largest total score of any choice that fits."""
    sums = [own.double().sort(descending=True).values.cumsum(0) for own in scores]
    choices = itertools.product(*(o.tolist() for o in offer.options))
    return max(
        sum(float(own[n - 1]) for own, n in zip(sums, choice, strict=True))
        for choice in choices
        if fits(offer.network.realised(choice), offer.capacity)
    )


@pytest.mark.parametrize("cost", [parameters, flops])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_each_ranking_equals_brute_force(seed: int, share: float, cost: Any) -> None:
    found, _ = network(small(), torch.zeros(1, 3, 8, 8), cost)
    offer, scores = offered(found, share), drawn(found, seed)
    assert counts(by_global_order(offer, scores).keeps) == lowest_first(offer, scores)
    kept = by_knapsack(offer, scores).keeps
    value = sum(float(own.double()[keep].sum()) for own, keep in zip(scores, kept, strict=True))
    # a search that may end beside the best: a solve counts the outputs of the one before
    assert 0.95 * most_valuable(offer, scores) <= value <= most_valuable(offer, scores) * (1 + 1e-9)


@pytest.mark.parametrize(("net", "pixels"), [(small, 8), (Block, 4)])
@pytest.mark.parametrize("round_to", [1, 2, 4])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
def test_equal_shares_are_equal_to_one_step_and_no_step_below_the_share_is_left(
    net: Callable[[], nn.Module], pixels: int, round_to: int, share: float
) -> None:
    found, _ = network(net(), torch.zeros(1, 3, pixels, pixels))
    offer = offered(found, share, round_to)
    if smallest_cost(found, offer.options) > offer.capacity:
        return
    kept, bound = equal_shares(offer, found.sizes), share_of(offer)
    assert fits(found.realised(kept), offer.capacity)
    for group, (count, size, options) in enumerate(zip(kept, found.sizes, offer.options, strict=True)):
        larger = [n for n in options.tolist() if n > count]
        smaller = [n for n in options.tolist() if n < count]
        assert not smaller or max(smaller) < bound * size
        if larger and count < bound * size:
            more = [*kept[:group], min(larger), *kept[group + 1 :]]
            assert not fits(found.realised(more), offer.capacity)


def test_what_equal_shares_leave_goes_to_the_group_that_is_furthest_below() -> None:
    found, _ = network(small(), torch.zeros(1, 3, 8, 8), parameters)
    # from 7/8 on the nearest are 4 of 4, 5 of 6 and 4 of 5; at 9/10 the third group would take its fifth, which is too dear,
    # and the sixth unit of the second group is not
    assert not fits(found.realised([4, 5, 5]), 0.9 * found.dense)
    assert equal_shares(offered(found, 0.9), found.sizes) == [4, 6, 4]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize(("round_to", "chunk"), [(1, 1), (8, 1), (4, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_network_fits_and_a_group_keeps_its_best(ranking: str, round_to: int, chunk: int, seed: int) -> None:
    found, _ = network(Block(), torch.zeros(1, 3, 4, 4))
    least = smallest_cost(found, [options_of(size, round_to, chunk) for size in found.sizes]) / found.dense
    for share in torch.linspace(least + 1e-6, 1.0, 7).tolist():
        offer, scores = offered(found, share, round_to, chunk), drawn(found, seed)
        keeps = RANKINGS[ranking](offer, scores).keeps
        assert found.realised(counts(keeps)) <= share * found.dense * (1 + 1e-9)
        for keep, own, options in zip(keeps, scores, offer.options, strict=True):
            assert int(keep.sum()) in options.tolist()
            assert torch.equal(keep, best_units(own, int(keep.sum()), chunk))


@pytest.mark.parametrize("ranking", RANKINGS)
def test_nothing_goes_without_need(ranking: str) -> None:
    found, _ = network(small(), torch.zeros(1, 3, 8, 8))
    assert counts(RANKINGS[ranking](offered(found, 1.0), drawn(found, 0)).keeps) == found.sizes


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_capacity_that_no_choice_meets_is_an_error_with_the_smallest_cost(ranking: str) -> None:
    found, _ = network(small(), torch.zeros(1, 3, 8, 8))
    offer = offered(found, 1e-3)
    with pytest.raises(InfeasibleError, match="no choice of one option in every group costs at most") as error:
        RANKINGS[ranking](offer, drawn(found, 0))
    assert error.value.minimum == pytest.approx(smallest_cost(found, offer.options))


def test_steps_of_several_units_go_by_their_mean_score() -> None:
    scores = [torch.tensor([4.0, 1.0, 1.0, 3.0]), torch.tensor([9.0, 0.5, 2.5])]
    options = [torch.tensor([2, 4]), torch.tensor([1, 2, 3])]
    assert removals(options, scores, [1, 1]) == [(1, 2), (0, 2), (1, 1)]  # means 0.5, 1.0 and 2.5
    assert removals([torch.tensor([2, 4])], [torch.tensor([4.0, 1.0, 1.0, 3.0])], [2]) == [(0, 2)]


def test_of_equal_scores_the_earlier_group_gives_first() -> None:
    same = [torch.ones(3), torch.ones(3)]
    options = [torch.arange(1, 4), torch.arange(1, 4)]
    assert removals(options, same, [1, 1]) == [(0, 2), (0, 1), (1, 2), (1, 1)]


def test_what_was_pruned_is_not_among_the_best() -> None:
    found, _ = network(small(), torch.zeros(1, 3, 8, 8))
    gone = [0, 3, 4]
    scores = drawn(found, 0)
    for own, index in zip(scores, gone, strict=True):
        own[index] = -torch.inf
    offer = offered(found, 0.5)
    left = Offer(found, [o[:-1] for o in offer.options], offer.chunks, [s - 1 for s in found.sizes], offer.capacity)
    choose: Callable[..., Any]
    for choose in RANKINGS.values():
        assert not any(keep[index] for keep, index in zip(choose(left, scores).keeps, gone, strict=True))
