"""The shell: what the methods need of PyTorch Lightning. The only module of the core that imports it."""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, ClassVar, TypedDict

from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core import checkpoint, distributed, optimizers
from sparse_callbacks.core.calendar import Calendar, Time, check_times, resolve
from sparse_callbacks.core.distributions import Distribution, clipped, is_epsilon
from sparse_callbacks.core.distributions import resolve as share_out
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.plan import Plan, plan_rows
from sparse_callbacks.core.schedules import Schedule, as_schedule
from sparse_callbacks.core.selection import NOT_TRAINED, Entry, KeepDense, layer_shapes, patterns, select
from sparse_callbacks.lightning import data_pass, optimizer_lives, turns
from sparse_callbacks.lightning.optimizer_lives import epoch_length, run_length
from sparse_callbacks.lightning.refusals import gradients_are_read, is_tuners, refuse_host, warnings_for

DEFAULT_SPARSITY = 0.9

# lightning.pytorch's Trainer serves as well, and type checkers do not see what a Trainer's connectors set on it
Trainer = Any


class Options(TypedDict, total=False):
    """Arguments that every method takes besides its own.

    ``keep_dense``: ``"first"``, ``"last"`` or ``"both"`` weights stay dense. ``print_plan``: print the plan at the start of fit
    (rank 0). ``fresh_start``: ignore the sparsity state of a resumed checkpoint, or its absence, and make new masks.
    """

    keep_dense: KeepDense | None
    print_plan: bool
    fresh_start: bool


