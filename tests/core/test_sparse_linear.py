"""`SparseLinear` seen from outside: how it is made, what it shows, how places move, and where it may go."""

import copy
from typing import Any

import pytest
import torch
from support.sparse_layers import GROUP, STORAGES, called, mask_of, twins
from torch import Tensor, nn

from sparse_callbacks import SparseLinear

STORED = pytest.mark.parametrize("storage", STORAGES)


# ---------------------------------------------------------------------- made from a dense layer, and back


@STORED
def test_what_it_shows_is_that_of_the_masked_layer(storage: str) -> None:
    linear, layer = twins(storage)
    mask = mask_of(storage)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.mask, mask)
    assert layer.live == int(mask.sum())
    assert layer.density == pytest.approx(float(mask.double().mean()))
    rows = mask[:: layer.group]
    assert layer.block_rows == len(rows)
    assert layer.keys().tolist() == rows.flatten().nonzero().flatten().tolist()
    sums = linear.weight.abs().view(len(rows), layer.group, 10).sum(1).flatten()[layer.keys()]
    torch.testing.assert_close(layer.unit_magnitudes(), sums)
    expected = {"sparse": "storage='sparse', live=", "grouped": "storage='grouped', group=4, live=36, density=0.3"}
    assert f"SparseLinear(in_features=10, out_features=12, bias=True, {expected[storage]}" in repr(layer)


@STORED
def test_parameters_have_the_names_and_the_order_of_a_dense_layer(storage: str) -> None:
    linear, layer = twins(storage)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in linear.named_parameters()]
    assert next(layer.parameters()) is layer.values
    assert not list(layer.named_buffers())
    assert layer.values.dim() > 1  # or groups without decay for vectors would take it from the weights
    assert not isinstance(layer, nn.Linear)  # whose users write into .weight


@STORED
def test_the_dense_weight_is_differentiable_and_says_that_it_was_read(storage: str) -> None:
    _, layer = twins(storage)
    assert not layer.weight_was_read
    factor = torch.randn(12, 10, dtype=torch.float64)
    (layer.weight * factor).sum().backward()
    assert layer.weight_was_read
    assert layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, layer.places.read(factor))
    assert torch.autograd.gradcheck(layer.places.dense, (layer.values,))


