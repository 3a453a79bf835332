"""Refusals of optimizers under which weights cannot grow, or steps cannot be replaced."""

import math
from collections.abc import Iterator
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.first_steps import UnknownStateError, first_steps
from sparse_callbacks.core.growth_rehearsal import rehearse_growth
from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.optimizer_state import decoded, members, name_of, state_tensors
from sparse_callbacks.core.optimizers import Ownership, is_elementwise
from sparse_callbacks.core.shadow_optimizer import Shadow
from sparse_callbacks.core.step import ReplacesSteps


def keeps_optimizers(method: Method) -> bool:
    """The optimizers go on after an update, with their state."""
    return not (isinstance(method, RestartsOptimizers) and method.restarts)


@singledispatch
def grows(method: Method) -> bool:
    """Whether weights may be born in a run, without a dense copy that they come back from. A method registers a function of
    its own."""
    if method.explores:
        return True
    makes_masks = any(getattr(type(method), n) is not getattr(Hooks, n) for n in ("new_masks", "after_step"))
    # one that arrives at its target only prunes
    return makes_masks and not (method.keeps_dense or method.arrives_at_stop)


def refuse_optimizers(method: Method, owners: Ownership) -> None:
    """Refuse optimizers that cannot do what ``method`` needs.

    Args:
        method: the method of the run.
        owners: the optimizers of the run, and which parameters are theirs.

    Raises:
        ValueError: the method grows weights, and what an optimizer keeps for a fresh weight cannot be found out; or it
            replaces steps, and an optimizer does something without gradients.
    """
    growing = grows(method) and keeps_optimizers(method)
    for index, optimizer in enumerate(owners.optimizers):
        if growing and owners.steps[index]:
            _refuse_growth(method, owners, index)
        if isinstance(method, ReplacesSteps) and owners.owns[index]:
            refuse_replaced_steps(method, optimizer)


def _refuse_growth(method: Method, owners: Ownership, index: int) -> None:
    optimizer, fresh, parameters = owners.optimizers[index], owners.fresh[index], owners.parameters_of(index)
    try:
        fresh.learn(parameters)
        if not is_elementwise(optimizer):
            rehearse_growth(optimizer, fresh, parameters)
    except UnknownStateError as error:
        raise ValueError(
            f"{type(method).__name__} grows weights, and each starts with the optimizer state of a fresh weight. "
            f"With {type(optimizer).__name__} that is not possible: {error}. Use another optimizer, such as torch.optim.AdamW, or a "
            "method that does not grow weights, such as Static, GMP or DPF."
        ) from error


def refuse_replaced_steps(method: Method, optimizer: Optimizer) -> None:
    """Refuse an optimizer that does something in a step without gradients.

    Raises:
        ValueError: it does, with what it does.
    """
    # torch's own of this kind pass over parameters without a gradient, whatever their arguments
    if not is_elementwise(optimizer) and (problem := _without_gradients(optimizer)):
        raise ValueError(
            f"an update of {type(method).__name__} takes the place of a step: nothing has a gradient then, and nothing "
            f"may move. {type(optimizer).__name__} {problem}. Use another optimizer, such as torch.optim.AdamW, or a "
            "method whose updates follow a step, such as SET or SNFS."
        )


def _without_gradients(optimizer: Optimizer) -> str:
    """What the optimizer does wrong in a step without gradients, and in the next one; empty where it does nothing
    wrong."""
    problems = []
    for closure in (False, True):  # which a Trainer gives, and most loops do not
        try:
            # some more than one: at first averages are the weights themselves, and some optimizers warm up
            shadow = first_steps(
                lambda whole: Shadow(optimizer, seed=0, whole=whole), _give, closures=[closure], steps=8
            )
        except UnknownStateError as error:
            problems.append(f"could not be tried without gradients: {error}")
        else:
            if problem := _after_replaced_step(shadow):
                return problem
    return problems[0] if len(problems) == 2 else ""


def _give(shadow: Shadow) -> None:
    shadow.give_gradients(1.0)


def _after_replaced_step(shadow: Shadow) -> str:
    before = _snapshot(shadow)
    try:
        shadow.step(shadow.take_gradients)
        after = _snapshot(shadow)
        shadow.step(lambda: _give(shadow))
    # whatever somebody's optimizer raises
    except Exception as error:
        return f"fails without gradients: {with_class(error)}"
    for name, value in after.items():
        if not _is_finite(value) and _is_finite(before.get(name, 0.0)):
            return f"makes {name} NaN or infinite without gradients"
    if moved := [n for n, v in after.items() if not n.startswith(_NUMBER) and not _equal(before.get(n), v)]:
        return f"changes {moved[0]} without gradients"
    weights = {n: v for n, v in _snapshot(shadow).items() if n.startswith(_WEIGHTS)}
    if any(not _is_finite(v) and _is_finite(before[n]) for n, v in weights.items()):
        return "makes weights NaN or infinite in the step after one without gradients"
    return ""


_WEIGHTS = "weights "
_NUMBER = "its number "  # counters of steps may go on


def _snapshot(shadow: Shadow) -> dict[str, Any]:
    """Copies of all weights, of their state, and of the optimizer's own numbers, by a name for each."""
    found: dict[str, Any] = {}
    for number, parameter in enumerate(shadow.stand_ins.values()):
        found[f"{_WEIGHTS}(parameter {number})"] = parameter.detach().clone()
        for path, tensor in state_tensors(shadow.optimizer, parameter):
            found[f"its state {name_of(path)!r} (parameter {number})"] = decoded(tensor).clone()
    for name, value in _numbers(shadow.optimizer):
        found[f"{_NUMBER}{name}"] = value
    return found


def _numbers(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Numbers in attributes and in parameter groups of the optimizer and of those that it holds."""
    for where, member in members(optimizer):
        for values in (vars(member), *member.param_groups):
            for name, value in values.items():
                if isinstance(value, float | Tensor):
                    yield f"{where}{name!r}", value.clone() if isinstance(value, Tensor) else value


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.dtype.is_floating_point or bool(torch.isfinite(value).all())
    return math.isfinite(value)


def _equal(before: Any, after: Any) -> bool:
    # an optimizer that has diverged on gradients of no network may hold NaN before and after
    return isinstance(before, Tensor) and torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
