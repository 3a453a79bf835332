"""Curves of a run: rows for the loggers, and the sparsity in the progress bar."""

from collections.abc import Sequence

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.sparsity import joint_sparsity, layer_sparsity
from sparse_callbacks.lightning.namespaces import Trainer


def row(method: Method, events: dict[str, float], methods: Sequence[Method]) -> dict[str, float]:
    """One row of curves: the network as it is, and the figures of the latest update.

    Args:
        method: the method that logs the row.
        events: figures of the latest update of ``method``, by their full names.
        methods: all methods of the run; the first one logs the sparsity of the whole network.
    """
    # one callback alone reports the network, or a run with several would log the same keys twice
    whole = whole_network(methods) if methods[0] is method else {}
    return whole | layer_sparsity(method.weights) | method.figures() | events


def whole_network(methods: Sequence[Method]) -> dict[str, float]:
    """``sparsity/total`` and ``sparsity/model`` over the weights of all methods of one model."""
    return joint_sparsity([m.weights for m in methods], sum(e.size for e in methods[0].entries))


def logged_metrics(trainer: Trainer) -> dict[str, float]:
    """The latest of everything that the module logged."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def row_is_due(number: int, last_logged: int, every: int | None) -> bool:
    """Whether the Trainer logs at this optimizer step, and no row was logged for it yet.

    Args:
        number: the number of optimizer steps that the Trainer has counted.
        last_logged: the number of the optimizer step of the latest row.
        every: the argument ``log_every_n_steps`` of the Trainer; None or 0 where it logs nothing.
    """
    return bool(every and number not in (0, last_logged) and number % every == 0)
