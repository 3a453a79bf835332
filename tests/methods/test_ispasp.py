"""i-SpaSP: tables, and a search that computes residuals of outputs in loops."""

from typing import Any

import numpy as np
import pytest
import torch
from oracles.calibrated import ISPASP
from support.calibrated import Tokens, losses, network
from torch import Tensor, nn

from sparse_callbacks.channels.feature_maps import maps_read
from sparse_callbacks.channels.groups import Group, Member, channel_groups
from sparse_callbacks.methods.channels import ispasp as module
from sparse_callbacks.methods.channels.allocation import best_units
from sparse_callbacks.methods.channels.calibrated_criteria import set_scores
from sparse_callbacks.methods.channels.ispasp import (
    Contributions,
    contributions,
    exchanges,
    half_residual,
    ispasp,
    why_not,
)

D = torch.float64


def of_table(name: str) -> Contributions:
    table = ISPASP[name]
    return Contributions.of(torch.tensor(table["hidden"], dtype=D), torch.tensor(table["weight"], dtype=D))


@pytest.mark.parametrize("name", ISPASP)
def test_the_iterations_of_the_tables(name: str) -> None:
    found = [
        (e.importance.tolist(), e.candidates.tolist(), e.selected.tolist(), e.residual)
        for e in exchanges(of_table(name), 2, ISPASP[name]["iterations"])
    ]
    assert found == ISPASP[name]["exchanges"]


@pytest.mark.parametrize("name", ISPASP)
def test_the_best_set_is_returned_and_not_the_last(name: str) -> None:
    units = of_table(name)
    assert ispasp(units, 2).tolist() == ISPASP[name]["best"]
    assert ISPASP[name]["exchanges"][-1][2] != ISPASP[name]["best"]


def test_no_pair_of_units_is_better_than_brute_force_finds() -> None:
    units = of_table("best seen")
    pairs = [torch.tensor([i, j]) for i in range(8) for j in range(i)]
    best = min(half_residual(units, torch.zeros(8, dtype=torch.bool).index_fill(0, p, True)) for p in pairs)
    assert best == 299.0


def test_of_equals_the_earliest_is_returned() -> None:
    """Units of no effect on the outputs leave residuals that are equal, and the first set has the lower indices."""
    units = Contributions(torch.zeros(4, 4), torch.zeros(4, 4), torch.tensor([1.0, 1.0, 2.0, 2.0]))
    assert [e.selected.tolist() for e in exchanges(units, 1)] == [[0], [0]]
    assert ispasp(units, 1).tolist() == [0]


def test_a_large_negative_activation_is_activity() -> None:
    hidden = torch.tensor([[-5.0, 5.0], [1.0, 1.0], [0.5, 0.5]], dtype=D)
    first = next(exchanges(Contributions.of(hidden, torch.tensor([[1.0, 0.1, 0.1]], dtype=D)), 2))
    assert first.candidates.tolist() == [0, 1, 2]
    assert first.selected.tolist() == [0, 1]


def test_importance_has_a_sign() -> None:
    """The second unit harms: what it contributes is against the sum. With absolute values it would be a candidate."""
    units = Contributions.of(torch.tensor([[4.0], [3.0], [1.0]], dtype=D), torch.tensor([[1.0, -1.0, 1.0]], dtype=D))
    first = next(exchanges(units, 1))
    assert first.importance.tolist() == [2.0, -2.0, 2.0]
    assert first.candidates.tolist() == [0, 2]


# ---------------------------------------------------------------------- layers, by loops over units and their outputs


