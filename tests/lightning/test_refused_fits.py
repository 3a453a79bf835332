"""A fit that is refused, by whomever and wherever before the first batch, leaves everything as it was."""

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from support.methods import METHODS, every_method, method, promises
from support.refusing import RefusedError, refuse
from torch import Tensor

from sparse_callbacks import SparsityCallback
from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.randomness import random_states
from sparse_callbacks.testing.comparison import differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import Stops, trainer_for


def fit(module: pl.LightningModule, *callbacks: Any, ckpt_path: Any = None, epochs: int = 2) -> pl.Trainer:
    trainer = trainer_for(callbacks, max_epochs=epochs)
    trainer.fit(module, Batches(), Batches(batches=1, seed=1), ckpt_path=ckpt_path)
    return trainer


def short(name: str) -> Any:
    """The callback with phases that end within an epoch."""
    return method(name, rounds=1, partitions=2 if promises(name, "one network") else 1)


def hooks_before_the_first_batch(*callbacks: Any, ckpt_path: Any = None) -> list[str]:
    """Names of the callback hooks that Lightning calls in a fit before its first batch."""
    seen: list[str] = []
    names = [n for n in vars(pl.Callback) if n.startswith("on_") or n == "setup"]

    def note(name: str) -> Callable[..., None]:
        return lambda *_, **__: seen.append(name)

    fit(Classifier(), *callbacks, pl.callbacks.LambdaCallback(**{n: note(n) for n in names}), ckpt_path=ckpt_path)
    return list(dict.fromkeys(seen[: seen.index("on_train_batch_start")]))


HOOKS = hooks_before_the_first_batch()


def seed_all() -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)


@functools.cache
def refused_random_states(hook: str) -> str:
    """Random states after a fit without a sparsity callback that is refused in this hook."""
    module = Classifier()
    seed_all()
    with pytest.raises(RefusedError):
        fit(module, pl.callbacks.LambdaCallback(**{hook: refuse}))
    return str(random_states())


def refused_fit(hook: str, module: pl.LightningModule, *callbacks: Any, ckpt_path: Any = None) -> None:
    """Fit, refused by a later callback in ``hook``, and nothing of the model and of random generators has changed."""
    before, held = copy.deepcopy(module.state_dict()), [p.grad for p in module.parameters()]
    seed_all()
    with pytest.raises(RefusedError):
        fit(module, *callbacks, pl.callbacks.LambdaCallback(**{hook: refuse}), ckpt_path=ckpt_path)
    assert all(p.grad is g for p, g in zip(module.parameters(), held, strict=True))
    if ckpt_path is not None:  # Lightning itself may have loaded it
        loaded = torch.load(ckpt_path, weights_only=True)["state_dict"]
        assert [] in (differences(before, module.state_dict()), differences(loaded, module.state_dict())), hook
    else:
        assert differences(before, module.state_dict()) == [], hook
        after = str(random_states())
        assert after == refused_random_states(hook), hook
    module.train()  # Lightning leaves it in eval mode where its trial of the validation fails
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())


def known(callback: SparsityCallback) -> dict[str, Any]:
    """What a callback shows of its last run."""
    return copy.deepcopy(
        {
            "masks": callback.masks,
            "state": callback.state_dict(),
            "figures": callback.figures(),
            "sparsity": callback.measured_sparsity(),
            "counts": (callback.step, callback.updates, callback.at_target, callback.target_sparsity),
            "plan": str(callback.plan()),
        }
    )


def test_hooks_are_found() -> None:
    assert {"setup", "on_fit_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start"} <= set(HOOKS)


@every_method
def test_a_fit_that_another_callback_refuses_changes_nothing(name: str) -> None:
    module, twin, callback, other = Classifier(), Classifier(), method(name), method(name)
    for hook in HOOKS:
        refused_fit(hook, module, callback)
        assert callback.masks == {}
        assert callback.attachment.host is None
    assert differences(snapshot(fit(twin, other), twin, other), snapshot(fit(module, callback), module, callback)) == []


