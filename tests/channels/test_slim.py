"""Slimming: the small network computes what the masked one did, and is really smaller."""

import copy
from dataclasses import replace

import pytest
import torch
from pytorch_lightning.utilities.compile import from_compiled
from support.channel_nets import (
    IMAGE,
    NETS,
    OUTPUTS,
    Auxiliary,
    Residual,
    Transformer,
    half,
    made,
    masked,
    outputs,
)
from torch import Tensor, nn

from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.idle_masks import NOTHING_DEAD
from sparse_callbacks.channels.slim import slim, slimmable_groups
from sparse_callbacks.testing.comparison import differences, structure
from sparse_callbacks.testing.networks import Classifier

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


def numbers(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------------- equal and smaller


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_slim_network_computes_what_the_masked_one_did(name: str, seed: int) -> None:
    net = made(NETS[name], seed).double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    groups = [g for g in channel_groups(net, x) if not g.reason]
    masks = half(net, groups)
    before, values = structure(net), copy.deepcopy(net.state_dict())
    small, proof = slim(net, masks, x)
    torch.testing.assert_close(outputs(small, 3 * x), outputs(masked(net, masks), 3 * x), rtol=1e-9, atol=1e-9)
    assert {r.name: r.units for r in proof.rows if r.units} == {g.name: g.size // 2 for g in groups}
    assert numbers(small) < 0.75 * numbers(net)
    assert (proof.before.parameters, proof.after.parameters) == (numbers(net), numbers(small))
    assert proof.checked.relative < 1e-12
    assert {n: type(m) for n, m in small.named_modules()} == {n: type(m) for n, m in net.named_modules()}
    assert differences(before, structure(net)) == []
    assert differences(values, net.state_dict()) == []


def test_sizes_and_costs_by_hand() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).train()
    net[0].weight.requires_grad = False
    small, proof = slim(net, {"3.weight": torch.tensor([1, 0, 1, 0, 0, 1]).bool()}, torch.randn(5, 4))
    assert [tuple(p.shape) for p in small.parameters()] == [(3, 4), (3,), (3,), (3,), (2, 3), (2,)]
    assert [p.requires_grad for p in small.parameters()] == [False] + [True] * 5
    assert (small[0].out_features, small[1].num_features, small[3].in_features, small[1].running_var.shape) == (
        3,
        3,
        3,
        (3,),
    )
    assert (proof.before.parameters, proof.after.parameters) == (30 + 12 + 14, 15 + 6 + 8)
    assert (proof.before.flops, proof.after.flops) == (5 * 2 * (24 + 12), 5 * 2 * (12 + 6))
    assert small.training
    assert small[1].training
    assert torch.equal(small[0].weight, net[0].weight[[0, 2, 5]])
    assert proof.removed == 3
    small(torch.randn(5, 4)).sum().backward()  # it trains on


def test_the_proof_is_a_table() -> None:
    _, proof = slim(made(Residual), {"outer.weight": torch.arange(6) < 3}, torch.randn(IMAGE))
    lines = str(proof).splitlines()
    assert lines[0].split() == ["before", "after", "ratio"]
    assert [line.split()[0] for line in lines[1:4]] == ["parameters", "FLOPs", "latency"]
    assert "outputs in float64:" in str(proof)
    # nobody has said what is a sample of the input
    assert lines[4] == "FLOPs and latency of a forward pass on the whole example input; a multiply-add is two FLOPs"
    whole, one = lines[2], str(replace(proof, samples=2)).splitlines()[2]
    counts = [[int(text.replace(",", "")) for text in line.split()[1:3]] for line in (whole, one)]
    assert counts[0] == [proof.before.flops, proof.after.flops] == [2 * count for count in counts[1]]
    assert lines[-2].split() == ["inner", "6", "3"]
    assert lines[-1].split() == ["head", "5", "0", "these", "are", "outputs", "of", "the", "network"]
    assert proof.left_out == {"head": OUTPUTS}


def test_only_what_every_reader_leaves_goes() -> None:
    net, x = made(Residual), torch.randn(IMAGE)
    masks = {"inner.weight": torch.arange(8) < 4, "head.weight": torch.arange(8) < 6}
    small, proof = slim(net, masks, x)
    assert small.stem.out_channels == small.head.in_features == 6
    torch.testing.assert_close(
        outputs(small, x),
        outputs(
            masked(net, {"inner.weight": masks["inner.weight"][:, None, None]} | {"head.weight": masks["head.weight"]}),
            x,
        ),
    )
    assert proof.removed == 2
    # the other reader has no mask, and the units of "inner" itself are not masked at all
    idle = slim(net, {"inner.weight": masks["inner.weight"]}, x)[1].left_out
    assert idle == {"stem": NOTHING_DEAD, "inner": NOTHING_DEAD, "head": OUTPUTS}


def test_masks_of_single_weights_remove_what_they_leave_unread() -> None:
    """Outputs first: a weight is read no more once the channel that it feeds is gone."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    last, middle = torch.ones(2, 5).bool(), torch.ones(5, 6).bool()
    last[:, 3] = False
    middle[[0, 1, 2, 4], 1] = False  # the one reader of channel 1 is the output that goes
    small, _ = slim(net, {"4.weight": last, "2.weight": middle}, torch.randn(3, 4))
    assert [(m.in_features, m.out_features) for m in small if isinstance(m, nn.Linear)] == [(4, 5), (5, 4), (4, 2)]


def test_one_unit_stays_where_all_are_dead() -> None:
    net, x = made(Residual), torch.randn(IMAGE)
    small, proof = slim(net, {"outer.weight": torch.zeros(6).bool()}, x)
    assert small.inner.out_channels == 1
    assert proof.rows[1].reason == "all units are dead; one stays"
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"outer.weight": torch.zeros(1)}), x))


def tied() -> nn.Module:
    """Two of four linear layers have one weight."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Linear(8, 3),
    ]
    net = nn.Sequential(*layers)
    net[4].weight = net[2].weight
    return net