def searched(layer: Any, x: Tensor, channels_of: list[list[int]], keep: int) -> tuple[list[list[int]], list[float]]:
    """The sets of five iterations and their residuals, from the outputs that every set gives."""

    def outputs(kept: set[int]) -> Tensor:
        given = torch.zeros_like(x)
        for unit in kept:
            for c in channels_of[unit]:
                at = (..., c) if isinstance(layer, nn.Linear) else (slice(None), c)
                given[at] = x[at]
        with torch.no_grad():
            bias = layer.bias
            layer.bias = None
            out = layer(given)
            layer.bias = bias
        return out

    every, kept, sets, residuals = set(range(len(channels_of))), set[int](), [], []
    activity = np.zeros(len(channels_of))
    for unit, channels in enumerate(channels_of):
        for c in channels:
            activity[unit] += float((x[..., c] if isinstance(layer, nn.Linear) else x[:, c]).abs().sum())
    for _ in range(5):
        leaf = x.clone().requires_grad_()
        bias, layer.bias = layer.bias, None
        importance = np.zeros(len(channels_of))
        # W^T V is the gradient of the outputs along V
        (back,) = torch.autograd.grad(layer(leaf), leaf, outputs(every) - outputs(kept))
        layer.bias = bias
        for unit, channels in enumerate(channels_of):
            for c in channels:
                importance[unit] += float((back[..., c] if isinstance(layer, nn.Linear) else back[:, c]).sum())
        merged = sorted({*np.argsort(-importance, kind="stable")[: 2 * keep].tolist()} | kept)
        kept = set(sorted(merged, key=lambda unit: -activity[unit])[:keep])
        sets.append(sorted(kept))
        residuals.append(0.5 * float((outputs(every) - outputs(kept)).square().sum()))
    return sets, residuals


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "strides and padding": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=(1, 2)), (5, 6, 7, 8)),
    "same": (lambda: nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(1, 2)), (5, 6, 7, 8)),
    "valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), (5, 6, 7, 8)),
    "one dimension": (lambda: nn.Conv1d(6, 4, 3, padding=1, stride=2), (5, 6, 9)),
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "tokens": (lambda: nn.Linear(6, 4), (5, 3, 6)),
}