class SparsityCallback(Engine, Callback):
    """Trains an ordinary LightningModule sparse.

    Between optimizer steps every sparse parameter holds ``mask * dense``. Nothing is added to the model: masks, step count and
    method state live here, and in the checkpoint under this callback's key (loadable with ``weights_only=True``), so a plain
    model loads every checkpoint strictly. Subclasses are the methods; see :class:`~sparse_callbacks.core.engine.Engine` for what
    they override.

    Args:
        sparsity: target fraction of zeros over the selected weights, in [0, 1).
        distribution: how layers share the target: ``"uniform"``, ``"erdos_renyi"``, ``"erdos_renyi_kernel"``, a mapping
            ``{glob: sparsity or name}`` (first match wins), or a callable ``(shapes, sparsity) -> {layer: sparsity}``.
        include: globs on parameter names; default: the weights of all supported layers except embeddings.
        exclude: globs on the names of parameters that stay dense.
        seed: of everything random here; draws derive from (seed, step, parameter name).
        **options: see :class:`Options`.

    Raises:
        ValueError: an argument, model, optimizer, strategy or checkpoint that cannot work, before the first batch.
    """

    schedulable: ClassVar[str | None] = None
    """Name of the argument that may be a schedule."""
    rising: ClassVar[bool] = False
    """A bare number for it is where the curve ends; otherwise where it begins."""
    published_every: ClassVar[int] = 100
    arrives_at_stop: ClassVar[bool] = False
    """The last update is at ``stop`` whatever the interval, and the target is reached only then."""

    def __init__(
        self,
        sparsity: float,
        *,
        distribution: Distribution,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        seed: int,
        keep_dense: KeepDense | None = None,
        print_plan: bool = True,
        fresh_start: bool = False,
    ) -> None:
        check_sparsity(sparsity)
        if is_epsilon(distribution) and float(sparsity) != DEFAULT_SPARSITY:
            raise ValueError(
                f"sparsity={sparsity} and distribution={distribution!r} both say how many weights there are. Leave sparsity= out, or "
                "choose a distribution that shares out a target."
            )
        if keep_dense not in (None, "first", "last", "both"):
            raise ValueError(f"keep_dense={keep_dense!r} is not known. Give 'first', 'last', 'both' or None.")
        check_seed(seed)
        Engine.__init__(self, int(seed))
        self.sparsity: Any = sparsity if isinstance(sparsity, int) else float(sparsity)
        self.distribution = dict(distribution) if isinstance(distribution, Mapping) else distribution
        self.include, self.exclude = patterns(include, "include"), patterns(exclude, "exclude")
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)
        self.keep_dense, self.print_plan, self.fresh_start = keep_dense, print_plan, fresh_start
        self.every: Time | None = None
        self.start: Time | None = None
        self.stop: Time = 0
        self._all_entries: list[Entry] = []
        self._model_size = 0
        self._restored: dict[str, Any] | None = None
        self._held_gradients: dict[str, Tensor] = {}
        self.saved_masks: dict[str, Tensor] = {}
        """Masks of the checkpoint that fit resumes from."""
        self._left_out: list[str] = []
        self._saved_times: list[int] = []
        self._host: tuple[Trainer, LightningModule] | None = None
        self.horizon_asked = False
        """The module has read :attr:`horizon`, so its schedules are not of one fixed length."""
        self._training = False
        self._window_open = False
        self._logged_at = -1

    def _times(self) -> list[int]:
        return [] if self.calendar is None else self.calendar.times()

    def set_times(self, every: Time | None, start: Time, stop: Time) -> None:
        """Keep the time arguments, once they were found possible."""
        check_times(start, stop, every)
        self.every, self.start, self.stop = every, start, stop

    # ------------------------------------------------------------------ what a user reads

    @property
    def target_sparsity(self) -> float:
        """Where the sparsity ends; :meth:`plan` tells what it comes to in whole weights."""
        return float(self.sparsity)

    @property
    def at_target(self) -> bool:
        """False while the network is still on its way to the target sparsity."""
        if not self.arrives_at_stop:
            return True
        planned = sum(self.parameter_zeros(self._all_entries, self._targets).values())
        return bool(self.masks) and self.store.total - sum(self.store.active.values()) >= planned

    def measured_sparsity(self) -> dict[str, float]:
        """Fraction of zeros by the masks: ``sparsity/total`` over the selected weights, ``sparsity/model`` over all parameters and
        ``sparsity/<parameter>`` for each. (Counting zeros would miss grown weights, which are exactly zero at first.)

        Raises:
            RuntimeError: before the first ``fit``, when there are no masks yet.
        """
        if not self.masks:
            raise RuntimeError(f"{type(self).__name__} has no masks yet: they are made at the start of fit. Before that, see plan(model).")
        return joint_sparsity([self]) | self._layer_sparsity()

    def figures(self) -> dict[str, float]:
        """Figures of the method's own for the network as it is; they are logged with the sparsity."""
        return {}

    def outcome(self) -> dict[str, str]:
        """What a summary of the run should tell besides the sparsity: what was reached beside what was asked for."""
        return {}

    def _layer_sparsity(self) -> dict[str, float]:
        return {f"sparsity/{n}": (m.numel() - self.store.active[n]) / m.numel() for n, m in self.masks.items()}

    def plan(self, model: nn.Module | None = None) -> Plan:
        """The table of every parameter, its shape, its target and, where it stays dense, why.

        Args:
            model: any module, at any time; by default the one of the latest ``fit``.

        Raises:
            ValueError: no model is known yet, or the arguments do not fit it.
        """
        if model is not None:
            model = getattr(model, "_orig_mod", model)  # of torch.compile
            entries = select(model, self.include, self.exclude, self.keep_dense)
            zeros = self.parameter_zeros(entries, self.share_out(entries))
        elif self._all_entries:
            entries, zeros = self._all_entries, self.parameter_zeros(self._all_entries, self._targets)
        else:
            raise ValueError("plan() knows no model yet. Give one, plan(model), or call it after fit has started.")
        target = self.distribution if is_epsilon(self.distribution) else f"sparsity {self.target_sparsity:g}"
        return Plan(f"{type(self).__name__}: {target}", plan_rows(entries, zeros), frozenset(zeros))

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        """Target sparsity of every layer."""
        chosen = [e for e in entries if not e.reason]
        distribution = self.distribution
        if isinstance(distribution, Mapping):  # a glob on a parameter's name also means the layers stacked in it
            distribution = {g: v for glob, v in distribution.items() for g in _stacked(glob, chosen)}
        return share_out(distribution, layer_shapes(entries), self.target_sparsity)

    def parameter_zeros(self, entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
        """Planned zeros of every sparse parameter."""
        return {e.name: sum(zeros_for(targets[x], e.size // e.parts) for x in e.layers) for e in entries if not e.reason}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self._arguments().items())})"

    def _arguments(self) -> dict[str, str]:
        """Constructor arguments as text; each is kept under its own name."""
        own = [p.name for p in inspect.signature(type(self).__init__).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
        return {name: checkpoint.shown(getattr(self, name)) for name in [*own, *(o for o in Options.__annotations__ if o not in own)]}

    # ------------------------------------------------------------------ Lightning's hooks, in their order

    @property
    def state_key(self) -> str:
        """Two callbacks on different layers have two keys in a checkpoint."""
        return self._key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_host(trainer)
            if self._model() is not pl_module or self.fresh_start:
                self.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers.refuse(trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None) is not None)
        trained = optimizers.stepped(*trainer.optimizers)
        entries = select(pl_module, self.include, self.exclude, self.keep_dense, trained)
        self._refuse_shared(trainer, [e.name for e in entries if not e.reason])
        saved = self._checked_state(trainer)
        if self.takes_turns:
            turns.refuse_ranks(trainer, pl_module, distributed.world_size(), self.workers)
            saved = None if saved is None else self.own_state(saved)
        self.steps_are_announced = pl_module.automatic_optimization
        reads = self._reads(trainer, pl_module)
        self._all_entries = entries
        self._left_out = [e.name for e in entries if e.reason in NOT_TRAINED]
        self._model_size = sum(p.numel() for p in pl_module.parameters())
        self.saved_masks = dict(saved["masks"]) if saved else {}
        self.begin(pl_module, entries, self.share_out(entries), trainer.optimizers, reads, saved)
        self._held_gradients = dict(saved.get("grads", {})) if saved else {}
        self._saved_times = list(saved["times"]) if saved else []
        self._restored = None
        self.attach(pl_module)
        if self.print_plan and trainer.is_global_zero:
            print(self.plan(), flush=True)
        if full := clipped(self.distribution, layer_shapes(entries)):
            rank_zero_info(f"{self.distribution} would make {', '.join(full)} denser than dense: all their weights are active.")
        for warning in warnings_for(trainer, self.arrives_at_stop):
            rank_zero_warn(warning)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.start is not None:
            # not in on_fit_start: asked there for the run's length, Lightning makes its loader and forgets to resume it
            lengths = (lambda: run_length(trainer)), (lambda: epoch_length(trainer))
            self.calendar = self.make_calendar(*lengths, bool(trainer.fast_dev_run))
            if self._saved_times and (now := self._times()) != self._saved_times:
                rank_zero_warn(
                    f"{type(self).__name__} goes on with other times than it was saved with, because the run's length differs: (every, "
                    f"start, stop) were {self._saved_times} steps and are {now}."
                )
            self._saved_times = []
            if trainer.global_step == 0 and (idle := self._idleness(run_length(trainer))) and not trainer.fast_dev_run:
                rank_zero_warn(idle)
        self._check_horizons(trainer)
        if self.takes_turns and distributed.world_size() > 1:
            turns.refuse_split_data(trainer)
        self._host = trainer, pl_module
        self.rehearse()
        self.apply_masks()  # not earlier: a fit that is refused leaves the weights as they were
        self._training = True
        parameters = dict(pl_module.named_parameters())
        for name, gradient in self._held_gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._window_open = bool(self._held_gradients)
        self._held_gradients = {}
        self.begin_training(trainer.current_epoch)
        if self.takes_turns:
            turns.translate_epochs(trainer, self.data_epoch)

    def make_calendar(self, total: Callable[[], float], epoch: Callable[[], float], lenient: bool) -> Calendar:
        """The calendar of the run that begins.

        Args:
            total: gives the optimizer steps of the run, infinite where it has no end that is known.
            epoch: gives the optimizer steps of an epoch, infinite where the loader has no length.
            lenient: a trial run (``fast_dev_run``): whatever does not fit is cut instead of refused.

        Raises:
            ValueError: times that the run cannot have.
        """
        assert self.start is not None
        return resolve(
            self.every, self.start, self.stop, self.published_every, total, final=self.arrives_at_stop, lenient=lenient,
            tell=rank_zero_info,
        )  # fmt: skip

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_start(trainer.current_epoch)
        if self.takes_turns:
            turns.translate_epochs(trainer, self.data_epoch)  # of loaders that are made anew for the epoch
            turns.reseed(trainer, self.data_epoch(trainer.current_epoch))
            if trainer.current_epoch == 0 or trainer.fit_loop.restarting:  # Lightning has made the iterator before
                turns.draw_anew(trainer)
        if not self._left_out:
            return
        trained = optimizers.stepped(*trainer.optimizers)
        parameters = dict(pl_module.named_parameters())
        late = [n for n in self._left_out if parameters[n].requires_grad and id(parameters[n]) in trained]
        self._left_out = [n for n in self._left_out if n not in late]
        if late:
            rank_zero_warn(
                f"{type(self).__name__} leaves {', '.join(late)} dense: they were frozen or in no optimizer when fit started and are "
                "trained only now. To make them sparse, train them from the start of a fit."
            )

    def _idleness(self, length: float) -> str:
        """A warning for a new run in which no update can fall; empty where there is one."""
        upcoming = self.progress.upcoming(self.times)
        if upcoming is not None and upcoming - self.step < length:
            return ""
        when = f"the first would be at step {upcoming}, after the run's {length:g}" if upcoming is not None else (
            f"{self.step} steps were counted before, in an earlier fit, and the last update was due at step {self.times.stop}"
        )  # fmt: skip
        return (
            f"{type(self).__name__} will not move a mask in this run: {when}. Give other times, or a new callback or fresh_start=True "
            "for a new start."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx
        if not self._window_open:
            if self.restart_wanted:
                self._restart_optimizers(trainer, pl_module)
            self.before_batch()
        self.batch_start()

    def _restart_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        """New optimizers and schedules, as the module configures them; all callbacks of the kind move their hooks to them."""
        optimizer_lives.restart(trainer)
        optimizers.refuse(trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None) is not None)
        reads = self._reads(trainer, module)
        for peer in (c for c in trainer.callbacks if isinstance(c, SparsityCallback)):
            peer.rebind(trainer.optimizers, reads)
            peer.restart_wanted = False
        self._check_horizons(trainer)

    def _check_horizons(self, trainer: Trainer) -> None:
        """Refuse a schedule that would be cut off before the first batch; later, when a restart brings one, say so and train on."""
        life = self.horizon if self.horizon_asked or self._training else self.shortest_life
        if life is None or trainer.fast_dev_run:
            return
        try:
            optimizer_lives.check_horizons(trainer, life, epoch_length(trainer))
        except ValueError as error:
            if not self._training:
                raise
            rank_zero_warn(str(error))

    @staticmethod
    def _reads(trainer: Trainer, module: LightningModule) -> list[bool]:
        return [module.automatic_optimization and gradients_are_read(trainer, module, o) for o in trainer.optimizers]

    @property
    def horizon(self) -> float | None:
        """Optimizer steps that the optimizers at hand live, where they are configured anew before the run is over; otherwise None."""
        return None

    @property
    def shortest_life(self) -> float | None:
        """Optimizer steps of the shortest :attr:`horizon` of the run."""
        return None

    def data_pass(self, fraction: float = 1.0, train: Sequence[nn.Module] = ()) -> Generator[Any, None, None]:
        """The network's output for each batch of one pass over the training data, in eval mode and without gradients.

        Each rank passes over its share of the data; where networks take turns, over all of it.

        Args:
            fraction: share of the batches, from the first on.
            train: modules that stay in train mode.
        """
        assert self._host is not None, "there is data in training only"
        trainer, module = self._host
        world, rank = (1, 0) if self.takes_turns else (distributed.world_size(), distributed.rank())
        given = getattr(self, "forward", None), getattr(self, "statistics_dataloader", None)
        yield from data_pass.outputs(trainer, module, *given, fraction, world, rank, train)

    @property
    def workers(self) -> int:
        """Networks that take turns."""
        return 1

    def data_epoch(self, epoch: int) -> int:
        """The number that samplers are told in place of ``epoch``, where networks take turns."""
        return epoch

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this rank resumes from, of a checkpoint in which several networks take turns."""
        return state

    def data_states(self) -> list[Any]:
        """What the training loaders of this rank resume from."""
        assert self._host is not None
        return turns.loader_states(self._host[0])

    def load_data_states(self, states: Sequence[Any]) -> None:
        """Put back what :meth:`data_states` found."""
        assert self._host is not None
        turns.load_loader_states(self._host[0], states)

    def average_gradients(self, on: bool) -> None:
        """Whether backward averages gradients over ranks from here on."""
        assert self._host is not None
        turns.average_gradients(self._host[0], on)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window_open = True
        if not pl_module.automatic_optimization:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self.after_backward(1.0 if scaler is None else scaler.get_scale())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._window_open = False
        self.before_optimizer_step(optimizer, trainer.global_step)
        if self.replacing and pl_module.automatic_optimization:
            self._withhold_instead_of_clipping(pl_module, optimizer)
        elif self.replacing:
            self.withhold(optimizer)

    def _withhold_instead_of_clipping(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients away in the place of clipping: Lightning's last call before the step, after all hooks that read them."""

        def withhold(*_: object, **__: object) -> None:
            vars(module).pop("configure_gradient_clipping", None)
            self.withhold(optimizer)

        vars(module)["configure_gradient_clipping"] = withhold

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.release()
        self.epoch_over = bool(trainer.is_last_batch)
        self.run_over = ends_run(trainer)
        self.after_batch()
        step, peers = trainer.global_step, [c for c in trainer.callbacks if isinstance(c, SparsityCallback)]
        leads = peers[0] is self  # one callback speaks for the whole network
        news = bool(self.events)
        if leads and (batch_idx == 0 or any(c.events for c in peers) or self._logged_at < 0):
            pl_module.log("sparsity/total", joint_sparsity(peers)["sparsity/total"], prog_bar=True, logger=False)
        often = trainer.log_every_n_steps
        if news or (often and step not in (0, self._logged_at) and step % often == 0):
            self._log(trainer, peers)

    def _log(self, trainer: Trainer, peers: Sequence["SparsityCallback"]) -> None:
        """A row of curves, of the network as it is and of the latest update."""
        figures = (joint_sparsity(peers) if peers[0] is self else {}) | self._layer_sparsity() | self.figures() | self.events
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        self.events = {}
        self._logged_at = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = logged_metrics(trainer)
        if trainer.sanity_checking:
            self.sanity_end(metrics)
        elif self._training:
            self.validation_end(metrics, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_end(logged_metrics(trainer), trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figures() and trainer.global_step not in (0, self._logged_at):  # which go on between updates
            self._log(trainer, [c for c in trainer.callbacks if isinstance(c, SparsityCallback)])
        if not self.at_target and not trainer.fast_dev_run:
            rank_zero_warn(self.shortfall())

    def shortfall(self) -> str:
        """Target and reached, for a run that ends before its target."""
        reached = self.measured_sparsity()["sparsity/total"]
        return (
            f"{type(self).__name__} ended at sparsity {reached:.4f}, before its target of {self.plan().total:.4f}: {self.step} steps were "
            f"taken and the target is due at step {self.times.stop}. Train longer, or give an earlier stop=."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._training:  # it may have come between the optimizer's step and ours
            self.apply_masks()
            self.release()
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        if not self.masks:
            return self._restored or {}
        current = {"version": checkpoint.VERSION, "arguments": self._arguments(), "times": self._times(), **self.engine_state()}
        model = self._model()
        if self._window_open and model is not None:  # accumulated gradients are in no checkpoint of Lightning's
            held = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            current["grads"] = held if self.takes_turns else dict(zip(held, distributed.mean(held.values()), strict=True))
        return current

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)
        self._restored = None

    def _leave(self, module: LightningModule) -> None:
        vars(module).pop("configure_gradient_clipping", None)
        self.end()
        if self._host is not None and self.takes_turns:
            turns.stop_translating(self._host[0])
        self._training = False
        self._host = None

    def __getstate__(self) -> dict[str, Any]:
        bound_by_lightning = ("log", "log_dict")
        return {k: v for k, v in super().__getstate__().items() if k not in bound_by_lightning} | {"_host": None}

    # ------------------------------------------------------------------ refusals

    def _refuse_shared(self, trainer: Trainer, names: Sequence[str]) -> None:
        peers = [c for c in trainer.callbacks if isinstance(c, SparsityCallback)]
        if len(peers) > 1 and (whole := [c for c in peers if c.takes_turns]):
            raise ValueError(
                f"{type(whole[0]).__name__} trains several copies of the whole network, and {len(peers)} sparsity callbacks are in "
                "callbacks=. Leave it alone there, or use GaP."
            )
        for other in trainer.callbacks:
            begun = isinstance(other, SparsityCallback) and other is not self and other._handles
            if begun and (both := sorted(set(names) & set(other.params))):
                raise ValueError(
                    f"{type(other).__name__} and {type(self).__name__} both claim {', '.join(both)}. Give each callback its own layers "
                    "with include= or exclude=."
                )

    def _checked_state(self, trainer: Trainer) -> Mapping[str, Any] | None:
        """The state to resume from, found to be ours and of the same arguments; None for a start with new masks."""
        if self.fresh_start or not trainer.ckpt_path or (self._restored is None and is_tuners(trainer.ckpt_path)):
            if trainer.ckpt_path and self._restored is not None:
                rank_zero_info(f"{type(self).__name__}: fresh_start=True, so the masks in the checkpoint are ignored.")
            return None
        return checkpoint.check(self._restored, self._arguments(), type(self).__name__, trainer.ckpt_path)


def check_sparsity(sparsity: object) -> None:
    """Refuse what is no fraction of zeros in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise ValueError(f"sparsity={sparsity!r} is no number. It is the fraction of zeros: for 90 % zeros write 0.9.")
    if not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(f"sparsity={sparsity!r} is not in [0, 1): it is the fraction of zeros. For 90 % zeros write 0.9.")


def pruning_curve(sparsity: float | str | Schedule) -> Schedule:
    """A number as a cubic up to it, a schedule or its text as it is; refuses one that does not run through fractions of zeros."""
    if not isinstance(sparsity, str | Schedule):
        check_sparsity(sparsity)
    curve = as_schedule(sparsity, "cubic", rising=True, name="sparsity")
    check_sparsity(curve.initial)
    return curve


def check_seed(seed: object) -> None:
    """Refuse what is no whole number."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed={seed!r} is no whole number. Give for example seed=0.")


def joint_sparsity(callbacks: Sequence[SparsityCallback]) -> dict[str, float]:
    """``sparsity/total`` and ``sparsity/model`` over the weights of all ``callbacks`` of one model."""
    size = sum(c.store.total for c in callbacks)
    zeros = size - sum(sum(c.store.active.values()) for c in callbacks)
    return {"sparsity/total": zeros / size, "sparsity/model": zeros / callbacks[0]._model_size}


def ends_run(trainer: Trainer) -> bool:
    """Whether the batch that is over was the last of the run, as far as that is known beforehand."""
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return bool(trainer.is_last_batch and last_epoch) or 0 <= trainer.max_steps <= trainer.global_step


def logged_metrics(trainer: Trainer) -> dict[str, float]:
    """The latest of everything that the module logged."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _stacked(glob: str, entries: Sequence[Entry]) -> list[str]:
    """The globs that mean for layers what ``glob`` means for parameters."""
    matching = [e for e in entries if fnmatchcase(e.name, glob)]
    missed = any(not fnmatchcase(e.layers[0], glob) for e in matching)
    hit = any(fnmatchcase(e.layers[0], glob) for e in matching) or not matching
    return [g for g, used in ((glob, hit), (f"{glob}[[]*]", missed)) if used]
