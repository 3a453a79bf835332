"""Refusals of optimizers under which weights cannot grow, or steps cannot be replaced."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.fresh_state import FreshState, UnknownStateError, first_step
from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.shadow_optimizer import Shadow, decoded, members, name_of, state_tensors
from sparse_callbacks.core.step import ReplacesSteps

# Some optimizers do in later steps what they leave out in the first.
_STEPS_BEFORE_GROWTH = 24
# How many times the first step of a grown weight may be larger or smaller than those of the others. In Adam it is 3 times as
# large, and 50 times in some that average their step sizes; a wrong code or a missing mean square makes hundreds.
_LARGER, _SMALLER = 100.0, 1000.0
_UNRESOLVED = 1e-6  # smaller steps are lost in the rounding of weights


def keeps_optimizers(method: Method) -> bool:
    """The optimizers go on after an update, with their state."""
    return not (isinstance(method, RestartsOptimizers) and method.restarts)


def grows(method: Method) -> bool:
    """Whether weights may be born in a run, without a dense copy that they come back from."""
    if method.explores:
        return True
    makes_masks = any(getattr(type(method), n) is not getattr(Hooks, n) for n in ("new_masks", "after_step"))
    # one that arrives at its target only prunes
    return makes_masks and not method.keeps_dense and not method.arrives_at_stop


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
        _rehearse_growth(optimizer, fresh, parameters)
    except UnknownStateError as error:
        raise ValueError(
            f"{type(method).__name__} grows weights, and each starts with the optimizer state of a fresh weight. Of "
            f"{type(optimizer).__name__} {error}. Use another optimizer, such as torch.optim.AdamW, or a "
            "method that does not grow weights, such as Static, GMP or DPF."
        ) from error


def _rehearse_growth(optimizer: Optimizer, fresh: FreshState, parameters: Sequence[Tensor]) -> None:
    """Let a shadow train with one half of each weight pruned, and look at the first step of that half once it grows.

    Raises:
        UnknownStateError: it is far larger or smaller than the steps of the others, as where the optimizer keeps state of the
            weights elsewhere, or takes no step from fresh state.
    """
    generator = torch.Generator().manual_seed(0)
    shadow = first_step(lambda: Shadow(optimizer, seed=0), 0.01)
    grown = {i: ~shadow.has_gradient(p) for i, p in shadow.stand_ins.items()}

    def gradients(all_of_them: bool) -> None:
        for i, p in shadow.stand_ins.items():
            if p.requires_grad:
                drawn = 0.01 * torch.randn(p.shape, generator=generator).to(p)
                p.grad = drawn if all_of_them else drawn.masked_fill_(grown[i], 0)

    moved = {i: (p.detach() - shadow.before[i]).abs() for i, p in shadow.stand_ins.items()}
    first = {i: float(m[~grown[i]].max()) if not grown[i].all() else 0.0 for i, m in moved.items()}
    for _ in range(_STEPS_BEFORE_GROWTH):
        shadow.step(lambda: gradients(False))
        for i, p in shadow.stand_ins.items():
            p.detach().masked_fill_(grown[i], 0)
    for parameter in parameters:
        fresh.write_stand_in(shadow, id(parameter), grown[id(parameter)])
    shadow.step(lambda: gradients(True))
    for i in map(id, parameters):
        moved_now = (shadow.stand_ins[i].detach() - shadow.before[i]).abs()
        _compare_steps(moved_now[grown[i]], moved_now[~grown[i]], first[i])


def _compare_steps(grown: Tensor, others: Tensor, first: float) -> None:
    if not grown.numel() or not others.numel():
        return
    largest = max(float(others.max()), first, _UNRESOLVED)
    if not grown.max() <= _LARGER * largest:
        raise UnknownStateError(
            f"the first step of a new weight is {float(grown.max()) / largest:.0f} times as large as those of the others"
        )
    if grown.median() * _SMALLER < others.median() - _UNRESOLVED:
        raise UnknownStateError("new weights do not move: it takes no step from fresh state")


def refuse_replaced_steps(method: Method, optimizer: Optimizer) -> None:
    """Refuse an optimizer that does something in a step without gradients.

    Raises:
        ValueError: it does, with what it does.
    """
    if problem := _without_gradients(optimizer):
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
            shadow = first_step(lambda: Shadow(optimizer, seed=0), 1.0, closures=[closure])
        except UnknownStateError as error:
            problems.append(f"was not understood: {error}")
        else:
            if problem := _after_replaced_step(shadow):
                return problem
    return problems[0] if len(problems) == 2 else ""


def _after_replaced_step(shadow: Shadow) -> str:
    try:
        for _ in range(8):  # at first averages are the weights themselves, and some optimizers warm up
            shadow.step(lambda: shadow.give_gradients(1.0))
        before = _snapshot(shadow)
        shadow.step(shadow.take_gradients)
        after = _snapshot(shadow)
        shadow.step(lambda: shadow.give_gradients(1.0))
    # whatever somebody's optimizer raises
    except Exception as error:
        return f"fails without gradients: {type(error).__name__}: {error}"
    for name, value in after.items():
        if not _is_finite(value) and _is_finite(before.get(name, 0.0)):
            return f"makes {name} NaN or infinite without gradients"
    if moved := [n for n, v in after.items() if not n.startswith(_NUMBER) and not _equal(before.get(n), v)]:
        return f"changes {moved[0]} without gradients"
    if not all(_is_finite(p) for p in shadow.stand_ins.values()):
        return "makes weights NaN or infinite in the step after one without gradients"
    return ""


_NUMBER = "its number "  # counters of steps may go on


def _snapshot(shadow: Shadow) -> dict[str, Any]:
    """Copies of all weights, of their state, and of the optimizer's own numbers, by a name for each."""
    found: dict[str, Any] = {}
    for number, parameter in enumerate(shadow.stand_ins.values()):
        found[f"weights (parameter {number})"] = parameter.detach().clone()
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
    return isinstance(before, Tensor) and torch.equal(before, after)
