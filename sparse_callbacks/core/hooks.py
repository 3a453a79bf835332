"""Hooks that a method overrides, each with what it does by default, and facts of a method's class."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from sparse_callbacks.core.record.multiply_adds import WeightsInStep
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.core.weights import SparseWeights

Figures = Mapping[str, float]
"""Figures for the log by their full names."""


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


class Hooks:
    """The hooks of a method: the engine calls each of them at its time, and a method overrides those that it needs.

    What concerns one optimizer step arrives as a :class:`~sparse_callbacks.core.step.Step`.
    """

    weights: SparseWeights
    """Masks and parameters."""

    # ------------------------------------------------------------------ facts of a class

    schedulable: ClassVar[str | None] = None
    """Name of the argument that may be a schedule."""
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

    # ------------------------------------------------------------------ what a method overrides

    def attach(self, model: nn.Module) -> None:
        """Look at the model, once, when the masks are made and before the first batch.

        Args:
            model: the model of the run, without wrappers.

        It is also called outside of a run, where no host is there, when the state of a checkpoint whose weights were
        loaded is taken; see :func:`~sparse_callbacks.core.restored.take_saved`.
        """

    def further_members(self, model: nn.Module, entries: Sequence[Entry]) -> Sequence[Entry]:
        """``entries`` with further parameters that this method masks (an empty ``reason``), such as biases of gated channels.

        Args:
            model: the model of the run, without wrappers.
            entries: every parameter of it, with the reason why it stays dense.
        """
        return entries

    def wants_dense_gradients(self, step: Step) -> bool:
        """Whether the coming step needs gradients of pruned weights; asked in manual optimization, where they are masked early.

        Args:
            step: the coming step.
        """
        return False

    def weights_in_step(self, step: Step) -> WeightsInStep:
        """How many weights a step multiplies, and of how many it needs the gradient, for the account of what training costs.

        By default the active ones; and the gradient of all weights of a parameter with a dense copy, and of every parameter
        where an update replaces the step. Asked once for each kind of step after masks have moved, not at every step.

        Args:
            step: a step of the kind that is asked about.
        """
        weights = self.weights
        learning = step.names if step.replaced else [n for n in step.names if weights.has_copy(n)]
        return WeightsInStep(weights.active_counts, {n: weights.size(n) for n in learning})

    def before_step(self, step: Step) -> None:
        """Edit or replace gradients, which are dense, reduced over ranks and unscaled, and not yet clipped.

        Keep no memory here: a step may still be skipped.

        Args:
            step: the step that is about to be taken.
        """
        step.mask_gradients()

    def after_step(self, step: Step) -> Update | None:
        """Called when the optimizer has stepped; what a method remembers from step to step is changed here.

        Args:
            step: the step that was taken.

        Returns:
            The update that falls now, or None.
        """
        return None

    def new_masks(self, step: Step) -> Update:
        """The update that takes the place of a step (:meth:`~sparse_callbacks.core.step.Step.replace`), or follows one.

        Args:
            step: the step that it replaces or follows.
        """
        return Update({name: mask for name, mask in self.weights.held_masks.items() if name in step.names})

    def new_weights(self, step: Step, name: str) -> Tensor | None:
        """Values for the born weights of a parameter, of its shape; None: they start from zero.

        Args:
            step: the step whose update has grown them.
            name: name of the parameter.
        """
        return None

    def after_update(self, step: Step) -> None:
        """Called when the masks of this step's update are in place.

        Args:
            step: the step of the update.
        """

    def write(self, names: Sequence[str] | None, finite: bool) -> None:
        """Restore the invariant: weights are what their masks leave of them.

        Args:
            names: names of sparse parameters whose optimizer has just stepped; None: all of them.
            finite: whether all values are known to be finite.
        """
        self.weights.write_masked(self.weights.params if names is None else names, finite)

    def start_copies(self, dense: Mapping[str, Tensor], new: Iterable[str]) -> None:
        """Start the dense copies of a method that ``keeps_dense``.

        Args:
            dense: dense values by parameter name, of the saved run or of the last one.
            new: names of parameters that had none, whose own values are the dense ones.
        """
        fresh = set(new)
        values = {n: dense.get(n, p.detach()) for n, p in self.weights.params.items() if n in dense or n in fresh}
        self.weights.start_copy(values)

    def rehearse(self) -> None:
        """Refuse now what would fail later in the run; no weight was changed yet."""

    def begin_training(self, epoch: int) -> Figures:
        """Called when everything is restored and the masks are written, before the first batch.

        Args:
            epoch: number of the epoch that begins, or goes on, from 0.

        Returns:
            Figures for the next row of the log, such as ``self.own_figures(phase=0)``.
        """
        return {}

    def window_start(self, batch: int) -> None:
        """Called before the first batch of each optimizer step: until that step the weights stay as they are.

        Args:
            batch: number of the batch in its epoch, from 0.
        """

    def batch_start(self, batch: int) -> None:
        """Called before each batch, also while gradients are accumulated; after :meth:`window_start` where there is one.

        Args:
            batch: number of the batch in its epoch, from 0.
        """

    def batch_end(self, end: BatchEnd) -> Figures:
        """Called when a batch is over, and with it the update that it may have brought.

        Args:
            end: how things stand then.

        Returns:
            Figures for the next row of the log, such as ``self.own_figures(phase=1)``.
        """
        return {}

    def epoch_start(self, epoch: int) -> None:
        """Called when an epoch begins, before its first batch is drawn.

        Args:
            epoch: number of the epoch, from 0.
        """

    def validation_end(self, metrics: Mapping[str, float], epoch: int | None) -> None:
        """Called when a validation is over, before checkpoints are written.

        Args:
            metrics: everything that was logged, by name.
            epoch: number of the epoch that it belongs to, from 0; None where the host has only tried its validation before
                training.
        """

    def epoch_end(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Called when an epoch is over, its validation included.

        Args:
            metrics: the latest values of everything that was logged, by name.
            epoch: number of the epoch, from 0.
        """
