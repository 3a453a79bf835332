"""Slimming: modules of torch between two layers, of which the first one loses half of its units."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.channels import compact
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.slim import slim

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
IMAGE, ROWS, STEPS = (2, 4, 6, 6), (3, 4), (2, 5, 4)


class Between(nn.Module):
    """A module between two layers; of a module that returns several tensors the first one is read."""

    def __init__(self, first: nn.Module, inner: nn.Module, last: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.twice = first, inner, last, twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        made = self.inner(h, h.flip(0)) if self.twice else self.inner(h)
        return self.last(made[0] if isinstance(made, tuple) else made)


@dataclass
class Case:
    """A network, its input, and how many units of its first layer can go.

    Attributes:
        make: makes the network.
        shape: shape of the input.
        removed: units of the first layer that are removed, of the half of them that nothing reads.
        stated: sizes that the inner module states of itself afterwards.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    removed: int
    stated: dict[str, int]


def convolved(inner: nn.Module, channels: int = 8) -> Callable[[], nn.Module]:
    return lambda: Between(nn.Conv2d(4, 8, 3, padding=1), copy.deepcopy(inner), nn.Conv2d(channels, 3, 1))


def linear(inner: nn.Module, units: int = 8, twice: bool = False) -> Callable[[], nn.Module]:
    return lambda: Between(nn.Linear(4, 8), copy.deepcopy(inner), nn.Linear(units, 3), twice)


class Bags(nn.Module):
    """Rows of a table that are added to the units."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(4, 8, mode=mode)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.bag(torch.tensor([[0, 1], [3, 2], [1, 1]]))


class Packed(nn.Module):
    """A recurrent layer over sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 6, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(h, torch.tensor([5, 3]), batch_first=True)
        made: Tensor = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]
        return made


class Filled(nn.Module):
    """Entries that are written by a mask, by numbers and in rows."""

    def forward(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[h < 0] = 0.5
        h[torch.tensor([0, 1])] = h[1:3] * 2
        return h.index_put((torch.tensor([2]),), h[:1], accumulate=True)


class Folded(nn.Module):
    """An image that is taken apart and put together again."""

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.fold(nn.functional.unfold(h, 2, stride=2), (6, 6), 2, stride=2)


def cases() -> dict[str, Case]:
    found = {
        "shuffle": Case(convolved(nn.ChannelShuffle(2)), IMAGE, 2, {}),  # of both groups
        "folded": Case(convolved(Folded()), IMAGE, 4, {}),
        "rrelu": Case(convolved(nn.RReLU()), IMAGE, 4, {}),
        "filled": Case(linear(Filled()), ROWS, 4, {}),
        "bilinear": Case(linear(nn.Bilinear(8, 8, 8), twice=True), ROWS, 4, {"in1_features": 4, "in2_features": 4}),
        "packed": Case(linear(Packed(), 6), STEPS, 4, {}),
        "loss": Case(linear(nn.SmoothL1Loss(reduction="none"), twice=True), ROWS, 4, {}),
        **{f"bag, {mode}": Case(linear(Bags(mode)), ROWS, 4, {}) for mode in ("sum", "mean", "max")},
    }
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        for more in (
            {},
            {"num_layers": 2, "bidirectional": True},
            {"proj_size": 6} if kind is nn.LSTM else {"bias": False},
        ):
            made = 6 * (2 if more.get("bidirectional") else 1)
            name = f"{kind.__name__} {more}"
            hidden: dict[str, Any] = {"hidden_size": 7 if "proj_size" in more else 6, "batch_first": True}
            found[name] = Case(linear(kind(8, **hidden, **more), made), STEPS, 4, {"input_size": 4})
    for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        found[cell.__name__] = Case(linear(cell(8, 6), 6), ROWS, 4, {"input_size": 4})
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_units_that_nothing_reads_go_and_the_outputs_stay(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    net, x = case.make().eval(), torch.randn(case.shape)
    group = channel_groups(net, x)[0]
    assert (group.name, group.reason) == ("first", "")
    masks = group.masks(net, torch.arange(group.size) % 2 == 0)
    # of a table that is added to the units
    masks |= {"first.weight": group.producers[0].mask(torch.arange(group.size) % 2 == 0, net.first.weight.ndim)}
    small, proof = slim(net, masks, x)
    assert proof.rows[0].units == case.removed
    assert proof.checked.relative < 1e-12
    assert proof.precision == torch.float64
    assert {n: getattr(small.inner, n) for n in case.stated} == case.stated
    with torch.no_grad():
        for parameter, mask in masks.items():
            net.get_parameter(parameter).mul_(mask)
        torch.testing.assert_close(small(x), net(x))
        compact.save_compact(small, tmp_path / "slim.safetensors")
        again = compact.load_compact(case.make().eval(), tmp_path / "slim.safetensors")
        assert torch.equal(again(x), small(x))


def test_a_compact_file_that_cuts_states_is_refused(tmp_path: Path) -> None:
    net, x = CASES["GRU {}"].make().eval(), torch.randn(STEPS)
    compact.save_compact(slim(net, {"first.weight": torch.ones(8, 4).bool()}, x)[0], tmp_path / "slim.safetensors")
    other = Between(nn.Linear(4, 8), nn.GRU(8, 7, batch_first=True), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"inner\.weight_.h_l0 has shape"):
        compact.load_compact(other, tmp_path / "slim.safetensors")


class Tied(nn.Module):
    """An autoencoder that decodes with the weight that it encodes with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear((x @ self.weight.T + self.shift).relu(), self.weight.T)


def test_the_weight_of_a_tied_autoencoder_stays_and_is_named() -> None:
    groups = channel_groups(Tied(), torch.randn(3, 4))
    assert [g.reason for g in groups if g.size == 6] == ["weight makes these channels and reads them"]
    _, proof = slim(Tied(), {"weight": torch.arange(6)[:, None].expand(6, 4) < 3}, torch.randn(3, 4))
    assert proof.removed == 0
