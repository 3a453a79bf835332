"""Optimizer steps of a run and its epochs, whose number of micro-batches in a step may change."""

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from sparse_callbacks.core.data_pass import batch_size
from sparse_callbacks.core.method import Method
from sparse_callbacks.lightning.added_epoch import epochs_to_train
from sparse_callbacks.lightning.fit_state import FitState
from sparse_callbacks.lightning.namespaces import Trainer


def run_length(trainer: Trainer) -> float:
    """Optimizer steps of the run, accumulation and devices counted; infinite where the run has no known end."""
    if scheduler_of(trainer) is None and epochs_to_train(trainer) == trainer.max_epochs:
        # inf or -1 for a run without an end, depending on why it has none
        steps = float(trainer.estimated_stepping_batches)
        return steps if steps > 0 else math.inf
    # Lightning's own number takes the factor of the current epoch for all of them, and counts one without training
    if trainer.max_epochs == -1:
        return _limit(trainer)
    return min(_limit(trainer), sum(epochs_of(trainer)))


def epoch_length(trainer: Trainer) -> float:
    """Optimizer steps of an epoch; infinite where the loader has no length.

    Lightning makes the train loader for the answer where it has not been made yet.

    Raises:
        ValueError: epochs of the run have different numbers of steps.
    """
    lengths = list(dict.fromkeys(epochs_of(trainer)))  # each once, in order
    if len(lengths) > 1:
        raise ValueError(
            f"epochs of this run have {', '.join(f'{n:g}' for n in lengths)} optimizer steps, as "
            f"{type(scheduler_of(trainer)).__name__} changes how many batches make one, so a time in epochs has no "
            "length. Give it in optimizer steps (every=), or accumulate equally in all epochs."
        )
    return lengths[0]


def shortest_epoch(trainer: Trainer) -> float:
    """Optimizer steps of the shortest epoch of the run; infinite where the loader has no length."""
    return min(epochs_of(trainer))


def epochs_of(trainer: Trainer) -> Iterator[float]:
    """Optimizer steps of each epoch of the run, at least of the first one; infinite where the loader has no length."""
    batches = _batches(trainer)
    before, limit, last = 0.0, _limit(trainer), _epochs(trainer)
    for epoch in count():
        # the last window of an epoch may have fewer batches, and is followed by a step all the same
        steps = math.ceil(batches / factor_in(trainer, epoch)) if math.isfinite(batches) else batches
        yield steps
        before += steps
        endless = last == limit == math.inf  # no epoch has another factor than the last one of the schedule
        if epoch + 1 >= last or before >= limit or (endless and epoch >= _last_change(trainer)):
            return


def scheduler_of(trainer: Trainer) -> Any | None:
    """The callback that sets the Trainer's ``accumulate_grad_batches`` anew in each epoch; None without one."""
    # by name, as the class exists twice (in pytorch_lightning and in lightning.pytorch); of several the last one sets it
    name = "GradientAccumulationScheduler"
    found = [c for c in trainer.callbacks if any(base.__name__ == name for base in type(c).__mro__)]
    return found[-1] if found else None


def factor_in(trainer: Trainer, epoch: int) -> int:
    """How many batches of ``epoch`` (from 0) make an optimizer step, as far as it can be known."""
    scheduler = scheduler_of(trainer)
    # asked for and not read from its dictionary: a subclass may compute it
    factor = trainer.accumulate_grad_batches if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)
    return int(factor)


def samples_of_step(trainer: Trainer) -> float | None:
    """Training samples of an optimizer step, over devices and accumulation; None where the loader has no batch size.

    Where a scheduler changes how many batches make a step it is the mean over the epochs.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    size = batch_size(trainer.train_dataloader)
    if size is None:
        return None
    epochs = _epochs(trainer)
    last = epochs if math.isfinite(epochs) else _last_change(trainer) + 1
    factors = [factor_in(trainer, epoch) for epoch in range(max(1, int(last)))]
    shares = trainer.distributed_sampler_kwargs  # how a sampler shares out the data; None on one device
    return size * sum(factors) / len(factors) * (1 if shares is None else shares["num_replicas"])


def why_cut_off(trainer: Trainer, expected: int, ahead: int, every: int, method: str) -> str:
    """Why updates will fall behind the end of the run, because ``accumulate_grad_batches`` was changed by code that
    nobody could ask before; empty where they will not.

    Args:
        trainer: a Trainer in the first batch of an epoch.
        expected: the factor that the times of updates were computed with.
        ahead: the number of optimizer steps from here to the last update of the method's curve.
        every: the number of optimizer steps between updates.
        method: name of the method, for the sentence.
    """
    factor = trainer.accumulate_grad_batches
    epochs = max(1.0, _epochs(trainer) - trainer.current_epoch)
    left = min(epochs * math.ceil(_batches(trainer) / factor), _limit(trainer) - trainer.global_step)
    if factor <= expected or ahead - left <= every:
        return ""
    return (
        f"accumulate_grad_batches is {factor} from epoch {trainer.current_epoch} on and was {expected} when the times of "
        f"{method} were computed: about {left:g} optimizer steps are left of the run, and the last update is due in "
        f"{ahead}. Use a GradientAccumulationScheduler, whose factors are known before the first batch, or give times in "
        "optimizer steps."
    )


def _last_change(trainer: Trainer) -> int:
    """The last epoch in which the factor changes."""
    scheduler = scheduler_of(trainer)
    return 0 if scheduler is None else max(scheduler.scheduling)


def _limit(trainer: Trainer) -> float:
    """``max_steps``; infinite without it."""
    return math.inf if trainer.max_steps in (None, -1) else float(trainer.max_steps)


def _epochs(trainer: Trainer) -> float:
    """``max_epochs``, of those in which weights are trained; infinite without it."""
    epochs = epochs_to_train(trainer)
    return math.inf if epochs is None or epochs == -1 else float(epochs)


def _batches(trainer: Trainer) -> float:
    """Batches of an epoch; infinite where the loader has no length."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    return float(trainer.num_training_batches)


def follow_factor(trainer: Trainer, fit: FitState, method: Method) -> None:
    """The first batch of a fit or an epoch: say so where somebody accumulates otherwise than was expected.

    Args:
        trainer: the Trainer of the fit.
        fit: what the callback remembers within the fit; it learns the epoch and the factor.
        method: the callback's method.
    """
    first, fit.last_epoch = fit.last_epoch < 0, trainer.current_epoch
    if scheduler_of(trainer) is not None:
        fit.accumulates = factor_in(trainer, trainer.current_epoch)
        if first:  # where Lightning resumes a run it may leave out the hook in which the scheduler sets it
            trainer.accumulate_grad_batches = fit.accumulates
    if method.calendar is not None and trainer.accumulate_grad_batches != fit.accumulates:
        ahead, every = method.calendar.stop - method.step, method.calendar.every
        text = why_cut_off(trainer, fit.accumulates, ahead, every, type(method).__name__)
        if text and not fit.cut_off:  # once: others of the same kind follow in each epoch
            rank_zero_warn(text)
        fit.cut_off |= bool(text)
        fit.accumulates = trainer.accumulate_grad_batches
