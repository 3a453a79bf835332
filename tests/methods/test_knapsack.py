"""The multiple-choice knapsack: reference cases, brute force over random ones, capacity, speed, refusals."""

import itertools
import math
import pickle
import time

import pytest
import torch
from oracles.smcp import BEST, CONDENSED, COSTS, VALUES
from torch import Tensor

from sparse_callbacks.methods.channels.knapsack import InfeasibleError, solve, undominated


def tensors(rows: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(row) for row in rows]


@pytest.mark.parametrize("capacity", BEST)
def test_the_reference_cases(capacity: float) -> None:
    value, cost, optimal = BEST[capacity]
    found = solve(tensors(VALUES), tensors(COSTS), capacity)
    assert found.choice in optimal
    assert (found.value, found.cost, found.gap) == (value, cost, 0.0)


def test_undominated_options() -> None:
    values, costs, capacity, kept = CONDENSED
    assert undominated(torch.tensor(values), torch.tensor(costs), capacity).tolist() == kept
    assert undominated(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([3.0, 3.0, 3.0])).tolist() == [2]
    assert undominated(torch.tensor([1.0]), torch.tensor([3.0]), 2).tolist() == []


def best(values: list[Tensor], costs: list[Tensor], capacity: float) -> float:
    """Value of the best choice, by trying all."""
    found = -math.inf
    for choice in itertools.product(*(range(len(v)) for v in values)):
        if math.fsum(float(c[i]) for c, i in zip(costs, choice, strict=True)) <= capacity:
            found = max(found, math.fsum(float(v[i]) for v, i in zip(values, choice, strict=True)))
    return found


KINDS = ["floats", "integers", "concave", "value is cost", "negative values", "one option"]


def instance(kind: str, seed: int, groups: int, options: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    values, costs = [], []
    for _ in range(groups):
        size = 1 if kind == "one option" else int(torch.randint(1, options + 1, (), generator=generator))
        value, cost = (torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
        if kind == "integers":
            value, cost = (10 * value).round(), (10 * cost).round()
        elif kind == "concave":
            value, cost = value.sort(descending=True).values.cumsum(0), cost.cumsum(0)
        elif kind == "value is cost":
            value = cost
        elif kind == "negative values":
            value = value - 2
        values.append(value)
        costs.append(cost)
    return values, costs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_against_brute_force(kind: str, seed: int) -> None:
    values, costs = instance(kind, seed, groups=1 + seed % 6, options=4)
    low, high = (sum(float(getattr(c, of)()) for c in costs) for of in ("min", "max"))
    for share in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        capacity = low + share * (high - low) + 1e-9
        found = solve(values, costs, capacity)
        assert found.value == pytest.approx(best(values, costs, capacity), abs=1e-9)  # sums in another order
        assert found.gap == 0.0
        assert found.cost <= capacity
        assert found.value == math.fsum(float(v[i]) for v, i in zip(values, found.choice, strict=True))
        assert found.cost == math.fsum(float(c[i]) for c, i in zip(costs, found.choice, strict=True))


def test_a_capacity_that_is_just_the_sum_is_enough() -> None:
    costs = [torch.tensor([0.05, 0.1], dtype=torch.float64)] * 10
    total = sum([0.1] * 10)  # rounded in another order than theirs
    assert total < math.fsum([0.1] * 10)
    assert solve([torch.tensor([1.0, 2.0])] * 10, costs, total).choice == (1,) * 10
    assert solve([torch.tensor([1.0, 2.0])] * 10, costs, total - 1e-9).value == 19.0


@pytest.mark.parametrize("kind", ["floats", "concave"])
def test_fifty_groups_of_64_options_are_solved_exactly_in_less_than_a_second(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(50)]
    costs = [torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(50)]
    if kind == "concave":
        values, costs = [v.sort(descending=True).values.cumsum(0) for v in values], [c.cumsum(0) for c in costs]
    begun = time.perf_counter()
    found = solve(values, costs, 0.5 * sum(float(c.mean()) for c in costs))
    assert time.perf_counter() - begun < 1.0
    assert found.gap == 0.0


def test_a_choice_that_is_not_proved_best_reports_its_gap() -> None:
    """Values equal to costs that no two sums share: every partial choice is as good as any other."""
    values, _ = instance("value is cost", 0, groups=24, options=24)
    capacity = 0.6 * sum(float(v.max()) for v in values)
    found = solve(values, values, capacity)
    assert 0 < found.gap < 1e-3 * capacity
    assert capacity - found.value <= found.gap * (1 + 1e-6) + 1e-9
    assert found.cost <= capacity


def test_the_choice_does_not_depend_on_the_type_of_numbers() -> None:
    assert solve([v.int() for v in tensors(VALUES)], [c.int() for c in tensors(COSTS)], 12).choice == (2, 2, 2)


# ---------------------------------------------------------------------- refusals


def test_an_infeasible_capacity_reports_the_smallest_feasible_cost() -> None:
    with pytest.raises(InfeasibleError, match=r"at most 8: the cheapest costs 10. Give a larger budget") as caught:
        solve([torch.ones(1)] * 2, [torch.full((1,), 5.0)] * 2, 8)
    assert (caught.value.capacity, caught.value.minimum) == (8, 10)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert solve([torch.ones(1)] * 2, [torch.full((1,), 5.0)] * 2, 10).cost == 10


@pytest.mark.parametrize(
    ("values", "costs"),
    [([], []), ([[1.0]], [[1.0, 2.0]]), ([[]], [[]]), ([[1.0], [1.0]], [[1.0]]), ([[[1.0]]], [[[1.0]]])],
)
def test_what_is_not_a_group_of_options_is_refused(values: list[list[float]], costs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"not groups of options. Give one 1-d tensor of each"):
        solve(tensors(values), tensors(costs), 3)


@pytest.mark.parametrize(
    ("value", "cost", "capacity"), [(math.nan, 1.0, 3.0), (1.0, math.inf, 3.0), (1.0, 1.0, math.inf)]
)
def test_numbers_that_are_not_finite_are_refused(value: float, cost: float, capacity: float) -> None:
    with pytest.raises(ValueError, match=r"is inf or NaN. Give finite numbers"):
        solve([torch.tensor([value])], [torch.tensor([cost])], capacity)
