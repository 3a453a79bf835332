"""A run that goes on from a state takes no step with weights of another run, which the masks would cut."""

import copy
from typing import Any

import pytest
import torch
from support.loops import METHODS, begin, net, sgd, train
from torch import nn

STOP = 20  # gates of L0 have closed


def saved_after(method: str, seed: int = 0) -> dict[str, Any]:
    model = net(seed)
    optimizer = sgd(model)
    run = begin(method, model, optimizer)
    train(run, model, optimizer, last=STOP)
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.state_dict()})


def begun(method: str, state: Any, weights: Any, when: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A run that goes on from ``state``, whose weights are loaded before it or after."""
    model = net(seed=1)
    optimizer = sgd(model)
    if when == "model first":
        model.load_state_dict(weights)
    run = begin(method, model, optimizer, state=copy.deepcopy(state))
    if when == "model last":
        model.load_state_dict(weights)
    return model, optimizer, run


@pytest.mark.combinations
@pytest.mark.parametrize("when", ["model first", "model last", "never"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_run_are_refused_before_the_first_step(method: str, when: str) -> None:
    saved = saved_after(method)
    dense = {name: torch.ones_like(value) for name, value in saved["model"].items()}
    model, optimizer, run = begun(method, saved["run"], dense, when)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"the weights of .*weight are not those of the run whose state was given as st"
    ):
        train(run, model, optimizer, last=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.combinations
@pytest.mark.parametrize("when", ["model first", "model last"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_the_run_go_on_whenever_they_are_loaded(method: str, when: str) -> None:
    saved = saved_after(method)
    model, optimizer, run = begun(method, saved["run"], saved["model"], when)
    train(run, model, optimizer, last=2)
    assert run.step > saved["run"]["steps"]["0"]


def test_weights_that_a_move_of_the_model_has_cut_are_refused_too() -> None:
    saved = saved_after("set")
    model, optimizer, _run = begun("set", saved["run"], net(seed=2).state_dict(), "model last")
    model.double()(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    with pytest.raises(ValueError, match="are not those of the run"):
        optimizer.step()
