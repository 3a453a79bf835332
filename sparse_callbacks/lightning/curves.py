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


def step_number(trainer: Trainer) -> int:
    """The number that Lightning logs the current batch under: how many batches ended in an optimizer step before it.

    It is not ``trainer.global_step``, which has counted the current step already when a batch ends, and counts every optimizer
    of a module that steps several by hand. After training it is the number of all such batches.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def row_is_due(trainer: Trainer) -> bool:
    """Whether Lightning logs a row of training metrics for the current batch; asked when the batch ends."""
    accumulates = trainer.lightning_module.automatic_optimization and trainer.fit_loop.epoch_loop._should_accumulate()
    return bool(trainer._logger_connector.should_update_logs and not accumulates)


def log_row(trainer: Trainer, figures: dict[str, float], step: int, epoch: int) -> None:
    """Send a row to every logger.

    Args:
        trainer: the Trainer with the loggers.
        figures: the row.
        step: the number of :func:`step_number`.
        epoch: the epoch of that step, which Lightning adds to each of its rows too.
    """
    for logger in trainer.loggers:
        logger.log_metrics({**figures, "epoch": epoch}, step=step)
