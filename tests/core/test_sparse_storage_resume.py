"""Runs with exchanged layers are saved, go on bit for bit, and refuse what is not theirs."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.exchanged_loops import HEAD, MOVING, OPTIMIZERS, batches, loss_of, net, train
from torch import nn

from sparse_callbacks import SET, RigL, SparseLinear, SparseRun, Static, exchange_layers, sparsify, to_dense
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.restored import take_saved

LENGTH = 12
STOP = 6  # RigL replaces the step that comes: an update of its masks


def made(kind: Any = RigL, storage: str = "sparse", **changes: Any) -> Any:
    return kind(0.8, **MOVING | {"storage": storage, "group": 4} | changes)


def begin(
    method: Any, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None = None
) -> SparseRun:
    return sparsify(method, model, optimizer, steps=100, state=state)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_at(step: int, kind: Any, storage: str, optimizer: str, micro: int = 0) -> Any:
    """Model, optimizer and run after so many steps and micro-batches of the next one, with the gradients of these."""
    model = net()
    method = made(kind, storage)
    exchange_layers(method, model)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    run = begin(method, model, stepper)
    train(model, stepper, 0, step)
    stepper.zero_grad()
    data = batches(2 * step)
    for _ in range(micro):
        loss_of(model, next(data)).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {
        "model": model.state_dict(),
        "optimizer": stepper.state_dict(),
        "run": run.state_dict(),
        "grads": gradients,
    }
    return through_a_file(found)


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, micro: int) -> None:
    """The rest of a window of two micro-batches, and the steps after it."""
    data = batches(2 * step + micro)
    for _ in range(micro, 2):
        loss_of(model, next(data)).backward()
    optimizer.step()
    train(model, optimizer, step + 1, LENGTH)


def assert_same(one: nn.Module, other: nn.Module, first: Any, second: Any) -> None:
    left = other.state_dict()
    assert [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, left[name])] == []
    torch.testing.assert_close(first.state_dict()["state"], second.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.combinations
@pytest.mark.parametrize("micro", [0, 1])
@pytest.mark.parametrize("optimizer", ["momentum", "amsgrad"])
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("kind", [SET, RigL])
def test_a_resumed_run_equals_one_that_never_stopped(kind: Any, storage: str, optimizer: str, micro: int) -> None:
    whole, method = net(), made(kind, storage)
    exchange_layers(method, whole)
    first = OPTIMIZERS[optimizer](whole.parameters())
    one = begin(method, whole, first)
    train(whole, first, 0, LENGTH)

    found = saved_at(STOP, kind, storage, optimizer, micro)
    assert ("records" in found["run"]) == (micro == 1 and kind is RigL)
    for order in ("model first", "model last"):
        saved = copy.deepcopy(found)  # an optimizer steps the tensors that it has loaded
        model, method = net(seed=1), made(kind, storage)
        if order == "model first":
            model.load_state_dict(saved["model"])
        second = OPTIMIZERS[optimizer](model.parameters())
        other = begin(method, model, second, saved["run"])
        if order == "model last":
            model.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
        for name, p in model.named_parameters():
            p.grad = saved["grads"].get(name)
        go_on(model, second, STOP, micro)
        assert_same(whole, model, first, second)
        assert (one.step, one.updates, one.figures()) == (other.step, other.updates, other.figures())


def test_a_state_may_be_loaded_into_a_run_that_has_begun() -> None:
    saved = saved_at(STOP, SET, "sparse", "momentum")
    whole, method = net(), made(SET)
    first = OPTIMIZERS["momentum"](whole.parameters())
    begin(method, whole, first)
    train(whole, first, 0, LENGTH)
    model, method = net(seed=1), made(SET)
    second = OPTIMIZERS["momentum"](model.parameters())
    run = begin(method, model, second)
    run.load_state_dict(saved["run"])
    model.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(model, second, STOP, LENGTH)
    assert_same(whole, model, first, second)


@pytest.mark.parametrize("exchanged_before", [False, True])
def test_a_first_step_with_weights_that_nobody_loaded_is_refused(exchanged_before: bool) -> None:
    saved = saved_at(STOP, SET, "sparse", "momentum")
    model, method = net(seed=1), made(SET)
    if exchanged_before:
        exchange_layers(method, model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    begin(method, model, optimizer, saved["run"])
    loss_of(model, next(batches())).backward()
    with pytest.raises(ValueError, match=r"the weights of 0\.weight are not those of the run"):
        optimizer.step()


def test_a_second_run_of_the_model_goes_on_and_one_after_other_places_were_loaded_is_refused() -> None:
    model, method = net(), made(SET)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with begin(method, model, optimizer) as run:
        train(model, optimizer, 0, 5)
        ever = run.figures()["update/ever_active"]
        masks = {n: m.clone() for n, m in run.masks.items()}
    assert method.measured_sparsity()["sparsity/0.weight"] == 0.8
    to_dense(model)  # and exchanged again
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with begin(method, model, optimizer) as run:
        assert all(torch.equal(run.masks[n], m) for n, m in masks.items())
        assert run.step == 5
        train(model, optimizer, 5, 7)
        assert run.figures()["update/ever_active"] > ever
    layer = model[0]
    keys = layer.keys()
    layer.set_places(torch.arange(keys.numel()))
    for speak in (method.measured_sparsity, lambda: begin(method, model, OPTIMIZERS["sgd"](model.parameters()))):
        with pytest.raises(ValueError, match=r"0\.weight have other live weights than the last fit left"):
            speak()


def test_a_second_run_under_masks_goes_on_with_the_places_of_exchanged_layers() -> None:
    model, method = net(), made(SET)
    with begin(method, model, OPTIMIZERS["sgd"](model.parameters())) as run:
        masks = {n: m.clone() for n, m in run.masks.items()}
    to_dense(model)
    method.storage = "masked"
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = begin(method, model, optimizer)
    assert all(isinstance(model[i], nn.Linear) for i in (0, 2))
    assert all(torch.equal(run.masks[n], m) for n, m in masks.items())
    train(model, optimizer, 0, 3)
    assert run.updates == 2


def test_a_dense_model_is_described_by_the_state_of_exchanged_layers() -> None:
    for storage in ("sparse", "grouped"):
        saved = saved_at(STOP, RigL, storage, "momentum")
        dense, method = net(seed=1), made(RigL, storage)
        dense.load_state_dict(saved["model"])
        take_saved(method, dense, SavedRun.of(saved["run"], "here"))
        assert all(isinstance(dense[i], nn.Linear) for i in (0, 2, 4))
        pruned = ~method.masks["0.weight"]
        assert not dense[0].weight[pruned].any()
        shown = method.measured_sparsity()
        twin, other = net(seed=1), made(RigL, storage)
        exchange_layers(other, twin)
        twin[0].set_places(keys_in(saved, "0.weight", twin[0]))
        twin[2].set_places(keys_in(saved, "2.weight", twin[2]))
        twin.load_state_dict(saved["model"])
        take_saved(other, twin, SavedRun.of(saved["run"], "here"))
        assert other.measured_sparsity() == shown
        assert other.step == method.step == 4


def keys_in(saved: Any, name: str, layer: SparseLinear) -> torch.Tensor:
    return layer.places.keys_of_saved(saved["run"]["patterns"][name])


# ---------------------------------------------------------------------- what is refused


def test_another_storage_than_the_saved_one_is_refused_with_the_remedy() -> None:
    saved = saved_at(STOP, SET, "sparse", "sgd")["run"]
    for storage in ("masked", "grouped"):
        model = net()
        with pytest.raises(
            ValueError, match=f"saved with storage='sparse', and this run has storage='{storage}'.*fresh_start"
        ):
            begin(made(SET, storage), model, OPTIMIZERS["sgd"](model.parameters()), saved)
    model = net()
    begin(made(SET, "masked", fresh_start=True), model, OPTIMIZERS["sgd"](model.parameters()), saved)


def test_masks_for_an_exchanged_layer_are_refused_whatever_the_arguments_say() -> None:
    saved = copy.deepcopy(saved_at(STOP, SET, "sparse", "sgd")["run"])
    saved["patterns"].pop("2.weight")
    saved["masks"]["2.weight"] = torch.ones(32, 32, dtype=torch.bool)
    del saved["names"], saved["units"], saved["zeros"]
    model, method = net(), made(SET)
    exchange_layers(method, model)
    with pytest.raises(ValueError, match=r"2\.weight was saved with storage='masked'.*storage='sparse'"):
        begin(method, model, OPTIMIZERS["sgd"](model.parameters()), saved)


def shifted(pattern: dict[str, torch.Tensor]) -> None:
    pattern["col"][:] = pattern["col"].flip(0)


def out_of_range(pattern: dict[str, torch.Tensor]) -> None:
    pattern["col"][-1] = 20


def shorter(pattern: dict[str, torch.Tensor]) -> None:
    pattern["col"] = pattern["col"][:-1].clone()
    pattern["crow"][-1] -= 1


def uneven(pattern: dict[str, torch.Tensor]) -> None:
    pattern["crow"][3] = pattern["crow"][2] - 1


def floats(pattern: dict[str, torch.Tensor]) -> None:
    pattern["col"] = pattern["col"].float()


def without(pattern: dict[str, torch.Tensor]) -> None:
    del pattern["crow"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shifted, "not in ascending order"),
        (out_of_range, "outside of the layer's 20 inputs"),
        (shorter, "127 live units, and 128 were counted when it was saved"),
        (uneven, "crow does not describe 32 rows"),
        (floats, "where whole numbers are"),
        (without, "neither 'crow' and 'col' nor 'idx'"),
    ],
)
def test_a_damaged_pattern_is_refused_in_words(damage: Callable[[Any], None], words: str) -> None:
    saved = saved_at(STOP, SET, "sparse", "sgd")["run"]
    damage(saved["patterns"]["0.weight"])
    model = net(seed=1)
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match=words):
        begin(made(SET), model, optimizer, saved)
    assert isinstance(model[0], nn.Linear)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


def test_units_that_were_live_before_are_checked_against_the_pattern() -> None:
    saved = saved_at(STOP, SET, "sparse", "sgd")["run"]
    former = saved["aux"]["once_active/0.weight"]
    for wrong in (former.flip(0), former + 640, former.int(), torch.zeros(81, dtype=torch.uint8), None):
        damaged = copy.deepcopy(saved)
        damaged["aux"]["once_active/0.weight"] = wrong
        if wrong is None:
            del damaged["aux"]["once_active/0.weight"], damaged["names"]
        model = net()
        with pytest.raises(ValueError, match=r"once_active/0\.weight"):
            begin(made(SET), model, OPTIMIZERS["sgd"](model.parameters()), damaged)


def test_damaged_records_are_refused_in_words() -> None:
    saved = saved_at(STOP, RigL, "sparse", "sgd", micro=1)["run"]
    for damage, words in (
        (lambda r: r["0.weight"][0].pop(), "records"),
        (lambda r: r.__setitem__("4.weight", r["0.weight"]), "records of '4.weight', and no pattern"),
        (lambda r: r["0.weight"][0].__setitem__(0, torch.zeros(3, 16)), "20 inputs and 32 outputs"),
    ):
        damaged = copy.deepcopy(saved)
        damage(damaged["records"])
        model = net()
        with pytest.raises(ValueError, match=words):
            begin(made(RigL), model, OPTIMIZERS["sgd"](model.parameters()), damaged)


def test_a_refused_run_leaves_exchanged_layers_as_they_were() -> None:
    model, method = net(), made(SET)
    exchange_layers(method, model)
    keys, values, layer = model[0].keys(), model[0].values.detach().clone(), model[0]
    saved = saved_at(STOP, SET, "sparse", "sgd")["run"]
    with pytest.raises(ValueError, match="looks at a weight as a matrix"):
        begin(method, model, torch.optim.Muon([model[0].values, model[2].values]), saved)  # type: ignore[attr-defined]
    assert model[0] is layer
    assert torch.equal(layer.keys(), keys)
    assert torch.equal(layer.values, values)
    assert HEAD not in method.masks
    assert Static(0.8, storage="sparse").storage == "sparse"
