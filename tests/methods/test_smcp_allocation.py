"""SMCP's choice of channels that a budget pays for, and the ramp of the budget."""

import itertools

import pytest
import torch
from oracles.smcp import SCHEDULES, TINY, TINY_INFEASIBLE, TINY_SOLVED, TINY_TOTAL
from support.costs import Block, network, rng
from torch import Tensor, nn

from sparse_callbacks.channels.costs import multiply_adds, parameters
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.methods.channels.allocation import (
    allocate,
    cost_reduction,
    options_of,
    smallest_cost,
    solve_once,
    values_of,
)
from sparse_callbacks.methods.channels.knapsack import InfeasibleError

IMAGE = torch.zeros(1, 3, 8, 8)


class Tiny(nn.Module):
    """The reference network: three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(*TINY[f"conv{i}"][::-1], 3, padding=1, bias=False) for i in (1, 2, 3)
        )
        self.fc = nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


def priced(found: Network, seed: int, round_to: int = 8) -> tuple[list[Tensor], list[Tensor]]:
    """Options of each group, and their values for random scores."""
    options = [options_of(size, round_to) for size in found.sizes]
    scores = [torch.rand(size, generator=rng(seed + i)) + 1e-3 for i, size in enumerate(found.sizes)]
    return options, [values_of(s, o) for s, o in zip(scores, options, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_network(seed: int) -> None:
    found, groups = network(Tiny(), IMAGE)
    assert found.dense == TINY_TOTAL
    assert [g.consumers[0].module for g in groups] == ["conv2", "conv3", "fc"]
    options, values = priced(found, seed)
    for budget, (kept, estimate, realised) in TINY_SOLVED.items():
        got = solve_once(found, options, values, budget * TINY_TOTAL, found.sizes)
        assert dict(zip(kept, got.kept, strict=True)) == kept
        assert (got.cost, got.estimate, got.gap) == (realised, estimate, 0.0)
        more = allocate(
            found, options, values, budget * TINY_TOTAL, found.sizes
        )  # which may use what the estimate left
        assert more.value >= got.value
        assert more.cost <= budget * TINY_TOTAL
    for budget, minimum in TINY_INFEASIBLE.items():
        with pytest.raises(InfeasibleError, match=rf"at most 3065.6: the cheapest costs {minimum}"):
            solve_once(found, options, values, budget * TINY_TOTAL, found.sizes)
        # the producers shrink with their consumers, so a network of that budget exists
        assert allocate(found, options, values, budget * TINY_TOTAL, found.sizes).cost <= budget * TINY_TOTAL


def test_a_budget_that_no_network_meets_tells_the_smallest_one() -> None:
    found, _ = network(Tiny(), IMAGE)
    options, values = priced(found, 0)
    assert smallest_cost(found, options) == 3 * 8 * 9 + 2 * 8 * 8 * 9 + 80
    with pytest.raises(InfeasibleError, match=r"the cheapest costs 1448\. Give a larger budget"):
        allocate(found, options, values, 1447, found.sizes)
    assert allocate(found, options, values, 1448, found.sizes).kept == (8, 8, 8)


@pytest.mark.parametrize("cost", [parameters, multiply_adds])
@pytest.mark.parametrize("round_to", [1, 4])
def test_the_choice_costs_what_the_budget_allows_from_wherever_it_starts(cost: object, round_to: int) -> None:
    found, _ = network(Block(), torch.zeros(2, 3, 4, 4), cost)
    for seed, share in itertools.product(range(4), (0.15, 0.3, 0.5, 0.8, 1.0)):
        options, values = priced(found, seed, round_to)
        capacity = max(share * found.dense, smallest_cost(found, options))
        for start in (found.sizes, [int(o.min()) for o in options], [int(o[seed % len(o)]) for o in options]):
            got = allocate(found, options, values, capacity, start)
            assert got.cost <= capacity * (1 + 1e-9)
            assert got.cost == found.realised(got.kept)
            for g, (kept, choices) in enumerate(zip(got.kept, options, strict=True)):  # nothing more can be had
                more = [int(o) for o in choices if o > kept][:1]
                assert not more or found.realised([*got.kept[:g], *more, *got.kept[g + 1 :]]) > capacity
            assert all(j in o for j, o in zip(got.kept, options, strict=True))
            if share == 1.0:
                assert list(got.kept) == found.sizes


@pytest.mark.parametrize("cost", [parameters, multiply_adds])
def test_the_choice_is_about_as_valuable_as_any_that_fits(cost: object) -> None:
    """Against all choices; a single solve reaches 0.85 of the best value on average."""
    found, _ = network(Block(), torch.zeros(1, 3, 4, 4), cost)
    reached = []
    for seed, budget in itertools.product(range(4), (0.3, 0.5, 0.7)):
        options, values = priced(found, seed, 4)
        every = itertools.product(
            *[list(zip(o.tolist(), v.tolist(), strict=True)) for o, v in zip(options, values, strict=True)]
        )
        capacity = max(budget * found.dense, smallest_cost(found, options))
        fitting = [sum(v for _, v in choice) for choice in every if found.realised([j for j, _ in choice]) <= capacity]
        got = allocate(found, options, values, capacity, found.sizes)
        worth = sum(float(v[o.tolist().index(j)]) for o, v, j in zip(options, values, got.kept, strict=True))
        assert got.value == pytest.approx(worth)
        reached.append(got.value / max(fitting))
    assert max(reached) <= 1 + 1e-9
    assert sum(reached) / len(reached) > 0.99
    assert min(reached) > 0.97


def test_one_solve_may_overspend_where_channels_come_back_and_the_repeated_one_does_not() -> None:
    """Six convolutions in a row, half of each gone: what one solve brings back makes the others dearer than it
    counted."""
    net = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(6)])
    found, _ = network(net, torch.zeros(1, 16, 4, 4))
    options, values = priced(found, 3, 1)
    now, capacity = [4] * 5, 0.4 * found.dense
    assert solve_once(found, options, values, capacity, now).cost > 1.1 * capacity
    got = allocate(found, options, values, capacity, now)
    assert 0.9 * capacity < got.cost <= capacity


# ---------------------------------------------------------------------- the ramp


@pytest.mark.parametrize("case", SCHEDULES, ids=str)
def test_the_ramp(case: tuple[str, float, int, int, int]) -> None:
    curve, final, epochs, warmup, full = case
    last = epochs - warmup - full + 1  # points - 1
    for epoch, expected in SCHEDULES[case].items():
        found = cost_reduction(curve, final, (epoch - warmup + 1) / last if epoch >= warmup else 0.0, 0.05 * last)
        assert found == pytest.approx(expected, abs=6e-7)  # the reference is rounded to 7 digits and comes from float32


@pytest.mark.parametrize("curve", ["exp", "linear", "exp2"])
def test_the_ramp_ends_exactly_at_its_target(curve: str) -> None:
    assert (cost_reduction(curve, 0.3, 0.0), cost_reduction(curve, 0.3, 1.0), cost_reduction(curve, 0.3, 2.0)) == (
        0.0,
        0.3,
        0.3,
    )


def test_a_curve_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"curve='cubic' is not known\. Give 'exp', 'linear' or 'exp2'"):
        cost_reduction("cubic", 0.5, 0.5)
