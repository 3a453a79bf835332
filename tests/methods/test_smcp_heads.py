"""SMCP on attention: heads are units, and each counts with all of its channels."""

from typing import Any

import pytest
import torch
from support.smcp_encoder import Encoder
from torch import Tensor, nn

from sparse_callbacks import SMCP, ConstrainedL0, sparsify
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.core.method import Method
from sparse_callbacks.methods.channels.allocation import in_units
from sparse_callbacks.methods.smcp.scores import active_outputs

EXAMPLE = torch.ones(1, 5, 6)


def trained(method: Method, net: nn.Module) -> dict[str, Tensor]:
    """The masks after twelve steps on random inputs."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    batches = [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    run = sparsify(method, net, optimizer, steps=len(batches), data=batches)
    for batch in batches:
        with run.batch():
            (net(batch) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(run.masks)


def smcp(budget: float, **options: Any) -> SMCP:
    return SMCP(budget, cost="parameters", every=2, start=1, stop=10, print_plan=False, **options)


WEIGHTS = 24 * 6 + 4 * 24 * 24 + 2 * 24 * 48 + 24 * 3


def test_heads_go_during_training_and_the_slim_network_costs_what_the_run_says() -> None:
    net = Encoder()
    method = smcp(0.4)  # one MLP unit and all heads are 0.55 of the weights
    masks = trained(method, net)
    attention = [kept for group, kept in zip(method.groups, method.kept, strict=True) if group.size == 6]
    assert attention[0] < 6
    small, proof = slim(net.eval(), masks, EXAMPLE)
    assert proof.cut == 0
    left = sum(p.numel() for p in small.parameters() if p.ndim > 1)
    assert left / WEIGHTS == pytest.approx(float(method.outcome()["budget"].split()[0]), abs=1e-4)
    assert left <= 0.4 * WEIGHTS


def test_gates_close_the_same_network_and_what_is_closed_goes() -> None:
    net = Encoder()
    masks = trained(ConstrainedL0(0.1, gate_lr=0.5, dual_lr=2.0, print_plan=False), net)
    x = torch.randn(3, 5, 6)
    small, proof = slim(net.eval(), masks, EXAMPLE)
    assert proof.cut == 0
    assert next(r for r in proof.rows if r.name == "layer.linear1").units > 0
    assert torch.allclose(small(x), net(x), atol=1e-6)


class Other(nn.MultiheadAttention):
    """What slimming cannot exchange."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return super().forward(*inputs, **named)


def test_heads_of_a_class_that_cannot_be_exchanged_stay_and_say_why() -> None:
    net = Encoder(Other)
    method = smcp(0.7)
    masks = trained(method, net)
    assert [g.name for g in method.groups] == ["layer.linear1"]
    assert any("Other divides its width by the number of heads" in why for why in method.left_out.values())
    assert slim(net.eval(), masks, EXAMPLE)[1].removed > 0


# ---------------------------------------------------------------------- channels of units


def member(parameter: str, side: str, units: list[int]) -> Member:
    return Member(parameter.rpartition(".")[0], parameter, 0, side, torch.tensor(units))


HEADS = Group(
    "qkv",
    3,
    (member("qkv.weight", "out", [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4),),
    (member("proj.weight", "in", [-1] + [0] * 4 + [1] * 4 + [2] * 4),),
    (member("bias_table", "both", [0, 1, 2]),),
)
FLAT = Group("conv", 2, (member("conv.weight", "out", [0, 1]),), (member("fc.weight", "in", [0] * 9 + [1] * 9),), ())


@pytest.mark.parametrize(
    ("channels", "units"), [(1, 1), (2, 1), (4, 1), (6, 3), (8, 2), (16, 4)]
)  # channels of a head: 4
def test_a_multiple_of_channels_in_heads(channels: int, units: int) -> None:
    assert in_units(channels, HEADS) == units


def test_inputs_of_a_flattened_image_make_no_more_channels() -> None:
    assert in_units(8, FLAT) == 8


def test_round_to_and_chunk_count_the_channels_of_heads() -> None:
    method = smcp(0.5, round_to=12, chunk=4)
    trained(method, Encoder())
    options = {g.name: (g.size, o.tolist()) for g, o in zip(method.groups, method._options, strict=True)}
    assert options == {"layer.self_attn.in_proj_weight": (6, [3, 6]), "layer.linear1": (48, [12, 24, 36, 48])}


def test_active_outputs_are_those_of_the_weight_and_not_of_another_in_its_module() -> None:
    """Queries and keys lie in one module; the channels that both read are made in front of it."""
    heads = [
        Group(
            "k",
            2,
            (member("a.q", "out", [0, 1]), member("a.k", "out", [0, 1])),
            (member("o.weight", "in", [0, 1]),),
            (),
        )
    ]
    inputs = [Group("x", 2, (member("x.weight", "out", [0, 1]),), (member("a.q", "in", [0, 1]),), ())]
    keep = torch.tensor([True, False])
    found = active_outputs([*heads, *inputs], [keep, ~keep])
    assert list(found) == ["a.q"]
    assert found["a.q"].tolist() == [True, False]
