"""Spdy: its levels, what they cost and spoil, the choice within a budget, and its arguments."""

import itertools
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks import Spdy
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.selection import select
from sparse_callbacks.methods.spdy.errors import index_errors, magnitude_errors
from sparse_callbacks.methods.spdy.levels import LEVELS, LayerCosts, flop_costs, sparsity_grid
from sparse_callbacks.methods.spdy.search import best_levels


class ConvNet(nn.Sequential):
    """Two convolutions and a linear layer for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        self.example_input_array = torch.zeros(2, 1, 8, 8)


def seeded(make: Any = ConvNet, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


# ---------------------------------------------------------------------- levels


def test_the_published_grid() -> None:
    grid = sparsity_grid()
    assert [round(s, 4) for s in grid[:8]] == [0.4, 0.4584, 0.5111, 0.5586, 0.6016, 0.6403, 0.6753, 0.7069]
    assert len(grid) == 41
    assert grid[-1] == 0.99
    ratios = [(1 - b) / (1 - a) for a, b in itertools.pairwise(grid)]
    assert ratios == pytest.approx([0.9027057706] * 40, abs=1e-9)
    assert (0.0, *grid) == LEVELS


# ---------------------------------------------------------------------- the choice


def costs_of(times: Sequence[Sequence[float]], others: float = 0.0) -> LayerCosts:
    names = [f"l{i}" for i in range(len(times))]
    levels = [tuple(i / len(row) for i in range(len(row))) for row in times]
    return LayerCosts(dict(zip(names, levels, strict=True)), dict(zip(names, times, strict=True)), others, "ms")


def chosen(times: Sequence[Sequence[float]], coefficients: Sequence[float], target: float) -> list[int]:
    costs = costs_of(times)
    errors = [[c * e for e in index_errors(len(row))] for c, row in zip(coefficients, times, strict=True)]
    return [*best_levels(costs, dict(zip(costs.levels, errors, strict=True)), target / costs.dense).values()]


# of the file that was made with an independent dynamic programme and by brute force
SMALL = ((4.0, 3.0, 2.0), (6.0, 4.0, 3.0), (2.0, 1.5, 1.0))
LARGE = (
    (4.75, 3.75, 2.75, 2.0, 1.25),
    (5.5, 4.5, 3.25, 2.25, 1.25),
    (5.0, 4.0, 3.0, 2.0, 1.25),
    (4.75, 3.75, 2.75, 2.0, 1.25),
)
COEFFICIENTS = (0.53, 0.16, 0.63, 0.77)


def test_the_table_of_three_layers() -> None:
    assert chosen(SMALL, (1.0, 0.4, 0.7), 8.0) == [1, 2, 0]
    equal = chosen(SMALL, (1.0, 1.0, 1.0), 8.0)  # the file has levels 2, 1, 0, which cost the same
    assert sum((i / 2) ** 2 for i in equal) == 1.25
    with pytest.raises(
        ValueError, match=r"budget=0.491667 of the ms cannot be met: .* costs 6 of 12. The smallest that can"
    ):
        chosen(SMALL, (1.0, 0.4, 0.7), 5.9)


def test_the_table_of_four_layers() -> None:
    assert chosen(LARGE, COEFFICIENTS, 11.0) == [2, 4, 2, 1]
    assert chosen(LARGE, COEFFICIENTS, 5.25) == [4, 4, 4, 4]
    uniform = chosen(LARGE, (1.0,) * 4, 11.0)
    assert math.fsum((i / 4) ** 2 for i in uniform) == 1.3125
    with pytest.raises(ValueError, match=r"costs 5 of 20. The smallest that can is budget=0.25; what exclude="):
        chosen(LARGE, COEFFICIENTS, 4.75)


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_within_the_budget_has_a_smaller_error(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    layers, levels = 4, 5
    times = torch.rand(layers, levels, generator=source, dtype=torch.float64).sort(1, descending=True).values
    errors = torch.rand(layers, levels, generator=source, dtype=torch.float64).sort(1).values
    if seed % 2:  # times with noise, and many equal costs
        times = (8 * torch.rand(layers, levels, generator=source, dtype=torch.float64)).round() + 1
    costs = costs_of(times.tolist(), others=0.5)
    by_layer = dict(zip(costs.levels, errors.tolist(), strict=True))
    least = costs.least / costs.dense
    budget = least + (1 - least) * float(torch.rand((), generator=source))
    found = best_levels(costs, by_layer, budget)
    every = itertools.product(range(levels), repeat=layers)
    named = [dict(zip(costs.levels, choice, strict=True)) for choice in every]
    fitting = [c for c in named if costs.at(c) <= budget * costs.dense]

    def error(choice: Mapping[str, int]) -> float:
        return math.fsum(by_layer[layer][i] for layer, i in choice.items())

    assert costs.at(found) <= budget * costs.dense
    assert error(found) == pytest.approx(min(map(error, fitting)), abs=1e-12)


def test_what_no_level_changes_counts_towards_the_budget() -> None:
    costs = costs_of([(2.0, 1.0), (2.0, 1.0)], others=4.0)
    errors = {"l0": [0.0, 1.0], "l1": [0.0, 2.0]}
    assert best_levels(costs, errors, 7 / 8) == {"l0": 1, "l1": 0}
    assert best_levels(costs, errors, 6 / 8) == {"l0": 1, "l1": 1}
    with pytest.raises(ValueError, match=r"costs 6 of 8. The smallest that can is budget=0.75;"):
        best_levels(costs, errors, 5.9 / 8)


# ---------------------------------------------------------------------- what levels cost and spoil


def test_flops_by_hand() -> None:
    net = ConvNet()
    costs = flop_costs(net, net.example_input_array, select(net))
    # weights times positions: 64 of an image of 8 x 8, 16 of one of 4 x 4
    dense = {"0.weight": 2 * 72 * 64, "2.weight": 2 * 576 * 16, "4.weight": 2 * 2560}
    assert {layer: flops[0] for layer, flops in costs.costs.items()} == dense
    assert (costs.others, costs.dense) == (0.0, sum(dense.values()))
    assert costs.costs["2.weight"][1] == 2 * 16 * (576 - 230)  # floor(0.4 * 576) zeros
    assert costs.costs["4.weight"][-1] == 2 * (2560 - 2534)
    without = flop_costs(net, net.example_input_array, select(net, exclude=("2.weight",)))
    assert set(without.costs) == {"0.weight", "4.weight"}
    assert without.others == dense["2.weight"]
    assert without.dense == costs.dense


def test_flops_of_a_layer_that_is_called_twice_and_of_stacked_ones() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(self.fc(x))
            found: Tensor = self.attention(x, x, x)[0]
            return found

    net = Shared()
    costs = flop_costs(net, torch.zeros(3, 5, 8), select(net))
    assert costs.costs["fc.weight"][0] == 2 * 2 * 5 * 64
    assert [costs.costs[f"attention.in_proj_weight[{i}]"][0] for i in range(3)] == [2 * 5 * 64] * 3
    assert costs.costs["attention.out_proj.weight"][0] == 2 * 5 * 64
    assert costs.others == 2 * 2 * 5 * 5 * 8  # queries with keys, and their softmax with values


def test_a_layer_that_no_pass_calls_is_refused() -> None:
    class Idle(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self[0](x)
            return found

    net = Idle(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"of Idle in eval mode does not call the layers of 1\.weight, .*exclude="):
        flop_costs(net, torch.zeros(1, 4), select(net))


def test_the_removed_share_of_squares() -> None:
    weight = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    total = 9 + 1 + 0.25 + 4
    errors = magnitude_errors(weight, (0.0, 0.24, 0.25, 0.5, 0.76))
    assert errors == [0.0, 0.0, 0.25 / total, 1.25 / total, 5.25 / total]  # floor(s * n) zeros
    assert magnitude_errors(torch.zeros(3), (0.0, 0.5)) == [0.0, 0.0]
    assert index_errors(5) == [0.0, 0.0625, 0.25, 0.5625, 1.0]


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(300, 70, generator=torch.manual_seed(0)),
        torch.randn(300, 70).half(),
        torch.randn(300, 70).double() * 1e-42,
        torch.randn(300, 70) * (torch.rand(300, 70) > 0.9),
        torch.randint(-3, 4, (300, 70)).float(),
        torch.full((300, 70), -0.3),
        torch.zeros(3, 3),
        torch.tensor([[2.0]]),
    ],
    ids=["normal", "half", "below float32", "pruned", "ties", "one value", "zeros", "one weight"],
)
def test_it_is_that_of_sorted_squares(weight: torch.Tensor) -> None:
    squares = weight.double().flatten().square().sort().values
    total = float(squares.sum()) or 1.0
    expected = [float(squares[: zeros_for(s, len(squares))].sum()) / total for s in LEVELS]
    assert magnitude_errors(weight, LEVELS) == pytest.approx(expected, rel=1e-9)


def test_the_error_is_that_of_outputs_for_white_inputs() -> None:
    """An independent way: outputs of the pruned layer on many random inputs."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 32, dtype=torch.float64), torch.randn(200_000, 32, dtype=torch.float64)
    smallest = weight.abs().flatten().argsort()[:256]
    pruned = weight.flatten().index_fill(0, smallest, 0.0).view_as(weight)
    measured = (inputs @ (weight - pruned).T).square().sum() / (inputs @ weight.T).square().sum()
    [error] = magnitude_errors(weight, (0.5,))
    assert error == pytest.approx(float(measured), rel=0.01)


