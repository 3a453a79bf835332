"""Slimming: the small network computes what the masked one did, is really smaller, and what cannot go is named."""

import copy
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.compile import from_compiled
from support.channel_nets import IMAGE, NETS, Auxiliary, Concat, Residual, Shuffled, Transformer, grouped, half, made
from support.contract_support import Classifier, conv_net, differences, fit, structure
from torch import Tensor, nn

from sparse_callbacks import DPF
from sparse_callbacks.channels import compact
from sparse_callbacks.channels.comparison import Difference, compare, why_not_equal
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.onnx import export_onnx
from sparse_callbacks.channels.slim import slim, slimmable_groups
from sparse_callbacks.core.inspection import tensors_in

OUTPUTS = "these are outputs of the network"


def masked(net: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with zeros where the masks say so."""
    found = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.items():
            found.get_parameter(name).mul_(mask)
    return found


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)


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
    assert (small[0].out_features, small[1].num_features, small[3].in_features, small[1].running_var.shape) == (3, 3, 3, (3,))
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
    assert lines[-2].split() == ["inner", "6", "3"]
    assert lines[-1].split() == ["head", "5", "0", "these", "are", "outputs", "of", "the", "network"]
    assert proof.left_out == {"head": OUTPUTS}


def test_only_what_every_reader_leaves_goes() -> None:
    net, x = made(Residual), torch.randn(IMAGE)
    masks = {"inner.weight": torch.arange(8) < 4, "head.weight": torch.arange(8) < 6}
    small, proof = slim(net, masks, x)
    assert small.stem.out_channels == small.head.in_features == 6
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"inner.weight": masks["inner.weight"][:, None, None]}
        | {"head.weight": masks["head.weight"]}), x))  # fmt: skip
    assert proof.removed == 2
    assert slim(net, {"inner.weight": masks["inner.weight"]}, x)[1].left_out == {"head": OUTPUTS}  # not even tried


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
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)]
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


class Aliased(nn.Module):
    """Every norm has two names, and one convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
        self.one, self.two, self.three = self.norms
        self.again = self.last

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm in self.norms:
            x = norm(x).relu()
        return self.again(x)


def test_modules_with_two_names_are_cut_once_and_loaded_as_they_were(tmp_path: Path) -> None:
    net, x = made(Aliased), torch.randn(IMAGE)
    mask = (torch.arange(8) % 2 == 0).view(1, 8, 1, 1)
    small, _ = slim(net, {"again.weight": mask}, x)
    assert small.first.out_channels == small.one.num_features == small.last.in_channels == 4
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"last.weight": mask}), x))
    for model in (net, small):
        compact.save_compact(model, tmp_path / "aliased.safetensors")
        again = compact.load_compact(Aliased().eval(), tmp_path / "aliased.safetensors")
        assert differences(again.state_dict(), model.state_dict()) == []
        assert torch.equal(outputs(again, x), outputs(model, x))


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
    masks = {n: torch.arange(8) < 5 for n in ("second.weight", "aside.conv.weight")} | {"aside.head.weight": torch.arange(4) < 3}
    small, proof = slim(net, masks, x)
    assert (small.first.out_channels, small.aside.conv.in_channels, small.aside.conv.out_channels) == (5, 5, 3)
    if not noise:
        for a, b in zip(trained(small, x), trained(masked(net, {n: m.view(1, -1, *[1] * (net.get_parameter(n).ndim - 2))
            for n, m in masks.items()}), x), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b)
    torch.stack(small.train()(x)).sum().backward()
    assert proof.left_out == {"head": OUTPUTS, "aside.head": OUTPUTS}
    assert slim(net, {"second.weight": masks["second.weight"]}, x)[1].removed == 0  # the other head reads them all


