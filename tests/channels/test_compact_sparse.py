"""Compact checkpoints of truly sparse layers: the size of their live weights, and networks that take them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nets import mlp
from torch import Tensor, nn

from sparse_callbacks import SparseLinear, exchange_layers, load_compact, save_compact, to_inference
from sparse_callbacks.core.inference import InferenceLinear
from sparse_callbacks.methods import RigL

WIDTHS = (24, 32, 6)


def sparse(storage: str = "sparse", fan_in: int = 4) -> nn.Sequential:
    first = SparseLinear.random(24, 32, fan_in, storage=storage, group=8, feature_major=False)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(32, 6))


def dense() -> nn.Sequential:
    return mlp(*WIDTHS, seed=1)


def refuse_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(layer: SparseLinear, what: str) -> None:
        raise AssertionError(f"{what} is made")

    monkeypatch.setattr(SparseLinear, "refuse_dense", refused)
    monkeypatch.setattr(
        "sparse_callbacks.core.sparse_layers.sparse_state.dense_of", lambda *args: refused(*args[:1], "a dense weight")
    )


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("into", [dense, sparse])
def test_layers_come_back_sparse_whatever_they_are_here(
    storage: str, into: Callable[..., nn.Sequential], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = sparse(storage), torch.randn(5, 24)
    fresh = into() if into is dense else into(storage, 7)
    refuse_dense(monkeypatch)
    save_compact(net, tmp_path / "net.safetensors")
    assert load_compact(fresh, tmp_path / "net.safetensors") is fresh
    layer = fresh[0]
    assert (type(layer), layer.storage, layer.group, layer.name) == (
        SparseLinear,
        storage,
        net[0].group,
        "0" if into is dense else "",
    )
    assert torch.equal(layer.keys(), net[0].keys())
    assert torch.equal(fresh(x), net(x))
    assert layer.feature_major is False or into is sparse
    fresh(x).sum().backward()  # it can be trained on
    assert layer.values.grad is not None
    assert not net[0].compact_state


def test_the_file_is_as_small_as_its_live_weights(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    for layer in (SparseLinear.random(512, 256, 20), SparseLinear.random(512, 256, 20, storage="grouped", group=64)):
        save_compact(nn.Sequential(layer), path)
        index = 4 * (layer.live + 257) if layer.storage == "sparse" else 4 * layer.live // 64
        assert path.stat().st_size < 4 * layer.live + index + 4 * 256 + 500


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_an_exchanged_network_is_saved_and_loads_into_the_original_class(storage: str, tmp_path: Path) -> None:
    net, x = dense(), torch.randn(5, 24)
    exchange_layers(RigL(0.75, storage=storage, group=2), net)
    save_compact(net, tmp_path / "net")
    again = load_compact(mlp(*WIDTHS, seed=2), tmp_path / "net")
    assert [type(layer) for layer in again] == [type(layer) for layer in net]
    assert torch.equal(again(x), net(x))


def test_a_network_without_sparse_layers_is_written_as_before(tmp_path: Path) -> None:
    save_compact(dense(), tmp_path / "dense.safetensors")
    assert json.loads((tmp_path / "dense.json").read_text())["version"] == 1
    save_compact(sparse(), tmp_path / "sparse.safetensors")
    assert json.loads((tmp_path / "sparse.json").read_text())["version"] == 2


def test_networks_for_inference_are_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sparse_callbacks.core.inference.milliseconds",
        lambda calls, *args, **words: [float(isinstance(call.func, nn.Linear)) for call in calls],
    )
    net, x = sparse(), torch.randn(5, 24)
    served = to_inference(net)
    assert type(served[0]) is InferenceLinear
    save_compact(served, tmp_path / "served")
    assert torch.equal(load_compact(dense(), tmp_path / "served")(x), net(x))
    save_compact(net, tmp_path / "net")
    other = to_inference(sparse(fan_in=9))
    assert torch.equal(load_compact(other, tmp_path / "net")(x), served(x))
    assert type(other[0]) is InferenceLinear
    assert not other[0].values.requires_grad


def test_a_network_on_the_meta_device_takes_memory_of_the_live_weights_alone(tmp_path: Path) -> None:
    net, x = sparse(), torch.randn(5, 24)
    save_compact(net, tmp_path / "net")
    with torch.device("meta"):
        fresh = dense()
    assert torch.equal(load_compact(fresh, tmp_path / "net")(x), net(x))
    assert fresh[0].places.device.type == "cpu"


def test_a_layer_with_two_names_stays_one(tmp_path: Path) -> None:
    layer = SparseLinear.random(6, 6, 2)
    save_compact(nn.Sequential(layer, layer), tmp_path / "twice")
    linear = nn.Linear(6, 6)
    again = load_compact(nn.Sequential(linear, linear), tmp_path / "twice")
    assert again[0] is again[1]
    assert torch.equal(again[0].weight, layer.weight)
    with pytest.raises(ValueError, match="is of another model: '1' is Linear here and missing there"):
        load_compact(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), tmp_path / "twice")


def test_types_are_those_of_the_file_and_frozen_layers_stay_frozen(tmp_path: Path) -> None:
    net = sparse().to(torch.bfloat16)
    save_compact(net, tmp_path / "net")
    fresh = dense().requires_grad_(False)
    seen: list[Any] = []
    fresh[0].register_forward_hook(lambda m, args, out: seen.append(m))
    load_compact(fresh, tmp_path / "net").eval()(torch.ones(1, 24, dtype=torch.bfloat16))
    assert fresh[0].values.dtype is torch.bfloat16
    assert not fresh[0].values.requires_grad
    assert seen == [fresh[0]]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(32, 6)),
            r"out_features of '0' is 40 here and 32",
        ),
        (lambda: sparse("grouped"), "storage of '0' is grouped here and sparse there"),
        (
            lambda: nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(32, 6)),
            "'0' is Identity here and SparseLinear there",
        ),
    ],
)
def test_another_network_is_refused_and_stays_as_it_is(
    model: Callable[[], nn.Sequential], words: str, tmp_path: Path
) -> None:
    save_compact(sparse(), tmp_path / "net")
    other = model()
    modules, state = list(other), {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"is of another model: {words}"):
        load_compact(other, tmp_path / "net")
    assert list(other) == modules
    assert all(torch.equal(state[n], t) for n, t in other.state_dict().items())


def test_a_layer_that_is_the_model_itself_must_be_sparse(tmp_path: Path) -> None:
    layer = SparseLinear.random(6, 6, 2)
    save_compact(layer, tmp_path / "layer")
    other = SparseLinear.random(6, 6, 3)
    assert torch.equal(load_compact(other, tmp_path / "layer").weight, layer.weight)
    with pytest.raises(ValueError, match="it is Linear here and SparseLinear there"):
        load_compact(nn.Linear(6, 6), tmp_path / "layer")


def broken(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def break_it(tensors: dict[str, Tensor]) -> None:
        tensors[f"0.weight.{part}"] = change(tensors[f"0.weight.{part}"]).contiguous()

    return break_it


@pytest.mark.parametrize(
    ("storage", "break_it", "words"),
    [
        ("sparse", broken("col", lambda t: t.flip(0)), "the pattern of '0' contradicts itself"),
        ("sparse", broken("col", lambda t: t + 24), "the pattern of '0' contradicts itself: .* outside"),
        ("sparse", broken("crow", lambda t: t[:-1]), "the pattern of '0' contradicts itself"),
        (
            "sparse",
            broken("values", lambda t: t[:, 1:]),
            "the pattern of '0' contradicts itself: its values have shape",
        ),
        ("grouped", broken("idx", lambda t: t[1:]), "the pattern of '0' contradicts itself"),
        ("grouped", lambda tensors: tensors.pop("0.weight.idx"), "are not a compact checkpoint of this library"),
    ],
)
def test_a_damaged_pattern_is_refused(
    storage: str, break_it: Callable[[dict[str, Tensor]], Any], words: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "net.safetensors"
    save_compact(sparse(storage), path)
    tensors = load_file(path)
    break_it(tensors)
    save_file(tensors, path)
    words_file = path.with_suffix(".json")
    described = json.loads(words_file.read_text())
    del described["checksum"]
    words_file.write_text(json.dumps(described))
    other = dense()
    with pytest.raises(ValueError, match=words):
        load_compact(other, path)
    assert type(other[0]) is nn.Linear
