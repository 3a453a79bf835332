"""What cannot be a run of a hand-written loop."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.host import TrainsInTurns
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.state_layout import damaged, is_count, shown_short


def refuse_arguments(method: Any, model: Any, steps: Any, epoch: Any, forward: Any, clip: Any, on_restart: Any) -> None:
    """Refuse what cannot be a run, before anything is touched."""
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is not a method. Give an instance, such as RigL(0.9).")
    if method.attachment.host is not None:
        raise ValueError(
            f"this {type(method).__name__} is in another run. Make a new one for every call to sparsify(), or close() the "
            "run that is over."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is not a torch module.")
    whole = isinstance(steps, Integral) and not isinstance(steps, bool)
    endless = isinstance(steps, float) and steps == math.inf
    if not (whole or endless) or steps < 1:
        raise ValueError(
            f"steps={steps!r} is not a number of optimizer steps. Give that of the whole run, or math.inf where nobody "
            "knows it."
        )
    if epoch is not None and (not isinstance(epoch, Integral) or isinstance(epoch, bool) or epoch < 1):
        raise ValueError(f"epoch={epoch!r} is not the number of optimizer steps in an epoch. Give 1 or more, or None.")
    for name, function in (("forward", forward), ("clip", clip), ("on_restart", on_restart)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r} is not a function.")


def refuse_hostless(method: Method, on_restart: Any) -> None:
    """Refuse methods that need more of their host than this loop has."""
    name = type(method).__name__
    if isinstance(method, TrainsInTurns):
        raise ValueError(method.why_not_in_a_loop())
    if restarts_optimizers(method) and on_restart is None:
        raise ValueError(
            f"{name}(restart=True) starts the optimizers anew with each phase, and the loop's learning rate schedule has "
            "to start with them. Give sparsify(..., on_restart=), a function that makes the schedule again (lambda: "
            "None where there is none), or restart=False."
        )


def restarts_optimizers(method: Method) -> bool:
    """The method starts its optimizers anew within the run."""
    return isinstance(method, RestartsOptimizers) and method.restarts


def epoch_length(epoch: int | None, data: Any | None) -> float:
    """Optimizer steps of an epoch; infinite where nobody knows."""
    if epoch is not None:
        return float(epoch)
    try:
        return float(len(data))  # type: ignore[arg-type]
    except TypeError:
        return math.inf


def epoch_of(state: Mapping[str, Any], path: object) -> int:
    """The epoch in a loop's saved state.

    Raises:
        ValueError: it is not a whole number.
    """
    epoch = state.get("epoch", 0)
    if not is_count(epoch):
        raise damaged(f"its 'epoch' is {shown_short(epoch)} and not a whole number from 0 on", path)
    return int(epoch)


def groups_of(state: Mapping[str, Any], here: list[list[dict[str, Any]]], path: object) -> list[list[dict[str, Any]]]:
    """The values that the parameter groups of the optimizers began with, in a loop's saved state.

    Args:
        state: the saved state; only methods that start optimizers anew save such values.
        here: those that the groups have now.
        path: where the state was saved, for errors.

    Raises:
        ValueError: other optimizers than here, or values of other types.
    """
    groups = state.get("groups", here)
    if not isinstance(groups, list) or not all(isinstance(g, list) for g in groups):
        raise damaged(f"its 'groups' are {shown_short(groups)} and not the parameter groups of optimizers", path)
    if (saved := [len(g) for g in groups]) != (counts := [len(g) for g in here]):
        raise ValueError(
            f"the saved run had optimizers with {saved} parameter groups, and this one has {counts} ({path}). Resume with "
            "the optimizers of the interrupted run."
        )
    pairs = [(a, b) for one, other in zip(groups, here, strict=True) for a, b in zip(one, other, strict=True)]
    for there, mine in pairs:
        if not isinstance(there, Mapping) or there.keys() != mine.keys():
            raise damaged(f"its 'groups' hold {shown_short(there)}, and a group has the keys {', '.join(mine)}", path)
        if wrong := [k for k, v in mine.items() if not _may_become(v, there[k])]:
            raise damaged(
                f"{wrong[0]} in its 'groups' is {shown_short(there[wrong[0]])}, and here it is {mine[wrong[0]]}", path
            )
    return groups


def _may_become(here: Any, there: Any) -> bool:
    """Whether a setting of a parameter group may have the value ``there`` where it has ``here`` now."""
    kinds = (bool | None, str, tuple | list, Tensor)
    if _is_number(here) or _is_number(there):
        return _is_number(here) and _is_number(there)
    return any(isinstance(here, kind) and isinstance(there, kind) for kind in kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
