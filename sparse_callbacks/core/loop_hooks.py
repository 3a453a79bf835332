"""The hooks by which a hand-written loop drives a run: of its optimizers, and of single parameters."""

from typing import Any, Protocol
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_callbacks.core.loop_optimizers import LoopOptimizers
from sparse_callbacks.core.method import Method


class Listener(Protocol):
    """What is told of backward passes and optimizer steps."""

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer begins its step; the arguments may be replaced."""

    def after_step(self, optimizer: Optimizer, *_: object) -> None:
        """An optimizer has stepped."""

    def pass_over(self, stepper: Optimizer) -> None:
        """An optimizer of two passes, which holds ``stepper``, may have new gradients."""

    def after_backward(self, index: int, parameter: Tensor) -> None:
        """A backward pass has reached a parameter of the optimizer at ``index``."""


class LoopHooks:
    """Plants the hooks of a run, and takes them away.

    Args:
        optimizers: the optimizers of the loop.
        method: the method of the run.
    """

    def __init__(self, optimizers: LoopOptimizers, method: Method) -> None:
        self._optimizers, self._method = optimizers, method
        self._before: list[Any] = []
        self._after: list[RemovableHandle] = []

    def plant(self, listener: Listener) -> None:
        """Plant all hooks, behind those of the engine, which were registered when it was bound."""
        self._before = [o.register_step_pre_hook(listener.before_step) for o in self._optimizers.steppers]
        self._before += self._optimizers.around_passes(listener.pass_over)
        self.plant_after(listener)

    def plant_after(self, listener: Listener) -> None:
        """Plant all hooks besides those before a step."""
        steppers = self._optimizers.steppers
        self._after = [o.register_step_post_hook(listener.after_step) for o in steppers]
        for index in range(len(steppers)):
            owned = (self._method.params[name] for name in self._method.owners.owns[index])
            # one parameter shows that a backward pass has run: see Listener.after_backward. One with a mask may be frozen
            first: Any = next((p for p in owned if p.requires_grad), None)  # the hook has no types in torch
            if first is not None:
                hook = _BackwardHook(listener, index)
                self._after.append(first.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._before:
            handle.remove()
        self._before = []  # they hold the listener, which would keep itself alive
        self.remove_after()

    def remove_after(self) -> None:
        """Take away what :meth:`plant_after` has planted."""
        for handle in self._after:
            handle.remove()
        self._after = []


class _BackwardHook:
    """Tells a listener of a backward pass. It holds the listener weakly: torch keeps such hooks where Python's collector
    of garbage does not see them, and a run that nobody closes must go with its optimizer."""

    def __init__(self, listener: Listener, index: int) -> None:
        self._listener, self._index = ref(listener), index

    def __call__(self, parameter: Tensor) -> None:
        listener = self._listener()
        if listener is not None:
            listener.after_backward(self._index, parameter)
