"""Why channels stay: every reason is true, and every layer has a row of its own."""

import pytest
import torch
from support.channel_nets import OUTPUTS
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.obstacles import NEVER_CALLED
from sparse_callbacks.channels.slim import slim


def reasons(net: nn.Module, inputs: Tensor) -> dict[str, str]:
    found = [(g.name, g.reason) for g in channel_groups(net.eval(), inputs)]
    assert len(dict(found)) == len(found), "two groups have one name"
    return dict(found)


def chain(wrapped: object) -> nn.Module:
    """Three layers; that in the middle is wrapped."""
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), wrapped(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_layer_has_one_row_and_is_named_by_those_it_reads(wrap: object) -> None:
    found = reasons(chain(wrap), torch.randn(3, 6))
    assert found.keys() == {"0", "2", "4"}
    remedy = "torch.nn.utils.parametrize.remove_parametrizations makes it a plain one"
    assert found["0"] == found["2"] == f"2 is parametrized: its weight is computed from others; {remedy}"
    net = chain(wrap)
    nn.utils.parametrize.remove_parametrizations(net[2], "weight")
    assert reasons(net, torch.randn(3, 6)) == {"0": "", "2": "", "4": OUTPUTS}


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.encoder(x).relu(), self.encoder.weight.t())


def test_a_weight_that_makes_and_reads_channels_says_so() -> None:
    assert reasons(Tied(), torch.randn(3, 10)) == {
        "encoder": "encoder.weight makes these channels and reads them",
        "encoder, part 2": "shares channels with the network's input",
    }


class Table(nn.Module):
    """A table of positions that layers compute from a buffer, as the one of Swin v2 with an end that is nowhere 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(5, 2))
        self.first, self.second, self.last = nn.Linear(2, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.embed = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.embed(x) + self.second(self.first(self.places).relu()).sigmoid()).relu())


@pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
def test_layers_that_compute_a_table_lose_channels() -> None:
    torch.manual_seed(0)
    net = Table()
    assert reasons(net, torch.randn(3, 5, 6)) == {"first": "", "second": "", "last": OUTPUTS}
    small, proof = slim(net, {"second.weight": torch.arange(16) % 2 == 0}, torch.randn(3, 5, 6))
    assert (small.first.out_features, small.second.in_features, proof.removed) == (8, 8, 8)


class Computed(Table):
    """Layers that compute the weight of another one, with values that are nowhere 0 on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.embed(x).relu(), self.second(self.first(self.places).sigmoid()))


@pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
def test_layers_that_compute_a_weight_lose_channels() -> None:
    torch.manual_seed(0)
    net = Computed()
    assert reasons(net, torch.randn(3, 6))["first"] == ""
    small, proof = slim(net, {"second.weight": torch.arange(16) % 2 == 0}, torch.randn(3, 6))
    assert (small.first.out_features, proof.removed) == (8, 8)


class LowRank(nn.Module):
    """Two layers whose weights are multiplied before any activations are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x).relu(), self.outer.weight @ self.inner.weight)


def test_what_only_weights_share_is_named() -> None:
    found = reasons(LowRank(), torch.randn(4, 6))
    why = "only weights, and no activations, are multiplied here: one is computed from inner.weight, outer.weight"
    assert found == {"first": "", "inner": why, "outer": OUTPUTS}


def test_an_output_of_one_channel_is_an_output() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
    assert reasons(net, torch.randn(3, 6)) == {"0": "", "2": OUTPUTS}
    squeezed = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 1), nn.Flatten(0))
    assert reasons(squeezed, torch.randn(3, 6))["1"] == "a single channel, and a layer keeps one at least"


class Positive(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.first, self.raw, self.function = nn.Linear(6, 16), nn.Parameter(torch.randn(3, 16)), function

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x).relu(), self.function(self.raw))


@pytest.mark.parametrize(
    ("function", "name"),
    [(functional.softplus, "softplus"), (torch.exp, "exp"), (lambda w: w + 1, "add"), (torch.tanh, ""), (abs, "")],
)
def test_weights_that_are_not_zero_where_a_mask_is_keep_their_inputs(function: object, name: str) -> None:
    expected = f"the weight is {name} of raw, so it is not zero where a mask makes raw zero" if name else ""
    assert reasons(Positive(function), torch.randn(4, 6))["first"] == expected


class Beside(nn.Module):
    """A buffer that goes into the weight, by ``function``."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 16), nn.Linear(16, 3), function
        self.register_buffer("beside", torch.ones(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x).relu(), self.function(self.second.weight, self.beside))


@pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
def test_a_buffer_that_scales_a_weight_goes_with_it() -> None:
    torch.manual_seed(0)
    net, x = Beside(torch.mul), torch.randn(4, 6)
    (first, _) = channel_groups(net.eval(), x)
    small, proof = slim(net, first.masks(net, torch.arange(16) % 2 == 0), x)
    assert (proof.removed, small.beside.shape) == (8, (3, 8))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.add, "the weight is add of second.weight, so it is not zero where a mask makes second.weight zero"),
        (lambda _, b: b.cos(), "beside reads these channels, a buffer: only parameters have masks"),
    ],
)
def test_a_buffer_that_is_left_where_the_weight_is_masked_keeps_the_channels(function: object, reason: str) -> None:
    assert reasons(Beside(function), torch.randn(4, 6))["first"] == reason


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.waves = nn.Linear(6, 16), nn.Linear(16, 8, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.waves(self.first(x).to(torch.complex64)).abs()


def test_complex_layers_are_said_to_lose_no_channels() -> None:
    expected = "waves: weights in complex64 lose no channels, only those in float16, bfloat16, float32 and float64 do"
    assert reasons(Complex(), torch.randn(4, 6))["first"] == expected


class Branches(nn.Module):
    """Which layer reads the channels depends on the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.few, self.many = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.few if len(x) < 5 else self.many)(self.first(x).relu())


@pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
def test_a_layer_that_was_never_called_is_said_to_fail_later() -> None:
    torch.manual_seed(0)
    small, proof = slim(Branches(), {"few.weight": torch.arange(16) % 2 == 0}, torch.randn(3, 6))
    assert proof.left_out["many"] == NEVER_CALLED
    with pytest.raises(RuntimeError):
        small(torch.randn(7, 6))


class Experts(nn.Module):
    """A mixture of 4 experts, whose weights are three-dimensional parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(6, 8), nn.Linear(8, 3)
        self.inner, self.outer = nn.Parameter(torch.randn(4, 8, 24)), nn.Parameter(torch.randn(4, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.kind == "loop":
            return self.last(sum(self.act(x @ i) @ o for i, o in zip(self.inner, self.outer, strict=True)).relu())
        return self.last(torch.bmm(self.act(torch.bmm(x.expand(4, *x.shape), self.inner)), self.outer).sum(0).relu())

    @staticmethod
    def act(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up


@pytest.mark.parametrize("kind", ["loop", "bmm"])
@pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
def test_experts_in_one_parameter_are_groups(kind: str) -> None:
    torch.manual_seed(0)
    net = Experts(kind)
    found = {g.name: g for g in channel_groups(net.eval(), torch.randn(5, 6))}
    assert {n: (g.size, g.reason) for n, g in found.items()} == {
        "first": (8, ""),
        "inner": (12, ""),
        "outer": (8, ""),
        "last": (3, OUTPUTS),
    }
    small, proof = slim(net, found["inner"].masks(net, torch.arange(12) % 3 > 0), torch.randn(5, 6))
    assert (small.inner.shape, small.outer.shape, proof.removed) == ((4, 8, 16), (4, 8, 8), 8)
