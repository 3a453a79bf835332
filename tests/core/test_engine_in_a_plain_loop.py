"""The engine without any Lightning: a plain torch loop, a small method and a host written by hand."""

import copy
import pickle
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.selection import select
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update


class Rolling(Method):
    """Every second step each mask is rolled by one position."""

    def __init__(self) -> None:
        super().__init__(0.5, distribution="uniform", include=None, exclude=None, seed=0)

    def after_step(self, step: Step) -> Update | None:
        return self.new_masks(step) if step.due else None

    def new_masks(self, step: Step) -> Update:
        return Update({n: self.weights.masks[n].roll(1) for n in step.names}, {"update/rolled": 1.0})


class RollingDense(Rolling):
    keeps_dense = True


class PlainHost:
    announces_steps = True

    def data_pass(self, fraction: float = 1.0, **_: Any) -> Generator[Any, None, None]:
        yield from ()

    def request_restart(self) -> None: ...

    def inform(self, text: str) -> None: ...


class Loop:
    def __init__(self, method: Method, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.method, self.engine, self.optimizer = method, Engine(method), make(self.model.parameters())
        method.calendar = Calendar(every=2, start=2, stop=6)
        entries = select(self.model, method.include, method.exclude, method.keep_dense)
        self.engine.bind(self.model, entries, [self.optimizer], [True], PlainHost())
        method.calendar = Calendar(every=2, start=2, stop=6)
        self.engine.write()

    def backward(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()

    def train(self, steps: int, first: int = 0) -> None:
        for tick in range(first, first + steps):
            self.backward(torch.randn(5, 6))
            self.engine.before(self.optimizer, tick)
            self.optimizer.step()
            self.engine.batch_over()
            for name, mask in self.method.masks.items():
                dense = self.method.weights.dense_values(name)
                assert torch.equal(self.model.get_parameter(name).detach(), mask * dense)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("method", [Rolling, RollingDense])
def test_every_step_ends_with_masked_weights(method: Any, make: Any) -> None:
    loop = Loop(method(), make)
    before, biases = loop.method.masks, loop.model[0].bias.detach().clone()
    assert {n: int(m.sum()) for n, m in before.items()} == {"0.weight": 24, "2.weight": 16}
    loop.train(8)
    assert (loop.method.step, loop.method.updates, loop.engine.skipped) == (8, 3, 0)
    for name, mask in before.items():
        assert torch.equal(loop.method.masks[name], mask.roll(3))
        assert loop.model.get_parameter(name).count_nonzero() > 0
    assert not torch.equal(loop.model[0].bias, biases)
    assert loop.engine.events["update/rolled"] == 1
    assert loop.engine.events["update/changed"] > 0


@pytest.mark.parametrize("method", [Rolling, RollingDense])
def test_a_skipped_step_changes_nothing_and_is_counted(method: Any) -> None:
    loop = Loop(method(), adamw)
    loop.train(1)
    values = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    addresses = {n: p.data_ptr() for n, p in loop.model.named_parameters()}
    dense = {n: loop.method.weights.dense_values(n).clone() for n in loop.method.params}
    masks = loop.method.masks
    loop.backward(torch.full((5, 6), torch.inf))
    loop.engine.before(loop.optimizer, 1)
    loop.engine.batch_over()  # a GradScaler found the inf and did not step
    loop.engine.batch_over()
    assert loop.engine.skipped == 1
    assert (loop.method.step, loop.method.updates) == (1, 0)
    assert all(torch.equal(p, values[n]) and p.data_ptr() == addresses[n] for n, p in loop.model.named_parameters())
    assert all(torch.equal(loop.method.weights.dense_values(n), d) for n, d in dense.items())
    assert all(torch.equal(loop.method.masks[n], m) for n, m in masks.items())
    loop.train(2, first=2)
    assert (loop.method.step, loop.method.updates, loop.engine.skipped) == (3, 1, 1)


def test_pickling_leaves_hooks_optimizers_and_steps_behind() -> None:
    loop = Loop(Rolling(), adamw)
    loop.train(3)
    copied: Engine = pickle.loads(pickle.dumps(loop.engine))
    assert loop.engine.is_bound
    assert loop.method.attachment.host is not None
    assert not copied.is_bound
    assert copied.method.attachment.host is None
    assert copied.method.owners.optimizers == []
    assert copied._steps == {}
    assert (copied.method.step, copied.method.updates) == (3, 1)
    assert all(torch.equal(copied.method.masks[n], m) for n, m in loop.method.masks.items())
    assert copied.events == loop.engine.events != {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_a_copied_engine_keeps_its_count_of_skipped_steps(copied: Callable[[Engine], Engine]) -> None:
    loop = Loop(Rolling(), adamw)
    loop.train(1)
    for tick in (1, 2):
        loop.backward(torch.full((5, 6), torch.inf))
        loop.engine.before(loop.optimizer, tick)
        loop.engine.batch_over()
    assert copied(loop.engine).skipped == loop.engine.skipped == 2


def test_unbind_takes_the_hook_off_the_optimizer() -> None:
    loop = Loop(Rolling(), sgd)
    loop.train(1)
    loop.engine.unbind()
    loop.backward(torch.randn(5, 6))
    loop.optimizer.step()  # nobody listens
    assert loop.method.step == 1
    assert loop.method.attachment.host is None
