"""What a trial finds out about an optimizer on a small copy of it, whatever the optimizer keeps, and without a trace."""

import copy
import random
from typing import Any

import pytest
import torch
from support.sam import TwoCalls
from torch import nn

from sparse_callbacks.core.optimizer_state import state_tensors
from sparse_callbacks.core.optimizer_trial import Trial
from sparse_callbacks.core.shadow_optimizer import Shadow
from sparse_callbacks.core.two_pass import by_closure, by_two_calls, stepping, why_not_resumed


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))]


class InAttributes(TwoCalls):
    """Keeps perturbations in tensors that its constructor makes, and adds them to the weights without asking."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        super().__init__(params, rho)
        self.directions = {"of": [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]}

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for p, direction in zip(self.param_groups[0]["params"], self.directions["of"], strict=True):
            direction.copy_(p.grad).mul_(self.param_groups[0]["rho"])
            p.add_(direction)

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p, direction in zip(self.param_groups[0]["params"], self.directions["of"], strict=True):
            p.sub_(direction)
        self.base_optimizer.step()


class RowsAndColumns(TwoCalls):
    """Its state has been made before and has a mean for each row and each column."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for p in self.param_groups[0]["params"]:
            if p.ndim == 2:
                self.state[p] |= {"rows": torch.ones(p.shape[0], 1), "columns": torch.ones(1, p.shape[1])}

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for p in self.param_groups[0]["params"]:
            if p.ndim == 2:
                p.grad.mul_(self.state[p]["rows"] * self.state[p]["columns"])
        super().first_step(zero_grad)


@pytest.mark.parametrize("make", [InAttributes, RowsAndColumns], ids=lambda m: m.__name__)
@pytest.mark.parametrize("trained", [False, True])
def test_two_passes_are_found_whatever_the_optimizer_keeps(make: Any, trained: bool) -> None:
    params = parameters()
    optimizer = make(params)
    for _ in range(2 if trained else 0):
        for call in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.randn_like(p)
            call()
    assert stepping(optimizer) is optimizer.base_optimizer
    tried = Trial(optimizer, optimizer.base_optimizer, by_two_calls)
    assert tried.moved
    assert tried.inner_takes_the_step
    assert not tried.failed


@pytest.mark.parametrize("rho", [0.0, 1e-7])
def test_a_tiny_radius_hides_nothing(rho: float) -> None:
    optimizer = TwoCalls(parameters(), rho=rho)
    assert Trial(optimizer, optimizer.base_optimizer, by_two_calls).moved
    assert optimizer.param_groups[0]["rho"] == rho


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_put_back_by_subtraction_are_back_in_every_precision(dtype: torch.dtype) -> None:
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    assert stepping(optimizer := InAttributes(params)) is optimizer.base_optimizer


class Compares(torch.optim.SGD):
    """Calls its closure twice, and looks whether the gradients differ."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        first = [p.grad.clone() for p in self.param_groups[0]["params"]]
        closure()
        second = [p.grad for p in self.param_groups[0]["params"]]
        assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        super().step()
        return loss


def test_each_call_of_the_closure_gives_another_gradient() -> None:
    tried = Trial(Compares(parameters(), lr=0.1), None, by_closure)
    assert (tried.calls, tried.failed, tried.moved) == (2, False, False)


class Draws(TwoCalls):
    def second_step(self, zero_grad: bool = False) -> None:
        torch.rand(1)
        random.random()
        super().second_step()


def test_a_trial_of_a_used_optimizer_leaves_no_trace() -> None:
    params = parameters()
    optimizer = Draws(params)
    called: list[str] = []
    for listened in (optimizer, optimizer.base_optimizer):
        listened.register_step_pre_hook(lambda *_: called.append("before"))
        listened.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.first_step = lambda **_: called.append("hidden")  # type: ignore[method-assign]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.base_optimizer.step()
    called.clear()
    values, gradients = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
    state, drawn, python = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state(), random.getstate()
    assert stepping(optimizer) is optimizer.base_optimizer
    assert called == []
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == python
    assert all(torch.equal(p, v) and torch.equal(p.grad, g) for p, v, g in zip(params, values, gradients, strict=True))


def test_attributes_that_hide_methods_are_not_called() -> None:
    """Such as the modes that a run puts over those of a schedule-free optimizer."""
    called: list[str] = []

    class Modes(torch.optim.SGD):
        def train(self) -> None:
            self.trains = True

        def eval(self) -> None:
            self.trains = False

    optimizer = Modes(parameters(), lr=0.1)
    vars(optimizer).update(train=lambda: called.append("train"), eval=lambda: called.append("eval"))
    shadow = Shadow(optimizer, seed=0)
    assert called == []
    assert shadow.optimizer.trains
    assert not hasattr(optimizer, "trains")


def test_optimizers_share_groups_and_state_in_the_copy_as_in_the_original() -> None:
    optimizer = TwoCalls(parameters())
    shadow = Shadow(optimizer, seed=0, corner=2)
    inner = shadow.copy_of(optimizer.base_optimizer)
    assert inner.state is shadow.optimizer.state
    assert inner.param_groups is shadow.optimizer.param_groups
    assert inner.param_groups[0]["params"] == list(shadow.stand_ins.values())
    assert [tuple(p.shape) for p in shadow.stand_ins.values()] == [(2, 2), (2,)]
    shadow.give_gradients(1.0)
    inner.step()
    assert all(list(state_tensors(shadow.optimizer, p)) for p in shadow.stand_ins.values())
    assert not optimizer.state


class NeedsAClosure(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize(("momentum", "lost"), [(0.9, True), (0.0, False)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, NeedsAClosure], ids=lambda k: k.__name__)
def test_state_within_that_no_checkpoint_holds_is_found(kind: Any, momentum: float, lost: bool) -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})
            self.base_optimizer = kind(self.param_groups, lr=0.1, momentum=momentum)

    optimizer = Around(parameters())
    text = why_not_resumed([optimizer], [optimizer.base_optimizer])
    assert ("leaves out the state of the" in text) == lost
