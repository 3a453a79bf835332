"""A call of `sparsify` that fails, wherever before the first batch, leaves everything as it was."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.loops import METHODS, adamw, begin, net, train
from support.refusing import RefusedError, refuse
from torch import nn

from sparse_callbacks import RigL
from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.randomness import random_states
from sparse_callbacks.testing.comparison import differences, structure

HOOKS = [n for n in vars(Hooks) if callable(getattr(Hooks, n)) and not n.startswith("_")]


def then(method: Any, hook: str, act: Callable[[], object]) -> None:
    """Call ``act()`` behind a hook of the method."""
    original = getattr(method, hook)

    def replaced(*values: Any, **named: Any) -> Any:
        found = original(*values, **named)
        act()
        return found

    setattr(method, hook, replaced)


def hooks_called_by(name: str) -> list[str]:
    """Hooks of the method that `sparsify` itself calls."""
    called: list[str] = []
    method = METHODS[name]()
    for hook in (*HOOKS, "initial_masks", "make_calendar"):
        then(method, hook, lambda hook=hook: called.append(hook))  # type: ignore[misc]
    model = net()
    run = begin(method, model, adamw(model))
    found = list(dict.fromkeys(called))
    run.close()
    return found


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    hooks = [len(h) for h in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)]
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), str(random_states()), hooks))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_fails_before_its_first_batch_changes_nothing(name: str) -> None:
    hooks = hooks_called_by(name)
    assert {"attach", "initial_masks", "rehearse", "write", "begin_training", "epoch_start", "window_start"} <= set(
        hooks
    )
    for hook in hooks:
        model = net()
        optimizer = adamw(model)
        method = METHODS[name]()
        before, parts = everything(model, optimizer), structure(model)
        original = dict(vars(method))
        then(method, hook, refuse)
        with pytest.raises(RefusedError):
            begin(method, model, optimizer)
        assert differences(before, everything(model, optimizer)) == [], hook
        assert structure(model) == parts
        assert method.masks == {}
        delattr(method, hook)
        assert vars(method).keys() == original.keys(), hook
        # nothing stands in the way of another try
        train(begin(method, model, optimizer), model, optimizer, last=2)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_fails_leaves_the_last_run_of_the_method(name: str) -> None:
    model, method = net(), METHODS[name]()
    optimizer = adamw(model)
    run = begin(method, model, optimizer)
    train(run, model, optimizer)
    run.close()
    known = copy.deepcopy((method.masks, run.state_dict(), run.figures(), method.at_target, str(method.plan())))
    for hook in hooks_called_by(name):
        for other in (model, net(seed=1))[hook == "initial_masks" :]:  # masks of the same model go on
            before = everything(other, optimizer)
            then(method, hook, refuse)
            with pytest.raises(RefusedError):
                begin(method, other, optimizer if other is model else adamw(other))
            delattr(method, hook)
            assert differences(before, everything(other, optimizer)) == [], hook
            found = (method.masks, run.state_dict(), run.figures(), method.at_target, str(method.plan()))
            assert differences(known, found) == [], hook


def test_a_warning_that_is_an_error_leaves_no_run_behind() -> None:
    model = net()
    optimizer = adamw(model)
    before = everything(model, optimizer)
    method = RigL(0.8, every=1000, start=500, stop=2000, print_plan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="will not move a mask"):
            begin(method, model, optimizer)
    assert differences(before, everything(model, optimizer)) == []
    assert method.masks == {}
