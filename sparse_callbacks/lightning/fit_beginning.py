"""A fit begins: the method takes hold of optimizers and weights, and training starts from its masks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from sparse_callbacks.core.agreement import refuse_unequal_runs
from sparse_callbacks.core.awaited import for_targets, why_never, with_awaited
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import why_all_active
from sparse_callbacks.core.idle_run import why_idle
from sparse_callbacks.core.selection import NOT_TRAINED, Entry, layer_shapes, select
from sparse_callbacks.core.unseen_steps import StepWatch
from sparse_callbacks.lightning import (
    accumulation,
    averaging,
    exchanging,
    open_window,
    optimizer_lives,
    sharded,
    spawned,
)
from sparse_callbacks.lightning.added_epoch import enter_epoch
from sparse_callbacks.lightning.hidden_calls import call_after_training, find_again
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.refusals import refuse_unsteppable, warnings_for
from sparse_callbacks.lightning.thawing import warn_of_thaw_to_come
from sparse_callbacks.lightning.trainer_optimizers import TrainerOptimizers

if TYPE_CHECKING:
    from sparse_callbacks.lightning.callback import SparsityCallback


def begin(callback: "SparsityCallback", trainer: Trainer, module: LightningModule) -> None:
    """Model and optimizers stand: take hold of the sparse parameters. No weight changes.

    Args:
        callback: the callback of the fit.
        trainer: its Trainer.
        module: its LightningModule.

    Raises:
        ValueError: an optimizer, a layer or a checkpoint that cannot work.
    """
    find_again(trainer)  # of a fit without a checkpoint, which has read none
    sharded.refuse_steps(trainer, module)
    optimizers = TrainerOptimizers(trainer, module)
    refuse_unsteppable(module, trainer.optimizers, optimizers.steppers)
    exchanging.refuse_dense_optimizers(callback, trainer)
    entries = select(module, callback.include, callback.exclude, callback.keep_dense, optimizers.trained)
    sharded.refuse_parts(trainer, module, entries)
    exchanging.refuse_idle_layers(callback, entries)
    # who awaits a layer claims it too: in a Trainer all callbacks see the optimizers that it may come into
    callback._refuse_neighbours(trainer, [e.name for e in for_targets(with_awaited(callback, entries)) if not e.reason])
    state = callback._state_to_resume(trainer, module)
    callback.saved = None if state is None else SavedRun.of(state, trainer.ckpt_path)
    if callback.saved is None:
        spawned.adopt(callback, module)
    fit = callback.fit_state
    fit.averages = averaging.saved_averages(callback, trainer)
    fit.left_out = [e.name for e in entries if e.reason in NOT_TRAINED] if why_never(callback) else []
    fit.restored, fit.given = None, list(trainer.optimizers)
    host = callback._host_of(trainer, module)
    reads, twice = optimizers.gradients_read, optimizers.two_pass
    callback.engine.bind(module, entries, optimizers.steppers, reads, host, twice)
    callback.engine.announce_by_hooks()
    call_after_training(trainer, callback._training_is_left)
    optimizer_lives.switch_through_wrappers(trainer)
    _inform(callback, trainer, entries, optimizers)


def _inform(
    callback: "SparsityCallback", trainer: Trainer, entries: Sequence[Entry], optimizers: TrainerOptimizers
) -> None:
    """The plan, and what the user should know before the first batch."""
    if callback.print_plan and trainer.is_global_zero:
        print(callback.plan(), flush=True)
    if text := why_all_active(callback.distribution, layer_shapes(entries)):
        rank_zero_info(text)
    if text := optimizers.why_not_resumed:
        rank_zero_warn(text)
    for warning in warnings_for(trainer, callback.arrives_at_stop):
        rank_zero_warn(warning)
    warn_of_thaw_to_come(trainer, callback)


def begin_training(
    callback: "SparsityCallback", trainer: Trainer, module: LightningModule, peers: Sequence["SparsityCallback"]
) -> None:
    """Everything is restored: resolve the times of updates and write the masks.

    Args:
        callback: the callback of the fit.
        trainer: its Trainer.
        module: its LightningModule.
        peers: all sparsity callbacks of the Trainer.

    Raises:
        ValueError: times, schedules or ranks that cannot work.
    """
    fit = callback.fit_state
    fit.rests = enter_epoch(trainer)
    if callback.start is not None:
        # not in on_fit_start: asked there for the run's length, Lightning makes its loader and forgets to resume it
        _begin_calendar(callback, trainer)
    refuse_unequal_runs(callback, lambda: accumulation.run_length(trainer))
    optimizer_lives.check_schedules(trainer, callback)
    fit.accumulates = accumulation.factor_in(trainer, trainer.current_epoch)
    fit.last_epoch, fit.logged_at, fit.in_bar, fit.cut_off = -1, -1, False, False
    if peers[0] is callback:  # before any of them writes its masks
        for peer in peers:
            peer.engine.make_scores()
    callback.rehearse()
    if fit.before is not None:  # others may still refuse the fit
        fit.before.keep_weights(callback)
    callback.engine.begin_weights()
    fit.averages.end()  # of a trial run that a tuner has made within this fit
    fit.averages = averaging.hold_averages(callback, trainer)
    if peers[-1] is callback:  # now averages are those of effective weights, for all of these callbacks
        fit.missed_epoch_start = averaging.catch_up(trainer, module)
    spawned.forget_brought(callback)
    callback.attachment.in_training = True
    fit.watch = StepWatch(callback.engine)
    open_window.put_back(callback.saved, fit, module, callback.engine)
    # `or {}`: in version 0.1 this hook gave nothing, and an override of that time still may
    callback.engine.events |= callback.begin_training(trainer.current_epoch) or {}
    if not trainer.fast_dev_run:  # whose epoch has a batch or two
        callback.engine.expect_gradients(trainer.current_epoch)
    fit.resumed = callback.saved is not None
    callback.saved = None  # from here on the run speaks for itself


def _begin_calendar(callback: "SparsityCallback", trainer: Trainer) -> None:
    callback.calendar = callback.make_calendar(optimizer_lives.length_of(trainer))
    saved = () if callback.saved is None else callback.saved.times
    if text := callback.calendar.why_other_times(saved, type(callback).__name__):
        rank_zero_warn(text)
    new_run = trainer.global_step == 0 and not trainer.fast_dev_run
    if new_run:
        length = accumulation.run_length(trainer)
        if reason := why_idle(callback, length):
            rank_zero_warn(reason)
        else:
            callback.engine.doctor.length_known(length)