class Swapped(Auxiliary):
    """In train mode the channels meet in another order."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.first(x)).relu()
        found = self.head(self.second(x).relu().mean((2, 3)))
        if not self.training:
            return found
        x = x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return found, self.aside["head"](self.aside["conv"](x).relu().mean((2, 3))) + self.noise * torch.randn(())


def test_a_group_that_changes_the_outputs_in_train_mode_is_put_back() -> None:
    net, x = made(Swapped), torch.randn(IMAGE)
    masks = {n: torch.arange(8) < 4 for n in ("second.weight", "aside.conv.weight")}
    small, proof = slim(net, masks, x)
    assert small.first.out_channels == 8
    assert proof.left_out["first"].startswith("without them, in train mode, the outputs differ by")
    found = {g.name: g.reason for g in slimmable_groups(net, x)}
    assert found["first"].startswith("without them, in train mode, the outputs differ by")
    assert not found["second"]
    noisy = slim(made(lambda: Swapped(1.0)), masks | {"second.weight": torch.arange(8) < 5, "aside.conv.weight": torch.arange(8) < 5}, x)[1]
    assert noisy.left_out["first"].startswith("without them, in train mode, the network fails (RuntimeError")  # 5 make no pairs


def test_memory_formats_stay() -> None:
    net = made(Residual).to(memory_format=torch.channels_last)
    small, _ = slim(net, {"outer.weight": torch.arange(6) < 3}, torch.randn(IMAGE))
    assert small.outer.weight.shape == (8, 3, 3, 3)
    assert small.outer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.outer.weight.is_contiguous()


# ---------------------------------------------------------------------- dead outputs


def rows(gone: int, channels: int) -> Tensor:
    return (torch.arange(channels) >= gone).view(-1, 1, 1, 1)


@pytest.mark.parametrize(("padding", "mode"), [(0, "zeros"), (1, "reflect")])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_constant_of_a_dead_output_goes_into_the_bias_of_its_reader(padding: int, mode: str, groups: int) -> None:
    reader = nn.Conv2d(8, 4, 3, padding=padding, padding_mode=mode, groups=groups, bias=False)
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid(), reader)).double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    mask = torch.tensor([0, 1, 1, 0] * 2).bool().view(8, 1, 1, 1)  # the same places in both groups
    small, proof = slim(net, {"0.weight": mask}, x)
    assert small[0].out_channels == 4
    assert small[3].bias.shape == (4,)
    torch.testing.assert_close(outputs(small, 2 * x), outputs(masked(net, {"0.weight": mask}), 2 * x), rtol=1e-10, atol=1e-10)
    assert proof.removed == 4


def test_a_linear_reader_takes_the_constants_behind_a_flattening() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * 36, 2))).double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    small, _ = slim(net, {"0.weight": rows(2, 6)}, x)
    assert (small[0].out_channels, small[3].in_features) == (4, 4 * 36)
    torch.testing.assert_close(outputs(small, 2 * x), outputs(masked(net, {"0.weight": rows(2, 6)}), 2 * x), rtol=1e-10, atol=1e-10)


def test_zero_padding_lets_only_zeros_pass() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)))
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([-9, -9, -9, 9, 0, 0, 0, 0.0]))  # ReLU makes zeros of three of the constants
        net[0].bias.zero_()
    small, proof = slim(net, {"0.weight": rows(4, 8)}, torch.randn(IMAGE))
    assert small[0].out_channels == 5
    assert proof.rows[0].reason == "1 units stay: what they hold is not a constant, or one that zero padding would change"


def test_a_dead_output_that_is_added_to_a_living_one_stays() -> None:
    small, proof = slim(made(Residual), {"outer.weight": rows(4, 8)}, torch.randn(IMAGE))
    assert (small.outer.out_channels, proof.left_out) == (8, {"head": OUTPUTS})


@pytest.mark.parametrize("turned", [False, True])
def test_constants_of_two_groups_add_up_in_one_reader(turned: bool) -> None:
    net, x = made(lambda: Concat(turned)).double(), torch.randn(IMAGE, dtype=torch.float64)
    masks = {"a.weight": rows(2, 4), "b.weight": rows(3, 6)}
    with torch.no_grad():
        net.norm.bias.abs_()
        net.norm.running_mean.copy_(-9 * torch.ones(10))
    small, _ = slim(net, masks, x)
    assert (small.a.out_channels, small.b.out_channels, small.head.in_channels) == (2, 3, 5)
    torch.testing.assert_close(outputs(small, x / 9), outputs(masked(net, masks), x / 9), rtol=1e-10, atol=1e-10)


class Gated(nn.Module):
    """Units that a second input switches off: bools, numbers of channels, or whether it is small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.table = nn.Linear(6, 8), nn.Linear(8, 3), torch.tensor([0.0, 1, 1, 1, 1])

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if gate.is_floating_point():
            on = (gate.abs().amax() < 6).to(x)
        else:
            on = gate.unsqueeze(-1) if gate.dtype == torch.bool else (gate[:, :1, None] > 3)
        return self.last(self.first(x).relu() * on).mean(1)


