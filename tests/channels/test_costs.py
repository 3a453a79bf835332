"""What layers cost, importance, ranking, the ramp, and the choice of channels that a budget pays for."""

import itertools
import math

import pytest
import torch
from oracles.smcp import (
    BY_4,
    BY_8,
    CONVOLUTION,
    CUMULATIVE,
    GRADIENT,
    MAGNITUDE,
    ORDER,
    SCHEDULES,
    SCORES,
    TAYLOR,
    TAYLOR_OUT_IN,
    TINY,
    TINY_INFEASIBLE,
    TINY_SOLVED,
    TINY_TOTAL,
    WEIGHT,
)
from torch import Tensor, nn

from sparse_callbacks.channels.costs import Layer, OtherCosts, cost_outside_layers, layers, multiply_adds, parameters
from sparse_callbacks.channels.groups import Group, Member, channel_groups
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.methods.smcp.allocation import (
    allocate,
    best_units,
    cost_reduction,
    options_of,
    ranking,
    smallest_cost,
    solve_once,
    values_of,
)
from sparse_callbacks.methods.smcp.knapsack import InfeasibleError
from sparse_callbacks.methods.smcp.scores import input_scores, magnitude, taylor, unit_scores

# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("inputs", CONVOLUTION)
def test_the_reference_convolution(inputs: int) -> None:
    millions, billions = CONVOLUTION[inputs]
    layer = layers(nn.Sequential(nn.Conv2d(64, 128, 3, stride=2, padding=1)), torch.zeros(2, 64, 56, 56))["0"]
    assert parameters(layer, inputs, 128) == 1e6 * millions
    assert multiply_adds(layer, inputs, 128) == 1e9 * billions


def counted(net: nn.Module, x: Tensor) -> float:
    """Multiply-adds as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops() / 2


class Twice(nn.Module):
    """A convolution used on two sizes, and a linear layer over rows, one of them given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(nn.functional.max_pool2d(self.conv(x), 2))
        return self.fc(input=x.flatten(2).transpose(1, 2).flatten(0, 1))


NETS = {
    "grouped": (nn.Sequential(nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 24, 3, groups=12)), (3, 8, 9, 9)),
    "1d and 3d": (nn.Sequential(nn.Conv1d(4, 6, 5, stride=2)), (2, 4, 31)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1)), (2, 4, 5, 7)),
    "dilated": (nn.Sequential(nn.Conv3d(2, 4, (3, 1, 2), dilation=2, padding="same")), (2, 2, 6, 6, 6)),
    "used twice": (Twice(), (2, 4, 8, 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_dense_costs_are_those_of_torch(name: str) -> None:
    net, shape = NETS[name]
    x = torch.randn(shape)
    found = layers(net, x)
    assert sum(multiply_adds(layer, layer.inputs, layer.outputs) for layer in found.values()) * shape[0] == counted(
        net, x
    )
    weights = sum(m.weight.numel() for m in net.modules() if hasattr(m, "weight"))
    assert sum(parameters(layer, layer.inputs, layer.outputs) for layer in found.values()) == weights


def test_looking_at_a_model_leaves_it_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net[2].eval()
    before, state = {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state()
    assert list(layers(net, torch.randn(2, 2, 5, 5, generator=torch.Generator()))) == ["0"]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net] == [True, True, False]
    assert not net[0]._forward_hooks


class Attends(nn.Module):
    """Tokens [n, 5]: an embedding, attention, an MLP, two recurrent layers, a product with a parameter; a head that is
    never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(7, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.recur, self.again = nn.GRU(6, 4, batch_first=True), nn.LSTM(4, 4, batch_first=True)
        self.table, self.idle = nn.Parameter(torch.randn(4, 3)), nn.Linear(50, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.again(self.recur(self.down(self.up(x).relu()))[0])[0] @ self.table


def test_what_is_no_convolution_and_no_linear_layer_is_counted_as_it_is() -> None:
    net, tokens = Attends(), torch.zeros(3, 5, dtype=torch.int64)
    found = layers(net, tokens)
    assert list(found) == ["up", "down"]
    other = cost_outside_layers(net, tokens, found)
    recurrent = 3 * 4 * (6 + 4) + 4 * 4 * (4 + 4)
    assert other.parameters == 7 * 6 + 4 * 6 * 6 + recurrent + 4 * 3
    # of one sample: projections of attention, scores and sums over 5 tokens, the recurrent layers' 5 steps, the last
    # product
    assert other.multiply_adds == 5 * 4 * 6 * 6 + 2 * 5 * 5 * 6 + 5 * recurrent + 5 * 4 * 3
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(not m._forward_hooks for m in net.modules())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    assert cost_outside_layers(plain, torch.zeros(2, 3, 8, 8), layers(plain, torch.zeros(2, 3, 8, 8))) == OtherCosts(
        0.0, 0.0
    )
    assert Network(found, [], parameters, other.parameters).dense == other.parameters + 2 * 60


# ---------------------------------------------------------------------- networks


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


IMAGE = torch.zeros(1, 3, 8, 8)


def network(net: nn.Module, x: Tensor, cost: object = parameters) -> tuple[Network, list[Group]]:
    groups = [g for g in channel_groups(net, x) if not g.reason]
    return Network(layers(net, x), groups, cost), groups  # type: ignore[arg-type]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


class Block(nn.Module):
    """Residual sum, concatenation, depthwise and grouped convolution, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.depth, self.wide = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1)
        self.join, self.many, self.fc = nn.Conv2d(40, 16, 1), nn.Conv2d(16, 16, 1, groups=2), nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.inner(x).relu())
        x = torch.cat([x, self.wide(self.depth(x))], 1)
        return self.fc(self.many(self.join(x)).flatten(1))


