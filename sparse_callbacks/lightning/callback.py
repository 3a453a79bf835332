"""The shell: Lightning's hooks, turned into calls of the engine."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core import distributed
from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import why_all_active
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.hooks import BatchEnd
from sparse_callbacks.core.loop_steps import last_run, restore_last_run
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.selection import NOT_TRAINED, layer_shapes, select
from sparse_callbacks.lightning import curves, optimizer_lives, spawned
from sparse_callbacks.lightning.fit_state import FitState
from sparse_callbacks.lightning.loaded_checkpoint import take_state_of_checkpoint
from sparse_callbacks.lightning.namespaces import Trainer, callback_classes
from sparse_callbacks.lightning.refusals import (
    ends_run,
    gradients_are_read,
    refuse_host,
    refuse_shared,
    state_to_resume,
    warn_of_thawed,
    warnings_for,
)
from sparse_callbacks.lightning.trainer_host import TrainerHost

if TYPE_CHECKING:
    from pytorch_lightning import Callback as AnyCallback
else:
    AnyCallback = type("AnyCallback", callback_classes(), {})


class SparsityCallback(Method, AnyCallback):
    """Trains an ordinary LightningModule sparse.

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
            refuse_host(trainer)
            self.fit_state.last_run = last_run(self)
            self.saved = None  # of an earlier fit; what this one resumes from is restored after setup
            if self.attachment.model is not pl_module or self.fresh_start:
                self.engine.forget()
            if self.fresh_start:
                spawned.forget_brought(self)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # the weights are loaded already. A fit takes its state later, in on_fit_start, when its optimizers stand
        if trainer.state.fn != "fit" and not self.engine.is_bound:
            take_state_of_checkpoint(self, pl_module, checkpoint["callbacks"].get(self.state_key), trainer.ckpt_path)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fit_state.restored = state_dict
        self.saved = None if self.fresh_start else SavedRun.of(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch_optimizers.refuse(trainer.optimizers, scaler_of(trainer) is not None)
        trained = torch_optimizers.parameter_ids(*trainer.optimizers)
        entries = select(pl_module, self.include, self.exclude, self.keep_dense, trained)
        self._refuse_neighbours(trainer, [e.name for e in entries if not e.reason])
        state = self._state_to_resume(trainer, pl_module)
        self.saved = None if state is None else SavedRun.of(state)
        if self.saved is None:
            spawned.adopt(self, pl_module)
        fit = self.fit_state
        fit.left_out = [e.name for e in entries if e.reason in NOT_TRAINED]
        fit.held_gradients = {} if self.saved is None else dict(self.saved.grads)
        fit.restored = None
        host = self._host_of(trainer, pl_module)
        self.engine.bind(pl_module, entries, trainer.optimizers, self._reads(trainer, pl_module), host)
        if self.print_plan and trainer.is_global_zero:
            print(self.plan(), flush=True)
        if text := why_all_active(self.distribution, layer_shapes(entries)):
            rank_zero_info(text)
        for warning in warnings_for(trainer, self.arrives_at_stop):
            rank_zero_warn(warning)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.start is not None:
            # not in on_fit_start: asked there for the run's length, Lightning makes its loader and forgets to resume it
            self._begin_calendar(trainer)
        optimizer_lives.check_schedules(trainer, self)
        self.rehearse()
        self.engine.write()  # not earlier: a fit that is refused leaves the weights as they were
        self.fit_state.last_run = None
        spawned.forget_brought(self)
        self.attachment.in_training = True
        self._put_gradients_back(pl_module)
        # `or {}`: in version 0.1 this hook gave nothing, and an override of that time still may
        self.engine.events |= self.begin_training(trainer.current_epoch) or {}
        self.saved = None  # from here on the run speaks for itself

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_start(trainer.current_epoch)
        self.fit_state.left_out = warn_of_thawed(trainer, pl_module, self.fit_state.left_out, type(self).__name__)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.fit_state.window_open:
            if self.engine.restart_wanted:
                self._restart_optimizers(trainer, pl_module)
            self.window_start(batch_idx)
        self.batch_start(batch_idx)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fit_state.window_open = True
        if not pl_module.automatic_optimization:
            scaler = scaler_of(trainer)
            self.engine.after_backward(1.0 if scaler is None else scaler.get_scale())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.fit_state.window_open = False
        step = self.engine.before(optimizer, trainer.global_step)
        if step.replaced and pl_module.automatic_optimization:
            self._withhold_instead_of_clipping(pl_module, optimizer)
        elif step.replaced:
            self.engine.withhold(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        engine, fit = self.engine, self.fit_state
        engine.batch_over()
        end = BatchEnd(bool(trainer.is_last_batch), ends_run(trainer), fit.window_open, engine.skipped)
        engine.events |= self.batch_end(end) or {}  # an override may give nothing
        peers = peers_of(trainer)
        leads = peers[0] is self  # one callback speaks for the whole network
        if leads and (batch_idx == 0 or any(c.engine.events for c in peers) or fit.logged_at < 0):
            pl_module.log("sparsity/total", curves.whole_network(peers)["sparsity/total"], prog_bar=True, logger=False)
        if engine.events or curves.row_is_due(trainer.global_step, fit.logged_at, trainer.log_every_n_steps):
            self._log(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = curves.logged_metrics(trainer)
        if trainer.sanity_checking:
            self.validation_end(metrics, None)
        elif self.attachment.in_training:
            self.validation_end(metrics, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_end(curves.logged_metrics(trainer), trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figures() and trainer.global_step not in (0, self.fit_state.logged_at):  # which go on between updates
            self._log(trainer)
        if not self.at_target and not trainer.fast_dev_run:
            rank_zero_warn(self.shortfall())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        spawned.discard(self)
        if self.attachment.in_training:  # it may have come between the optimizer's step and ours
            self.engine.write()
            self.engine.batch_over()
        self._leave(pl_module)
        self._restore_last_run()

    def state_dict(self) -> dict[str, Any]:
        if not self.masks:
            return self.fit_state.restored or {}
        if (brought := spawned.state_brought(self)) is not None:
            return deepcopy(brought)
        current = self.engine.state()
        if (
            self.fit_state.window_open and self.attachment.model is not None
        ):  # accumulated gradients are in no checkpoint of Lightning's
            held = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            current["grads"] = self._gradients_to_save(held)
        return current

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)
        if (
            self.saved is None
        ):  # otherwise a run that was over already was resumed: these masks are those of its weights
            self._restore_last_run()
        self.fit_state.restored = self.saved = self.fit_state.last_run = None  # also of a fit that was refused
        if stage == "fit":
            spawned.hand_over(self, trainer)

    # ------------------------------------------------------------------ parts of the hooks

    def _host_of(self, trainer: Trainer, module: LightningModule) -> TrainerHost:
        return TrainerHost(trainer, module, self.engine)

    def _refuse_neighbours(self, trainer: Trainer, names: Sequence[str]) -> None:
        """Refuse callbacks of ours that claim the same parameters."""
        refuse_shared(self, names, [c for c in peers_of(trainer) if c is not self and c.engine.is_bound])

    def _state_to_resume(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Any] | None:
        """The state that this fit goes on from; None for a start with new masks."""
        return state_to_resume(self, self.fit_state.restored, trainer.ckpt_path)

    @staticmethod
    def _reads(trainer: Trainer, module: LightningModule) -> list[bool]:
        """For each optimizer, whether anybody reads gradients between backward and its step."""
        return [module.automatic_optimization and gradients_are_read(trainer, module, o) for o in trainer.optimizers]

    def _begin_calendar(self, trainer: Trainer) -> None:
        self.calendar = self.make_calendar(optimizer_lives.length_of(trainer))
        saved = () if self.saved is None else self.saved.times
        if text := self.calendar.why_other_times(saved, type(self).__name__):
            rank_zero_warn(text)
        new_run = trainer.global_step == 0 and not trainer.fast_dev_run
        if new_run:
            length = optimizer_lives.run_length(trainer)
            if reason := self.progress.why_idle(self.times, length, type(self).__name__):
                rank_zero_warn(reason)

    def _put_gradients_back(self, module: LightningModule) -> None:
        """Give parameters the gradients of an accumulation window that was open when the checkpoint was written."""
        fit, parameters = self.fit_state, dict(module.named_parameters())
        for name, gradient in fit.held_gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        fit.window_open = bool(fit.held_gradients)
        fit.held_gradients = {}

    def _gradients_to_save(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Accumulated gradients for a checkpoint, which one rank writes for all: their mean."""
        return dict(zip(held, distributed.mean(held.values()), strict=True))

    def _restart_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        """New optimizers and schedules, as the module configures them; all callbacks of the kind move their hooks to
        them."""
        optimizer_lives.restart(trainer)
        torch_optimizers.refuse(trainer.optimizers, scaler_of(trainer) is not None)
        reads = self._reads(trainer, module)
        for peer in peers_of(trainer):
            peer.engine.rebind(trainer.optimizers, reads)
            peer.engine.restart_wanted = False
        optimizer_lives.check_schedules(trainer, self)

    def _withhold_instead_of_clipping(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients away in the place of clipping: Lightning's last call before the step, after all hooks that
        read them.

        Taken away earlier, clipping by value and every hook that reads ``p.grad`` would fail. The instance's attribute
        hides the class's hook for this one step.
        """

        def withhold(*_: object, **__: object) -> None:
            vars(module).pop("configure_gradient_clipping", None)
            self.engine.withhold(optimizer)

        vars(module)["configure_gradient_clipping"] = withhold

    def _log(self, trainer: Trainer) -> None:
        """A row of curves to every logger."""
        figures = curves.row(self, self.engine.events, peers_of(trainer))
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        self.engine.events = {}
        self.fit_state.logged_at = trainer.global_step

    def _leave(self, module: LightningModule) -> None:
        vars(module).pop("configure_gradient_clipping", None)
        self.engine.unbind()

    def _restore_last_run(self) -> None:
        """Go back to the masks of the last run where those of this fit were never written into the weights."""
        before, self.fit_state.last_run = self.fit_state.last_run, None
        if before is not None:
            restore_last_run(self, *before)

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


def scaler_of(trainer: Trainer) -> Any | None:
    """The GradScaler of a Trainer in half precision; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)
