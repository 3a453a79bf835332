"""Optimizers that take gradients at two points for one step, as sharpness-aware minimization does."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.first_steps import UnknownStateError, first_steps
from sparse_callbacks.core.optimizer_state import state_tensors
from sparse_callbacks.core.optimizer_trial import CORNER, Trial
from sparse_callbacks.core.optimizers import parameter_ids, several_closures
from sparse_callbacks.core.shadow_optimizer import Shadow

# The two calls of implementations without a closure: to the perturbed point, and back with the step.
_TWO_CALLS = ("first_step", "second_step")


def stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the step: the one that ``optimizer`` perturbs weights for, or ``optimizer`` itself.

    Its own hooks fire when the gradients of the second pass are complete and the weights are back where they were.
    Optimizers that are not torch's are tried out on small parameters.

    Raises:
        ValueError: it takes gradients where the weights are not those of the network, and holds no optimizer that takes
            the step.
    """
    if type(optimizer).__module__.partition(".")[0] == "torch":
        return optimizer
    inner = _inner_of(optimizer)
    tried = [Trial(optimizer, inner, steps) for steps in (by_closure, by_two_calls)]
    trials = [t for t in tried if not t.failed]
    if not trials and inner is not None and not any(t.inner_steps for t in tried):
        return inner  # its steps have other names: the hooks of the inner one fire in any case
    if inner is not None and all(t.inner_takes_the_step for t in trials if t.moved) and any(t.moved for t in trials):
        return inner
    if any(t.moved for t in trials):
        raise ValueError(
            f"{type(optimizer).__name__} moves the weights before it asks for gradients, and nothing shows when they are "
            "back: masks and dense values would be mixed up with the perturbation. Let it hold an optimizer of torch "
            "that takes the step from where the weights were (self.base_optimizer = SGD(self.param_groups, ...); "
            "self.base_optimizer.step() last), or use an optimizer with one gradient a step, such as SGD or AdamW."
        )
    if any(t.calls > 1 for t in trials):
        raise ValueError(several_closures(type(optimizer).__name__))
    return optimizer


def _inner_of(optimizer: Optimizer) -> Optimizer | None:
    """The only optimizer among the attributes of another that steps the same parameters."""
    mine = parameter_ids(optimizer)
    held = {id(o): o for o in vars(optimizer).values() if isinstance(o, Optimizer) and parameter_ids(o) == mine}
    return next(iter(held.values())) if len(held) == 1 else None


def by_closure(optimizer: Any, closure: Callable[[], Tensor]) -> object:
    """A step with a closure, where it takes one."""
    step = type(optimizer).step
    return step(optimizer, closure) if len(inspect.signature(step).parameters) > 1 else step(optimizer)


def by_two_calls(optimizer: Any, closure: Callable[[], Tensor]) -> object:
    """A step in two calls, with a backward pass before each."""
    first, second = (getattr(optimizer, name) for name in _TWO_CALLS)
    first()
    optimizer.zero_grad()
    closure()
    return second()


