"""States of truly sparse layers: a dense layer loads them, and what does not fit is refused with the layer's name."""

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from support.sparse_layers import GROUP, STORAGES, mask_of, twins
from torch import Tensor, nn

from sparse_callbacks import SparseLinear
from sparse_callbacks.core.sparse_layers import live_weight

STORED = pytest.mark.parametrize("storage", STORAGES)


def other(storage: str, seed: int = 5) -> SparseLinear:
    """A layer of other values and another pattern."""
    linear = nn.Linear(10, 12, dtype=torch.float64)
    mask = mask_of(storage, seed=seed)
    return SparseLinear.from_dense(linear, mask, storage=storage, group=GROUP)  # type: ignore[arg-type]


@STORED
def test_a_dense_layer_loads_the_state_and_back(storage: str) -> None:
    linear, layer = twins(storage)
    assert list(layer.state_dict()) == list(linear.state_dict())
    net = nn.Sequential(nn.Linear(10, 12, dtype=torch.float64))
    net.load_state_dict(nn.Sequential(layer).state_dict())
    assert torch.equal(net[0].weight, linear.weight)
    with torch.no_grad():
        layer.values.zero_()
    assert nn.Sequential(layer).load_state_dict(net.state_dict()) == ([], [])
    assert torch.equal(layer.weight, linear.weight)


@STORED
def test_the_state_of_a_layer_is_its_own(storage: str) -> None:
    """A state that is kept does not change with the layer, as that of nn.Linear does; loading writes in place."""
    _, layer = twins(storage)
    kept, memory = layer.state_dict()["weight"], layer.values.data_ptr()
    before = kept.clone()
    layer.load_state_dict({"weight": kept * 2, "bias": layer.bias})
    assert torch.equal(kept, before)
    assert layer.values.data_ptr() == memory


@STORED
def test_non_zeros_outside_of_the_live_places_are_refused_by_name(storage: str) -> None:
    _, layer = twins(storage)
    net, values = nn.Sequential(nn.ReLU(), layer), layer.values.detach().clone()
    state = net.state_dict()
    row, column = layer.mask.logical_not().nonzero()[0]
    state["1.weight"][row, column] = 1e-30
    with pytest.raises(RuntimeError, match=r"1: its weight has 1 non-zeros outside of the \d+ live places"):
        net.load_state_dict(state, strict=False)
    assert torch.equal(layer.values, values)
    layer.pattern_follows = True
    net.load_state_dict(state)
    assert torch.equal(layer.values, values)


