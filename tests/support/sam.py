"""Sharpness-aware minimization in the forms that people write it in."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Closure = Callable[[], Any]


class TwoCalls(Optimizer):
    """Two calls with a backward pass before each, or one with a closure for the second pass; the state is shared."""

    def __init__(self, params: Any, rho: float = 0.05, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"rho": rho, "lr": lr, "momentum": momentum})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=momentum)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([g.norm() for g in self.gradients()]).norm() + 1e-12
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.detach().clone()
                    p.add_(p.grad, alpha=float(group["rho"] / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:
        assert closure is not None
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups, self.base_optimizer.state = self.param_groups, self.state


class ClosureTwice(TwoCalls):
    """Calls its closure for both passes: what a Trainer needs in automatic optimization."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        # past attributes of the instance, as code that is written out in step() is
        TwoCalls.first_step(self, zero_grad=True)
        with torch.enable_grad():
            closure()
        TwoCalls.second_step(self)
        return loss


class DataReplaced(TwoCalls):
    """Puts weights back by another tensor, only where there is a gradient, and keeps a state of its own."""

    def __init__(self, params: Any, rho: float = 0.05, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, rho, lr, momentum)
        self.state = defaultdict(dict)

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


class OtherNames(TwoCalls):
    """Its two calls have names of their own, and it has no step."""

    def ascend(self) -> None:
        TwoCalls.first_step(self)

    def descend(self) -> None:
        TwoCalls.second_step(self)

    first_step = second_step = None  # type: ignore[assignment]

    def step(self, closure: Closure | None = None) -> None:
        raise NotImplementedError("call ascend() and descend()")


class NoInner(TwoCalls):
    """Takes the step itself."""

    def __init__(self, params: Any, rho: float = 0.05, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__(params, rho, lr, momentum)
        del self.base_optimizer

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p].pop("old")).sub_(p.grad, alpha=group["lr"])


class NoInnerNoStep(NoInner):
    """The same without a closure."""

    def step(self, closure: Closure | None = None) -> None:
        raise NotImplementedError("call first_step() and second_step()")


class NothingKnown(NoInner):
    """The same under other names."""

    def ascend(self) -> None:
        TwoCalls.first_step(self)

    def descend(self) -> None:
        NoInner.second_step(self)

    first_step = second_step = None  # type: ignore[assignment]

    def step(self, closure: Closure | None = None) -> None:
        raise NotImplementedError("call ascend() and descend()")


# Each takes one step: an optimizer, a function that runs a backward pass, and the parameters' zero_grad.
def with_two_calls(optimizer: Any, backward: Closure) -> None:
    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step(zero_grad=True)


def with_a_closure(optimizer: Any, backward: Closure) -> None:
    backward()
    optimizer.step(backward)
    optimizer.zero_grad()


def with_closures_only(optimizer: Any, backward: Closure) -> None:
    optimizer.step(closure=backward)
    optimizer.zero_grad()


def with_other_names(optimizer: Any, backward: Closure) -> None:
    backward()
    optimizer.ascend()
    optimizer.zero_grad(set_to_none=False)
    backward()
    optimizer.descend()
    optimizer.zero_grad(set_to_none=False)


FORMS: dict[str, tuple[type[TwoCalls], Callable[[Any, Closure], None]]] = {
    "two_calls": (TwoCalls, with_two_calls),
    "closure": (TwoCalls, with_a_closure),
    "closure_twice": (ClosureTwice, with_closures_only),
    "data_replaced": (DataReplaced, with_two_calls),
    "other_names": (OtherNames, with_other_names),
}


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """What these optimizers are with a radius of 0."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
