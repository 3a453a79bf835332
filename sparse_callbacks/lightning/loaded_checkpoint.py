"""The state of a checkpoint whose weights a Trainer loads to validate, test or predict."""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun, check_state
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.restored import take_saved


def take_state_of_checkpoint(method: Method, model: nn.Module, state: Mapping[str, Any] | None, path: object) -> None:
    """Let ``method`` describe the network whose weights were loaded from a checkpoint outside of ``fit``.

    A checkpoint whose state cannot be taken is tested all the same. The method then stays as it was, and refuses to
    speak of weights that its masks do not belong to.

    Args:
        method: the method, which no run uses now.
        model: the model, with the weights of the checkpoint.
        state: the state of the method in the checkpoint; None or empty where there is none.
        path: the path of the checkpoint, for the warning.
    """
    if not state:
        return
    name = type(method).__name__
    try:
        take_saved(method, model, SavedRun.of(check_state(state, method.arguments, name, path), path))
    except (ValueError, RuntimeError) as error:  # what a method refuses, and what its `attach` asks of a run
        rank_zero_warn(f"{name} does not take the masks of the checkpoint whose weights were loaded: {error}")