def small_cost(net: nn.Module, groups: list[Group], kept: list[int], cost: str) -> float:
    """What the network costs once its channels are really gone: counted by torch on weights of the remaining shapes."""
    gone: dict[tuple[str, int], Tensor] = {}
    for group, count in zip(groups, kept, strict=True):
        keep = torch.arange(group.size) < count
        for m in group.members:
            shape = net.get_parameter(m.parameter).shape
            gone[m.module, m.dim] = gone.get((m.module, m.dim), torch.ones(shape[m.dim], dtype=torch.bool)) & m.kept(
                keep
            )
    total = 0.0
    for name, module in net.named_modules():
        if not hasattr(module, "weight"):
            continue
        shape = list(module.weight.shape)
        for dim in (0, 1):
            shape[dim] = int(gone[name, dim].sum()) if (name, dim) in gone else shape[dim]
        total += math.prod(shape) * (1 if cost == "parameters" or name == "fc" else 16)
    return total


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_costs_follow_the_channels_through_sums_concatenations_and_grouped_layers(cost: str) -> None:
    net, x = Block(), torch.zeros(2, 3, 4, 4)
    found, groups = network(net, x, {"parameters": parameters, "flops": multiply_adds}[cost])
    assert {"stem", "inner", "wide"} <= {g.name for g in groups}
    assert found.dense == small_cost(net, groups, found.sizes, cost)
    for seed in range(10):
        kept = [int(torch.randint(1, size + 1, (), generator=rng(7 * seed + i))) for i, size in enumerate(found.sizes)]
        assert found.realised(kept) == pytest.approx(small_cost(net, groups, kept, cost), rel=1e-12)
        options = [torch.tensor([1, kept[g], size]) for g, size in enumerate(found.sizes)]
        tables, rest = found.tables(options, kept)
        assert math.fsum(float(t[1]) for t in tables) + rest == pytest.approx(found.realised(kept), rel=1e-12)
        assert all(t[0] <= t[1] <= t[2] for t in tables)


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


class Both(nn.Module):
    """Two layers read together by a third, one of them through a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.depth = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.read = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.cat([self.a(x), self.depth(self.b(x))], 1))


def test_an_option_costs_its_share_of_what_reads_it_and_its_depthwise_layer() -> None:
    found, groups = network(Both(), IMAGE)
    assert [g.name for g in groups] == ["a", "b"]
    tables, rest = found.tables([torch.tensor([1, 4]), torch.tensor([2, 8])], [4, 6])
    assert tables[0].tolist() == pytest.approx([1 * 2, 4 * 2])
    assert tables[1].tolist() == pytest.approx([2 * 2 + 2 * 9, 8 * 2 + 8 * 9])
    assert rest == pytest.approx(3 * 4 + 3 * 6)


def test_a_depthwise_convolution_goes_with_its_channels() -> None:
    layer = Layer("depth", 8, 8, (3, 3), groups=8, positions=(16,))
    assert [multiply_adds(layer, j, j) for j in (8, 4)] == [8 * 9 * 16, 4 * 9 * 16]
    multiplied = Layer("depth", 8, 16, (3, 3), groups=8)
    assert parameters(multiplied, 4, 8) == 8 * 9


# ---------------------------------------------------------------------- importance and ranking


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
