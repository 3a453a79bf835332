"""Products of activations: what they sum over and the channels of heads stay, other rows and columns can go."""

import pytest
import torch
from support.channel_nets import OUTPUTS
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.operations.products import SHARED, SUMMED, WHOLE
from sparse_callbacks.channels.slim import slim, slimmable_groups


def groups_of(net: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Group]:
    torch.manual_seed(0)
    return {g.name: g for g in channel_groups(net.eval(), inputs)}


class Graph(nn.Module):
    """A graph convolution whose neighbours are an input, applied ``steps`` times."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        self.steps, self.first, self.last = steps, nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.steps):
            x = neighbours @ x
        return self.last(x.relu())


class Pooled(nn.Module):
    """Instances pooled by the weights that a layer gives them, once for each of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.weigh, self.last = (
            nn.Linear(6, 16),
            nn.Linear(16, 8),
            nn.Linear(8, 2),
            nn.Linear(32, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        shares = self.weigh(self.hidden(x).tanh()).softmax(0)
        return self.last((shares.T @ x).flatten()[None])


class Context(nn.Module):
    """GCNet's context: an average over places, with weights that a convolution gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weigh = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 1, 1)
        self.inner, self.outer, self.last = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        shares = self.weigh(x).flatten(2).softmax(2)[..., None]
        context = torch.matmul(x.flatten(2)[:, None], shares)
        return self.last(x + self.outer(self.inner(context[:, 0, :, :, None]).relu()))


@pytest.mark.parametrize(
    ("build", "inputs", "name"),
    [
        (Graph, (torch.randn(7, 6), torch.rand(7, 7)), "first"),
        (lambda: Graph(2), (torch.randn(7, 6), torch.rand(7, 7)), "first"),
        (Pooled, (torch.randn(7, 6),), "first"),
        (Pooled, (torch.randn(7, 6),), "weigh"),
        (Context, (torch.randn(2, 3, 4, 5),), "first"),
    ],
    ids=["graph", "graph, twice", "pooled", "weights of pooling", "context"],
)
@pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
def test_channels_that_a_product_does_not_sum_over_go(build: type, inputs: tuple[Tensor, ...], name: str) -> None:
    torch.manual_seed(0)
    net = build().eval()
    group = groups_of(net, inputs)[name]
    assert not group.reason
    keep = torch.arange(group.size) % 2 == 0
    small, proof = slim(net, group.masks(net, keep), inputs)
    assert proof.removed == group.size // 2
    assert small.get_submodule(name).weight.shape[0] == group.size - group.size // 2


class OneHead(nn.Module):
    """Attention with a single head of 8 channels, whose forward reshapes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.last = nn.Linear(6, 16), nn.Linear(8, 16), nn.Linear(16, 3)
        self.q, self.k, self.v = (nn.Linear(16, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return self.last(x + self.out(scores.softmax(-1) @ self.v(x)))


class Turned(OneHead):
    """The same with the values before the scores."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        scores = self.k(x) @ self.q(x).transpose(-1, -2)
        return self.last(x + self.out((self.v(x).transpose(-1, -2) @ scores.softmax(-2)).transpose(-1, -2)))


@pytest.mark.parametrize("build", [OneHead, Turned])
def test_channels_of_queries_keys_and_values_are_not_cut_singly(build: type[OneHead]) -> None:
    found = groups_of(build(), (torch.randn(2, 5, 6),))
    reasons = {n: g.reason for n, g in found.items()}
    assert reasons == {"first": "", "q": SUMMED, "v": WHOLE, "last": OUTPUTS}


class GraphAttention(nn.Module):
    """Scores of 3 heads out of sums, and not out of products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.one, self.other = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(-1, (-1, 4))
        scores = (x * self.one).sum(-1)[:, None] + (x * self.other).sum(-1)[None]
        return self.last(torch.einsum("ijh,jhd->ihd", scores.softmax(1), x).flatten(1).relu())


def test_heads_whose_scores_are_sums_go_whole() -> None:
    found = {g.name: g for g in slimmable_groups(GraphAttention().eval(), (torch.randn(7, 6),))}
    assert {n: (g.size, g.reason) for n, g in found.items()} == {"first": (3, ""), "last": (3, OUTPUTS)}
    assert found["first"].producers[0].units.tolist() == [0] * 4 + [1] * 4 + [2] * 4


class GraphHeads(nn.Module):
    """3 heads of 4 channels, each with neighbours of its own, which are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        x = neighbours @ self.first(x).unflatten(-1, (-1, 4)).transpose(0, 1)
        return self.last(x.transpose(0, 1).flatten(1).relu())


def test_heads_lose_no_single_channels_whatever_their_scores_are() -> None:
    found = groups_of(GraphHeads(), (torch.randn(7, 6), torch.rand(3, 7, 7)))
    assert {n: g.reason for n, g in found.items()} == {
        "first": "shares channels with the network's input",
        "last": OUTPUTS,
    }


class ExpandedKeys(nn.Module):
    """2 keys that serve 2 queries each, by an expansion whose number the model fixes, in attention without a fused kernel."""

    def __init__(self, keys: int = 2) -> None:
        super().__init__()
        self.keys, self.copies = keys, 4 // keys
        self.q_proj, self.o, self.last = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 5)
        self.k_proj, self.v = nn.Linear(6, 3 * keys), nn.Linear(6, 3 * keys)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v))
        k, v = (z[:, :, None].expand(-1, -1, self.copies, -1, -1).flatten(1, 2) for z in (k, v))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.last(self.o(mixed.transpose(1, 2).flatten(2)).relu())


def test_queries_of_a_key_that_is_expanded_go_with_it_alone() -> None:
    found = groups_of(ExpandedKeys(), (torch.randn(1, 5, 6),))
    assert [(n, g.size) for n, g in found.items() if not g.reason] == [("q_proj", 2), ("o", 8)]
    assert found["q_proj"].producers[0].units.tolist() == [0] * 6 + [1] * 6


def test_queries_of_one_key_stay_where_the_class_counts_them() -> None:
    net = ExpandedKeys(keys=1)
    assert groups_of(net, (torch.randn(1, 5, 6),))["q_proj"].reason == ""
    name = {"__module__": "transformers.models.llama.modeling_llama", "__qualname__": "LlamaAttention"}
    net.__class__ = type("LlamaAttention", (ExpandedKeys,), {**name, "forward": ExpandedKeys.forward})
    assert groups_of(net, (torch.randn(1, 5, 6),))["q_proj"].reason == SHARED
