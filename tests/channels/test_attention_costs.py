"""What the projections of torch's attention cost, and what a network costs by the heads that it keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.channels.attention_costs import projections
from sparse_callbacks.channels.attention_exchange import put_slim_attention
from sparse_callbacks.channels.costs import cost_outside_layers, layers, multiply_adds, parameters
from sparse_callbacks.channels.forward_flops import forward_flops
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.channels.slim import slim


class Reads(nn.Module):
    """Queries from 6 inputs attend to a memory of 5; two layers around. Inputs are [length, batch, channels]."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.remember = nn.Linear(6, 12), nn.Linear(5, kdim or 12)
        self.attend = nn.MultiheadAttention(12, 3, kdim=kdim, vdim=kdim)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = self.remember(memory)
        return self.out(self.attend(self.embed(x), key=memory, value=memory, need_weights=False)[0])


EXAMPLE = (torch.ones(7, 2, 6), torch.ones(4, 2, 5))
"""Seven queries and four keys; the batch is not the first dimension, so all of it counts as one sample."""
SIZES = {"attend.in_proj_weight": (12, 36), "attend.out_proj": (12, 12)}
SEPARATE = {
    "attend.q_proj_weight": (12, 12),
    "attend.k_proj_weight": (8, 12),
    "attend.v_proj_weight": (8, 12),
    "attend.out_proj": (12, 12),
}


@pytest.mark.parametrize(("kdim", "sizes"), [(None, SIZES), (8, SEPARATE)])
def test_projections_have_the_sizes_of_their_weights_and_leave_nothing_out(kdim: int | None, sizes: Any) -> None:
    net = Reads(kdim)
    found = projections(net, EXAMPLE)
    assert {name: (layer.inputs, layer.outputs) for name, layer in found.items()} == sizes
    every = {**layers(net, EXAMPLE), **found}
    other = cost_outside_layers(net, EXAMPLE, every)
    assert other.parameters == 0
    counted = sum(parameters(layer, layer.inputs, layer.outputs) for layer in every.values())
    assert counted == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    if kdim:
        # 14 queries, and 8 keys and values
        rows = {name: layer.positions for name, layer in found.items()}
        assert rows == dict(zip(SEPARATE, [(14,), (8,), (8,), (14,)], strict=True))


class Encoder(nn.Module):
    """A transformer layer of torch with as many heads as given, for inputs [n, 5, 6]."""

    def __init__(self, heads: int = 4, kind: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, heads, 32, dropout=0.0, batch_first=True)
        self.layer.self_attn = kind(16, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


def test_the_multiply_adds_of_an_attention_are_those_of_its_projections_and_products() -> None:
    net, x = Encoder().eval(), torch.randn(3, 5, 6)
    every = {**layers(net, x), **projections(net, x)}
    in_layers = sum(multiply_adds(layer, layer.inputs, layer.outputs) for layer in every.values())
    assert cost_outside_layers(net, x, every).multiply_adds == 2 * 5 * 5 * 16
    assert 2 * 3 * (in_layers + 2 * 5 * 5 * 16) == forward_flops(net, x)
    assert not net.layer.self_attn._forward_hooks


@pytest.mark.parametrize("kdim", [None, 8])
def test_a_network_costs_what_is_left_of_it_without_some_heads(kdim: int | None) -> None:
    net = Reads(kdim)
    every = {**layers(net, EXAMPLE), **projections(net, EXAMPLE)}
    traced = Reads(kdim)
    put_slim_attention(traced)
    groups = [g for g in channel_groups(traced, EXAMPLE) if not g.reason and g.size == 3]
    assert len(groups) == 1
    network = Network(every, groups, parameters)
    masks = groups[0].masks(net, torch.tensor([True, False, False]))
    with torch.no_grad():
        net.attend.out_proj.weight.mul_(masks["attend.out_proj.weight"])
    small, _ = slim(net, masks, EXAMPLE)
    assert network.realised([1]) == sum(p.numel() for p in small.parameters() if p.ndim > 1) < network.dense
    # the table of the group holds what reads it: 4 of the 12 inputs of the output projection for each head
    assert network.tables([torch.tensor([1, 3])], [3])[0][0].tolist() == [4 * 12, 12 * 12]


class Scaled(nn.Conv2d):
    """A convolution with a gain for each of its outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


def test_a_parameter_beside_the_weight_of_a_layer_is_no_input_of_it() -> None:
    net, x = nn.Sequential(Scaled(3, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)), torch.randn(1, 3, 4, 4)
    groups = [g for g in channel_groups(net, x) if not g.reason]
    assert [(m.parameter, m.side) for g in groups for m in g.members][::2] == [("0.weight", "out"), ("0.gain", "both")]
    network = Network(layers(net, x), groups, parameters)
    assert network.realised([3]) == 3 * 3 + 3 * 2
    assert network.tables([torch.tensor([3])], [8]) == ([torch.tensor([3 * 2.0])], 3 * 8)
