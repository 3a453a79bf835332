"""Exchanged layers are trained as masked ones are: the same masks after each update, and the same weights."""

import weakref
from typing import Any

import pytest
import torch
from support.exchanged_loops import (
    ALL_ELEMENTWISE,
    HEAD,
    MOVING,
    OPTIMIZERS,
    exchange,
    first_masks,
    history,
    net,
    train,
    weights_of,
)
from torch import Tensor

from sparse_callbacks import GMP, SET, SNFS, RigL, SparseLinear, Static, sparsify
from sparse_callbacks.core.optimizer_state import state_tensors
from sparse_callbacks.core.sparse_layers.moved_places import Move
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.unit_updates import moved_units

UPDATES = 20


def given(method: type, **changes: Any) -> Any:
    """The method on the masks of :func:`first_masks`."""
    state = {n: m.double() for n, m in first_masks(net()).items()}
    return method(**MOVING | {"initial_mask": state} | changes)


def random_start(method: type, **changes: Any) -> Any:
    """The method for layers that bring their places."""
    return method(0.8, **MOVING | changes)


def same_history(method: type, optimizer: str, masked: Any, exchanged: Any, updates: int, size: int = 16) -> None:
    """Masks are equal after each update, and weights within 1e-10."""
    there, one = history(method(0.8, **MOVING | masked), OPTIMIZERS[optimizer], net(), updates, size)
    here, other = history(method(0.8, **MOVING | exchanged), OPTIMIZERS[optimizer], net(), updates, size)
    assert not one.method.weights.layers_stored
    assert set(other.method.weights.layers_stored) == {"0.weight", "2.weight"}
    assert len(there) == len(here) == updates
    for number, (expected, found) in enumerate(zip(there, here, strict=True)):
        for name in expected[0]:
            assert torch.equal(expected[0][name], found[0][name]), (number, name)
            assert (expected[1][name] - found[1][name]).abs().max() < 1e-10, (number, name)
    assert not torch.equal(there[0][0]["2.weight"], there[-1][0]["2.weight"])
    assert one.figures() == other.figures()  # the shares that changed and that were ever active included
    assert one.step == other.step


@pytest.mark.combinations
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", [SET, RigL])
def test_masks_after_each_update_and_weights_are_those_of_masked_storage(method: type, optimizer: str) -> None:
    same_history(method, optimizer, {}, {"storage": "sparse"}, UPDATES)


@pytest.mark.combinations
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", [SET, RigL])
def test_a_grouped_layer_is_trained_as_a_masked_one_of_its_pattern(method: type, optimizer: str) -> None:
    same_history(method, optimizer, {"pattern": "fan_in/4"}, {"storage": "grouped", "group": 4}, UPDATES)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", [SET, RigL])
def test_a_layer_of_constant_fan_in_is_trained_as_a_masked_one(method: type, optimizer: str) -> None:
    """Its smallest weights leave as a whole, so that rows lose different numbers, and each row is filled up again."""
    same_history(
        method, optimizer, {"pattern": "fan_in"}, {"pattern": "fan_in", "storage": "grouped", "group": 1}, UPDATES
    )


