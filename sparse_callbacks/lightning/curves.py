"""Curves of a run: rows for the loggers, and the sparsity in the progress bar."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.sparsity import joint_sparsity, layer_sparsity
from sparse_callbacks.core.units_left import bar_figures
from sparse_callbacks.lightning.namespaces import Trainer

RECORDED = ("flops/", "active/", "bytes/", "topology/")
"""How figures of a run's record begin that loggers get too; metrics they have already."""


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


def shown_in_bar(methods: Sequence[Method]) -> dict[str, float]:
    """Figures that a progress bar shows of the network: those of a method whose sparsity would mislead, or the sparsity."""
    # those of several methods are each of the whole network, and none of them is true of it
    own = bar_figures(methods[0]) if len(methods) == 1 else {}
    return own or {"sparsity/total": whole_network(methods)["sparsity/total"]}


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
    return bool(trainer._logger_connector.should_update_logs and not accumulates(trainer))


def accumulates(trainer: Trainer) -> bool:
    """Whether the current batch adds to gradients and is not followed by a step; asked when the batch ends."""
    return bool(trainer.lightning_module.automatic_optimization and trainer.fit_loop.epoch_loop._should_accumulate())


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


def log_recorded(trainer: Trainer, recorded: Mapping[str, Any]) -> None:
    """Send to every logger what a row of the run's record says besides metrics."""
    if not trainer.loggers or recorded["event"] == "start":
        return  # the first step has a row of its own
    step = step_number(trainer) - (recorded["event"] == "end")  # by then the last batch is counted
    figures = {key: value for key, value in recorded.items() if key.startswith(RECORDED)}
    # the epoch that the step lies in and not how many are done, as in Lightning's rows
    log_row(trainer, figures, step, max(0, math.ceil(recorded["epoch"]) - 1))
