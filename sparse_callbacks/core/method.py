"""The base of every method: its arguments, its plan, and the hooks that a method overrides."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple, TypedDict
from weakref import ref

import torch
from torch import Tensor, nn

from sparse_callbacks.core import checkpoint, randomness
from sparse_callbacks.core.arguments import check_seed, check_sparsity
from sparse_callbacks.core.calendar import Calendar, RunLength, Time, check_times, resolve_times
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import Distribution, is_epsilon, resolve
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.ops import random_mask, zeros_for
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.plan import Plan, plan_rows
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.selection import Entry, KeepDense, layer_shapes, patterns, select
from sparse_callbacks.core.shards import layout_of
from sparse_callbacks.core.signatures import refuse_old_hooks
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.core.weights import SparseWeights

DEFAULT_SPARSITY = 0.9

Figures = Mapping[str, float]
"""Figures for the log by their full names."""


class Options(TypedDict, total=False):
    """Arguments that every method takes besides its own.

    ``keep_dense``: ``"first"``, ``"last"`` or ``"both"`` weights stay dense. ``print_plan``: print the plan at the
        start of fit
    (rank 0). ``fresh_start``: ignore the sparsity state of a resumed checkpoint, or its absence, and make new masks.
    """

    keep_dense: KeepDense | None
    print_plan: bool
    fresh_start: bool


class BatchEnd(NamedTuple):
    """How things stand when a batch is over.

    Attributes:
        epoch_over: it was the last batch of its epoch.
        run_over: it was the last batch of the run.
        window_open: gradients of an accumulation window wait for their step.
        skipped: announced steps of this fit that a GradScaler has skipped so far.
    """

    epoch_over: bool
    run_over: bool
    window_open: bool
    skipped: int


class Method:
    """Arguments and rules of one method: which weights are pruned, when, and which come instead.

    A subclass overrides at most the hooks below and reads ``weights`` (masks and parameters), ``aux``, ``targets``,
    ``owners`` and ``progress``. What concerns one optimizer step arrives as a
    :class:`~sparse_callbacks.core.step.Step`; what concerns the training loop is asked of ``host``. The
    :class:`~sparse_callbacks.core.engine.Engine` calls the hooks, takes the masks that a method makes and keeps the
    invariant.

    Args:
        sparsity: target fraction of zeros over the selected weights, in [0, 1).
        distribution: how layers share the target: ``"uniform"``, ``"erdos_renyi"``, ``"erdos_renyi_kernel"``, a mapping
            ``{glob: sparsity or name}`` (first match wins), or a callable ``(shapes, sparsity) -> {layer: sparsity}``.
        include: globs on parameter names; default: the weights of all supported layers except embeddings.
        exclude: globs on the names of parameters that stay dense.
        seed: of everything random here; draws derive from (seed, step, parameter name).
        keep_dense, print_plan, fresh_start: see :class:`Options`.

    Raises:
        ValueError: an argument that no run can use.
    """

    # ------------------------------------------------------------------ facts of a class

    schedulable: ClassVar[str | None] = None
    """Name of the argument that may be a schedule."""
    rising: ClassVar[bool] = False
    """A bare number for the schedulable argument is where its curve ends; otherwise where it begins."""
    published_every: ClassVar[int] = 100
    """Optimizer steps between updates in the paper."""
    arrives_at_stop: ClassVar[bool] = False
    """The last update is at ``stop`` whatever the interval, and the target is reached only then."""
    first_update: ClassVar[int] = 1
    """The earliest step of an update: 0 where the calendar counts the steps taken so far, before the coming one."""
    keeps_dense: ClassVar[bool] = False
    """Pruned weights go on to learn: a dense copy takes the steps, with gradients that are not masked."""
    reads_dense_gradients: ClassVar[bool] = True
    """False: the gradients of pruned weights may be anything, also NaN."""
    plans_counts: ClassVar[bool] = True
    """At the end there are as many zeros as planned; False: gates or a budget decide."""
    figure_prefix: ClassVar[str] = ""
    """What the method's own figures are logged under; by default the lower-case name of the class."""
    explores: ClassVar[bool] = False
    """Connections come and go, so that the share of weights that were ever active is worth knowing."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_old_hooks(cls, Method)

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
                f"sparsity={sparsity} and distribution={distribution!r} both say how many weights there are. Leave "
                "sparsity= out, or "
                "choose a distribution that shares out a target."
            )
        if keep_dense not in (None, "first", "last", "both"):
            raise ValueError(f"keep_dense={keep_dense!r} is not known. Give 'first', 'last', 'both' or None.")
        check_seed(seed)
        self.seed = int(seed)
        self.sparsity: Any = sparsity if isinstance(sparsity, int) else float(sparsity)
        self.distribution = dict(distribution) if isinstance(distribution, Mapping) else distribution
        self.include, self.exclude = patterns(include, "include"), patterns(exclude, "exclude")
        self.keep_dense, self.print_plan, self.fresh_start = keep_dense, print_plan, fresh_start
        self.every: Time | None = None
        self.start: Time | None = None
        self.stop: Time = 0
        self.aux: dict[str, Tensor] = {}
        """Tensors of the method that must survive a resume. A key ends in the name of a parameter on whose device it
        lies."""
        self.weights = SparseWeights({}, {}, {})
        """Masks and parameters."""
        self.owners = Ownership([], {})
        """Which optimizer steps which sparse parameter."""
        self.progress = Progress(self.first_update)
        """Steps counted and updates done."""
        self.calendar: Calendar | None = None
        """When updates fall in this run; None before fit and for a method without times."""
        self.entries: list[Entry] = []
        """Every parameter of the model, with the reason why it stays dense."""
        self.targets: dict[str, float] = {}
        """Planned sparsity of every sparse layer."""
        self.saved: SavedRun | None = None
        """The run that this fit goes on from, until training has begun; None for a new one."""
        self.in_training = False
        """A run is going on: everything is restored and the masks are written."""
        self._host: Host | None = None
        self._model: Callable[[], nn.Module | None] = _no_model

    # ------------------------------------------------------------------ what a method overrides

    def attach(self, model: nn.Module) -> None:
        """Look at the model once, when masks exist and before the first batch."""

    def further_members(self, model: nn.Module, entries: Sequence[Entry]) -> Sequence[Entry]:
        """``entries`` with further parameters that this method masks (an empty ``reason``), such as biases of gated
        channels."""
        return entries

    def initial_masks(self) -> dict[str, Tensor]:
        """Masks at the start of training: by default random positions, exactly the planned count in each layer."""
        return {name: self.weights.by_layer(name, self._random_mask, p.detach()) for name, p in self.params.items()}

    def wants_dense_gradients(self, step: Step) -> bool:
        """The coming ``step`` needs gradients of pruned weights (asked in manual optimization, where they are masked
        early)."""
        return False

    def before_step(self, step: Step) -> None:
        """Gradients are dense, reduced over ranks and unscaled, and not yet clipped. Edit or replace them; keep no
        memory here."""
        step.mask_gradients()

    def after_step(self, step: Step) -> Update | None:
        """The step was really taken and counted. Whatever has memory moves here; gives the update that falls now, or
        None."""
        return None

    def new_masks(self, step: Step) -> Update:
        """The update that takes the place of a step (:meth:`~sparse_callbacks.core.step.Step.replace`), or follows
        one."""
        return Update({name: self.weights.masks[name] for name in step.names})

    def new_weights(self, step: Step, name: str) -> Tensor | None:
        """Values for the born weights of a parameter, of its shape; None: they start from zero."""
        return None

    def after_update(self, step: Step) -> None:
        """The engine has taken the masks of this step's update."""

    def write(self, names: Sequence[str] | None, finite: bool) -> None:
        """Restore the invariant in ``names``, whose optimizer has just stepped, or, with None, in all sparse
        parameters.

        Args:
            names: names of sparse parameters, or None.
            finite: whether all values are known to be finite.
        """
        self.weights.write_masked(self.params if names is None else names, finite)

    def start_copies(self, dense: Mapping[str, Tensor], new: Iterable[str]) -> None:
        """Start the dense copies of a method that ``keeps_dense``.

        Args:
            dense: dense values by parameter name, of the saved run or of the last one.
            new: names of parameters that had none, whose own values are the dense ones.
        """
        fresh = set(new)
        values = {n: dense.get(n, p.detach()) for n, p in self.params.items() if n in dense or n in fresh}
        self.weights.start_copy(values)

    def rehearse(self) -> None:
        """Fail now where the run would fail later: nothing was written yet."""

    def begin_training(self, epoch: int) -> Figures:
        """Everything is restored and the masks are written; ``epoch`` (from 0) of the fit begins, or goes on."""
        return {}

    def window_start(self, batch: int) -> None:
        """The batch with this number in its epoch begins, and opens an accumulation window: the weights are those of
        the coming step."""

    def batch_start(self, batch: int) -> None:
        """Any batch begins, also inside an accumulation window; after :meth:`window_start` where there is one."""

    def batch_end(self, end: BatchEnd) -> Figures:
        """A batch is over, and with it the update that it may have brought."""
        return {}

    def epoch_start(self, epoch: int) -> None:
        """Epoch ``epoch`` (from 0) of the fit begins, before its first batch is drawn."""

    def sanity_end(self, metrics: Mapping[str, float]) -> None:
        """The host has tried its validation before training, with these ``metrics``."""

    def validation_end(self, metrics: Mapping[str, float], epoch: int) -> None:
        """A validation in ``epoch`` is over; checkpoints may be written next."""

    def epoch_end(self, metrics: Mapping[str, float], epoch: int) -> None:
        """``epoch`` is over, its validation included; ``metrics`` are the latest of everything logged."""

    def make_calendar(self, run: RunLength) -> Calendar:
        """The calendar of the run that begins.

        Raises:
            ValueError: times that the run cannot have.
        """
        assert self.start is not None
        return resolve_times(
            self.every,
            self.start,
            self.stop,
            self.published_every,
            run,
            final=self.arrives_at_stop,
            inform=self.host.inform,
        )

    # ------------------------------------------------------------------ what a method reads

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool mask by parameter name, True where a connection is active; shape of the parameter."""
        return dict(self.weights.masks)

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The sparse parameters by name."""
        return self.weights.params

    @property
    def step(self) -> int:
        """Gradient steps taken, the most of any optimizer. A step that an update replaced does not count."""
        return self.progress.most()

    @property
    def updates(self) -> int:
        """Topology updates done."""
        return self.progress.updates

    @property
    def times(self) -> Calendar:
        """The calendar of this run, in optimizer steps."""
        if self.calendar is None:
            raise RuntimeError(f"{type(self).__name__} has no calendar: it is made when fit starts.")
        return self.calendar

    @property
    def host(self) -> Host:
        """The training loop, as far as a method may use it; only during a run."""
        if self._host is None:
            raise RuntimeError(
                f"{type(self).__name__} is not in a run: data and optimizers are there in training only."
            )
        return self._host

    @property
    def model(self) -> nn.Module:
        """The model of the latest run, held weakly."""
        model = self._model()
        if model is None:
            raise RuntimeError(f"{type(self).__name__} knows no model: it takes hold of one when fit starts.")
        return model

    @property
    def is_in_run(self) -> bool:
        """There is a host: a run has begun and is not over."""
        return self._host is not None

    @property
    def has_model(self) -> bool:
        """The model of the latest run is there."""
        return self._model() is not None

    def belongs_to(self, model: nn.Module) -> bool:
        """The latest run was with this very model."""
        return self._model() is model

    def enter(self, model: nn.Module, host: Host) -> None:
        """A run begins: take hold of its model (weakly) and its host. Called by the engine."""
        self._model, self._host = ref(model), host

    def leave(self) -> None:
        """The run is over: let go of its host and its optimizers. Called by the engine."""
        self._host, self.owners, self.in_training = None, Ownership([], {}), False

    def forget_model(self) -> None:
        """The next run is a new one, also with the same model. Called by the engine."""
        self._model = _no_model

    def generator(self, name: str, number: int) -> torch.Generator:
        """A random generator that derives from (seed, number, name): the same on every rank, device and resume."""
        return randomness.generator(self.seed, number, name)

    def planned_zeros(self, layer: str, size: int) -> int:
        """Zeros of a layer of ``size`` weights at the target."""
        return zeros_for(self.targets[layer], size)

    def own_figures(self, **figures: float) -> dict[str, float]:
        """Figures of the method by their full names, ``<prefix>/<figure>``."""
        prefix = self.figure_prefix or type(self).__name__.lower()
        return {f"{prefix}/{name}": value for name, value in figures.items()}

    def set_times(self, every: Time | None, start: Time, stop: Time) -> None:
        """Keep the time arguments, once they were found possible."""
        check_times(start, stop, every)
        self.every, self.start, self.stop = every, start, stop

    def _random_mask(self, layer: str, weight: Tensor) -> Tensor:
        active = weight.numel() - self.planned_zeros(layer, weight.numel())
        whole = random_mask(weight.shape, active, self.generator(layer, 0))
        return layout_of(weight).part(whole).to(weight.device)

    # ------------------------------------------------------------------ what a user reads

    @property
    def target_sparsity(self) -> float:
        """Where the sparsity ends; :meth:`plan` shows what it comes to in whole weights."""
        return float(self.sparsity)

    @property
    def at_target(self) -> bool:
        """False while the network is still on its way to the target sparsity."""
        if not self.arrives_at_stop:
            return True
        planned = sum(self.parameter_zeros(self.entries, self.targets).values())
        return bool(self.masks) and self.weights.size_of_all - sum(self.weights.active_counts.values()) >= planned

    def measured_sparsity(self) -> dict[str, float]:
        """Fraction of zeros by the masks: ``sparsity/total`` over the selected weights, ``sparsity/model`` over all
        parameters and ``sparsity/<parameter>`` for each. (Counting zeros would miss grown weights, which are exactly
        zero at first.)

        Raises:
            RuntimeError: before the first ``fit``, when there are no masks yet.
        """
        if not self.masks:
            raise RuntimeError(
                f"{type(self).__name__} has no masks yet: they are made at the start of fit. Before that, see "
                "plan(model)."
            )
        return joint_sparsity([self]) | self.layer_sparsity()

    def layer_sparsity(self) -> dict[str, float]:
        """``sparsity/<parameter>`` for each sparse parameter."""
        counts = self.weights.active_counts
        return {f"sparsity/{n}": (m.numel() - counts[n]) / m.numel() for n, m in self.weights.masks.items()}

    def figures(self) -> dict[str, float]:
        """Figures of the method's own for the network as it is; they are logged with the sparsity."""
        return {}

    def outcome(self) -> dict[str, str]:
        """What a summary of the run should show besides the sparsity: what was reached beside what was asked for."""
        return {}

    def shortfall(self) -> str:
        """Target and reached sparsity, for a run that ends before its target."""
        reached = self.measured_sparsity()["sparsity/total"]
        return (
            f"{type(self).__name__} ended at sparsity {reached:.4f}, before its target of {self.plan().total:.4f}: "
            f"{self.step} steps were "
            f"taken and the target is due at step {self.times.stop}. Train longer, or give an earlier stop=."
        )

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
        elif self.entries:
            entries, zeros = self.entries, self.parameter_zeros(self.entries, self.targets)
        else:
            raise ValueError("plan() knows no model yet. Give one, plan(model), or call it after fit has started.")
        target = self.distribution if is_epsilon(self.distribution) else f"sparsity {self.target_sparsity:g}"
        return Plan(f"{type(self).__name__}: {target}", plan_rows(entries, zeros), frozenset(zeros))

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        """Target sparsity of every layer."""
        chosen = [e for e in entries if not e.reason]
        distribution = self.distribution
        if isinstance(distribution, Mapping):  # a glob on a parameter's name also means the layers stacked in it
            distribution = {g: v for glob, v in distribution.items() for g in _layer_globs(glob, chosen)}
        return resolve(distribution, layer_shapes(entries), self.target_sparsity)

    def parameter_zeros(self, entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
        """Planned zeros of every sparse parameter."""
        return {
            e.name: sum(zeros_for(targets[x], e.size // e.parts) for x in e.layers) for e in entries if not e.reason
        }

    def why_idle(self, length: float) -> str:
        """Why no update can fall in a new run of ``length`` optimizer steps; empty where one can."""
        upcoming = self.progress.upcoming(self.times)
        if upcoming is not None and upcoming - self.step < length:
            return ""
        if upcoming is not None:
            when = f"the first would be at step {upcoming}, after the run's {length:g}"
        else:
            when = f"{self.step} steps were counted before, in an earlier fit, and the last update was due at step {self.times.stop}"
        return (
            f"{type(self).__name__} will not move a mask in this run: {when}. Give other times, or a new callback or "
            "fresh_start=True "
            "for a new start."
        )

    @property
    def arguments(self) -> dict[str, str]:
        """Constructor arguments as text; each is kept under its own name."""
        own = [
            p.name for p in inspect.signature(type(self).__init__).parameters.values() if p.kind is not p.VAR_KEYWORD
        ][1:]
        names = [*own, *(o for o in Options.__annotations__ if o not in own)]
        return {name: checkpoint.shown(getattr(self, name)) for name in names}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.arguments.items())})"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the hold on a model, its optimizers and the host stay behind."""
        left_behind = {"_model": _no_model, "_host": None, "owners": Ownership([], {}), "in_training": False}
        return {**vars(self), **left_behind}


def _no_model() -> None:
    return None


def joint_sparsity(methods: Sequence[Method]) -> dict[str, float]:
    """``sparsity/total`` and ``sparsity/model`` over the weights of all ``methods`` of one model."""
    size = sum(m.weights.size_of_all for m in methods)
    zeros = size - sum(sum(m.weights.active_counts.values()) for m in methods)
    return {"sparsity/total": zeros / size, "sparsity/model": zeros / sum(e.size for e in methods[0].entries)}


def _layer_globs(glob: str, entries: Sequence[Entry]) -> list[str]:
    """The globs that mean for layers what ``glob`` means for parameters."""
    matching = [e for e in entries if fnmatchcase(e.name, glob)]
    if not matching:
        return [glob]  # it may name a single layer, such as "in_proj_weight[[]0]"
    found = []
    if any(fnmatchcase(e.layers[0], glob) for e in matching):
        found.append(glob)
    if any(not fnmatchcase(e.layers[0], glob) for e in matching):
        found.append(f"{glob}[[]*]")
    return found