GATES = {
    "bools": (torch.ones(2, 7, dtype=torch.bool), torch.tensor([[True] * 3 + [False] * 4] * 2)),
    "integers": (torch.tensor([[5, 1, 1, 1], [6, 0, 2, 1]]), torch.tensor([[1, 5, 1, 1], [0, 6, 2, 1]])),
    "numbers": (torch.randn(2, 7), torch.full((2, 7), 9.0)),
}


@pytest.mark.parametrize("kind", GATES)
def test_constants_that_hang_on_another_input_are_none(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Gated(), torch.randn(2, 7, 6)
    with torch.no_grad():
        net.first.bias.fill_(1.0)
    given, other = GATES[kind]
    small, proof = slim(net, {"first.weight": (torch.arange(8) % 2 == 0)[:, None]}, (x, given))
    assert proof.removed == 0
    assert proof.rows[0].reason.startswith("4 units stay")
    assert small(x, other).shape == (2, 3)


def test_inputs_that_cannot_be_varied_stay_as_they_are() -> None:
    """Attention with nothing to attend to is NaN, and lengths have to be in order."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, there: Tensor, lengths: Tensor) -> Tensor:
            assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
            weights = torch.zeros(there.shape, dtype=x.dtype).masked_fill(~there, float("-inf")).softmax(1)
            return self.last((self.first(x).relu() * weights.unsqueeze(-1)).sum(1))

    example = torch.randn(30, 2, 6), torch.ones(30, 2, dtype=torch.bool), torch.arange(30, 0, -1)
    assert slim(Masked(), {"last.weight": torch.arange(8) < 5}, example)[1].removed == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_below_float32_only_exact_constants_go(dtype: torch.dtype) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 3)]
            self.layers = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.to(dtype))

    net = made(Cast).to(dtype)
    masks = {"layers.0.weight": rows(2, 8), "layers.0.bias": torch.arange(8) != 1}
    with torch.no_grad():
        net.layers[0].bias[0] = -99.0  # Sigmoid makes it zero, or nearly
    small, proof = slim(net, masks, torch.randn(IMAGE))
    assert proof.removed == 1
    assert small.layers[0].out_channels == 7
    assert proof.precision == dtype


def test_unit_and_input_masks_together() -> None:
    net, x = made(Residual).double(), torch.randn(IMAGE, dtype=torch.float64)
    masks = {"stem.weight": rows(3, 8), "outer.weight": rows(3, 8) & (torch.arange(6) < 4).view(1, 6, 1, 1)}
    with torch.no_grad():
        net.inner.padding_mode = "reflect"
        net.inner._reversed_padding_repeated_twice = (1, 1, 1, 1)
    small, _ = slim(net, masks, x)
    assert (small.stem.out_channels, small.inner.out_channels) == (5, 4)
    torch.testing.assert_close(outputs(small, 2 * x), outputs(masked(net, masks), 2 * x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trained_module_with_the_masks_of_its_callback() -> None:
    """Filters that DPF prunes are dead outputs; the module still hangs on its trainer."""
    module = Classifier(conv_net())
    callback = DPF("constant(0.5)", unit="filter", distribution="uniform", keep_dense="last", print_plan=False)
    trainer = fit(module, callback)
    x = torch.randn(3, 2, 5, 5)
    small, proof = slim(module, callback.masks, x)
    torch.testing.assert_close(outputs(small.net, x), outputs(module.net, x))
    assert proof.removed > 0
    assert module.trainer is trainer


# ---------------------------------------------------------------------- put back, named, refused


def test_a_group_that_changes_the_outputs_is_put_back_and_named() -> None:
    net, x = made(Shuffled).double(), torch.randn(IMAGE, dtype=torch.float64)
    masks = {"inner.weight": torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).bool(), "last.weight": torch.arange(6) < 3}
    small, proof = slim(net, masks, x)
    assert (small.first.out_channels, small.inner.out_channels) == (8, 3)
    assert set(proof.left_out) == {"first", "last"}
    assert proof.left_out["first"].startswith("without them the ")
    assert torch.equal(small.first.weight, net.first.weight)
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"inner.weight": masks["inner.weight"].view(1, -1, 1, 1),
        "last.weight": masks["last.weight"].view(1, -1, 1, 1)}), x))  # fmt: skip


def test_groups_are_tried_out_and_the_model_put_back() -> None:
    net = made(Shuffled).train()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    before = structure(net)
    found = {g.name: g.reason for g in slimmable_groups(net, torch.randn(IMAGE))}
    assert found["first"].startswith("without them the ")
    assert not found["inner"]
    assert {**dict(net.named_parameters()), **dict(net.named_buffers())} == tensors  # by identity
    assert differences(before, structure(net)) == []
    assert all(not g.reason for g in slimmable_groups(made(grouped), torch.randn(IMAGE))[:-1])


def test_a_transformer_loses_units_of_its_mlp() -> None:
    net, x = made(Transformer).double(), torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.arange(12) % 3 == 0
    small, proof = slim(net, {"down.weight": mask}, x)
    assert (small.up.out_features, small.down.in_features) == (4, 4)
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"down.weight": mask}), x))
    assert "down" in proof.left_out


def test_excluded_groups_stay() -> None:
    small, proof = slim(made(Residual), {"outer.weight": torch.arange(6) < 3}, torch.randn(IMAGE), exclude="inner")
    assert small.inner.out_channels == 6
    assert proof.left_out["inner"] == "inner is excluded"


def test_masks_that_do_not_fit_are_refused() -> None:
    net, x = made(Residual), torch.randn(IMAGE)
    with pytest.raises(ValueError, match=r"masks names 'foo.weight', and the model has no such parameter. There are for example stem.w"):
        slim(net, {"foo.weight": torch.ones(3)}, x)
    with pytest.raises(ValueError, match=r"mask of outer.weight has shape \[1, 5, 1, 1\] and the parameter \[8, 6, 3, 3\]"):
        slim(net, {"outer.weight": torch.ones(5)}, x)


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    net = made(Residual)
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN, or no finite outputs, in eval mode"):
        slim(net, {}, torch.randn(IMAGE))


def test_outputs_that_never_change_prove_nothing() -> None:
    with pytest.raises(ValueError, match="gives the same outputs for different random inputs"):
        slim(made(Residual), {"head.weight": torch.zeros(1)}, torch.randn(IMAGE))


def test_a_network_that_does_not_run_in_float64_is_compared_in_its_own_precision() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.float()))

    small, proof = slim(Single(), {"last.weight": torch.arange(6) < 3}, torch.randn(2, 4))
    assert small.first.out_features == 3
    assert proof.precision == torch.float32
    assert "outputs in float32:" in str(proof)
    assert 0 <= proof.checked.relative < 1e-5


@dataclass
class Found:
    label: Tensor
    logits: Tensor


class Centred(nn.Module):
    """A mean over the channels, which a trace takes for an elementwise operation; labels first, and a copy of the channels if asked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.inner, self.last = nn.Linear(6, 32), nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> object:
        h = self.first(x)
        z = self.last(self.inner(h - h.mean(1, keepdim=True) if self.kind != "record" else h).relu())
        label = z.argmax(1)
        if self.kind == "record":
            return label, Found(z, h)
        return (label, z) if self.kind == "integer" else (z.half(), z)


@pytest.mark.parametrize("kind", ["integer", "half", "record"])
def test_every_output_is_compared_with_the_limit_of_its_own_type(kind: str) -> None:
    torch.manual_seed(0)
    mask = torch.ones(32, dtype=torch.bool)
    mask[[3, 7]] = False
    _, proof = slim(Centred(kind), {"inner.weight": mask}, torch.randn(4, 6))
    assert proof.removed == 0
    assert proof.precision == (torch.float16 if kind == "half" else torch.float64)
    assert proof.left_out["first"].startswith("without them the outputs differ by" if kind != "record" else OUTPUTS)


def test_mismatches_are_judged_tensor_by_tensor() -> None:
    one, whole = torch.tensor([1.0, 2.0]), torch.tensor([100, 1])
    assert why_not_equal([one], [one + 1e-5]) == ""
    assert why_not_equal([one.half()], [one.half() + 0.01]) == ""
    assert why_not_equal([one], [one + 1e-3]) == "outputs differ by 5.0e-04 (relative)"
    assert why_not_equal([one.double()], [one.double() + 1e-5]).startswith("outputs differ by 5")
    assert why_not_equal([one.half(), whole], [one.half(), whole + 1]) == "outputs differ by 1.0e-02 (relative)"
    assert why_not_equal([one.half(), one], [one.half(), one + 0.01]) == "outputs differ by 5.0e-03 (relative)"
    assert why_not_equal([one], [one, one]) == "outputs are 2 in the place of 1"
    assert why_not_equal([one], [one + 1e-3], tolerance=1e-2) == ""
    assert why_not_equal([whole], [whole + 1], tolerance=1.0) != ""
    assert why_not_equal([one * 1j], [one * 1j + 1]) == "outputs differ by 5.0e-01 (relative)"


class Barred(nn.Module):
    """One of four classes is impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).masked_fill(torch.arange(4) == 1, float("-inf"))


def test_outputs_may_be_infinite_where_they_always_are() -> None:
    _, proof = slim(Barred(), {"last.weight": torch.arange(8) < 5}, torch.randn(2, 6))
    assert proof.removed == 3
    assert proof.checked.relative < 1e-12


def test_a_batch_is_compared_by_its_first_entry_and_at_the_end_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    net, x = made(Residual), torch.randn(5, *IMAGE[1:])
    original = Residual.forward

    def counted(self: Residual, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            sizes.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Residual, "forward", counted)
    masks = {"inner.weight": torch.arange(8) < 6, "head.weight": torch.arange(8) < 6, "outer.weight": torch.arange(6) < 3}
    assert slim(net, masks, x)[1].removed == 5
    assert sizes.count(1) == 4  # whether one is taken, what it gives, and a look after each of two groups
    assert sizes.count(5) == 11  # whether float64 is taken, which layers run; three samples at first, at the end, and for the proof


def test_given_inputs_are_compared_too() -> None:
    """A switch that only real data throws: on it a channel is read that is dead otherwise."""

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h) + (h.sum(1, keepdim=True) if x[0, 0] > 50 else 0)

    mask, x = {"last.weight": torch.arange(6) < 3}, torch.zeros(1, 4)
    torch.manual_seed(0)
    net = Switch()
    assert slim(net, mask, x)[1].removed == 3
    assert slim(net, mask, x, inputs=[x + 99])[1].removed == 0


def test_differences_of_outputs() -> None:
    one = [torch.tensor([1.0, -4.0])]
    assert compare(one, [torch.tensor([1.5, -4.0])]) == Difference(0.5, 0.125)
    assert compare(one, [torch.tensor([1.0, float("nan")])]).relative == float("inf")
    assert compare(one, [torch.zeros(3)]).relative == float("inf")
    assert compare([torch.zeros(2)], [torch.zeros(2)]) == Difference(0.0, 0.0)
    endless = [torch.tensor([1.0, float("-inf"), float("nan")])]
    assert compare(endless, [torch.tensor([1.5, float("-inf"), float("nan")])]) == Difference(0.5, 0.5)
    assert compare(endless, [torch.tensor([1.0, float("inf"), float("nan")])]).relative == float("inf")
    assert compare([endless[0][1:]], [endless[0][1:]]) == Difference(0.0, 0.0)


# ---------------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", [*NETS, "constant"])
def test_a_compact_checkpoint_loads_onto_the_original_class(name: str, tmp_path: Path) -> None:
    build = NETS.get(name, lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False)))
    net, x = made(build), torch.randn(IMAGE)
    masks = half(net, [g for g in channel_groups(net, x) if not g.reason]) if name in NETS else {"0.weight": rows(4, 8)}
    small, _ = slim(net, masks, x)
    compact.save_compact(small, tmp_path / "small.safetensors")
    torch.serialization.clear_safe_globals()
    fresh = build()
    fresh.requires_grad_(False)
    again = compact.load_compact(fresh, tmp_path / "small.safetensors")
    assert again is fresh
    assert torch.equal(outputs(again, x), outputs(small, x))
    assert differences(again.state_dict(), small.state_dict()) == []
    assert [str(m) for m in again.modules() if not list(m.children())] == [str(m) for m in small.modules() if not list(m.children())]
    description = json.loads((tmp_path / "small.json").read_text())
    assert description["version"] == 1
    with torch.device("meta"):
        elsewhere = build()
    if name not in ("scaled",):  # a parameter of its own is made from random numbers, which meta tensors do not hold
        assert torch.equal(outputs(compact.load_compact(elsewhere, tmp_path / "small.safetensors"), x), outputs(small, x))


def test_tied_weights_stay_tied_on_disk(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    net = build()
    compact.save_compact(net, tmp_path / "tied.safetensors")
    again = compact.load_compact(build(), tmp_path / "tied.safetensors")
    assert again[0].weight is again[2].weight
    assert torch.equal(again[0].weight, net[0].weight)
    for first, last in ((net, net[2]), (net[2], net)):  # one of the two has another name besides
        compact.save_compact(nn.ModuleList([first, last]), tmp_path / "tied.safetensors")
        fresh = build()
        twice = nn.ModuleList([fresh, fresh[2]] if first is net else [fresh[2], fresh])
        assert compact.load_compact(twice, tmp_path / "tied.safetensors") is twice
        assert fresh[0].weight is fresh[2].weight


def stacked(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class Other(nn.Sequential):
    """The same layers under another class."""


def conv(into: int = 4, out: int = 4, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, **options)


def two_linear(is_tied: bool) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if is_tied:
        net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("saved", "model", "difference"),
    [
        (nn.Linear(4, 4), nn.Conv2d(4, 4, 1), "it is Conv2d here and Linear there"),
        (stacked(nn.Linear(4, 4)), Other(nn.Linear(4, 4)), "it is Other here and Sequential there"),
        (stacked(nn.Linear(4, 4)), stacked(nn.Conv2d(4, 4, 1)), "'0' is Conv2d here and Linear there"),
        (stacked(nn.Linear(4, 4), nn.ReLU()), stacked(nn.Linear(4, 4), nn.Tanh()), "'1' is Tanh here and ReLU there"),
        (stacked(nn.Linear(4, 4)), stacked(nn.Linear(4, 4), nn.ReLU()), "'1' is ReLU here and missing there"),
        (nn.LayerNorm(4, bias=False), nn.LayerNorm(4), "bias is missing there"),
        (nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False), "bias is too many there"),
        (two_linear(False), two_linear(True), "1.weight and 0.weight are one parameter here and two there"),
        (two_linear(True), two_linear(False), "1.weight and 0.weight are one parameter there and two here"),
        (conv(kernel=3), conv(kernel=5), r"kernel_size of '' is \[5, 5\] here and \[3, 3\] there"),
        (conv(stride=2), conv(), r"stride of '' is \[1, 1\] here and \[2, 2\] there"),
        (conv(padding=1), conv(padding="same"), r"padding of '' is same here and \[1, 1\] there"),
        (conv(dilation=2), conv(), r"dilation of '' is \[1, 1\] here and \[2, 2\] there"),
        (conv(padding_mode="reflect"), conv(), "padding_mode of '' is zeros here and reflect there"),
        (conv(out=8), conv(), r"weight has shape \[4, 4, 3, 3\] here and \[8, 4, 3, 3\] there"),
        (nn.Embedding(3, 2), nn.Embedding(5, 2), r"weight has shape \[5, 2\] here and \[3, 2\] there"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(saved: nn.Module, model: nn.Module, difference: str, tmp_path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    compact.save_compact(saved, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=rf"is of another model: {difference}. Give an instance of {type(saved).__name__}, made with the"):
        compact.load_compact(model, tmp_path / "small.safetensors")
    assert differences(before, model.state_dict()) == []


@pytest.mark.parametrize(
    ("attribute", "value", "difference"),
    [
        ("out_channels", 7, r"weight has shape \[4, 4, 3, 3\] there, where the sizes beside it mean \[7, 4, 3, 3\]"),
        ("groups", 4, r"weight has shape \[4, 4, 3, 3\] there, where the sizes beside it mean \[4, 1, 3, 3\]"),
        ("groups", 0, "groups of '' is 0 there"),
        ("in_channels", None, "in_channels of '' is None there"),
    ],
)
def test_sizes_that_are_not_those_of_the_tensors_are_refused(attribute: str, value: object, difference: str, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    compact.save_compact(conv(), path)
    description = json.loads(path.with_suffix(".json").read_text())
    description["layers"][""][attribute] = value
    path.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"is of another model: {difference}"):
        compact.load_compact(conv(), path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 1, "class": "Linear", "layers": {"": 3}, "shared": {}}'])
def test_a_description_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    compact.save_compact(nn.Linear(4, 4), path)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"small.safetensors and small.json are not a compact checkpoint .* Write them anew"):
        compact.load_compact(nn.Linear(4, 4), path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no file .*small.safetensors. A compact checkpoint is two files, small.saf"):
        compact.load_compact(nn.Linear(4, 4), path)
    compact.save_compact(nn.Linear(4, 4), path)
    path.write_bytes(path.read_bytes()[:9])
    with pytest.raises(ValueError, match="are not a compact checkpoint of this library"):
        compact.load_compact(nn.Linear(4, 4), path)
    path.with_suffix(".json").write_text('{"version": 9}')
    compact.save_compact(nn.Linear(4, 4), tmp_path / "whole")
    (tmp_path / "whole.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="is of version 9, and this release reads version 1"):
        compact.load_compact(nn.Linear(4, 4), tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere to write small.safetensors to"):
        compact.save_compact(nn.Linear(4, 4), tmp_path / "nowhere" / "small.safetensors")


def test_every_name_has_a_description_of_its_own(tmp_path: Path) -> None:
    nets = {name: nn.Linear(4, size) for size, name in enumerate(["net-0.5", "net-0.3", "net.st", "net.safetensors"], 1)}
    for name, net in nets.items():
        compact.save_compact(net, tmp_path / name)
    for name, net in nets.items():
        assert torch.equal(compact.load_compact(nn.Linear(4, 9), tmp_path / name).weight, net.weight)
    with pytest.raises(ValueError, match=r"net.json would hold the tensors, and .json is for"):
        compact.save_compact(nn.Linear(4, 4), tmp_path / "net.json")


class Talkative(nn.Linear):
    def get_extra_state(self) -> str:
        return "a word"

    def set_extra_state(self, state: str) -> None: ...


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"_extra_state in the state dict is not a tensor, and a compact checkpoint holds tensors only"):
        compact.save_compact(Talkative(2, 2), tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    net, x = made(NETS[name]).train(), torch.randn(IMAGE)
    small, _ = slim(net, half(net, [g for g in channel_groups(net, x) if not g.reason]), x)
    difference = export_onnx(small, tmp_path / "small.onnx", x)
    assert difference.relative < 1e-5
    assert small.training
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]
    with pytest.raises(ValueError, match=r"onnxruntime computes something else from .*tolerance=-1 is allowed"):
        export_onnx(small, tmp_path / "small.onnx", {"input" if name == "grouped" else "x": x}, tolerance=-1)


def shapes(path: Path) -> list[object]:
    return [slot.shape for slot in onnxruntime().InferenceSession(str(path)).get_inputs()]


def onnxruntime() -> Any:
    return pytest.importorskip("onnxruntime")


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, more: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": self.last(self.first(x).relu() + more["z"]) * scale}


@pytest.mark.parametrize("example", [
    (torch.randn(1, 4), {"z": torch.randn(1, 6)}), {"more": {"z": torch.randn(3, 6)}, "x": torch.randn(3, 4), "scale": 2.0}
], ids=type)  # fmt: skip
def test_onnx_files_take_any_batch(example: Any, tmp_path: Path) -> None:
    net, path = Mapped(), tmp_path / "x.onnx"
    assert export_onnx(net, path, example).relative < 1e-5
    assert all(isinstance(shape[0], str) for shape in shapes(path))
    session, x, z = onnxruntime().InferenceSession(str(path)), torch.randn(7, 4), torch.randn(7, 6)
    fed = {slot.name: (x if slot.shape[1] == 4 else z).numpy() for slot in session.get_inputs()}
    expected = net(x, {"z": z}, *([2.0] if isinstance(example, dict) else []))["y"]
    torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0]), expected.detach(), rtol=1e-4, atol=1e-5)
    export_onnx(net, path, example, dynamic_batch=False)
    assert shapes(path)[0][0] in (1, 3)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(8.0).view(2, 4)


@pytest.mark.parametrize(
    ("net", "example", "reason"),
    [
        (Fixed(), torch.randn(2, 4), "With another size: RuntimeError: The size of tensor a"),
        (nn.Bilinear(4, 3, 2), (torch.randn(1, 4), torch.randn(1, 3)), ""),
        (Mapped(), (torch.randn(4), {"z": torch.randn(6)}), r"the inputs have no common size of dimension 0, but \[4, 6\]"),
    ],
    ids=["fixed", "bilinear", "vector"],
)
def test_onnx_files_of_one_batch_size_come_with_a_warning(net: nn.Module, example: Any, reason: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert export_onnx(net, tmp_path / "x.onnx", example).relative < 1e-5
    told = [str(w.message) for w in caught if "takes batches of the size of example_input only" in str(w.message)]
    assert bool(told) == bool(reason)
    if reason:
        assert re.search(reason, told[0])
        assert len(shapes(tmp_path / "x.onnx")) == len(tensors_in(example))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_types_that_onnxruntime_lacks_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Conv2d(3, 4, 3).to(dtype)
    with pytest.raises(ValueError, match=r"onnxruntime cannot run .*x.onnx .* give the model and example_input in float32"):
        export_onnx(net, tmp_path / "x.onnx", torch.randn(IMAGE, dtype=dtype))


def test_half_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    net, x = made(Residual).half(), torch.randn(IMAGE).half()
    assert 1e-4 < export_onnx(net, tmp_path / "x.onnx", x).relative < 5e-2
    with pytest.raises(ValueError, match="tolerance=1e-06 is allowed"):
        export_onnx(net, tmp_path / "x.onnx", x, tolerance=1e-6)


@pytest.mark.parametrize(("module", "name"), [("safetensors.torch", "channels"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")])
def test_without_the_extra_the_error_names_it(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    write = compact.save_compact if name == "channels" else lambda net, path: export_onnx(net, path, torch.zeros(1, 2))
    with pytest.raises(ImportError, match=rf"pip install 'sparse-callbacks\[{name}\]'"):
        write(nn.Linear(2, 2), tmp_path / "x")


class Woken(nn.Module):
    """Dead outputs of one layer are read by a branch of training, those of another are made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.g, self.h = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        return (self.f(x), self.h(self.g(x).relu())) if self.training else self.f(x)


@pytest.mark.parametrize("name", ["a", "g"])
def test_dead_outputs_that_a_branch_of_training_reads_go(name: str) -> None:
    torch.manual_seed(0)
    net, x = Woken(), torch.randn(2, 8)
    mask = torch.ones_like(net.get_parameter(f"{name}.weight"), dtype=torch.bool)
    mask[0] = False
    small, proof = slim(net, {f"{name}.weight": mask}, x)
    assert proof.removed == 1
    full = masked(net, {f"{name}.weight": mask}).train()
    torch.testing.assert_close(small.train()(x), full(x))


def test_dead_outputs_that_nothing_is_seen_to_read_stay() -> None:
    class Sometimes(Woken):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            if self.training and len(x) == 1:
                raise ValueError("one is not enough to train on")
            return super().forward(x)

    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[0] = False
    _, proof = slim(Sometimes(), {"g.weight": mask}, torch.randn(1, 8))
    assert proof.removed == 0


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
    # projections 4 x 6 x 6 and two products of 4 x 4 for each of 4 tokens and of 2 samples; MLP and head; two for each multiply-add
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
