"""What layers cost, and what a network costs by the channels that it keeps."""

import math

import pytest
import torch
from oracles.smcp import CONVOLUTION
from support.costs import Block, network, rng
from torch import Tensor, nn

from sparse_callbacks.channels.costs import Layer, OtherCosts, cost_outside_layers, layers, multiply_adds, parameters
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.network_cost import Network, _Side

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


def test_what_lies_outside_convolutions_and_linear_layers_is_counted_as_it_is() -> None:
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


class Both(nn.Module):
    """Two layers read together by a third, one of them through a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.depth = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.read = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.cat([self.a(x), self.depth(self.b(x))], 1))


def test_an_option_costs_its_share_of_what_reads_it_and_its_depthwise_layer() -> None:
    found, groups = network(Both(), torch.zeros(1, 3, 8, 8))
    assert [g.name for g in groups] == ["a", "b"]
    tables, rest = found.tables([torch.tensor([1, 4]), torch.tensor([2, 8])], [4, 6])
    assert tables[0].tolist() == pytest.approx([1 * 2, 4 * 2])
    assert tables[1].tolist() == pytest.approx([2 * 2 + 2 * 9, 8 * 2 + 8 * 9])
    assert rest == pytest.approx(3 * 4 + 3 * 6)


def test_what_no_option_changes_is_counted_once_for_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    found, groups = network(Block(), torch.zeros(1, 3, 4, 4))
    counted: list[str] = []
    usual = _Side.total
    monkeypatch.setattr(_Side, "total", lambda side, *given, **more: counted.append("") or usual(side, *given, **more))

    def sums(step: int) -> tuple[int, list[Tensor]]:
        counted.clear()
        tables, _ = found.tables([torch.arange(step, g.size + 1, step) for g in groups], found.sizes)
        return len(counted), tables

    (few, coarse), (many, fine) = sums(8), sums(1)
    assert few == many
    assert all(torch.equal(some, every[7::8]) for some, every in zip(coarse, fine, strict=True))


def test_a_depthwise_convolution_goes_with_its_channels() -> None:
    layer = Layer("depth", 8, 8, (3, 3), groups=8, positions=(16,))
    assert [multiply_adds(layer, j, j) for j in (8, 4)] == [8 * 9 * 16, 4 * 9 * 16]
    multiplied = Layer("depth", 8, 16, (3, 3), groups=8)
    assert parameters(multiplied, 4, 8) == 8 * 9
