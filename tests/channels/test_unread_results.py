"""What a network computes and nobody reads ties no channels; what its code reads does."""

import array
import copy
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import slim
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.operations.products import SUMMED, WHOLE
from sparse_callbacks.channels.slim import slimmable_groups


class Attended(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.first, self.attention, self.last = (
            nn.Linear(6, 16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 3),
        )
        self.options, self.shown = options, False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        out, weights = self.attention(x, x, x, **self.options)
        out = self.last(torch.tanh(x + out))
        return (out, weights) if self.shown else out


@pytest.mark.parametrize("options", [{}, {"average_attn_weights": False}, {"need_weights": False}])
def test_heads_go_where_nobody_reads_the_weights_of_attention(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    net, x = Attended(**options).eval(), torch.randn(2, 5, 6)
    masks = {"attention.out_proj.weight": torch.arange(16) // 4 != 1}
    with torch.no_grad():
        net.attention.out_proj.weight.mul_(masks["attention.out_proj.weight"])
    small, proof = slim(net, masks, x)
    assert small.attention.num_heads == 3
    assert sum(row.units for row in proof.rows) == 1
    torch.testing.assert_close(small(x), net(x))


def test_heads_stay_where_the_averaged_weights_are_outputs() -> None:
    net = Attended()
    net.shown = True
    reasons = [g.reason for g in slimmable_groups(net, torch.randn(2, 5, 6)) if g.name.startswith("attention")]
    assert len(reasons) > 0
    assert set(reasons) <= {SUMMED, WHOLE}


class Branching(nn.Module):
    """Reads a mean over its channels as a number, or writes it into its output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 8), nn.Linear(8, 2), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mean = x.mean(-1, keepdim=True)
        out = self.last(torch.relu(x))
        if self.kind == "number" and float(mean.sum()) > 0:
            out = -out
        if self.kind == "written":
            out[..., :1].copy_(mean)
        return out


@pytest.mark.parametrize(("kind", "reason"), [("unread", ""), ("number", "mean"), ("written", "mean")])
def test_a_mean_over_channels_ties_them_if_it_is_read(kind: str, reason: str) -> None:
    first = channel_groups(Branching(kind), torch.randn(3, 4))[0]
    assert first.name == "first"
    assert (reason in first.reason) if reason else not first.reason


class Taken(nn.Module):
    """Gives what code does with its units, beside its output."""

    def __init__(self, take: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.take = nn.Linear(4, 8), nn.Linear(8, 2), take

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.first(x))
        return self.last(x), self.take(x.softmax(1).amax(1)), self.take(x)


TAKES: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda t: float(t.numpy().max()),
    "list": lambda t: t.tolist(),
    "array": lambda t: array.array("d", t.flatten().tolist()),
    "bytes": lambda t: t.numpy().tobytes(),
    "numpy.asarray": lambda t: float(np.asarray(t).max()),
    "dlpack": lambda t: float(np.from_dlpack(t).max()),
    "storage": lambda t: bytes(t.untyped_storage()),
    "typed storage": lambda t: [*t.storage()],
    "address": lambda t: ctypes.string_at(t.data_ptr(), 4),
    "copy": lambda t: float(copy.deepcopy(t).max()),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("kind", TAKES)
def test_numbers_that_leave_torch_are_read(kind: str, place: int) -> None:
    take, calls = TAKES[kind], itertools.count()
    net = Taken(lambda t: take(t) if next(calls) % 2 == place - 1 else None)
    reason = channel_groups(net, torch.randn(3, 4))[0].reason
    assert ("softmax" if place == 1 else "the network's code takes them out of torch by ") in reason


def test_an_address_of_a_parameter_is_no_reading() -> None:
    class Asking(Taken):
        def forward(self, x: Tensor) -> Any:
            assert self.first.weight.data_ptr() != 0
            return super().forward(x)

    assert channel_groups(Asking(lambda t: None), torch.randn(3, 4))[0].reason == ""