@pytest.mark.parametrize("names", [["2.weight"], ["4.weight"], ["2.weight", "4.weight"]])
def test_tied_weights_stay_tied_and_are_masked_as_one(names: list[str]) -> None:
    net, x = tied(), torch.randn(2, 6)
    masks = {n: torch.arange(8) % (2 + i) == 0 for i, n in enumerate(names)}
    small, proof = slim(net, masks | {"7.weight": torch.arange(8) < 3}, x)
    assert small[2].weight is small[4].weight
    assert net[2].weight is net[4].weight
    assert torch.equal(small[2].weight.any(0), torch.stack([*masks.values()]).all(0))
    assert (small[6].out_features, small[2].in_features) == (3, 8)
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, masks | {"7.weight": torch.arange(8) < 3}), x))
    assert proof.left_out["0"] == "4.weight and 2.weight are one parameter"


def test_a_mask_of_channels_is_of_the_inputs_of_a_transposed_convolution_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 3))
    mask, x = torch.arange(8) % 2 == 0, torch.randn(IMAGE)
    small, _ = slim(net, {"2.weight": mask}, x)
    assert (small[2].in_channels, small[2].out_channels) == (4, 8)
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"2.weight": mask.view(8, 1, 1, 1)}), x))


class ByName(nn.Module):
    """Layers called with named inputs, a tensor stored in each pass, a counter of passes; in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        self.passes += 1
        self.middle = self.first(input=x).relu()
        return self.last(input=self.middle)


@pytest.mark.parametrize("shape", [(3, 4), (4,)], ids=["batch", "vector"])
def test_layers_may_be_called_by_name_and_without_a_batch(shape: tuple[int, ...]) -> None:
    net, x = ByName(), torch.randn(shape)
    mask = (torch.arange(6) % 2 == 0).view(6, 1)
    small, proof = slim(net, {"first.weight": mask}, x)
    assert small.first.out_features == 3
    assert proof.precision == torch.float32
    assert small.passes == net.passes == 0
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"first.weight": mask}), x))


def test_slimming_in_inference_mode_gives_a_network_that_trains() -> None:
    net, x = made(Residual), torch.randn(IMAGE)
    with torch.inference_mode():
        small, proof = slim(net, {"outer.weight": torch.arange(6) < 3}, x)
    assert proof.removed == 3
    small.train()(x).sum().backward()


# ---------------------------------------------------------------------- branches of train mode


def trained(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs in train mode, norms and dropouts in eval mode."""
    net = copy.deepcopy(net).eval()
    net.training = True
    with torch.no_grad():
        return list(net(x))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_head_of_train_mode_loses_the_channels_too(noise: float) -> None:
    net, x = made(lambda: Auxiliary(noise)), torch.randn(IMAGE)
    masks = {n: torch.arange(8) < 5 for n in ("second.weight", "aside.conv.weight")} | {
        "aside.head.weight": torch.arange(4) < 3
    }
    small, proof = slim(net, masks, x)
    assert (small.first.out_channels, small.aside.conv.in_channels, small.aside.conv.out_channels) == (5, 5, 3)
    if not noise:
        for a, b in zip(
            trained(small, x),
            trained(
                masked(net, {n: m.view(1, -1, *[1] * (net.get_parameter(n).ndim - 2)) for n, m in masks.items()}), x
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    torch.stack(small.train()(x)).sum().backward()
    assert proof.left_out == {"head": OUTPUTS, "aside.head": OUTPUTS}
    assert slim(net, {"second.weight": masks["second.weight"]}, x)[1].removed == 0  # the other head reads them all


class Counting(Auxiliary):
    """In train mode the number of channels counts, which must be even there."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.first(x)).relu()
        found = self.head(self.second(x).relu().mean((2, 3)))
        if not self.training:
            return found
        if x.shape[1] % 2:
            raise RuntimeError("an odd number")
        x = x * x.shape[1]
        return found, self.aside["head"](self.aside["conv"](x).relu().mean((2, 3))) + self.noise * torch.randn(())


def test_a_group_that_changes_the_outputs_in_train_mode_is_put_back() -> None:
    net, x = made(Counting), torch.randn(IMAGE)
    masks = {n: torch.arange(8) < 4 for n in ("second.weight", "aside.conv.weight")}
    small, proof = slim(net, masks, x)
    assert small.first.out_channels == 8
    assert proof.left_out["first"].startswith("without them, in train mode, the outputs differ by")
    found = {g.name: g.reason for g in slimmable_groups(net, x)}
    assert found["first"].startswith("without them, in train mode, the outputs differ by")
    assert not found["second"]
    noisy = slim(
        made(lambda: Counting(1.0)),
        masks | {"second.weight": torch.arange(8) < 5, "aside.conv.weight": torch.arange(8) < 5},
        x,
    )[1]
    assert noisy.left_out["first"].startswith("without them, in train mode, the network fails (RuntimeError")


def test_memory_formats_stay() -> None:
    net = made(Residual).to(memory_format=torch.channels_last)
    small, _ = slim(net, {"outer.weight": torch.arange(6) < 3}, torch.randn(IMAGE))
    assert small.outer.weight.shape == (8, 3, 3, 3)
    assert small.outer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.outer.weight.is_contiguous()


# ---------------------------------------------------------------------- modules of Lightning, and what counts


def test_a_module_that_lightning_has_compiled_is_slimmed_itself() -> None:
    net = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))
    found = from_compiled(torch.compile(net, backend="eager"))
    mask = torch.arange(8) < 5
    small, proof = slim(found, {"net.3.weight": mask}, torch.randn(2, 12))
    assert proof.removed == 3
    assert small.net[1].out_features == 5
    assert small(torch.randn(2, 12)).shape == (2, 3)
    assert "forward" not in vars(small)


def test_the_products_of_attention_count() -> None:
    net, x = made(Transformer), torch.randn(2, 4, 6)
    _, proof = slim(net, {"down.weight": torch.arange(12) < 6}, x)
    # projections 4 x 6 x 6 and two products of 4 x 4 for each of 4 tokens and of 2 samples; MLP and head; two for each
    # multiply-add
    tokens, rest = 2 * 4, 2 * 4 * (4 * 6 * 6 + 2 * 4 * 6) + 2 * 6 * 3
    assert proof.before.flops == 2 * (rest + tokens * 2 * 6 * 12)
    assert proof.after.flops == 2 * (rest + tokens * 2 * 6 * 6)
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_layers_count() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.recur = nn.Linear(6, 8), nn.Linear(8, 4), nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.recur(self.down(self.up(x).relu()))[0]

    _, proof = slim(Recurrent(), {"down.weight": torch.arange(8) < 5}, torch.randn(2, 4, 6))
    recurrent = 4 * 3 * (4 + 3)
    assert proof.before.flops == 2 * 2 * 4 * (8 * (6 + 4) + recurrent)
    assert proof.after.flops == 2 * 2 * 4 * (5 * (6 + 4) + recurrent)
