"""What a hand-written loop saves: the engine's state, its epoch, and how its optimizers began."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

from torch import Tensor

from sparse_callbacks.core.checkpoint import SavedRun, check_state
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.loop_refusals import restarts_optimizers
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.state_layout import damaged, inventory, is_count, shown_short

Groups = list[list[dict[str, Any]]]
"""The values of the parameter groups of each optimizer, without their parameters."""


@dataclass(frozen=True)
class LoopState:
    """The saved state of a run in a hand-written loop.

    Attributes:
        run: masks, counters and tensors of the method.
        epoch: the epoch (from 0) in which it was saved.
        groups: the values that the parameter groups of the optimizers began with.
    """

    run: SavedRun
    epoch: int
    groups: Groups

    @classmethod
    def read(cls, state: Mapping[str, Any], method: Method, groups: Groups, path: str) -> Self:
        """The state that :func:`saved_state` gave, checked.

        Args:
            state: what was saved.
            method: the method that goes on from it.
            groups: the values that the parameter groups have here.
            path: where the state was given, for errors.

        Raises:
            ValueError: it is damaged, or not of this method, these arguments and such optimizers.
        """
        run = SavedRun.of(check_state(state, method.arguments, type(method).__name__, path), path)
        return cls(run, _epoch_of(state, path), _groups_of(state, groups, path))


def saved_state(engine: Engine, epoch: int, groups: Groups) -> dict[str, Any]:
    """Everything that a resume needs beside the model's and the optimizer's own states: tensors, numbers and strings.

    Args:
        engine: the engine of the run.
        epoch: the current epoch.
        groups: the values that the parameter groups of the optimizers began with.
    """
    method = engine.method
    began = {"groups": copy.deepcopy(groups)} if restarts_optimizers(method) else {}
    state = engine.state()
    return {"method": type(method).__name__, **state, **inventory(state), "epoch": epoch, **began}


def _epoch_of(state: Mapping[str, Any], path: object) -> int:
    """The epoch in a loop's saved state.

    Raises:
        ValueError: it is not a whole number.
    """
    epoch = state.get("epoch", 0)
    if not is_count(epoch):
        raise damaged(f"its 'epoch' is {shown_short(epoch)} and not a whole number from 0 on", path)
    return int(epoch)


def _groups_of(state: Mapping[str, Any], here: Groups, path: object) -> Groups:
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
