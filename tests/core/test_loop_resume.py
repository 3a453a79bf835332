"""A hand-written loop goes on from a saved run, bit for bit."""

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.loops import EPOCH, METHODS, STEPS, adamw, assert_same, begin, data, net, sgd, train
from torch import nn

from sparse_callbacks import GaP, RigL, SparseRun, Static, sparsify
from sparse_callbacks.testing.comparison import differences

STOP = 9  # between two updates, and within a phase of GaP


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_after(method: str, make: Any, steps: int) -> dict[str, Any]:
    model = net()
    optimizer = make(model)
    run = begin(method, model, optimizer)
    train(run, model, optimizer, last=steps)
    found = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.state_dict()}
    return through_a_file(found)


def whole(method: str, make: Any) -> tuple[nn.Module, SparseRun]:
    model = net()
    optimizer = make(model)
    run = begin(method, model, optimizer)
    train(run, model, optimizer)
    return model, run


def same_run(one: SparseRun, other: SparseRun) -> None:
    assert (one.step, one.updates) == (other.step, other.updates)
    assert one.masks.keys() == other.masks.keys()
    assert all(torch.equal(other.masks[n], m) for n, m in one.masks.items())
    first, second = one.state_dict(), other.state_dict()
    for key in ("aux", "dense"):
        assert differences(first[key], second[key]) == [], key


@pytest.mark.combinations
@pytest.mark.parametrize("order", ["state=", "model first", "model last", "optimizer last"])
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_one_that_never_stopped(method: str, make: Any, order: str) -> None:
    saved = saved_after(method, make, STOP)
    model = net(seed=1)  # other weights and masks than those that are loaded
    optimizer = make(model)
    if order == "state=":
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run = begin(method, model, optimizer, state=saved["run"])
    elif order == "model first":
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run = begin(method, model, optimizer)
        run.load_state_dict(saved["run"])
    elif order == "optimizer last":
        model.load_state_dict(saved["model"])
        run = begin(method, model, optimizer)
        run.load_state_dict(saved["run"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        run = begin(method, model, optimizer)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run.load_state_dict(saved["run"])
    train(run, model, optimizer, first=STOP)
    straight, expected = whole(method, make)
    assert_same(model, straight)
    same_run(run, expected)


@pytest.mark.parametrize("stop", [11, 12, 13])
def test_gap_puts_back_the_first_values_in_a_resumed_run_too(stop: int) -> None:
    """A phase ends with step 12 here; its schedule has changed the rate that the resumed run finds."""

    def begins(state: Mapping[str, Any] | None) -> Any:
        model = net()
        optimizer = sgd(model)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        method = GaP(0.8, partitions=2, every=6, print_plan=False)
        run = sparsify(
            method,
            model,
            optimizer,
            STEPS,
            state=None if state is None else state["run"],
            on_restart=lambda: rates.append(optimizer.param_groups[0]["lr"]),
        )
        return model, optimizer, run

    rates: list[float] = []
    found = []
    for stops in (None, stop):
        model, optimizer, run = begins(None)
        for step in range(STEPS):
            if step == stops:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.state_dict()}
                model, optimizer, run = begins(through_a_file(state))
            train(run, model, optimizer, first=step, last=step + 1)
            optimizer.param_groups[0]["lr"] *= 0.9
        found.append(model)
    assert_same(*found)
    assert rates == [0.1] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"version": 99}, "sparsity state of version 99, and this package reads up to"),
        (lambda state: state | {"arguments": {"sparsity": "0.5"}}, r"other arguments: sparsity=0\.5 there and"),
        (lambda state: state | {"masks": {}}, r"do not fit the model: 0\.weight, .* differ in name or shape"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_state_of_something_else_is_refused(at_once: bool, change: Any, message: str) -> None:
    state = change(saved_after("rigl", sgd, 3)["run"])
    model = net()
    optimizer = sgd(model)
    if at_once:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            begin("rigl", model, optimizer, state=state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not optimizer._optimizer_step_pre_hooks
        return
    run = begin("rigl", model, optimizer)
    masks = run.masks
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(state)
    assert all(torch.equal(run.masks[n], m) for n, m in masks.items())
    train(run, model, optimizer)  # the run is as it was


def test_gap_refuses_the_groups_of_other_optimizers() -> None:
    state = saved_after("gap", sgd, 3)["run"]
    model = net()
    optimizer = torch.optim.SGD([{"params": model[:2].parameters()}, {"params": model[2:].parameters()}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"saved run had optimizers with \[1\] parameter groups, and this one has \[2\]"
    ):
        begin("gap", model, optimizer, state=state)


def test_a_state_that_comes_too_late_is_refused() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("static", model, optimizer)
    saved = run.state_dict()
    train(run, model, optimizer, last=1)
    with pytest.raises(RuntimeError, match=r"comes too late: steps were taken already\. Call it before the first step"):
        run.load_state_dict(saved)


def test_what_initial_masks_had_cut_is_kept_until_the_first_step() -> None:
    """The model was loaded first, and masks that do not belong to it were put on it."""
    saved = saved_after("static", sgd, 3)
    model = net()
    model.load_state_dict(saved["model"])
    run = sparsify(Static(0.8, seed=0, print_plan=False), model, sgd(model), STEPS)
    run.load_state_dict(saved["run"])
    for name, value in saved["model"].items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_fresh_start_ignores_the_state() -> None:
    saved = saved_after("rigl", sgd, STOP)
    model = net()
    run = begin(RigL(0.8, every=4, fresh_start=True, print_plan=False), model, sgd(model), state=saved["run"])
    assert (run.step, run.updates) == (0, 0)


def test_other_times_than_the_saved_ones_are_announced() -> None:
    saved = saved_after("rigl", sgd, STOP)["run"]
    model = net()
    with pytest.warns(UserWarning, match="RigL goes on with other times than it was saved with"):
        sparsify(METHODS["rigl"](), model, sgd(model), 2 * STEPS, epoch=EPOCH, data=data(), state=saved)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_is_not_changed_by_the_run_that_goes_on_from_it(method: str) -> None:
    saved = saved_after(method, adamw, STOP)
    before = copy.deepcopy(saved["run"])
    model = net(seed=1)
    model.load_state_dict(saved["model"])
    optimizer = adamw(model)
    train(begin(method, model, optimizer, state=saved["run"]), model, optimizer, first=STOP)
    assert differences(before, saved["run"]) == []
