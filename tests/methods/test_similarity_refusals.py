"""Networks and layers without a similarity are refused: linear ones, unknown sides, activations that cannot be
followed."""

import pytest
import torch
from support.similarities import close, kernel_similarity, passes, similarities, weights
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.methods.ctre.activations import measure_similarity
from sparse_callbacks.methods.ctre.similarity import layers_of


def test_a_network_without_activations_is_refused() -> None:
    for net in (
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Identity(), nn.Linear(5, 3)),
        nn.Sequential(nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(5, 3)),
    ):
        x = torch.rand(2, 4, 1, 1) if isinstance(net[0], nn.Conv2d) else torch.rand(2, 4)
        with pytest.raises(
            ValueError, match=r"no activation between the layers: the next layer takes the output of 0\.weight as it is"
        ):
            similarities(net, x)


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [
        (nn.LSTM(4, 5), "weight_ih_l0", "LSTM"),
        (nn.Embedding(4, 5), "weight", "Embedding"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "an attention"),
        (nn.MultiheadAttention(4, 2), "out_proj.weight", "an attention"),
    ],
)
def test_layers_without_two_known_sides_are_refused(module: nn.Module, name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({kind}\): the activations .* exclude="):
        list(layers_of(module, {name: module.get_parameter(name)}))


def test_all_that_is_refused_is_named_at_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5), nn.GRU(4, 3))
    params = {n: p for n, p in net.named_parameters() if p.ndim == 2}
    with pytest.raises(
        ValueError, match=r"exclude=\['1.weight_hh_l0', '1.weight_ih_l0', '2.weight_hh_l0', '2.weight_ih_l0'\]"
    ):
        list(layers_of(net, params))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.scaled_dot_product_attention(self.query(x), x, self.value(x)))


class Detour(nn.Module):
    """The output of the last layer leaves torch, and comes back as something new."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(self.last(self.first(x).relu()).tolist())


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        out = self.last(hidden)
        hidden.mul_(2)
        return out


class Shuffled(nn.Module):
    """Permuted and flattened: nobody can tell which neuron is where."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3), nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).permute(0, 2, 3, 1).flatten(1).relu())


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (
            Attention(),
            torch.randn(1, 3, 4),
            r"the activations of query\.weight, value\.weight are not known .*(mm|scaled_dot).*exclude=",
        ),
        (
            nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 3)),
            torch.randn(1, 3, 4),
            r"the activations of 0\.weight are not known",
        ),
        (
            Detour(),
            torch.randn(3, 4),
            r"last\.weight are not known \(they reach neither a layer nor the output\).*forward=",
        ),
        (
            Overwriting(),
            torch.randn(3, 4),
            r"the network writes into the activations around (first|last)\.weight .*inplace=False",
        ),
    ],
    ids=["attention", "recurrent", "detour", "overwriting"],
)
def test_activations_that_cannot_be_followed_are_refused(net: nn.Module, x: Tensor, message: str) -> None:
    params = {n: p for n, p in weights(net).items() if "_l0" not in n}
    with pytest.raises(ValueError, match=message):
        measure_similarity(net, params, passes(net, x))


def test_neurons_that_are_shuffled_count_before_the_shuffle() -> None:
    torch.manual_seed(0)
    net, x = Shuffled(), torch.randn(3, 2, 5, 5)
    expected = kernel_similarity(net.first, x, net.first(x).detach())
    assert close(similarities(net, x)["first.weight"], expected)