@STORED
def test_other_shapes_and_missing_weights_are_refused(storage: str) -> None:
    _, layer = twins(storage)
    with pytest.raises(RuntimeError, match=r"its weight has shape \(12, 9\), and the layer \(12, 10\)"):
        layer.load_state_dict({"weight": torch.zeros(12, 9), "bias": torch.zeros(12)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": torch.zeros(12, dtype=torch.float64)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight\.other"'):
        layer.load_state_dict(layer.state_dict() | {"weight.other": torch.zeros(1)})


@STORED
def test_a_compact_state_brings_its_pattern(storage: str) -> None:
    _, layer = twins(storage)
    layer.compact_state = True
    with torch.no_grad():
        layer.values.view(-1)[0] = 0  # lives, though it is zero
    state = nn.Sequential(layer).state_dict()
    pattern = ["crow", "col"] if storage == "sparse" else ["idx"]
    assert list(state) == [*(f"0.weight.{part}" for part in ("values", *pattern)), "0.bias"]
    for assign in (False, True):
        taker = other(storage)
        assert nn.Sequential(taker).load_state_dict(state, assign=assign) == ([], [])
        assert torch.equal(taker.keys(), layer.keys())
        assert torch.equal(taker.weight, layer.weight)
        assert taker(torch.ones(10, dtype=torch.float64)).equal(layer(torch.ones(10, dtype=torch.float64)))
    # a layer that writes the dense layout reads both
    assert not taker.compact_state


def test_a_damaged_compact_state_is_refused() -> None:
    layers = {storage: twins(storage)[1] for storage in STORAGES}
    for layer in layers.values():
        layer.compact_state = True
    cases: list[tuple[str, str, Any, str]] = [
        ("sparse", "crow", lambda t: t[:-1], "crow does not describe 12 rows"),
        ("sparse", "crow", lambda t: t + 1, "crow does not describe 12 rows"),
        ("sparse", "col", lambda t: t + 9, "outside of the layer's 10 inputs"),
        ("sparse", "col", lambda t: t.flip(0), "not in ascending order"),
        ("sparse", "values", lambda t: t[:, 1:], "live values in a pattern of"),
        ("grouped", "idx", lambda t: t[1:], "idx does not describe 3 groups of 4 rows"),
        ("grouped", "idx", lambda t: t.flip(1), "not in ascending order"),
        ("grouped", "idx", lambda t: t - 100, "outside of the layer's 10 inputs"),
        ("grouped", "values", lambda t: t[1:], "live values in a pattern of"),
    ]
    for storage, part, damage, words in cases:
        layer, state = layers[storage], layers[storage].state_dict()
        keys, values = layer.keys(), layer.values.detach().clone()
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict(state | {f"weight.{part}": damage(state[f"weight.{part}"])})
        assert torch.equal(layer.keys(), keys)
        assert torch.equal(layer.values, values)


@STORED
def test_states_may_be_assigned(storage: str) -> None:
    """As they are for layers on the meta device: type and memory are those of the state."""
    linear, layer = twins(storage)
    state = {name: tensor.float() for name, tensor in linear.state_dict().items()}
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(state, assign=True)
    assert empty.values.dtype == torch.float32
    assert isinstance(empty.values, nn.Parameter)
    assert torch.equal(empty.weight, linear.weight.float())
    empty(torch.ones(10)).sum().backward()


@STORED
def test_hooks_of_the_user_see_states_first(storage: str) -> None:
    linear, layer = twins(storage)

    def renamed(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")

    layer.register_load_state_dict_pre_hook(renamed)
    layer.load_state_dict({"kernel": linear.weight * 2, "bias": linear.bias})
    assert torch.equal(layer.weight, linear.weight * 2)


@STORED
def test_layers_are_copied_and_pickled_whole(storage: str) -> None:
    _, layer = twins(storage)
    layer.name = "net.0"
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(3, 10, dtype=torch.float64)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(same(x), layer(x))
        assert same.name == "net.0"
        same.move_to(other(storage, seed=0).keys())
        same.values.data.zero_()
    assert layer.values.any()


# ---------------------------------------------------------------------- layers that are too large for a matrix


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> SparseLinear:
    monkeypatch.setattr(live_weight, "LARGEST_DENSE", 100)
    layer = SparseLinear.random(11, 10, 3)
    layer.name = "net.0"
    return layer


def test_a_layer_that_is_too_large_has_the_compact_state_always(too_large: SparseLinear) -> None:
    too_large.compact_state = False
    assert list(too_large.state_dict()) == ["weight.values", "weight.crow", "weight.col", "bias"]
    taker = SparseLinear.random(11, 10, 2)
    taker.load_state_dict(too_large.state_dict())
    assert torch.equal(taker.keys(), too_large.keys())


def test_it_refuses_the_matrix_in_words(too_large: SparseLinear) -> None:
    words = "net.0 has 10 x 11 entries, too many for a dense matrix"
    with pytest.raises(ValueError, match=words):
        _ = too_large.weight
    with pytest.raises(ValueError, match=words):
        _ = too_large.mask
    with pytest.raises(ValueError, match=words):
        too_large.to_dense()
    with pytest.raises(RuntimeError, match=words):
        too_large.load_state_dict({"weight": torch.zeros(10, 11), "bias": torch.zeros(10)})


def test_the_limit_is_that_of_int32() -> None:
    layer = SparseLinear.random(2**16, 2**15, 1, device="meta")
    assert not layer.is_too_large
    assert SparseLinear.random(2**16, 2**15 + 1, 1, device="meta").is_too_large
    assert re.search(r"live=32768, density=1\.53e-05", repr(layer))