@every_method
def test_a_refused_fit_leaves_the_earlier_run_as_it_was(name: str) -> None:
    """Of the same model, whose second fit goes on afterwards, and of another one."""
    module, twin, callback, other = Classifier(), Classifier(), short(name), short(name)
    fit(module, callback, epochs=1), fit(twin, other, epochs=1)
    before = known(callback)
    for hook in HOOKS:
        refused_fit(hook, module, callback)
        assert differences(before, known(callback)) == [], hook
        refused_fit(hook, Classifier(conv_net(3)), callback)
        assert differences(before, known(callback)) == [], hook
    assert differences(snapshot(fit(twin, other), twin, other), snapshot(fit(module, callback), module, callback)) == []


@every_method
def test_a_refused_resume_leaves_the_earlier_run_as_it_was(name: str, tmp_path: Path) -> None:
    stops = Stops(tmp_path, (5,))
    fit(Classifier(), short(name), stops)
    hooks = hooks_before_the_first_batch(short(name), ckpt_path=stops.path(5))
    assert {"on_fit_start", "on_train_start"} <= set(hooks)
    callback = short(name)
    fit(Classifier(conv_net(4)), callback)
    before = known(callback)
    for hook in hooks:
        refused_fit(hook, Classifier(conv_net(3)), callback, ckpt_path=stops.path(5))
        assert differences(before, known(callback)) == [], hook


@every_method
def test_a_fit_that_the_method_itself_refuses_changes_nothing(name: str) -> None:
    """In each of its own hooks that are called before the first batch."""
    hooks = [n for n in vars(Hooks) if callable(getattr(Hooks, n)) and not n.startswith("_")]
    called: list[str] = []

    def then(made: Any, hook: str, act: Callable[[], object]) -> None:
        original = getattr(made, hook)

        def replaced(*values: Any, **named: Any) -> Any:
            found = original(*values, **named)
            act()
            return found

        setattr(made, hook, replaced)

    def watched() -> Any:
        made = method(name)
        for hook in (*hooks, "initial_masks", "make_calendar"):
            then(made, hook, lambda hook=hook: called.append(hook))  # type: ignore[misc]
        return made

    first = pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: called.append("first batch"))
    fit(Classifier(), first, watched())
    before_training = dict.fromkeys(called[: called.index("first batch")])
    assert {"attach", "initial_masks", "rehearse", "write", "begin_training", "epoch_start"} <= before_training.keys()
    for hook in before_training:
        module, callback = Classifier(), method(name)
        then(callback, hook, refuse)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(RefusedError):
            fit(module, callback)
        assert differences(before, module.state_dict()) == [], hook
        assert callback.masks == {}


@pytest.mark.combinations
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("hook", ["configure_optimizers", "on_fit_start", "on_train_start", "train_dataloader"])
def test_a_fit_that_the_module_refuses_changes_nothing(name: str, hook: str) -> None:
    module, callback = Classifier(), method(name)
    before: dict[str, Tensor] = copy.deepcopy(module.state_dict())
    setattr(module, hook, refuse)
    trainer = trainer_for([callback])
    with pytest.raises(RefusedError):
        trainer.fit(module, None if hook == "train_dataloader" else Batches())
    assert differences(before, module.state_dict()) == []
    assert callback.masks == {}


def test_a_refused_resume_puts_no_gradients_into_the_parameters(tmp_path: Path) -> None:
    """Those of the open window that the checkpoint holds."""
    stops, options = Stops(tmp_path, (2,)), {"accumulate_grad_batches": 3, "max_epochs": 1}
    trainer_for([method("static"), stops], **options).fit(Classifier(), Batches())
    assert "grads" in next(iter(torch.load(stops.path(2), weights_only=True)["callbacks"].values()))
    module = Classifier()
    refuses = pl.callbacks.LambdaCallback(on_train_start=refuse)
    with pytest.raises(RefusedError):
        trainer_for([method("static"), refuses], **options).fit(module, Batches(), ckpt_path=stops.path(2))
    assert all(p.grad is None for p in module.parameters())
