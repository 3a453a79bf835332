"""Slimming: masks of the gains and shifts of norms, and masks that remove nothing."""

from typing import Any

import pytest
import torch
from support.channel_nets import IMAGE, NETS, OUTPUTS, Concat, Residual, dead_rows, made, masked, outputs
from torch import Tensor, nn

from sparse_callbacks.channels.idle_masks import NOT_ITS_DOING, NOTHING_DEAD, SHIFT_ALONE
from sparse_callbacks.channels.slim import slim

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")

KEEP = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool()


def normed(padding: int, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return made(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 4, 3, padding=padding)
        )
    ).double()


def slimmed(net: nn.Module, masks: dict[str, Tensor]) -> tuple[Any, Any]:
    x = torch.randn(IMAGE, dtype=torch.float64)
    small, proof = slim(net, masks, x)
    torch.testing.assert_close(outputs(small, 3 * x), outputs(masked(net, masks), 3 * x), rtol=1e-10, atol=1e-10)
    return small, proof


@pytest.mark.parametrize("padding", [0, 1])
def test_channels_whose_gain_and_shift_are_masked_go(padding: int) -> None:
    small, proof = slimmed(normed(padding), {"1.weight": KEEP, "1.bias": KEEP})
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (5, 5, 5)
    assert proof.removed == 3
    assert proof.left_out == {"3": OUTPUTS}


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
def test_with_the_gain_alone_the_shift_goes_into_the_bias_of_the_reader(act: type[nn.Module]) -> None:
    net = normed(0, act)
    small, proof = slimmed(net, {"1.weight": KEEP})
    assert small[0].out_channels == 5
    assert not torch.equal(small[3].bias, net[3].bias)
    assert proof.removed == 3


def test_zero_padding_keeps_shifts_that_are_not_zero_behind_the_activation() -> None:
    net = normed(1)
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([1, 1, 1, 1, -1, 1, 1, 1.0]))  # ReLU makes a zero of the one of channel 4
    small, proof = slimmed(net, {"1.weight": KEEP})
    assert small[0].out_channels == 7
    assert proof.rows[0].reason.startswith("2 units stay: what they hold is not a constant, or one that zero padding")


def test_a_gain_in_one_of_two_branches_removes_nothing() -> None:
    """The other branch is added, so the channels of the sum live."""
    _, proof = slimmed(made(Residual).double(), {"norm.weight": KEEP, "norm.bias": KEEP})
    assert proof.removed == 0
    assert proof.left_out["stem"].startswith("3 units stay: what they hold is not a constant")


class Hidden(nn.Module):
    """A sum of two layers, one of them behind a norm; a large negative shift there lets ReLU hide the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 8), nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.one(x) + self.norm(self.two(x))).relu())


@pytest.mark.parametrize("sign", [1, -1])
def test_what_relu_hides_on_all_samples_is_not_taken_for_a_constant(sign: int) -> None:
    torch.manual_seed(0)
    net = Hidden().double().eval()
    with torch.no_grad():
        net.norm.bias.fill_(-500.0)
        net.norm.bias[3] = 5.0  # one unit that shows
        net.one.weight.abs_().mul_(sign)
    x = torch.randn(2, 4, dtype=torch.float64)
    keep = torch.arange(8) != 5
    masks = {"norm.weight": keep}
    small, proof = slim(net, masks, x)
    assert proof.removed == 0
    far = torch.full((1, 4), sign * 1e4, dtype=torch.float64)
    assert (masked(net, masks)(far) - net.head(torch.zeros(8).double())).abs().max() > 1
    torch.testing.assert_close(small(far), masked(net, masks)(far))
    # with the other branch masked as well nothing makes the unit
    small, proof = slim(net, masks | {"one.weight": keep[:, None]}, x)
    assert proof.removed == 1


def test_looking_for_what_makes_a_unit_leaves_the_weights_as_they_are() -> None:
    net = normed(0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small, _ = slimmed(net, {"1.weight": KEEP})
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(small[0].weight, before["0.weight"][KEEP])


def test_a_norm_behind_a_concatenation_removes_from_each_branch() -> None:
    gain = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 1]).bool()
    small, proof = slimmed(made(Concat).double(), {"norm.weight": gain, "norm.bias": gain})
    assert (small.a.out_channels, small.b.out_channels, small.norm.num_features) == (3, 3, 6)
    assert proof.removed == 4


def test_a_depthwise_convolution_and_a_scale_silence_channels_too() -> None:
    small, proof = slimmed(made(NETS["squeeze_excite"]).double(), {"depthwise.0.weight": dead_rows(3, 8)})
    assert proof.rows[0].reason.startswith("3 units stay: what they hold is not a constant")  # the shift times the gate
    small, _ = slimmed(made(NETS["scaled"]).double(), {"scale": (torch.arange(8) > 2).view(8, 1, 1)})
    assert small.first.out_channels == 5


# ---------------------------------------------------------------------- masks that remove nothing


class Mixed(nn.Module):
    """A LayerNorm and a GroupNorm, a table, layers whose units can go, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer_norm = nn.EmbeddingBag(5, 6), nn.LayerNorm(6)
        self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.group_norm, self.spare = nn.GroupNorm(2, 6), nn.PReLU(6)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        x = self.layer_norm(x + self.table(words))
        return self.out(self.group_norm(self.down(self.up(x).relu())))


