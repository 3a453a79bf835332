"""The loss of the training step on a fixed list of batches, outside of a Trainer's loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn

from sparse_callbacks.core import data_pass
from sparse_callbacks.core.calibration import (
    BATCHES_ADVICE,
    LOSS_ADVICE,
    Calibration,
    Loss,
    number_of_batches,
    sampling,
)
from sparse_callbacks.lightning.data_pass import as_in_training, training_loader, unlogged, users_sampler
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.seen_rows import batch_index


def calibration(
    trainer: Trainer,
    module: nn.Module,
    batches: int | Iterable[Any],
    loss: Loss | None,
    seed: int,
    passed: Callable[[Any, int], object],
) -> Calibration:
    """See :meth:`~sparse_callbacks.core.host.Host.calibration`; nothing is logged by the module or its loggers.

    Args:
        trainer: the Trainer of the run.
        module: the LightningModule of the run.
        batches, loss, seed: see there.
        passed: told of each batch, and of what is computed with it in forward passes.

    Raises:
        ValueError: the module is in manual optimization and there is no ``loss``, or ``batches`` cannot be used.
    """
    if loss is None and not module.automatic_optimization:
        raise ValueError(
            f"scores are computed from the loss, and {type(module).__name__} is in manual optimization, where training_step "
            f"takes steps of its own. {LOSS_ADVICE}"
        )
    step: Any = module.training_step
    if loss is None and "dataloader_iter" in signature(step).parameters:
        raise ValueError(
            f"scores are computed from the loss on a batch, and {type(module).__name__}.training_step fetches its own from "
            f"dataloader_iter. {LOSS_ADVICE}"
        )
    size = number_of_batches(batches)

    @cache  # a Trainer that has not begun makes a loader each time
    def loader() -> Any:
        return training_loader(trainer)

    def draw() -> Any:
        if size is None:
            return batches
        return data_pass.in_order(loader(), 1, 0, True, users_sampler, shuffled=sampling(seed), advice=BATCHES_ADVICE)

    @contextmanager
    def context() -> Iterator[None]:
        with trainer.precision_plugin.forward_context(), unlogged(module), _without_loggers(trainer):
            yield

    return Calibration(
        module,
        draw,
        loss or _step_loss,
        size=size,
        seed=seed,
        move=lambda batch: as_in_training(trainer, module, batch),
        context=context,
        passed=passed,
    )


def _step_loss(module: Any, batch: Any) -> Tensor:
    """The loss that ``training_step`` gives for a batch, as the first one of an epoch."""
    try:
        found = module.training_step(batch, *batch_index(module))
    except Exception as error:
        error.add_note(
            f"Scores are computed from the loss, so {type(module).__name__}.training_step was called in eval mode, before "
            f"or between the steps of training. {LOSS_ADVICE}"
        )
        raise
    loss: Tensor = found["loss"] if isinstance(found, Mapping) and "loss" in found else found
    return loss


@contextmanager
def _without_loggers(trainer: Trainer) -> Iterator[None]:
    """What is given to the Trainer's loggers directly goes nowhere."""
    kept = trainer.loggers
    if kept:  # code that asks whether there is a logger takes the same way as in training
        trainer.loggers = [DummyLogger()]
    try:
        yield
    finally:
        trainer.loggers = kept
