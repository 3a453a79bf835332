"""What needs dense layers takes exchanged ones: cutting, counting, and first masks from what they have saved."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loops
from torch import nn

from sparse_callbacks import SparseLinear, channel_groups, exchange_layers, save_compact, slim, sparsify, to_dense
from sparse_callbacks.channels.costs import cost_outside_layers, layers, multiply_adds
from sparse_callbacks.channels.forward_flops import forward_flops
from sparse_callbacks.channels.norms import norm_inputs
from sparse_callbacks.methods import SET, Static

STORAGES: dict[str, dict[str, Any]] = {"sparse": {"storage": "sparse"}, "grouped": {"storage": "grouped", "group": 4}}


def exchanged(storage: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    exchange_layers(SET(0.5, distribution="uniform", **STORAGES[storage]), model)
    return model


@pytest.mark.parametrize("storage", STORAGES)
def test_a_network_of_exchanged_layers_is_cut_and_counted_as_its_dense_twin(storage: str) -> None:
    model, x = exchanged(storage).eval(), torch.randn(2, 12)
    twin = to_dense(copy.deepcopy(model))
    mask = torch.arange(24) % 3 != 0
    small, proof = slim(model, {"3.weight": mask}, x)
    expected, other = slim(twin, {"3.weight": mask}, x)
    assert type(small[0]) is nn.Linear
    assert small[0].out_features == expected[0].out_features == 16
    assert proof.removed == other.removed == 8
    assert torch.allclose(small(x), expected(x), atol=1e-6)
    assert [(g.name, g.size, g.reason) for g in channel_groups(model, x)] == [
        (g.name, g.size, g.reason) for g in channel_groups(twin, x)
    ]
    assert isinstance(model[0], SparseLinear)


@pytest.mark.parametrize("storage", STORAGES)
def test_flops_and_costs_of_exchanged_layers_are_those_of_dense_ones(storage: str) -> None:
    model, x = exchanged(storage).eval(), torch.randn(2, 12)
    twin = to_dense(copy.deepcopy(model))
    assert forward_flops(model, x) == forward_flops(twin, x) == 2 * 2 * (12 * 24 + 24 * 24 + 24 * 4)
    found = layers(model, x)
    assert found == layers(twin, x)
    assert math.isclose(
        sum(multiply_adds(la, la.inputs, la.outputs) for la in found.values()), 12 * 24 + 24 * 24 + 24 * 4
    )
    assert cost_outside_layers(model, x, found) == cost_outside_layers(twin, x, found)
    assert norm_inputs(model, x) == {"1": ["0"]}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("layout", ["dense", "compact", "a compact file", "a loop's", "a callback's"])
def test_first_masks_come_from_what_exchanged_layers_have_saved(storage: str, layout: str, tmp_path: Path) -> None:
    model = exchanged(storage)
    live = [m for m in model if isinstance(m, SparseLinear)]
    with torch.no_grad():
        live[0].values.view(-1)[:3] = 0  # as values that were just born
    masks = {f"{i}.weight": model[i].mask for i in (0, 3, 5)}
    source: Any = model.state_dict()
    if layout == "compact":
        for layer in live:
            layer.compact_state = True
        source = model.state_dict()
        assert "0.weight" not in source
    elif layout == "a compact file":
        pytest.importorskip("safetensors")
        source = tmp_path / "net.safetensors"
        save_compact(model, source)
    elif layout in ("a loop's", "a callback's"):
        method = Static(initial_mask="nonzero", print_plan=False)
        run = sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), 5)
        state = run.state_dict()
        run.close()
        source = {"model": model.state_dict(), "run": state}
        if layout == "a callback's":
            source = {"state_dict": model.state_dict(), "callbacks": {"Static": state}}
    other = loops.net()
    other = nn.Sequential(other[0], nn.BatchNorm1d(24), *other[1:])
    given = Static(from_checkpoint=source, print_plan=False)
    sparsify(given, other, torch.optim.SGD(other.parameters(), 0.1), 5)
    lost = 3 * (4 if storage == "grouped" else 1) if layout == "dense" else 0
    for name, mask in masks.items():
        if layout == "dense" and name == "0.weight":
            assert int((mask & ~given.masks[name]).sum()) in range(1, lost + 1)
        else:
            assert torch.equal(given.masks[name], mask), name


@pytest.mark.parametrize("damage", ["a value more", "a column outside", "crow of another layer"])
def test_a_compact_state_dict_that_is_damaged_is_refused_in_words(damage: str) -> None:
    model = exchanged("sparse")
    model[0].compact_state = True
    state = model.state_dict()
    if damage == "a value more":
        state["0.weight.values"] = torch.cat([state["0.weight.values"], torch.ones(1, 1)], 1)
    elif damage == "a column outside":
        state["0.weight.col"] = state["0.weight.col"] + 100
    else:
        state["0.weight.crow"] = state["0.weight.crow"][:-1]
    with pytest.raises(ValueError, match=r"of the live weights of 0.weight there, .*Give from_checkpoint= another"):
        Static(from_checkpoint=state).plan(to_dense(copy.deepcopy(model)))


def dense_twin() -> nn.Module:
    return to_dense(exchanged("grouped"))


def test_a_file_of_safetensors_that_nobody_describes_gives_its_zeros(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = to_dense(exchanged("sparse"))
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    plan = Static(from_checkpoint=tmp_path / "net.safetensors").plan(dense_twin())
    assert plan.zeros == sum(int((model[i].weight == 0).sum()) for i in (0, 3, 5))


@pytest.mark.parametrize("damage", ["cut off", "a bit flipped", "description of another"])
def test_a_damaged_compact_file_gives_no_masks(damage: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "net.safetensors"
    save_compact(exchanged("sparse"), path)
    whole = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(whole[:-9])
    elif damage == "a bit flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        words = path.with_suffix(".json")
        words.write_text(json.dumps(json.loads(words.read_text()) | {"checksum": "0"}))
    with pytest.raises(ValueError, match=r"net\.safetensors cannot be read .*Give from_checkpoint= another"):
        Static(from_checkpoint=path).plan(dense_twin())


@pytest.mark.parametrize("as_file", [True, False])
def test_the_state_of_a_run_alone_gives_no_masks_and_the_error_says_what_to_save(as_file: bool, tmp_path: Path) -> None:
    model = exchanged("sparse")
    with sparsify(
        Static(initial_mask="nonzero", print_plan=False), model, torch.optim.SGD(model.parameters(), 0.1), 5
    ) as run:
        state: Any = run.state_dict()
    if as_file:
        torch.save(state, tmp_path / "run.pt")
        state = tmp_path / "run.pt"
    with pytest.raises(ValueError, match=r"is the state of a run alone.*'model': model\.state_dict\(\).*state=\)"):
        Static(from_checkpoint=state).plan(to_dense(model))
    with pytest.raises(ValueError, match=r"The checkpoint has: no matrix of weights\. Names must"):
        Static(from_checkpoint={"epoch": 3}).plan(to_dense(model))