class Sharing(nn.Module):
    """A convolution or linear layer of one input channel for each of its outputs, and a layer that reads them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_sums_give_the_iterations_that_outputs_give(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNFOLDED", 2000)  # several parts of a batch
    make, shape = LAYERS[kind]
    torch.manual_seed(1)
    net = Sharing(make()).double()
    x = torch.randn(shape, dtype=D)
    member = Member("layer", "layer.weight", 1, "in", torch.arange(6) // chunk)
    maker = Member("maker", "maker.weight", 0, "out", torch.arange(6) // chunk)
    group = Group("maker", 6 // chunk, (maker,), (member,), ())
    (units,) = contributions(net, [group], (net(part).sum() for part in x.split(3)))
    sets, residuals = searched(net.layer, x, [[*range(u * chunk, (u + 1) * chunk)] for u in range(group.size)], 2)
    found = list(exchanges(units, 2))
    assert len(found) > 1
    for e, expected, residual in zip(found, sets, residuals, strict=False):
        assert e.selected.tolist() == expected
        assert e.residual == pytest.approx(residual, rel=1e-9)


def test_circular_padding_is_what_the_layer_has_read() -> None:
    torch.manual_seed(0)
    net = Sharing(nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", bias=False)).double()
    x = torch.randn(3, 6, 5, 5, dtype=D)
    group = Group(
        "maker", 6, (Member("m", "m.weight", 0, "out", torch.arange(6)),),
        (Member("layer", "layer.weight", 1, "in", torch.arange(6)),), (),
    )  # fmt: skip
    (units,) = contributions(net, [group], (net(x) for _ in range(1)))
    kept = torch.tensor([True, False, True, False, False, True])
    with torch.no_grad():
        expected = 0.5 * (net(x) - net(x * kept[:, None, None])).square().sum()
    assert half_residual(units, kept) == pytest.approx(float(expected), rel=1e-9)


def test_slices_of_other_groups_have_no_part() -> None:
    net = Sharing(nn.Linear(6, 4, bias=False)).double()
    x = torch.randn(7, 6, dtype=D)
    units_of = torch.tensor([-1, 0, 1, -1, 2, 2])
    group = Group(
        "maker", 3, (Member("m", "m.weight", 0, "out", torch.arange(3)),),
        (Member("layer", "layer.weight", 1, "in", units_of),), (),
    )  # fmt: skip
    (units,) = contributions(net, [group], (net(x) for _ in range(1)))
    net.requires_grad_(False)
    lost = x * (units_of == 2)
    assert half_residual(units, torch.tensor([True, True, False])) == pytest.approx(
        0.5 * float(net(lost).square().sum()), rel=1e-9
    )
    assert units.activity[2] == pytest.approx(float(lost.abs().sum()))


def test_heads_are_units() -> None:
    net, groups, batches = network("attention")
    (heads,) = [g for g in groups if "in_proj" in g.name]
    assert not why_not(net, heads)
    (units,) = contributions(net, [heads], losses(net, batches))
    ((_, maps), *_) = [*maps_read(net, ["layer.self_attn.out_proj.weight"], losses(net, batches[:1]))]
    (single,) = contributions(net, [heads], losses(net, batches[:1]))
    weight = net.get_parameter("layer.self_attn.out_proj.weight")
    read = maps[0].values.detach().reshape(-1, 8)
    each = [read[:, 2 * h : 2 * h + 2] @ weight[:, 2 * h : 2 * h + 2].T for h in range(4)]
    expected = torch.stack([torch.stack([(a * b).sum() for b in each]) for a in each])
    assert torch.allclose(single.products, expected, rtol=1e-9)
    assert len(units.activity) == 4


def test_other_groups_are_left_out_with_the_reason() -> None:
    net, groups, _ = network("parts")
    reasons = {g.name: why_not(net, g) for g in groups}
    assert reasons["one"] == "1 layers make these channels and 2 read them"
    assert reasons["stem"] == "split is a grouped convolution"
    assert reasons["split"] == ""
    assert reasons["up"].startswith("2 layers make")
    transposed = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 2, 1))
    (group, _) = channel_groups(transposed, torch.zeros(1, 1, 3, 3))
    assert why_not(transposed, group).startswith(
        "1.weight is not the weight of a linear layer or of a convolution in one"
    )
    wide = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(4 * 2500, 2))
    (group, _) = channel_groups(wide, torch.zeros(1, 1, 50, 50))
    assert why_not(wide, group) == "an output of 2 reads 10000 entries, more than 8192"


def test_a_consumer_that_no_batch_calls_is_refused_by_name() -> None:
    net = Tokens()
    group = Group(
        "layer.linear1", 12, (), (Member("layer.linear2", "layer.linear2.weight", 1, "in", torch.arange(12)),), ()
    )
    with pytest.raises(ValueError, match=r"no batch of the calibration calls layer\.linear2, .* exclude=.*'l1'"):
        contributions(net, [group], [torch.zeros(())])


# ---------------------------------------------------------------------- as scores of units


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_largest_scores_are_the_set(count: int) -> None:
    units = of_table("best seen")
    scores = set_scores(units, torch.ones(8, dtype=torch.bool), count, 1)
    assert best_units(scores, count).nonzero()[:, 0].tolist() == ispasp(units, count).tolist()


def test_the_largest_scores_of_chunks_are_the_set_of_chunks() -> None:
    table = ISPASP["best seen"]
    hidden, weight = torch.tensor(table["hidden"], dtype=D), torch.tensor(table["weight"], dtype=D)
    scores = set_scores(Contributions.of(hidden, weight), torch.ones(8, dtype=torch.bool), 4, 2)
    # in pairs, from outputs: an iteration of the search by hand
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    importance = (weight.T @ weight @ hidden).sum(1).view(4, 2).sum(1)
    candidates = importance.argsort(descending=True)[:4]
    activity = hidden.abs().sum(1).view(4, 2).sum(1)
    first = sorted(activity.argsort(descending=True)[:2].tolist())
    assert len(candidates) == 4
    kept = sorted(best_units(scores, 4, 2).nonzero()[:, 0].tolist())
    assert kept == sorted(pairs[first[0]] + pairs[first[1]])


def test_units_that_are_gone_are_not_in_the_set() -> None:
    units = of_table("best seen")
    live = torch.ones(8, dtype=torch.bool)
    live[[5, 7]] = False
    left = live.nonzero()[:, 0]
    small = Contributions(units.products[left][:, left], units.pull[left][:, left], units.activity[left])
    scores = set_scores(units, live, 2, 1).masked_fill(~live, -torch.inf)
    assert best_units(scores, 2).nonzero()[:, 0].tolist() == left[ispasp(small, 2)].tolist()
