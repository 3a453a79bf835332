"""The passes of an optimizer that takes gradients at two points for one step, in a hand-written loop."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from sparse_callbacks.core.two_pass import CallFirst


class AroundPasses:
    """Calls a function wherever an optimizer of two passes may have new gradients, until :meth:`remove`.

    That is before each method that its class has of its own, before its step, and after each call of the step's
    closure.

    Args:
        optimizer: the optimizer of two passes.
        called: what the loop calls in its place: a wrapper of Fabric, or the optimizer itself.
        act: called each time.
    """

    def __init__(self, optimizer: Optimizer, called: Any, act: Callable[[], object]) -> None:
        self._optimizer, self._act = optimizer, act
        # a wrapper of Fabric is of a subclass, and has the methods of the class of its own
        hooked: list[Any] = [optimizer] if called is optimizer else [optimizer, called]
        self._handles: list[Any] = [optimizer.register_step_pre_hook(self._before_step)]
        self._handles += [CallFirst(o, act) for o in hooked]

    def remove(self) -> None:
        """Call it no longer."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The pre hook: gradients may be there, and the closure makes others."""
        if optimizer is not self._optimizer:
            return None  # a wrapper, such as Fabric's
        self._act()

        def then_act(closure: Any) -> Any:
            return _AfterEachCall(closure, self._act) if callable(closure) else closure

        # args begin with the optimizer itself
        return (args[0], *map(then_act, args[1:])), {k: then_act(v) for k, v in kwargs.items()}


class _AfterEachCall:
    """A closure that calls ``then`` whenever it was called.

    Args:
        closure: the loop's own.
        then: called after the closure.
    """

    def __init__(self, closure: Callable[[], Any], then: Callable[[], object]) -> None:
        self._closure, self._then = closure, then

    def __call__(self) -> Any:
        loss = self._closure()
        self._then()
        return loss