def mixed(masks: dict[str, Tensor]) -> dict[str, str]:
    torch.manual_seed(0)
    net = Mixed().double()
    rows = slim(net, masks, (torch.randn(4, 6, dtype=torch.float64), torch.tensor([[0], [3], [1], [4]])))[1].left_out
    return {name: reason for name, reason in rows.items() if name not in ("table", "down", "out")}


LIVE = {"down.weight": torch.arange(8) < 6}
SOME = torch.ones(8, 6, dtype=torch.bool).index_put_((torch.tensor(0), torch.tensor(1)), torch.tensor(False))


@pytest.mark.parametrize(
    ("masks", "rows"),
    [
        ({"layer_norm.weight": torch.arange(6) < 3}, {}),  # the row of ``table`` says that it meets the network's input
        ({"group_norm.bias": torch.arange(6) < 3}, {}),  # the row of ``down`` says that its channels run into the norm
        (
            {"spare.weight": torch.arange(6) < 3},
            {"spare.weight": "no group of channels has this parameter of PReLU"},
        ),
        ({"up.weight": SOME}, {"up": NOTHING_DEAD}),
        ({"up.bias": torch.arange(8) < 3}, {"up": NOTHING_DEAD}),
        (LIVE, {}),
        (LIVE | {"up.weight": SOME}, {}),  # the row of ``table``, whose channels it reads
        (LIVE | {"up.bias": torch.arange(8) < 4}, {}),
        (LIVE | {"up.bias": torch.arange(8) != 3}, {"up.bias": SHIFT_ALONE}),
        ({"layer_norm.weight": torch.ones(6).bool()}, {}),
    ],
    ids=["layer_norm", "group_norm", "spare", "weights", "bias", "live", "other", "with", "shift", "all"],
)
def test_masks_that_remove_nothing_have_a_row_with_the_reason(masks: dict[str, Tensor], rows: dict[str, str]) -> None:
    found = mixed(masks)
    assert list(found) == list(rows)
    assert all(found[name].startswith(reason) for name, reason in rows.items())


def test_a_mask_beside_the_one_that_removes_has_a_row_of_its_own() -> None:
    net, masks = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), {"2.weight": torch.arange(8) < 6}
    assert slim(net, masks | {"0.weight": SOME}, torch.randn(4, 6))[1].left_out == {
        "0.weight": NOT_ITS_DOING,
        "2": OUTPUTS,
    }


def test_a_mask_of_a_layer_whose_group_stays_is_spoken_of_by_the_group() -> None:
    _, proof = slim(made(Residual), {"head.weight": torch.ones(5, 8).bool().triu()}, torch.randn(IMAGE))
    assert proof.left_out == {"stem": NOTHING_DEAD, "head": OUTPUTS}