@pytest.mark.parametrize("pattern", [None, "fan_in/4"])
def test_growth_among_candidates_is_that_of_masked_storage(pattern: str | None) -> None:
    storage = {"storage": "sparse"} if pattern is None else {"storage": "grouped", "group": 4}
    some = {"candidates": 1.5}
    same_history(RigL, "adam", some | {"pattern": pattern}, some | storage, 6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_set_as_published_is_that_of_masked_storage(optimizer: str) -> None:
    """Weights of each sign leave separately, and grown weights start at the same random values."""
    published = {"drop": "signed", "new_weights": "uniform"}
    same_history(SET, optimizer, published, published | {"storage": "sparse"}, UPDATES)


def test_random_values_of_a_grouped_layer_are_those_of_its_pattern() -> None:
    some = {"new_weights": "uniform"}
    same_history(SET, "adam", some | {"pattern": "fan_in/4"}, some | {"storage": "grouped", "group": 4}, 6)


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("method", [SET, RigL])
def test_batches_that_are_worked_off_in_pieces_train_the_same(method: type, storage: str) -> None:
    pattern = {"pattern": "fan_in/4"} if storage == "grouped" else {}
    same_history(method, "adam", pattern, {"storage": storage, "group": 4}, 3, size=300)


@pytest.mark.parametrize("optimizer", ALL_ELEMENTWISE)
def test_born_weights_and_those_that_moved_have_the_state_of_masked_storage(optimizer: str) -> None:
    states = []
    for model, method in ((net(), given(SET)), (exchange(net(), first_masks(net())), random_start(SET))):
        made = ALL_ELEMENTWISE[optimizer](model.parameters())
        run = sparsify(method, model, made, steps=100)
        train(model, made, 0, 5)
        assert run.updates == 3
        states.append((run, model, made))
    (one, dense, first), (other, sparse, second) = states
    for name, mask in one.masks.items():
        assert torch.equal(mask, other.masks[name])
        there = dict(state_tensors(first, dense.get_parameter(name)))
        here = dict(state_tensors(second, dict(sparse.named_parameters())[name]))
        assert there.keys() == here.keys()
        assert optimizer == "sgd" or there
        for path, tensor in there.items():
            # step 5 has just taken the third update, so what it bore has fresh state
            expected = tensor[mask] if tensor.shape == mask.shape else tensor
            torch.testing.assert_close(here[path].flatten(), expected.flatten(), rtol=1e-10, atol=1e-14)


def test_no_dense_tensor_is_made_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Tensor:
        raise AssertionError("a dense tensor was made")

    masks = first_masks(net())
    monkeypatch.setattr(SparseLinear, "mask", property(refused))
    monkeypatch.setattr("sparse_callbacks.core.sparse_layers.live_places.RowPlaces.dense", refused)
    static = Static(0.8, distribution="uniform", exclude=HEAD, print_plan=True)
    for method in (random_start(SET), random_start(RigL, rescale="fan_in"), static):
        model = exchange(net(), masks)
        optimizer = torch.optim.AdamW(model.parameters())
        with sparsify(method, model, optimizer, steps=12, epoch=6) as run:
            train(model, optimizer, 0, 12)
            assert run.figures()["sparsity/0.weight"] == pytest.approx(0.8, abs=1e-3)
            run.state_dict()
        run.measured_sparsity()
        assert method.plan()["0.weight"].size == 640


def test_a_gradient_of_other_places_is_gone_after_an_update() -> None:
    model = exchange(net(), first_masks(net()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sparsify(random_start(SET), model, optimizer, steps=10)
    gradients = []
    for _ in range(2):
        train(model, optimizer, 0, 1)
        gradients.append((run.updates, model[0].values.grad is None))
    assert gradients == [(1, True), (1, False)]


def test_plan_and_sparsity_are_those_of_masked_storage() -> None:
    shown = []
    for model, method in ((net(), given(SET)), (exchange(net(), first_masks(net())), random_start(SET))):
        run = sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), steps=10)
        rows = [(row.name, row.shape, row.size, row.zeros) for row in run.plan()]
        shown.append((rows, run.measured_sparsity(), method.weights.active_counts))
    assert shown[0] == shown[1]
    assert shown[1][2] == {"0.weight": 128, "2.weight": 205}


@pytest.mark.parametrize("rescale", ["layer", "fan_in"])
def test_live_values_are_rescaled_as_masked_weights_are(rescale: Any) -> None:
    found = []
    for storage in ({}, {"storage": "sparse"}, {"pattern": "fan_in/4"}, {"storage": "grouped", "group": 4}):
        model, more = net(), {"distribution": "uniform", "exclude": HEAD, "rescale": rescale, "print_plan": False}
        run = sparsify(Static(0.8, **more | storage), model, torch.optim.SGD(model.parameters(), 0.1), steps=4)
        found.append(weights_of(model, run))
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name])
        assert torch.equal(found[2][name], found[3][name])
        assert weight.norm() > net().get_parameter(name).norm() / 2


# ---------------------------------------------------------------------- what is refused


