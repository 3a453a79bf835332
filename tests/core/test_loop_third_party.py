"""Optimizers of packages that perturb weights for their steps, or write to weights after them, in a loop."""

import importlib
from typing import Any

import pytest
import torch
from support.loops import assert_masked, batches, begin, data, loss_of, net
from support.sam import with_a_closure, with_two_calls

pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]

SHARP = {
    "SAM": lambda cls, model: cls(model.parameters(), torch.optim.SGD, lr=0.1),
    "LookSAM": lambda cls, model: cls(model.parameters(), torch.optim.SGD, lr=0.1),
    "FriendlySAM": lambda cls, model: cls(model.parameters(), torch.optim.SGD, lr=0.1),
    "WSAM": lambda cls, model: cls(model, model.parameters(), torch.optim.SGD, lr=0.1, decouple=False),
}
AROUND = {
    "Lookahead": lambda cls, model: cls(torch.optim.SGD(model.parameters(), lr=0.1)),
    "TRAC": lambda cls, model: cls(torch.optim.SGD(model.parameters(), lr=0.1)),
    "OrthoGrad": lambda cls, model: cls(torch.optim.SGD(model.parameters(), lr=0.1)),
}
REFUSED = {
    "BSAM": lambda cls, model: cls(model.parameters(), num_data=100, lr=0.1),
    "ScheduleFreeSGD": lambda cls, model: cls(model.parameters(), lr=0.1),
    "SPlus": lambda cls, model: cls(model.parameters(), lr=0.1),
}


def made(table: Any, name: str, model: Any) -> Any:
    return table[name](getattr(importlib.import_module("pytorch_optimizer"), name), model)


def run_of(method: str, table: Any, name: str, take_step: Any) -> Any:
    model = net()
    optimizer = made(table, name, model)
    run = begin(method, model, optimizer)
    for batch in batches(data(), 0, 12):

        def backward(batch: Any = batch) -> Any:
            assert_masked(model, run)
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        take_step(optimizer, backward)
        assert_masked(model, run)
    return run


# FriendlySAM perturbs along a mean of earlier gradients, and with it weights that were pruned since
@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) for m in ("static", "rigl", "dpf") for n in SHARP if m == "static" or n != "FriendlySAM"],
)
@pytest.mark.parametrize("take_step", [with_a_closure, with_two_calls])
def test_two_passes_keep_pruned_weights_zero_and_are_counted_once(take_step: Any, method: str, name: str) -> None:
    run = run_of(method, SHARP, name, take_step)
    assert run.step + (run.updates if method == "rigl" else 0) == 12


def plain(optimizer: Any, backward: Any) -> None:
    backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("method", ["static", "gmp", "dpf"])
def test_what_is_written_after_the_inner_step_is_masked(method: str, name: str) -> None:
    assert run_of(method, AROUND, name, plain).step == 12


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_before_the_first_batch(name: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"moves the weights before it asks for gradients|has train\(\) and eval\(\)"):
        begin("static", model, made(REFUSED, name, model))


@pytest.mark.parametrize("name", ["SGDScheduleFreeClosure", "AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure"])
def test_the_closure_variants_of_schedulefree_are_refused(name: str) -> None:
    cls, model = getattr(importlib.import_module("schedulefree"), name), net()
    with pytest.raises(ValueError, match=f"{name} moves the weights before it asks for gradients"):
        begin("static", model, cls(model.parameters(), lr=0.1))


def test_the_wrappers_of_schedulefree_are_refused() -> None:
    cls, model = importlib.import_module("schedulefree").ScheduleFreeWrapper, net()
    with pytest.raises(ValueError, match=r"ScheduleFreeWrapper has train\(\) and eval\(\)"):
        begin("static", model, cls(torch.optim.SGD(model.parameters(), lr=0.1)))