def by_closure_alone(optimizer: Any, closure: Callable[[], Tensor]) -> object:
    """A step with a closure, and no gradient before it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    return by_closure(optimizer, closure)


def refuse_two_calls(given: Sequence[Optimizer], found: Sequence[Optimizer]) -> None:
    """Refuse optimizers that cannot be stepped by ``step(closure)`` alone.

    Args:
        given: the optimizers that the user's code made.
        found: those that take their steps.

    Raises:
        ValueError: a class without a ``step``, or one of two passes whose step needs a gradient before its closure.
    """
    for optimizer, stepper in zip(given, found, strict=True):
        # torch wraps the step of a class when it makes the first instance
        has_step = inspect.unwrap(type(optimizer).step) is not inspect.unwrap(Optimizer.step)
        if has_step and (stepper is optimizer or not Trial(optimizer, stepper, by_closure_alone).failed):
            continue
        name = type(optimizer).__name__
        raise ValueError(
            f"{name} cannot be stepped by step(closure) alone, which is how automatic optimization steps it: "
            f"{'it fails where no gradient was there before' if has_step else 'it has no step()'}. Let its step(closure) call the "
            "closure for each pass, or set self.automatic_optimization = False and call both passes in training_step, or "
            "override optimizer_step."
        )


def steppers(given: Sequence[Optimizer], scaler: bool) -> list[Optimizer]:
    """:func:`stepping` of all optimizers of a run.

    Args:
        given: the optimizers that the user's code made.
        scaler: whether a GradScaler scales the loss.

    Raises:
        ValueError: as :func:`stepping`, or a GradScaler with an optimizer of two passes.
    """
    found = [stepping(o) for o in given]
    if scaler and (both := two_pass(given, found)):
        names = [type(g).__name__ for g, s in zip(given, found, strict=True) if s in both]
        raise ValueError(
            f"{names[0]} takes gradients twice for one step, and a GradScaler decides about a step by one gradient. Use "
            "precision='bf16-mixed', or an optimizer with one gradient a step."
        )
    return found


def two_pass(given: Sequence[Optimizer], steppers: Sequence[Optimizer]) -> list[Optimizer]:
    """Those of ``steppers`` that another optimizer, in ``given``, perturbs weights for."""
    return [s for g, s in zip(given, steppers, strict=True) if s is not g]


def why_not_resumed(given: Sequence[Optimizer], found: Sequence[Optimizer]) -> str:
    """Why a resumed run will differ: the state of an inner optimizer is in no checkpoint; empty where it is, or where
    there is none.

    Args:
        given: the optimizers that the user's code made, and whose states it saves.
        found: those that take their steps.
    """
    for optimizer, stepper in zip(given, found, strict=True):
        # a class that writes its own state_dict() is trusted to write all
        if stepper.state is optimizer.state or type(optimizer).state_dict is not Optimizer.state_dict:
            continue
        if _keeps_state(stepper):
            return (
                f"{type(optimizer).__name__}.state_dict() leaves out the state of the {type(stepper).__name__} within, "
                "such as its momentum, so a resumed run begins without it. Share it: self.state = "
                "self.base_optimizer.state, in the constructor and after load_state_dict()."
            )
    return ""


def _keeps_state(optimizer: Optimizer) -> bool:
    try:
        shadow = first_steps(
            lambda _: Shadow(optimizer, seed=0, corner=CORNER), lambda shadow: shadow.give_gradients(1.0)
        )
    except UnknownStateError:  # nothing is known of it, and nothing said
        return False
    return any(True for p in shadow.stand_ins.values() for _ in state_tensors(shadow.optimizer, p))


def own_methods(optimizer: Optimizer) -> Iterable[str]:
    """Names of the public methods that an optimizer's class has beyond those of every torch optimizer."""
    for cls in type(optimizer).__mro__:
        if cls is Optimizer:
            return
        for name, value in vars(cls).items():
            if inspect.isfunction(value) and not name.startswith("_") and not hasattr(Optimizer, name):
                yield name


class CallFirst:
    """Calls ``first`` at the beginning of every method that an optimizer's class has of its own, until :meth:`remove`.

    Attributes of the instance hide the methods; neither pickle nor deepcopy takes them along.

    Args:
        optimizer: an optimizer of two passes, which may be stepped by methods of any name.
        first: called before each of them.
    """

    def __init__(self, optimizer: Optimizer, first: Callable[[], object]) -> None:
        self._optimizer = ref(optimizer)
        self._hidden = {n: _After(first, optimizer, n) for n in own_methods(optimizer) if n not in vars(optimizer)}
        vars(optimizer).update(self._hidden)

    def remove(self) -> None:
        """Let the methods of the class be found again."""
        optimizer = self._optimizer()
        for name in self._hidden if optimizer is not None else ():
            vars(optimizer).pop(name, None)


class _After:
    """Calls ``first`` and then a method of an optimizer."""

    def __init__(self, first: Callable[[], object], optimizer: Optimizer, name: str) -> None:
        self._first, self._optimizer, self._name = first, ref(optimizer), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._first()
        optimizer = self._optimizer()
        return getattr(type(optimizer), self._name)(optimizer, *args, **kwargs)