# ---------------------------------------------------------------------- the object


def test_shares_meet_the_budget_and_are_levels() -> None:
    net = seeded()
    for budget in (0.05, 0.3, 0.5, 0.9):
        found = Spdy(budget).layer_shares(net, select(net))
        assert set(found.sparsities) == {"0.weight", "2.weight", "4.weight"}
        assert set(found.sparsities.values()) <= set(LEVELS)
        flops = {"0.weight": 64, "2.weight": 16, "4.weight": 1}
        sizes = {e.name: e.size for e in select(net)}
        left = sum(n * (sizes[k] - math.floor(found.sparsities[k] * sizes[k])) for k, n in flops.items())
        assert left <= budget * sum(n * sizes[k] for k, n in flops.items())
        assert found.reached == left / sum(n * sizes[k] for k, n in flops.items())
        assert Spdy(budget).shares(net, select(net)) == found.sparsities


def test_larger_weights_stay() -> None:
    """Of two equal layers the one whose weights are of more unequal size loses more of them."""
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    nn.init.constant_(net[0].weight, 1.0)
    with torch.no_grad():
        net[1].weight[:, 5:] = 1e-3
    found = Spdy(0.6, input=(20,)).shares(net, select(net))
    assert found["0.weight"] == 0.0
    assert found["1.weight"] > 0.7


