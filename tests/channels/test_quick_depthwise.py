"""Depthwise convolutions in float64: what is computed in little time is what torch computes."""

import pytest
import torch
from torch import nn

from sparse_callbacks.channels import quick_depthwise as module
from sparse_callbacks.channels.quick_depthwise import quicken_depthwise
from sparse_callbacks.channels.slim import slim

CASES = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strides and dilations": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    "same": {"kernel_size": 5, "padding": "same"},
    "no bias": {"kernel_size": 3, "bias": False},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "several outputs a channel": {"kernel_size": 3, "out_channels": 12},
    "two groups": {"kernel_size": 3, "groups": 2},
}

LEFT_TO_TORCH = ("same", "reflected", "several outputs a channel", "two groups")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many channels each convolution had that was computed in another way than torch's."""
    found: list[int] = []
    original = module.depthwise

    def counted(x: torch.Tensor, *args: object) -> torch.Tensor:
        found.append(x.shape[1])
        return original(x, *args)

    monkeypatch.setattr(module, "depthwise", counted)
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_outputs_are_those_of_torch(case: str, calls: list[int]) -> None:
    torch.manual_seed(0)
    options = {"in_channels": 6, "out_channels": 6, "groups": 6} | CASES[case]
    net, x = (
        nn.Sequential(nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(**options)).double(),
        torch.randn(2, 6, 9, 11).double(),
    )
    expected = net(x)
    quicken_depthwise(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-13, atol=1e-13)
    assert len(calls) == 1 + (case not in LEFT_TO_TORCH)


@torch.no_grad()
def test_what_torch_refuses_is_refused(calls: list[int]) -> None:
    net = nn.Conv2d(6, 6, 5, groups=6).double()
    quicken_depthwise(net)
    for shape in ((2, 6, 4, 9), (2, 5, 9, 9)):
        with pytest.raises(RuntimeError, match=r"greater than actual input|to have 6 channels, but got 5"):
            net(torch.randn(shape).double())
    assert calls == []


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Conv2d, Doubled])
def test_other_precisions_and_forwards_are_left_to_torch(kind: type[nn.Conv2d], calls: list[int]) -> None:
    net, x = kind(6, 6, 3, groups=6), torch.randn(2, 6, 9, 11)
    expected = net(x)
    quicken_depthwise(net)
    assert torch.equal(net(x), expected)
    assert calls == []
    net.double()(x.double())
    assert len(calls) == (kind is nn.Conv2d)


def test_slimming_compares_in_float64_in_this_way(calls: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[3].weight[:, 6:] = 0
    small, proof = slim(net, {"3.weight": torch.arange(8) < 6}, torch.randn(2, 3, 6, 6))
    assert small[1].groups == 6
    assert proof.checked.relative < 1e-12
    assert calls == [8] * 4 + [6] * 3  # three inputs before and after, and the first entry of one