@STORED
def test_type_mode_and_frozen_parameters_are_kept_both_ways(storage: str) -> None:
    linear = nn.Linear(10, 12, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(linear, mask_of(storage), storage=storage, group=GROUP)  # type: ignore[arg-type]
    assert layer.bias is not None
    for made in (layer, layer.to_dense()):
        assert [p.dtype for p in made.parameters()] == [torch.bfloat16] * 2
        assert [p.requires_grad for p in made.parameters()] == [False, True]
        assert not made.training
    dense = layer.to_dense()
    assert torch.equal(dense.weight, linear.weight * mask_of(storage))
    assert dense.bias.data_ptr() != layer.bias.data_ptr() != linear.bias.data_ptr()
    assert SparseLinear.random(10, 12, 3, bias=False).to_dense().bias is None


def test_masks_that_are_not_of_the_pattern_are_refused() -> None:
    linear, mask = nn.Linear(10, 12), mask_of("grouped")
    with pytest.raises(ValueError, match=r"the mask has shape \(12, 9\) and the weight \(12, 10\)"):
        SparseLinear.from_dense(linear, mask[:, 1:])
    with pytest.raises(ValueError, match="groups of 5 do not divide 12 rows"):
        SparseLinear.from_dense(linear, mask, storage="grouped", group=5)
    with pytest.raises(ValueError, match="groups of 4 rows that do not read the same inputs"):
        SparseLinear.from_dense(linear, mask_of("sparse"), storage="grouped", group=GROUP)
    uneven = mask.clone()
    uneven[:4] |= mask[4:8]
    with pytest.raises(ValueError, match=r"groups of 4 rows that read from 3 to \d inputs"):
        SparseLinear.from_dense(linear, uneven, storage="grouped", group=GROUP)
    with pytest.raises(TypeError, match="storage='csr' is not of a type that"):
        SparseLinear.from_dense(linear, mask, storage="csr")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what cannot be set


@STORED
def test_the_weight_cannot_be_set_and_the_values_by_a_parameter_of_their_shape(storage: str) -> None:
    _, layer = twins(storage)
    layer.name = "net.0"
    given: list[Any] = [torch.zeros(12, 10), nn.Parameter(torch.zeros(12, 10)), layer.values.detach(), None]
    for name in ("weight", "values"):
        for value in given:
            with pytest.raises(AttributeError, match=rf"net.0: {name} cannot be set.*layer.values.data.copy_"):
                setattr(layer, name, value)
        with pytest.raises(AttributeError, match=f"net.0: {name} cannot be deleted"):
            delattr(layer, name)
    with pytest.raises(AttributeError, match="cannot be"):
        nn.utils.parametrizations.weight_norm(layer)
    fresh = nn.Parameter(torch.zeros_like(layer.values))
    layer.weight = fresh  # type: ignore[assignment]
    assert layer.values is fresh
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


# ---------------------------------------------------------------------- drawn at random


@STORED
def test_a_random_layer_begins_as_a_dense_one_of_its_fan_in(storage: str) -> None:
    torch.manual_seed(0)
    layer = SparseLinear.random(1000, 640, 25, storage=storage, group=64)  # type: ignore[arg-type]
    dense = nn.Linear(25, 640)
    assert (layer.mask.sum(1) == 25).all()
    assert layer.bias is not None
    for ours, theirs in ((layer.values, dense.weight), (layer.bias, dense.bias)):
        assert ours.abs().max() <= 0.2
        torch.testing.assert_close(ours.std(), theirs.std(), atol=0.005, rtol=0)
    before = layer.values.detach().clone(), layer.keys()
    layer.reset_parameters()
    assert not torch.equal(layer.values, before[0])
    assert torch.equal(layer.keys(), before[1])


@STORED
def test_the_generator_decides_pattern_and_values(storage: str) -> None:
    first, same, third = (
        SparseLinear.random(40, 12, 9, storage=storage, group=4, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.mask, third.mask)


def test_fan_in_must_fit_the_inputs() -> None:
    with pytest.raises(ValueError, match=r"fan_in=11 of a layer of 10 inputs, .*: give a number from 0 to 10"):
        SparseLinear.random(10, 12, 11)
    with pytest.raises(ValueError, match="groups of 64 do not divide 12 rows"):
        SparseLinear.random(10, 12, 3, storage="grouped")
    assert SparseLinear.random(10, 12, 10).density == 1
    assert SparseLinear.random(10, 12, 0).live == 0
    assert SparseLinear.random(0, 12, 0)(torch.ones(3, 0)).shape == (3, 12)


# ---------------------------------------------------------------------- places move


def moved(storage: str) -> tuple[SparseLinear, Tensor]:
    """A layer, and as many keys of which some are new."""
    _, layer = twins(storage)
    torch.manual_seed(3)
    mask = mask_of(storage, seed=1)
    if storage == "sparse":
        mask = torch.zeros(120, dtype=torch.bool).scatter(0, torch.randperm(120)[: layer.live], True).view(12, 10)
    return layer, mask[:: layer.group].flatten().nonzero().flatten()


@STORED
def test_places_move_in_place_and_born_values_are_zero(storage: str) -> None:
    layer, keys = moved(storage)
    before, old_mask = layer.weight.detach(), layer.mask
    momentum = torch.randn_like(layer.values)
    dense_momentum = layer.places.dense(momentum)
    tensors = [layer.values, momentum, *(t for _, t in layer.places.tensors())]
    memory, versions = [t.data_ptr() for t in tensors], [t._version for t in tensors]
    parameter = layer.values
    born = layer.move_to(keys, [momentum])
    assert torch.equal(layer.keys(), keys)
    assert torch.equal(layer.weight, before * layer.mask)
    assert torch.equal(layer.places.dense(momentum), dense_momentum * layer.mask)
    assert torch.equal(layer.places.dense(born), layer.mask & ~old_mask)
    assert layer.places.dense(born).any()
    assert layer.values is parameter
    tensors = [layer.values, momentum, *(t for _, t in layer.places.tensors())]
    assert [t.data_ptr() for t in tensors] == memory
    assert all(t._version > v for t, v in zip(tensors, versions, strict=True))
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: called(layer, *args), (layer.values, layer.bias, x))


@STORED
def test_known_slots_spare_the_search(storage: str) -> None:
    layer, keys = moved(storage)
    same = copy.deepcopy(layer)
    slots = layer.places.slots_of(keys)
    assert torch.equal(same.move_to(keys, slots=slots), layer.move_to(keys))
    assert torch.equal(same.values, layer.values)


@STORED
def test_as_many_places_must_come_as_leave(storage: str) -> None:
    layer, keys = moved(storage)
    before, old_keys = layer.values.detach().clone(), layer.keys()
    with pytest.raises(ValueError, match=r"has \d+ live units and was given \d+ keys"):
        layer.move_to(keys[1:])
    with pytest.raises(ValueError, match=r"was given 1 values for \d+ live places"):
        layer.set_places(keys, torch.zeros(1, 1))
    if storage == "grouped":
        uneven = torch.arange(9)
        with pytest.raises(ValueError, match="do not all read the same number of inputs"):
            layer.move_to(torch.where(uneven < 5, uneven, uneven + 15))
        with pytest.raises(ValueError, match="cannot be as many for each of 3 groups"):
            layer.set_places(keys[1:])
    assert torch.equal(layer.values, before)
    assert torch.equal(layer.keys(), old_keys)


@pytest.mark.parametrize("share", [0.2, 0.9])
@STORED
def test_another_pattern_may_have_any_number_of_places(storage: str, share: float) -> None:
    layer, _ = moved(storage)
    before, parameter = layer.weight.detach(), layer.values
    layer.values.grad = torch.ones_like(layer.values)
    other = SparseLinear.random(10, 12, int(10 * share), storage=storage, group=GROUP)  # type: ignore[arg-type]
    layer.set_places(other.keys())
    assert torch.equal(layer.weight, before * other.mask)
    assert layer.values is parameter
    assert layer.values.grad is None
    layer.set_places(other.keys(), other.values.double())
    assert torch.equal(layer.weight, other.weight.double())


# ---------------------------------------------------------------------- where it may go


@STORED
def test_types_move_the_values_and_leave_the_pattern(storage: str) -> None:
    _, layer = twins(storage)
    pattern = {name: t.dtype for name, t in layer.places.tensors()}
    layer.half().float()
    assert layer.values.dtype == torch.float32
    assert {name: t.dtype for name, t in layer.places.tensors()} == pattern


@STORED
def test_a_layer_on_the_meta_device_keeps_its_pattern(storage: str) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = SparseLinear.random(10, 12, 3, storage=storage, group=GROUP)  # type: ignore[arg-type]
    keys = layer.keys()
    assert all(p.is_meta for p in layer.parameters())
    assert layer.to_dense().weight.is_meta
    nn.Sequential(layer).to("meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.keys(), keys)
    assert (layer.mask.sum(1) == 3).all()
    layer(torch.ones(10)).sum().backward()
    dense = nn.Linear(10, 12, device="meta")
    on_meta = SparseLinear.from_dense(dense, mask_of(storage), storage=storage, group=GROUP)  # type: ignore[arg-type]
    assert on_meta.values.is_meta
    on_meta.set_places(keys)
    assert on_meta.values.is_meta
    assert on_meta.live == layer.live


def test_sparse_storage_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see it: whatever moves the module is asked first where it leads."""
    _, layer = twins("sparse", torch.float32)
    net = nn.Sequential(layer)
    elsewhere = torch.empty(0, device="meta")
    monkeypatch.setattr("sparse_callbacks.core.sparse_layers.live_weight.PRODUCTS_RUN_ON", ("cpu",))
    with pytest.raises(ValueError, match=r"was asked to go to meta.*storage='masked'.*'grouped'.*to_dense"):
        net.to(elsewhere.device)
    assert layer.values.device.type == layer.places.device.type == "cpu"
    with pytest.raises(ValueError, match="was asked to go to meta"):
        SparseLinear.random(10, 12, 3, device="meta")
    grouped = SparseLinear.random(10, 12, 3, storage="grouped", group=GROUP).to("meta")
    assert grouped.values.is_meta


@STORED
def test_shared_memory_holds_the_pattern_too(storage: str) -> None:
    _, layer = twins(storage)
    nn.Sequential(layer).share_memory()
    assert layer.values.is_shared()
    assert all(t.is_shared() for _, t in layer.places.tensors())


@STORED
def test_hooks_of_modules_see_its_calls(storage: str) -> None:
    _, layer = twins(storage)
    seen: list[tuple[int, ...]] = []
    layer.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    layer.register_full_backward_hook(lambda _, before, after: seen.append(tuple(before[0].shape)))
    layer(torch.randn(5, 10, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == [(5, 12), (5, 10)]


@STORED
def test_transforms_of_functions_refuse_it_in_torchs_words(storage: str) -> None:
    """functional_call works, torch.func.grad does not: use torch.autograd.grad."""
    _, layer = twins(storage)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(5, 10, dtype=torch.float64))


PARAMETRIZED: dict[str, Any] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrizations.orthogonal": nn.utils.parametrizations.orthogonal,
    "prune": lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_what_would_compute_its_weight_from_others_is_refused_in_words(name: str) -> None:
    _, layer = twins("sparse")
    layer.name = "net.0"
    with pytest.raises(AttributeError, match=r"net\.0.* cannot be parametrized.*Parametrize the nn\.Linear before"):
        PARAMETRIZED[name](layer)
    if name == "weight_norm":  # torch takes the Parameter away before it asks for anything
        with pytest.raises(RuntimeError, match=r"net\.0 has lost its live values.*weight_norm"):
            layer(torch.randn(5, 10, dtype=torch.float64))
    else:
        assert layer(torch.randn(5, 10, dtype=torch.float64)).shape == (5, 12)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_batch_of_another_type_is_refused_where_a_dense_layer_refuses_it(
    storage: str, kind: torch.dtype, autocast: bool
) -> None:
    linear, layer = (module.float() for module in twins(storage))
    for x in (torch.ones(3, 10, dtype=kind), torch.ones(200, 10, dtype=kind)):
        with torch.autocast("cpu", enabled=autocast):
            try:
                linear(x)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    layer(x)
            else:
                layer(x)


def test_the_refusal_names_both_types() -> None:
    with pytest.raises(RuntimeError, match="holds float32 and was given a batch of float64"):
        SparseLinear.random(8, 8, 2, dtype=torch.float32)(torch.ones(2, 8, dtype=torch.float64))
