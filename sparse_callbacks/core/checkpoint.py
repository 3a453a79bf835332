"""What a checkpoint holds of a callback, and whether a callback may resume from it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_callbacks.core.schedules import Schedule

VERSION = 1
# of from_checkpoint the checkpoint has the masks; a loader's text holds its address in memory
_MAY_DIFFER = ("print_plan", "fresh_start", "from_checkpoint", "statistics_dataloader")


def shown(value: object) -> str:
    """An argument as text that is the same in every process: a function by its name, a state dict not in full."""
    if callable(value) and not isinstance(value, Schedule):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    if isinstance(value, Mapping) and any(isinstance(v, Tensor | Mapping) for v in value.values()):
        return f"<state dict of {len(value)}>"
    return repr(value)


def check(state: Mapping[str, Any] | None, arguments: Mapping[str, str], name: str, path: object) -> Mapping[str, Any]:
    """The state in a checkpoint, if a callback with these arguments may resume from it.

    Args:
        state: found in the checkpoint under the callback's key, or None.
        arguments: of the callback, as text by name.
        name: of the callback.
        path: of the checkpoint, for the errors.

    Raises:
        ValueError: no state, one of a later version, or one of other arguments.
    """
    if state is None:
        raise ValueError(
            f"the checkpoint {path} holds no state of {name}: its weights come without masks. Resume with the callback of the "
            "interrupted run (same method, include= and exclude=), or give fresh_start=True to make new masks."
        )
    if state["version"] > VERSION:
        raise ValueError(
            f"the checkpoint {path} has sparsity state of version {state['version']}, and this package reads up to {VERSION}. Upgrade "
            "sparse-callbacks."
        )
    saved = state["arguments"]
    differ = [k for k in arguments if k in saved and k not in _MAY_DIFFER and arguments[k] != saved[k]]
    if differ:
        changes = ", ".join(f"{k}={saved[k]} there and {k}={arguments[k]} here" for k in differ)
        raise ValueError(
            f"the checkpoint {path} was written by a {name} with other arguments: {changes}. Give the same, or fresh_start=True to make "
            "new masks."
        )
    return state
