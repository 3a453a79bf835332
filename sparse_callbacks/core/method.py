"""The base of every method: its arguments, its state, its plan, and what it may read."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from sparse_callbacks.core import checkpoint, randomness
from sparse_callbacks.core.arguments import check_seed, check_sparsity
from sparse_callbacks.core.attachment import Attachment
from sparse_callbacks.core.awaited import for_targets, with_awaited
from sparse_callbacks.core.calendar import Calendar, RunLength, Time, check_times, resolve_times
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.constructors import argument_values, checks_arguments
from sparse_callbacks.core.distributions import Distribution, check_distribution, decides_total
from sparse_callbacks.core.first_mask_arguments import refusing_first_masks
from sparse_callbacks.core.found_shares import find_shares, follow_from_model, found_targets, remarks_of_minimum
from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.joint_thresholds import (
    are_joint,
    planned_total,
    refuse_unreachable,
    with_joint_rows,
    without_thresholds,
)
from sparse_callbacks.core.live.live_runs import refuse_foreign_places
from sparse_callbacks.core.ops import random_mask, zeros_for
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.pattern_arguments import refusing_pattern
from sparse_callbacks.core.patterns import pattern_remarks
from sparse_callbacks.core.plan import Plan, plan_rows
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.selection import Entry, KeepDense, patterns, select
from sparse_callbacks.core.shards import layout_of
from sparse_callbacks.core.signatures import refuse_old_hooks
from sparse_callbacks.core.sparsity import joint_sparsity, layer_sparsity
from sparse_callbacks.core.state_layout import shown_short
from sparse_callbacks.core.storages.storage import refusing_storage, storage_asked, storage_remark
from sparse_callbacks.core.targets import layer_targets, zeros_by_parameter
from sparse_callbacks.core.weights import SparseWeights, whole

DEFAULT_SPARSITY = 0.9


class Options(TypedDict, total=False):
    """Arguments that every method takes besides its own.

    Attributes:
        keep_dense: ``"first"``, ``"last"`` or ``"both"``: the first, the last, or both of the selected weights, in the order of
            the model, stay dense; None: all become sparse.
        print_plan: whether the plan is printed when a run begins, on rank 0.
        fresh_start: whether the sparsity state of a resumed checkpoint, or its absence, is ignored, and new masks are made.
    """

    keep_dense: KeepDense | None
    print_plan: bool
    fresh_start: bool


class Method(Hooks):
    """Arguments and rules of one method: which weights are pruned, when, and which come instead.

    A subclass overrides at most the hooks (those of :class:`~sparse_callbacks.core.hooks.Hooks` and the first two below)
    and reads ``weights`` (masks and parameters), ``aux``, ``targets``, ``owners`` and ``progress``. What concerns one
    optimizer step arrives as a :class:`~sparse_callbacks.core.step.Step`; what concerns the training loop is asked of
    ``host``. The :class:`~sparse_callbacks.core.engine.Engine` calls the hooks, takes the masks that a method makes and
    keeps the invariant.

    Args:
        sparsity: target fraction of zeros over the selected weights, in [0, 1).
        distribution: how layers share the target: ``"uniform"``, ``"uniform_plus"``, ``"erdos_renyi"``,
            ``"erdos_renyi_kernel"``; ``"global"`` (each layer keeps a weight; ``"global(0)"``: or none) and ``"lamp"``, one
            threshold over all magnitudes or scores, renewed at each selection by GMP, DPF and PruneAtStart and else found
            once, when a run begins; ``"epsilon(1)"``, in place of a target; a mapping ``{glob: sparsity or name}`` (first match wins); a
            callable ``(shapes, sparsity) -> {layer: sparsity}``; or an object that sees the model, in place of a target
            (:class:`~sparse_callbacks.core.allocations.sees_model.SeesModel`).
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        keep_dense: ``"first"``, ``"last"`` or ``"both"``: the first, the last, or both of the selected weights stay dense.
        print_plan: whether the plan is printed when a run begins, on rank 0.
        fresh_start: whether the sparsity state of a resumed checkpoint, or its absence, is ignored, and new masks are made.

    Raises:
        ValueError: an argument that no run can use.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_old_hooks(cls)
        if "__init__" in vars(cls):
            init = refusing_pattern(refusing_first_masks(refusing_storage(cls.__init__), Options), Options)
            cls.__init__ = checks_arguments(init, Options)  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        if name in ("setup", "teardown") or name.startswith("on_"):  # a Trainer looks for its hooks
            raise AttributeError(self._why_no_callback())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Any:
        raise TypeError(self._why_no_callback())  # a Trainer takes what is no callback of its own for a list of them

    def _why_no_callback(self) -> str:
        name, module = type(self).__name__, type(self).__module__
        if module.startswith("sparse_callbacks.methods"):
            advice = f"Give the Trainer the callback: sparse_callbacks.{name}."
        else:
            advice = f"Give the Trainer a callback of it: class {name}Callback({name}, SparsityCallback)."
        return (
            f"{name} of {module} is a plain method, which a Trainer cannot call. {advice} For a loop of your own there is "
            "sparse_callbacks.sparsify."
        )

    def __init__(
        self,
        sparsity: float,
        *,
        distribution: Distribution = "uniform",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        keep_dense: KeepDense | None = None,
        print_plan: bool = True,
        fresh_start: bool = False,
    ) -> None:
        check_sparsity(sparsity)
        check_distribution(distribution)
        if decides_total(distribution) and float(sparsity) != DEFAULT_SPARSITY:
            raise ValueError(
                f"sparsity={sparsity} and distribution={checkpoint.shown(distribution)} both say how many weights there are. Leave "
                "sparsity= out, or choose a distribution that shares out a target."
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
        self.attachment = Attachment()
        """The model and the host that the engine has attached this method to."""

    # ------------------------------------------------------------------ masks and times of a run; hooks too

    def initial_masks(self) -> dict[str, Tensor]:
        """Masks at the start of training: by default random positions, exactly the planned count in each layer."""
        return {name: self.weights.by_layer(name, self._random_mask, p.detach()) for name, p in self.params.items()}

    def make_calendar(self, run: RunLength) -> Calendar:
        """The calendar of the run that begins.

        Args:
            run: the length of the run.

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
    def masks(self) -> Mapping[str, Tensor]:
        """Bool mask by parameter name, True where a connection is active; shape of the weight.

        They are for reading: what is written into them may or may not reach the weights. Those of exchanged layers are made
        when they are asked for.
        """
        masks = self.weights.masks
        return masks if self.weights.layers_stored else {name: whole(mask) for name, mask in masks.items()}

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
        """The calendar of this run, in optimizer steps.

        Raises:
            RuntimeError: before a run, or for a method without times.
        """
        if self.calendar is None:
            raise RuntimeError(f"{type(self).__name__} has no calendar: it is made when fit starts.")
        return self.calendar

    @property
    def host(self) -> Host:
        """The training loop, as far as a method may use it; only during a run.

        Raises:
            RuntimeError: the method is not in a run.
        """
        if self.attachment.host is None:
            raise RuntimeError(
                f"{type(self).__name__} is not in a run: data and optimizers are there in training only."
            )
        return self.attachment.host

    @property
    def model(self) -> nn.Module:
        """The model of the latest run.

        Raises:
            RuntimeError: there was no run yet.
        """
        if self.attachment.model is None:
            raise RuntimeError(f"{type(self).__name__} knows no model: it takes hold of one when fit starts.")
        return self.attachment.model

    def generator(self, name: str, number: int) -> torch.Generator:
        """A random generator that derives from (seed, number, name): the same on every rank, device and resume.

        Args:
            name: what is drawn, usually the name of a parameter.
            number: when it is drawn, usually the number of the step.
        """
        return randomness.generator(self.seed, number, name)

    def planned_zeros(self, layer: str, size: int) -> int:
        """Zeros of a layer at the target.

        Args:
            layer: name of the layer.
            size: number of its weights.
        """
        return zeros_for(self.targets[layer], size)

    def own_figures(self, **figures: float) -> dict[str, float]:
        """Figures of the method by their full names, ``<prefix>/<figure>``.

        Args:
            **figures: numbers by their short names.
        """
        prefix = self.figure_prefix or type(self).__name__.lower()
        return {f"{prefix}/{name}": value for name, value in figures.items()}

    def set_times(self, every: Time | None, start: Time, stop: Time) -> None:
        """Keep the time arguments, once they were found possible.

        Args:
            every: interval between updates, in optimizer steps (int) or as a fraction of the run (float); None:
                ``published_every``, shortened in short runs.
            start: first time of an update, in the same units.
            stop: last time of an update, in the same units.
        """
        check_times(start, stop, every)
        self.every, self.start, self.stop = every, start, stop

    def _random_mask(self, layer: str, weight: Tensor) -> Tensor:
        layout = layout_of(weight)
        shape = layout.whole_shape(weight)
        active = shape.numel() - self.planned_zeros(layer, shape.numel())
        whole = random_mask(shape, active, self.generator(layer, 0))
        return layout.part(whole).to(weight.device)

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
        planned = planned_total(self, self.entries, self.targets)
        return bool(self.masks) and self.weights.size_of_all - sum(self.weights.active_counts.values()) >= planned

    def measured_sparsity(self) -> dict[str, float]:
        """Fractions of zeros, counted in the masks.

        ``sparsity/total`` is over the selected weights, ``sparsity/model`` over all parameters, and ``sparsity/<parameter>`` of each
        sparse one. Zeros of the weights themselves would be more: a weight that has just grown is zero at first.

        Raises:
            RuntimeError: before the first ``fit``, when there are no masks yet.
            ValueError: after a run, where the model holds weights that the masks do not belong to.
        """
        if not self.masks:
            raise RuntimeError(
                f"{type(self).__name__} has no masks yet: they are made at the start of fit. Before that, see "
                "plan(model)."
            )
        if self.attachment.host is None:  # in a run the engine keeps them together, and dense copies come and go
            checkpoint.refuse_foreign_weights(self.weights.held_masks, self.params)
            refuse_foreign_places(self.weights, self.weights.layers_stored)
        return joint_sparsity([self.weights], sum(e.size for e in self.entries)) | layer_sparsity(self.weights)

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
            f"{self.step} steps were taken and the target is due at step {self.times.stop}. Train longer, or give an "
            "earlier stop=."
        )

    def plan(self, model: nn.Module | None = None) -> Plan:
        """The table of every parameter, its shape, its target and, where it stays dense, why.

        Args:
            model: any module, at any time; by default the one of the latest ``fit``.

        Raises:
            ValueError: no model is known yet, or the arguments do not fit it.
            TypeError: ``model`` is not a module.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"model={shown_short(model)} is not a torch module. Give one, or None for that of the latest fit."
            )
        if model is not None:
            model = getattr(model, "_orig_mod", model)  # of torch.compile
            entries = with_awaited(self, select(model, self.include, self.exclude, self.keep_dense))
            known = self.attachment.shares
            find_shares(self, model, for_targets(entries), self.saved)
            targets = self.share_out(for_targets(entries))
            self.attachment.shares = known
        elif self.entries:
            entries, targets = self.entries, self.targets
        else:
            raise ValueError("plan() knows no model yet. Give one, plan(model), or call it after fit has started.")
        asked = self.distribution
        total = asked if isinstance(asked, str | Mapping) else checkpoint.shown(asked)
        target = total if decides_total(asked) else f"sparsity {self.target_sparsity:g}"
        zeros = self.parameter_zeros(entries, targets)
        remarks = pattern_remarks(self, entries, zeros)
        for name, text in remarks_of_minimum(self, entries, targets).items():
            remarks[name] = "; ".join(filter(None, (remarks.get(name), text)))
        rows = plan_rows(entries, zeros, remarks)
        made = Plan(f"{type(self).__name__}: {target}", rows, frozenset(zeros), remark=storage_remark(self))
        return with_joint_rows(self, made, entries, targets)

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        """Target sparsity of every layer.

        Args:
            entries: every parameter of the model; those without a reason are sparse.
        """
        if follow_from_model(self):
            return found_targets(self, entries)
        if not are_joint(self):
            return layer_targets(self.distribution, entries, self.target_sparsity)
        refuse_unreachable(self, entries)
        return layer_targets(without_thresholds(self.distribution, self.target_sparsity), entries, self.target_sparsity)

    def parameter_zeros(self, entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
        """Planned zeros of every sparse parameter.

        Args:
            entries: every parameter of the model.
            targets: sparsity of every sparse layer, as :meth:`share_out` gives it.
        """
        return zeros_by_parameter(entries, targets)

    @property
    def arguments(self) -> dict[str, str]:
        """Constructor arguments as text; each is kept under its own name."""
        return {name: checkpoint.shown(value) for name, value in argument_values(self, Options).items()}

    def __repr__(self) -> str:
        asked = {name: checkpoint.shown(value) for name, value in storage_asked(self).items()}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in (self.arguments | asked).items())})"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the hold on a model, its optimizers and the host stay behind."""
        owned = self.owners.owns
        return {**vars(self), "owners": Ownership.between_runs(owned, self.params, len(owned))}
