"""Slimming: the small network computes what the masked one did, is really smaller, and what cannot go is named."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from channel_nets import IMAGE, NETS, Concat, Residual, Shuffled, Transformer, grouped, half, made
from contract_support import Classifier, conv_net, differences, fit, structure
from torch import Tensor, nn

from sparse_callbacks import DPF, export
from sparse_callbacks.channels import channel_groups
from sparse_callbacks.proof import Difference, compare
from sparse_callbacks.slimming import slim, slimmable_groups

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
    assert proof.rows[1].note == "all units are dead; one stays"
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"outer.weight": torch.zeros(1)}), x))


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
    assert proof.rows[0].note == "1 units stay: what they hold is no constant, or one that zero padding would change"


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
    with pytest.raises(ValueError, match="gives no finite outputs in eval mode"):
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


# ---------------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", [*NETS, "constant"])
def test_a_compact_checkpoint_loads_onto_the_original_class(name: str, tmp_path: Path) -> None:
    build = NETS.get(name, lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False)))
    net, x = made(build), torch.randn(IMAGE)
    masks = half(net, [g for g in channel_groups(net, x) if not g.reason]) if name in NETS else {"0.weight": rows(4, 8)}
    small, _ = slim(net, masks, x)
    export.save_compact(small, tmp_path / "small.safetensors")
    torch.serialization.clear_safe_globals()
    fresh = build()
    fresh.requires_grad_(False)
    again = export.load_compact(fresh, tmp_path / "small.safetensors")
    assert again is fresh
    assert torch.equal(outputs(again, x), outputs(small, x))
    assert differences(again.state_dict(), small.state_dict()) == []
    assert [str(m) for m in again.modules() if not list(m.children())] == [str(m) for m in small.modules() if not list(m.children())]
    description = json.loads((tmp_path / "small.json").read_text())
    assert description["version"] == 1
    with torch.device("meta"):
        elsewhere = build()
    if name not in ("scaled",):  # a parameter of its own is made from random numbers, which meta tensors do not hold
        assert torch.equal(outputs(export.load_compact(elsewhere, tmp_path / "small.safetensors"), x), outputs(small, x))


def test_tied_weights_stay_tied_on_disk(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    net = build()
    export.save_compact(net, tmp_path / "tied.safetensors")
    again = export.load_compact(build(), tmp_path / "tied.safetensors")
    assert again[0].weight is again[2].weight
    assert torch.equal(again[0].weight, net[0].weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    export.save_compact(nn.Sequential(nn.Linear(4, 4)), path)
    with pytest.raises(ValueError, match="is of another model: '0' is Conv2d here and Linear there"):
        export.load_compact(nn.Sequential(nn.Conv2d(4, 4, 1)), path)
    with pytest.raises(ValueError, match=r"is of another model: 1.bias is missing there"):
        export.load_compact(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), path)
    description = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(description | {"version": 9}))
    with pytest.raises(ValueError, match="is of version 9, and this release reads version 1"):
        export.load_compact(nn.Sequential(nn.Linear(4, 4)), path)


class Talkative(nn.Linear):
    def get_extra_state(self) -> str:
        return "a word"

    def set_extra_state(self, state: str) -> None: ...


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"_extra_state in the state dict is no tensor, and a compact checkpoint holds tensors only"):
        export.save_compact(Talkative(2, 2), tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    net, x = made(NETS[name]).train(), torch.randn(IMAGE)
    small, _ = slim(net, half(net, [g for g in channel_groups(net, x) if not g.reason]), x)
    difference = export.export_onnx(small, tmp_path / "small.onnx", x)
    assert difference.relative < 1e-5
    assert small.training
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]
    with pytest.raises(ValueError, match=r"onnxruntime computes something else from .*tolerance=-1 is allowed"):
        export.export_onnx(small, tmp_path / "small.onnx", {"input" if name == "grouped" else "x": x}, tolerance=-1)


@pytest.mark.parametrize(("module", "name"), [("safetensors.torch", "channels"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")])
def test_without_the_extra_the_error_names_it(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    write = export.save_compact if name == "channels" else lambda net, path: export.export_onnx(net, path, torch.zeros(1, 2))
    with pytest.raises(ImportError, match=rf"pip install 'sparse-callbacks\[{name}\]'"):
        write(nn.Linear(2, 2), tmp_path / "x")