def test_an_exchanged_layer_that_is_not_trained_is_refused_with_its_name() -> None:
    model = exchange(net(), first_masks(net()))
    model[0].values.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight is of a SparseLinear and frozen.*exclude=\['0\.weight'\]"):
        sparsify(random_start(SET), model, torch.optim.SGD(model.parameters(), 0.1), steps=4)
    model[0].values.requires_grad_(True)
    with pytest.raises(ValueError, match=r"2\.weight is of a SparseLinear and in no optimizer"):
        sparsify(random_start(SET), model, torch.optim.SGD([model[0].values], 0.1), steps=4)
    left_out = random_start(SET, exclude=[HEAD, "2.weight"])
    run = sparsify(left_out, model, torch.optim.SGD([model[0].values], 0.1), steps=4)
    assert list(run.masks) == ["0.weight"]


class Renamed(torch.optim.AdamW):
    """A subclass, which may do anything in its step."""


@pytest.mark.parametrize("make", [Renamed, getattr(torch.optim, "Muon", Renamed)])
def test_optimizers_that_may_look_at_matrices_are_refused_and_nothing_is_changed(make: Any) -> None:
    model = exchange(net(), first_masks(net()))
    matrices = [p for n, p in model.named_parameters() if n != "4.bias" and p.ndim == 2]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{make.__name__} looks at a weight as a matrix.*elementwise"):
        sparsify(random_start(SET), model, make(matrices), steps=4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class GrowsByScore(SET):
    def grow_scores(self, step: Any, name: str) -> Tensor:
        return torch.rand_like(self.params[name])


class OwnMasks(Static):
    def after_step(self, step: Any) -> Update:
        return Update(dict(self.masks))


def test_masks_for_an_exchanged_layer_are_an_error() -> None:
    model = exchange(net(), first_masks(net()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(OwnMasks(0.8, exclude=HEAD, print_plan=False), model, optimizer, steps=4)
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight have sparse storage, and an update gave masks"):
        train(model, optimizer, 0, 1)


@pytest.mark.parametrize("method", [GMP, SNFS, GrowsByScore])
def test_methods_that_need_every_weight_refuse_exchanged_layers(method: type) -> None:
    model = exchange(net(), first_masks(net()))
    with pytest.raises(ValueError, match=rf"0\.weight, 2\.weight have sparse storage, and {method.__name__} "):
        sparsify(method(0.8, print_plan=False), model, torch.optim.SGD(model.parameters(), 0.1), steps=4)
    assert method(0.8, include=HEAD, print_plan=False).plan(model).selected == {HEAD}


def test_an_average_of_live_weights_is_refused() -> None:
    model = exchange(net(), first_masks(net()))
    run = sparsify(random_start(SET), model, torch.optim.SGD(model.parameters(), 0.1), steps=4)
    with pytest.raises(ValueError, match="sparse storage has no averages"):
        run.average(torch.optim.swa_utils.AveragedModel(model))


@pytest.mark.parametrize("method", [SET, RigL])
def test_in_float32_few_places_differ_after_a_run(method: type, capsys: pytest.CaptureFixture[str]) -> None:
    model = net(dtype=torch.float32)
    there, _ = history(method(0.8, **MOVING), OPTIMIZERS["adam"], model, UPDATES)
    exchanged = net(dtype=torch.float32)
    here, _ = history(method(0.8, storage="sparse", **MOVING), OPTIMIZERS["adam"], exchanged, UPDATES)
    differ = sum(int((mask ^ here[-1][0][name]).sum()) for name, mask in there[-1][0].items())
    size = sum(mask.numel() for mask in there[-1][0].values())
    with capsys.disabled():
        print(f"\n{method.__name__}, float32: {differ} of {size} places differ after {UPDATES} updates")
    assert differ <= size // 20


def test_a_move_is_forgotten_before_the_next_layer_looks_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier: list[Any] = []

    def found(*given: Any) -> Move | None:
        assert [move for move in (known() for known in earlier) if move is not None] == []
        move = moved_units(*given)
        assert move is not None
        earlier.append(weakref.ref(move))
        return move

    monkeypatch.setattr("sparse_callbacks.methods.drop_and_grow.moved_units", found)
    model = exchange(net(), first_masks(net()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(random_start(SET), model, optimizer, steps=10)
    train(model, optimizer, 0, 3)
    assert len(earlier) == 4
