"""Slimming: models of which nothing can be cut are refused, and those that change in eval mode are named as such."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.slim import slim, slimmable_groups

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings(
    "ignore:the masks cut weights:UserWarning", "ignore:.*torch.jit:DeprecationWarning"
)
MASKS = {"last.weight": torch.arange(8) < 4}


class Around(nn.Module):
    """A module between two linear layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 8), inner, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Around(torch.jit.script(layers())),
            "inner is a ScriptModule, made by torch.jit.script or torch.jit.trace",
        ),
        (lambda: Around(torch.jit.trace(layers(), torch.randn(2, 8))), "inner is a ScriptModule.*Give the model with"),
        (lambda: torch.jit.script(layers()), "This is a ScriptModule.*whose layers cannot be replaced"),
        (lambda: Around(nn.LazyLinear(8)), "inner.weight has no shape yet, as LazyLinear learns its sizes"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    net, x = make(), torch.randn(2, 4)
    for refused in (lambda: slim(net, MASKS, x), lambda: channel_groups(net, x), lambda: slimmable_groups(net, x)):
        with pytest.raises(ValueError, match=message):
            refused()


def test_a_model_without_values_has_groups_and_cannot_be_compared() -> None:
    net, x = Around(nn.ReLU()).to("meta"), torch.zeros(2, 4, device="meta")
    assert [g.reason for g in channel_groups(net, x)] == ["", "these are outputs of the network"]
    for refused in (lambda: slim(net, MASKS, x), lambda: slimmable_groups(net, x)):
        with pytest.raises(ValueError, match=r"first.weight is on the meta device and has no values.*Load the weights"):
            refused()


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return x.relu() * 2


class Calling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(x)


def compiled() -> nn.Module:
    """Made in the test: torch.compile imports its compiler, for seconds of every process that collects tests."""
    return torch.compile(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("make", [Calling, compiled], ids=["function", "compiled"])
def test_scripted_functions_and_compiled_modules_are_followed(make: Callable[[], nn.Module]) -> None:
    small, proof = slim(Around(make()), MASKS, torch.randn(2, 4))
    assert (small.first.out_features, proof.removed) == (4, 4)


class Averaging(nn.Module):
    """A mean that goes on to learn in eval mode."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        new = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.replaces:
            self.mean = new
        else:
            self.mean.copy_(new)
        return x - self.mean


@pytest.mark.parametrize("replaces", [False, True])
def test_a_buffer_that_is_written_in_eval_mode_is_named(replaces: bool) -> None:
    _, proof = slim(Around(Averaging(replaces)), MASKS, torch.randn(2, 4))
    assert proof.left_out["first"].startswith("the model writes into its buffer inner.mean in eval mode")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_channels_that_decide_what_runs_stay() -> None:
    assert channel_groups(Around(Branching()), torch.randn(2, 4))[0].reason.startswith("runs into sum in inner")
