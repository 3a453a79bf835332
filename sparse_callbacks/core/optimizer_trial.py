"""A trial of an optimizer on small parameters, which shows what it does to weights within a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.optimizer_state import members
from sparse_callbacks.core.shadow_optimizer import Shadow, without_traces

CORNER = 2  # elements that tensors keep of each dimension
_STEPS = 8  # some optimizers do in a later step what they leave out in the first
_LONGEST_PERIOD = 32  # and some in every k-th step alone
_RADIUS = "rho"  # what the literature calls the size of a perturbation; a tiny one would hide that there is one
_LEAST_RADIUS, _LARGE_RADIUS = 0.01, 0.1

Steps = Callable[[Any, Callable[[], Tensor]], object]
"""Takes one step with the copy of an optimizer; the closure gives it gradients."""


class Trial:
    """What an optimizer did in its steps on small parameters.

    Args:
        optimizer: the optimizer to try; it is only read.
        inner: an optimizer that it holds, or None.
        steps: takes a step.
    """

    def __init__(self, optimizer: Optimizer, inner: Optimizer | None, steps: Steps) -> None:
        self.moved = False
        """Parameters were elsewhere than at the step's beginning when gradients were asked for."""
        self.calls = 0
        """Most calls of the closure in one step."""
        self.failed = False
        """A step raised an error, so that the rest is not known."""
        self.inner_steps = 0
        """Steps of the inner optimizer."""
        self.inner_takes_the_step = inner is not None
        """In every step the inner optimizer stepped once, from where the step began, and nothing moved afterwards."""
        self._generator = torch.Generator().manual_seed(0)
        try:
            with without_traces():
                shadow = Shadow(optimizer, seed=0, corner=CORNER)
                shadow.take_state()
                _enlarge_radius(shadow.optimizer)
                for _ in range(_steps_to_try(optimizer)):
                    self._step(shadow, None if inner is None else shadow.copy_of(inner), steps)
        except Exception:  # whatever someone else's optimizer may raise on parameters that are not those of a network
            self.failed = True

    def _step(self, shadow: Shadow, inner: Any, steps: Steps) -> None:
        begin, calls = _values(shadow), 0
        around: list[list[Tensor]] = []
        handles = []

        def inner_stepped(*_: object) -> None:
            around.append(_values(shadow))
            self.inner_steps += 1

        if inner is not None:
            handles = [
                inner.register_step_pre_hook(lambda *_: around.append(_values(shadow))),
                inner.register_step_post_hook(inner_stepped),
            ]

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            self.moved |= not _equal(begin, _values(shadow))
            self._give_gradients(shadow)
            return torch.ones((), requires_grad=True)

        self._give_gradients(shadow)
        steps(shadow.optimizer, closure)
        for handle in handles:
            handle.remove()
        self.calls = max(self.calls, calls)
        restored = len(around) == 2 and all(
            torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(begin, around[0], strict=True)
        )
        self.inner_takes_the_step &= restored and _equal(around[1], _values(shadow))

    def _give_gradients(self, shadow: Shadow) -> None:
        """Give every parameter another gradient."""
        for p in shadow.stand_ins.values():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=self._generator).to(p)


def _enlarge_radius(optimizer: Optimizer) -> None:
    for _, member in members(optimizer):
        for values in (vars(member), *(v for v in vars(member).values() if isinstance(v, dict)), *member.param_groups):
            radius = values.get(_RADIUS)
            if isinstance(radius, int | float) and abs(radius) < _LEAST_RADIUS:
                values[_RADIUS] = _LARGE_RADIUS


def _steps_to_try(optimizer: Optimizer) -> int:
    """A whole number among the arguments may be the k of what is done in every k-th step."""
    numbers = (
        value
        for _, member in members(optimizer)
        for values in (vars(member), *member.param_groups)
        for value in values.values()
        if isinstance(value, int) and not isinstance(value, bool) and value <= _LONGEST_PERIOD
    )
    return max(_STEPS, max(numbers, default=0) + 1)


def _values(shadow: Shadow) -> list[Tensor]:
    return [p.detach().clone() for p in shadow.stand_ins.values()]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
