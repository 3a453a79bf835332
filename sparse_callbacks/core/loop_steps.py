"""One optimizer step in a hand-written loop: where it stands, its number, and its closure."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core import optimizers as torch_optimizers


class StepInLoop:
    """Where an optimizer of the loop stands between two of its steps."""

    def __init__(self) -> None:
        self.window_open = False
        """A backward pass has run since the last step."""
        self.gradient: Callable[[], Tensor | None] = _nothing
        """The gradient that the last backward pass left in the parameter that is watched, held weakly."""
        self.called = False
        """A method of an optimizer of two passes was called since its last step."""
        self.announced = False
        """before_clipping() was called for the step that comes."""
        self.running = False
        """The optimizer is within its step."""
        self.stepped = False
        """It has stepped in this batch."""

    def remember(self, gradient: Tensor | None) -> None:
        """A backward pass has left this gradient in the parameter that is watched."""
        self.gradient = _nothing if gradient is None else ref(gradient)


class CalledOnce:
    """A closure that tells a run when it has been called, because gradients are there then, and refuses a second call.

    Args:
        run: the run, for its hooks to know the closure again.
        optimizer: the optimizer that calls the closure.
        closure: the loop's own.
        ready: called after the closure.
    """

    def __init__(
        self, run: object, optimizer: Optimizer, closure: Callable[[], Any], ready: Callable[[Optimizer], None]
    ) -> None:
        self.run, self._optimizer, self._closure, self._ready = run, optimizer, closure, ready
        self._called = False

    def __call__(self) -> Any:
        if self._called:
            raise ValueError(torch_optimizers.second_gradient(type(self._optimizer).__name__))
        self._called = True
        loss = self._closure()
        self._ready(self._optimizer)
        return loss


# For each optimizer the number of its current step, and who has asked for it. Runs that share an optimizer must agree on
# the number, because one may have taken the gradients away that the other needs.
_ticks: WeakKeyDictionary[Optimizer, tuple[int, WeakSet[Any]]] = WeakKeyDictionary()


def next_tick(optimizer: Optimizer, run: Any) -> int:
    """The number of the step that begins: a run (or its engine) that has seen the current one begins the next."""
    tick, seen = _ticks.get(optimizer, (0, WeakSet()))
    if run in seen:
        tick, seen = tick + 1, WeakSet()
    seen.add(run)
    _ticks[optimizer] = tick, seen
    return tick


def _nothing() -> None:
    return None
