"""The shell: Lightning's hooks, turned into calls of the engine."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core import distributed
from sparse_callbacks.core.agreement import refuse_unequal_weights
from sparse_callbacks.core.before_run import BeforeRun
from sparse_callbacks.core.checkpoint import SavedRun, check_state
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.hooks import BatchEnd
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.local_parts import is_sharded, whole_tensors
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.neighbours import refuse_neighbours
from sparse_callbacks.core.restored import calendar_of
from sparse_callbacks.lightning import (
    accumulation,
    averaging,
    curves,
    exchanging,
    open_window,
    optimizer_lives,
    sharded,
    spawned,
)
from sparse_callbacks.lightning.added_epoch import enter_epoch, move_again, unless_at_rest
from sparse_callbacks.lightning.clipping import call_instead_of_clipping, clip_again
from sparse_callbacks.lightning.fit_beginning import begin, begin_training
from sparse_callbacks.lightning.fit_state import FitState
from sparse_callbacks.lightning.hidden_calls import find_again, run_as_usual
from sparse_callbacks.lightning.loaded_checkpoint import take_state_of_checkpoint
from sparse_callbacks.lightning.loaded_places import take_places_of_checkpoint
from sparse_callbacks.lightning.namespaces import Trainer, callback_classes
from sparse_callbacks.lightning.refusals import ends_run, refuse_host, refuse_shared, state_to_resume
from sparse_callbacks.lightning.resumed_file import add_inventory, look_before_loading
from sparse_callbacks.lightning.thawing import follow_training
from sparse_callbacks.lightning.trainer_host import TrainerHost
from sparse_callbacks.lightning.trainer_optimizers import TrainerOptimizers, scaler_of

if TYPE_CHECKING:
    from pytorch_lightning import Callback as AnyCallback
else:
    AnyCallback = type("AnyCallback", callback_classes(), {})


class SparsityCallback(Method, AnyCallback):
    """Base of the callbacks, each of which trains an ordinary LightningModule sparse by one method.

    Between optimizer steps every sparse parameter holds ``mask * dense``. Nothing is added to the model: masks, step
    count and method state live here, and in the checkpoint under this callback's key (loadable with
    ``weights_only=True``), so a plain model loads every checkpoint strictly. Subclasses are the methods; see
    :class:`~sparse_callbacks.core.method.Method` for the arguments and for what they override.

    Raises:
        ValueError: an argument, model, optimizer, strategy or checkpoint that cannot work, before the first batch.
    """

    __iter__ = None  # type: ignore[assignment]  # a plain method says that it cannot be iterated over; a callback is not asked

    @cached_property
    def engine(self) -> Engine:
        """Drives this method over the model of the latest fit."""
        return Engine(self)

    @cached_property
    def fit_state(self) -> FitState:
        """What the shell remembers within a fit."""
        return FitState()

    @cached_property
    def state_key(self) -> str:  # cached: Lightning asks for it at every hook
        """Two callbacks on different layers have two keys in a checkpoint."""
        spawned.watch(self)  # a Trainer asks every callback for its key when it is made
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def __getattr__(self, name: str) -> Any:
        if name in spawned.RUN:  # they are missing where another process may have trained
            spawned.bring_back(self)
            if name in vars(self):
                return vars(self)[name]
        return super().__getattr__(name)

    # ------------------------------------------------------------------ Lightning's hooks, in their order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        spawned.bring_back(self)
        if stage == "fit":
            self.fit_state.before = BeforeRun(self)
            refuse_host(trainer)
            averaging.refuse_averages(self, trainer)
            sharded.refuse_sharding(trainer, self)
            exchanging.refuse_unfit_trainer(self, trainer, pl_module)
            look_before_loading(trainer, pl_module, peers_of(trainer))
            exchanging.exchange_before_optimizers(trainer, pl_module, peers_of(trainer))
            self.saved = None  # of an earlier fit; what this one resumes from is restored after setup
            if self.attachment.model is not pl_module or self.fresh_start:
                self.engine.forget()
            if self.fresh_start:
                spawned.forget_brought(self)
        elif exchanged_layers(pl_module) or exchanging.wanted_storages(self):
            take_places_of_checkpoint(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # the weights are loaded already. A fit takes its state later, in on_fit_start, when its optimizers stand
        if trainer.state.fn != "fit" and not self.engine.is_bound:
            sharded.reshard(trainer, pl_module)
            take_state_of_checkpoint(self, pl_module, checkpoint["callbacks"].get(self.state_key), trainer.ckpt_path)
            self.fit_state.evaluates = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        add_inventory(self.state_key, checkpoint)  # the states of all callbacks are in it already

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fit_state.evaluates:
            self.fit_state.evaluates = False  # what fits of the checkpoint was taken in on_load_checkpoint
            return
        self.fit_state.restored = state_dict
        path = "that is loaded"
        checked = None if self.fresh_start else check_state(state_dict, self.arguments, type(self).__name__, path)
        self.saved = None if checked is None else SavedRun.of(checked, path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not sharded.shards_model(trainer):
            begin(self, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if sharded.shards_model(trainer):
            sharded.reshard(trainer, pl_module)
            # only now: sharded parameters and their optimizers are restored after on_fit_start, and on the way there torch
            # lets the optimizers take a step, which must not be seen
            begin(self, trainer, pl_module)
        begin_training(self, trainer, pl_module, peers_of(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fit_state.before is not None:
            self.fit_state.before.keep_random_states()
        self.fit_state.missed_epoch_start = False
        self.fit_state.rests = enter_epoch(trainer)
        if self.fit_state.rests:
            return
        self.epoch_start(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        fit = self.fit_state
        fit.before = None  # from here on an error is one of training
        if fit.exchanged is not None:
            exchanging.watch_first_use(fit)
        if fit.missed_epoch_start:
            fit.missed_epoch_start = False
            averaging.start_epoch(trainer, pl_module)
        if fit.rests:
            return
        if epoch_begins := trainer.current_epoch != fit.last_epoch:
            accumulation.follow_factor(trainer, fit, self)
        if not fit.window_open and self.engine.restart_wanted:
            self._restart_optimizers(trainer, pl_module)
        # not in on_train_epoch_start, where callbacks behind this one have yet to thaw layers
        if epoch_begins:
            follow_training(trainer, pl_module, self, peers_of(trainer))
        if not fit.window_open:
            self.window_start(batch_idx)
        self.batch_start(batch_idx)
        if fit.watch is not None:
            fit.watch.batch_begins()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.engine.dense_gradients.drop_outdated()

    @unless_at_rest
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fit_state.window_open = True
        self.fit_state.waiting.update(range(len(self.owners.optimizers)))
        if not pl_module.automatic_optimization or self.engine.has_two_passes:
            scaler = scaler_of(trainer)
            # DistributedDataParallel's own switch: no_sync() turns it off
            reduced = getattr(trainer.strategy.model, "require_backward_grad_sync", True)
            self.engine.after_backward(1.0 if scaler is None else scaler.get_scale(), reduced)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if optimizer not in self.owners.optimizers:
            return  # it has two passes, and this is either of them: the optimizer that it holds announces the step
        self.fit_state.window_open = False
        step = self.engine.before(optimizer, trainer.global_step)
        self.fit_state.waiting.discard(step.index)
        if step.replaced and pl_module.automatic_optimization:
            call_instead_of_clipping(pl_module, lambda: self.engine.withhold(optimizer))
        elif step.replaced:
            self.engine.withhold(optimizer)

    @unless_at_rest
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        engine, fit = self.engine, self.fit_state
        if fit.first_use is not None:
            exchanging.warn_of_first_use(fit)
        # before anything is written back to where the batch began, as samples of gates are
        if fit.watch is not None and not fit.watch.batch_over(bool(trainer.is_last_batch)):
            fit.watch = None
        fit.window_open &= not engine.begun_steps
        fit.waiting -= engine.begun_steps
        engine.batch_over()
        end = BatchEnd(bool(trainer.is_last_batch), ends_run(trainer), fit.window_open, engine.skipped)
        engine.events |= self.batch_end(end) or {}  # an override may give nothing
        peers = peers_of(trainer)
        leads = peers[0] is self  # one callback speaks for the whole network
        news = batch_idx == 0 or end.epoch_over or any(c.engine.events for c in peers)
        # not after every batch: gates move in each, and their figures wait for the device
        if leads and (news or not fit.in_bar):
            fit.in_bar = True
            shown = curves.shown_in_bar(peers)
            for name, value in {**curves.whole_network(peers), **shown}.items():
                if name != "sparsity/model":
                    pl_module.log(name, value, prog_bar=name in shown, logger=False)
        step = curves.step_number(trainer)
        if engine.events or (step != fit.logged_at and curves.row_is_due(trainer)):
            self._log(trainer, step)

    @unless_at_rest
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = curves.logged_metrics(trainer)
        if trainer.sanity_checking:
            self.validation_end(metrics, None)
        elif self.attachment.in_training:
            self.validation_end(metrics, trainer.current_epoch)

    @unless_at_rest
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.epoch_over()
        self.epoch_end(curves.logged_metrics(trainer), trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_unequal_weights(self, self.params)
        step = curves.step_number(trainer) - 1  # of the last batch that ended in a step
        going_on = self.figures() and step != self.fit_state.logged_at  # they go on between updates
        if step >= 0 and (going_on or self.engine.events):  # events: an update at the end of the last epoch
            self._log(trainer, step)
        if trainer.fast_dev_run:
            return
        if not self.at_target:
            rank_zero_warn(self.shortfall())
        elif trainer.should_stop:  # the user has asked for an early end, by EarlyStopping or max_time=
            return
        elif text := self.progress.why_unfinished(self.calendar, self.engine.skipped, type(self).__name__):
            rank_zero_warn(text)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        spawned.discard(self)
        move_again(trainer)
        find_again(trainer)
        run_as_usual(trainer)
        before, self.fit_state.before = self.fit_state.before, None
        if before is not None:
            self._leave(pl_module)
            before.bring_back(self)
            exchanging.bring_dense_back(self.fit_state)
            self.fit_state.restored = None
            return
        try:
            if self.attachment.in_training:  # it may have come between the optimizer's step and ours
                self.engine.write()
                self.engine.batch_over()
        finally:
            self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        if not self.masks:
            return self.fit_state.restored or {}
        if (brought := spawned.state_brought(self)) is not None:
            return deepcopy(brought)
        window = open_window.state_of_window(self.fit_state, self.engine, self._gradients_to_save)
        return self.engine.state() | window | self.fit_state.averages.state()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        move_again(trainer)
        find_again(trainer)
        run_as_usual(trainer)
        if stage == "fit":
            averaging.end_with_averages(self, trainer, pl_module)
        self._leave(pl_module)
        fit = self.fit_state
        if fit.before is not None and self.saved is None and not fit.resumed:
            # no batch came: these masks were never those of the weights. A run that was over already when it was resumed
            # has brought its own, and so has one of which only the end of an epoch was left.
            fit.before.bring_back(self)
            exchanging.bring_dense_back(self.fit_state)
        elif fit.before is not None and self.saved is not None:  # over already: its calendar was never made anew
            self.calendar = calendar_of(self, self.saved.times)
        fit.restored = fit.before = fit.exchanged = self.saved = None
        fit.resumed = False
        if stage == "fit":
            spawned.hand_over(self, trainer)

    # ------------------------------------------------------------------ parts of the hooks

    def _host_of(self, trainer: Trainer, module: LightningModule) -> TrainerHost:
        return TrainerHost(trainer, module, self.engine)

    def _refuse_neighbours(self, trainer: Trainer, names: Sequence[str]) -> None:
        """Refuse callbacks of ours that claim the same parameters."""
        others = [c for c in peers_of(trainer) if c is not self and c.engine.is_bound]
        refuse_shared(self, names, others)
        refuse_neighbours(self, others)

    def _state_to_resume(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Any] | None:
        """The state that this fit goes on from; None for a start with new masks."""
        return state_to_resume(self, self.fit_state.restored, trainer.ckpt_path)

    def _gradients_to_save(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Accumulated gradients for a checkpoint, which one rank writes for all: their mean."""
        if any(map(is_sharded, held.values())):  # torch has reduced them, and each process has its parts
            return whole_tensors(held)
        return distributed.mean_of_any(held, dict(self.model.named_parameters()))

    def _restart_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        """New optimizers and schedules, as the module configures them; all callbacks of the kind move their hooks to
        them."""
        optimizer_lives.restart(trainer)
        optimizers = TrainerOptimizers(trainer, module)
        for peer in peers_of(trainer):
            optimizers.take_over(peer.engine)
        optimizer_lives.switch_through_wrappers(trainer)
        optimizer_lives.check_schedules(trainer, self)

    def _log(self, trainer: Trainer, step: int) -> None:
        """A row of curves to every logger, under the number of one optimizer step."""
        figures = curves.row(self, self.engine.events, peers_of(trainer))
        curves.log_row(trainer, figures, step, max(0, self.fit_state.last_epoch))
        self.engine.events = {}
        self.fit_state.logged_at = step

    def _leave(self, module: LightningModule) -> None:
        clip_again(module)
        self.fit_state.watch, self.fit_state.given, self.fit_state.rests = None, [], False
        self._training_is_left()
        self.fit_state.averages.end()
        self.engine.unbind()

    def _training_is_left(self) -> None:
        """The loop of training was left, by an error too: nothing that lasts for a while only may outlive it."""
        if self.fit_state.first_use is not None:  # the first batch has failed
            self.fit_state.first_use.end()
            self.fit_state.first_use = None
        self.engine.doctor.end()
        self.engine.end_window()

    def __getstate__(self) -> dict[str, Any]:
        handover = spawned.handover_for_copy(self)
        # what Lightning binds to this callback and a Trainer, and what makes a Trainer known to it
        left_behind = ("log", "log_dict", "state_key", "_handover")
        state = {k: v for k, v in super().__getstate__().items() if k not in left_behind}
        if handover is None:
            return state
        if handover.path is not None:  # for a process that is being started
            spawned.expect(self)
        return state | {"_handover": handover}


def peers_of(trainer: Trainer) -> list[SparsityCallback]:
    """All sparsity callbacks of a Trainer, in their order."""
    return [c for c in trainer.callbacks if isinstance(c, SparsityCallback)]
