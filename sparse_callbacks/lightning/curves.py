"""Curves of a run: rows for the loggers, and the sparsity in the progress bar."""

from collections.abc import Sequence

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.sparsity import joint_sparsity, layer_sparsity
from sparse_callbacks.lightning.namespaces import Trainer


def row(method: Method, events: dict[str, float], methods: Sequence[Method]) -> dict[str, float]:
    """One row of curves: the network as it is, and the figures of the latest update.

    Args:
        method: whose row it is.
        events: figures of its latest update.
        methods: all methods of the run; the first one logs the sparsity of the whole network.
    """
    whole = whole_network(methods) if methods[0] is method else {}
    return whole | layer_sparsity(method.weights) | method.figures() | events


def whole_network(methods: Sequence[Method]) -> dict[str, float]:
    """``sparsity/total`` and ``sparsity/model`` over the weights of all methods of one model."""
    return joint_sparsity([m.weights for m in methods], methods[0].model_size)


def logged_metrics(trainer: Trainer) -> dict[str, float]:
    """The latest of everything that the module logged."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def row_is_due(step: int, last_logged: int, every: int | None) -> bool:
    """Whether the Trainer logs at this optimizer step, and no row was logged for it yet.

    Args:
        step: the Trainer's optimizer steps.
        last_logged: the step of the latest row.
        every: the Trainer's ``log_every_n_steps``.
    """
    return bool(every and step not in (0, last_logged) and step % every == 0)