def test_the_model_stays_as_it_was() -> None:
    net = seeded()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    state = torch.get_rng_state()
    Spdy(0.5).shares(net, select(net))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training


def test_arguments_are_kept_printed_and_compared() -> None:
    spdy = Spdy()
    assert repr(spdy) == "Spdy(budget=0.5, cost='flops', error='magnitude')"
    given = Spdy(0.25, "t.json", "calibration", input=[1, 8, 8], batches=3, loss=functional.mse_loss, seed=5)
    assert repr(given) == (
        "Spdy(budget=0.25, cost='t.json', error='calibration', input=(1, 8, 8), batches=3, loss=mse_loss, seed=5)"
    )
    assert Spdy(input=[1, 8, 8]) == Spdy(input=(1, 8, 8)) != spdy
    assert pickle.loads(pickle.dumps(replace(given, loss=None))) == replace(given, loss=None)
    with pytest.raises(AttributeError):
        spdy.budget = 0.7  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": 1.0}, r"budget=1.0 is out of range. Give a number above 0 and below 1"),
        ({"budget": True}, r"budget=True is out of range"),
        ({"budget": "half"}, r"budget='half' is out of range"),
        ({"cost": "macs"}, r"cost='macs' is not known. Give 'flops' or the path of a table of times"),
        ({"error": "index"}, r"error='index' is not known. Give 'magnitude' or 'calibration'"),
        ({"input": "1x8"}, r"input='1x8' is not the size of a sample"),
        ({"input": (1, 0)}, r"input=\(1, 0\) is not the size of a sample"),
        ({"batches": 0}, r"batches=0 is not a number of batches"),
        ({"loss": "mse"}, r"loss='mse' is not a function"),
        ({"batches": 3}, r"batches= says nothing to error='magnitude', which looks at no data. Leave batches= out"),
        ({"loss": print}, r"loss= says nothing to error='magnitude'"),
        ({"seed": 0.5}, r"seed=0.5 is not a whole number"),
    ],
    ids=lambda value: next(iter(value)) + repr(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_arguments_that_no_model_can_make_right(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Spdy(**arguments)


def test_a_sample_is_needed_and_must_fit() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r"the module has no example_input_array, and there is no training data outside"
    ):
        Spdy().shares(net, select(net))
    with pytest.raises(ValueError, match=r"input=\(5,\): Sequential does not take a float tensor of size \[1, 5\]"):
        Spdy(input=(5,)).shares(net, select(net))
    assert Spdy(input=(4,)).shares(net, select(net)).keys() == {"0.weight", "1.weight"}
    assert Spdy(input=(4,)).shares(net.double(), select(net)).keys() == {"0.weight", "1.weight"}


def test_losses_need_a_run() -> None:
    net = ConvNet()
    with pytest.raises(ValueError, match=r"takes losses on training data, and there is none outside of a run"):
        Spdy(error="calibration").shares(net, select(net))
