"""The engine: drives one method over one model and its optimizers, and keeps the invariant."""

import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core import topology
from sparse_callbacks.core.agreement import refuse_unequal_weights
from sparse_callbacks.core.checkpoint import SavedRun, state_of
from sparse_callbacks.core.doctor.doctor import Doctor
from sparse_callbacks.core.first_gradients import SilenceWarning
from sparse_callbacks.core.fresh_weights import rescale_fresh, warn_of_start
from sparse_callbacks.core.gradient_care import GradientCare
from sparse_callbacks.core.gradients import DenseGradients
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.live.live_records import put_back_records
from sparse_callbacks.core.live.live_runs import note_places, refuse_matrix_optimizers
from sparse_callbacks.core.live.lost_writes import LostWrites
from sparse_callbacks.core.live.uncompiled import leave_abandoned_runs
from sparse_callbacks.core.loop_steps import next_tick
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.nm_layers import changed_groups
from sparse_callbacks.core.optimizer_hold import OptimizerHold
from sparse_callbacks.core.optimizer_modes import mask_averages
from sparse_callbacks.core.optimizer_needs import keeps_optimizers, refuse_optimizers, refuse_replaced_steps
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.record.recorder import RunRecorder
from sparse_callbacks.core.run_beginning import RunBeginning
from sparse_callbacks.core.scored_start import first_score, renew_weights, take_scores
from sparse_callbacks.core.selection import Entry, select
from sparse_callbacks.core.sparse_layers.moved_places import Move
from sparse_callbacks.core.step import ReplacesSteps, SetsRates, Step
from sparse_callbacks.core.thawed import have_moved, thawed_names
from sparse_callbacks.core.topology import EverActive, Update
from sparse_callbacks.core.weights import SparseWeights

# steps between two calls of optimizers.avoid_slow_square_roots (what it writes decays), and two looks at other ranks
ROOTS_EVERY = 100


class Engine:
    """Drives one method over one model, so that between optimizer steps every sparse parameter holds ``mask * dense``.

    The host calls :meth:`bind` when a run begins, :meth:`before` at every optimizer step once its gradients are
    complete, :meth:`batch_over` where a batch ends, and :meth:`unbind`. The optimizers themselves call
    :meth:`after`.

    Args:
        method: whose masks these are. The engine asks it, and never the other way round.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.events: dict[str, float] = {}
        """Figures of the latest update and of phases that have begun, until the host logs them."""
        self.restart_wanted = False
        """The optimizers and their schedules shall be configured anew before the next batch that opens a window."""
        self.skipped = 0
        """Announced steps of this fit that were not taken, by a GradScaler's choice."""
        self.doctor = Doctor(method, self._warned)
        """Warns of what goes wrong in the run."""
        self.recorder: RunRecorder | None = None
        """Keeps the record of the run, where somebody wants one."""
        self._silence, self._lost_writes = SilenceWarning(self.method), LostWrites(self.method)
        self._seen: set[int] = set()  # optimizers of this run that have taken a step
        self._begins_anew = False  # the weights of a new run are not written yet
        self._has_scored = False
        self._release()

    def _release(self) -> None:
        """The fields that live as long as the engine is bound to optimizers."""
        self._hold = OptimizerHold(Ownership([], {}), SparseWeights({}, {}, {}), self.after)
        self._care = GradientCare(self.method, {})
        self._steps: dict[int, Step] = {}
        self._replaceable: list[Optimizer] = []

    # ------------------------------------------------------------------ a run begins and ends

    def bind(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        optimizers: Sequence[Optimizer],
        gradients_read: Sequence[bool],
        host: Host,
        two_pass: Sequence[Optimizer] = (),
    ) -> None:
        """Take hold of the sparse parameters of a run. No value changes before :meth:`write`.

        With ``method.saved`` its masks go on; otherwise those of the last run with the same model, and otherwise
        initial ones are made.

        Args:
            model: the module whose ``named_parameters`` the masks go by.
            entries: all parameters; those without a reason become sparse.
            optimizers: the optimizers of the run.
            gradients_read: for each optimizer, whether anybody reads gradients between backward and its step.
            host: who runs the loop.
            two_pass: those of the optimizers that take the steps of another one, which perturbs weights before.
        """
        method = self.method
        self.end_window()  # of a run whose end nobody has announced
        leave_abandoned_runs()
        self.skipped, self.restart_wanted = 0, False
        self._seen, self._lost_writes = set(), LostWrites(method)
        self.doctor.forget()
        with method.attachment.begins(host):
            beginning = RunBeginning(method, model, entries, optimizers)
        if beginning.is_new:
            self.forget()
        beginning.take_effect()
        method.attachment.enter(model, host)
        self._begins_anew, self._has_scored = beginning.is_new, False
        if beginning.is_new and first_score(method) is None:
            warn_of_start(method)
        self._take_hold(beginning.owners, gradients_read, two_pass)
        method.attach(model)

    def forget(self) -> None:
        """Start anew: no masks, no counters, no state of the method."""
        method = self.method
        method.aux, method.progress, method.calendar = {}, Progress(method.first_update), None
        method.weights = SparseWeights(method.params, method.weights.entries, {})
        method.attachment.forget()
        self.events = {}

    def rebind(
        self, optimizers: Sequence[Optimizer], gradients_read: Sequence[bool], two_pass: Sequence[Optimizer] = ()
    ) -> None:
        """Go on with other optimizers for the same parameters, in the same order."""
        owners = Ownership(optimizers, self.method.params)
        refuse_optimizers(self.method, owners)
        refuse_matrix_optimizers(optimizers, self.method.weights.layers_stored)
        self._take_hold(owners, gradients_read, two_pass)

    def take_up(
        self,
        trained: Set[int],
        optimizers: Sequence[Optimizer],
        gradients_read: Sequence[bool],
        two_pass: Sequence[Optimizer] = (),
    ) -> list[str] | None:
        """Let layers that have begun to be trained become sparse, and follow parameters to their optimizers.

        Call it between two steps.

        Args:
            trained: ``id`` of every parameter that some optimizer of the loop steps.
            optimizers, gradients_read, two_pass: see :meth:`bind`.

        Returns:
            Names of the parameters that have become sparse; None where nothing has changed.
        """
        method, dense = self.method, self._care.dense
        thawed = thawed_names(method, trained)
        if thawed:
            entries = select(method.model, method.include, method.exclude, method.keep_dense, set(trained))
            weights = method.weights
            # the run goes on from its own state, as a resumed one does, with more layers
            method.saved = SavedRun.of(self.state(), "of this run itself")
            try:
                beginning = RunBeginning(method, method.model, entries, optimizers, admits=True)
                beginning.take_effect()
                self._take_hold(beginning.owners, gradients_read, two_pass)
                method.attach(method.model)
            finally:
                method.saved = None
            method.weights.take_over_watchers(weights)
            self.write()
            self.begin_window()
        elif have_moved(method, optimizers):
            method.progress.begin(len(optimizers))
            self.rebind(optimizers, gradients_read, two_pass)
            self.begin_window()
        else:
            return None
        self._care.dense.take_over(dense)
        return thawed

    def _take_hold(self, owners: Ownership, gradients_read: Sequence[bool], two_pass: Sequence[Optimizer]) -> None:
        method = self.method
        self._hold.move_on()
        recorder = self._care.recorder
        self._release()
        self._care = GradientCare(method, method.params, gradients_read, two_pass, recorder)
        method.owners = owners
        self._hold = OptimizerHold(owners, method.weights, self.after, isinstance(method, SetsRates))

    def expect_gradients(self, epoch: int, steps: float = math.inf) -> None:
        """Training begins: warn of sparse parameters without a gradient when enough steps are over, or the first epoch.

        Args:
            epoch: the epoch (from 0) that begins or goes on.
            steps: the number of optimizer steps in an epoch, as far as it is known.
        """
        self._silence.expect(epoch, steps)
        self.doctor.begin()

    def epoch_over(self) -> None:
        """An epoch is over; of interest is the first one, see :meth:`expect_gradients`."""
        self._silence.epoch_over()
        self.doctor.epoch_over()

    def unbind(self) -> None:
        """The run is over: take all hooks away; masks and counters stay."""
        method = self.method
        self.end_window()  # first: whatever fails below, compiled code of this process runs again
        if method.attachment.in_training:  # a last pruning, which no step has followed
            mask_averages(method.owners.optimizers, method.weights)
        self.doctor.end()
        self._lost_writes.look()
        self._hold.end_run()
        dense = self._care.dense
        self._release()
        self._care.dense = dense  # a checkpoint of a run that was broken off within a window holds them
        note_places(method.weights)
        method.weights.release_memory()
        method.attachment.leave()
        method.owners = Ownership.between_runs(method.owners.owns, method.params, len(method.owners.owns))

    def end_window(self) -> None:
        """Training has ended, in whatever way: nothing is recorded any more, and compiled code runs compiled."""
        self._care.end()

    @property
    def is_bound(self) -> bool:
        """A run is going on."""
        return bool(self._hold.handles)

    # ------------------------------------------------------------------ one optimizer step

    def before(self, optimizer: Optimizer, tick: int) -> Step:
        """Gradients are ready and the step comes at once: :meth:`announce` it and :meth:`enter_step`.

        Args:
            optimizer: the optimizer that is about to step.
            tick: the number of the optimizer step in the run, replaced and skipped ones included.
        """
        step = self.announce(optimizer, tick)
        self.enter_step(optimizer)
        return step

    def announce(self, optimizer: Optimizer, tick: int, gradients_read: bool = False) -> Step:
        """Gradients are ready: the method edits them, or replaces the step.

        Args:
            optimizer: the optimizer that is about to step.
            tick: the number of the optimizer step in the run, replaced and skipped ones included.
            gradients_read: whether somebody reads the gradients of this step in any case.
        """
        method = self.method
        index = method.owners.index(optimizer)
        self._lost_writes.look()
        last = self._steps.get(index)
        if last is not None and last.tick == tick:
            raise ValueError(torch_optimizers.second_gradient(type(optimizer).__name__))
        step = self._steps[index] = self._care.begin_step(index, tick, gradients_read)
        if step.names:
            self._silence.look(step)
            self._care.note_finite(step)
            if self.doctor.waits:
                self.doctor.look(step)
            method.before_step(step)
            self._care.edited(step)
        return step

    def enter_step(self, optimizer: Optimizer) -> None:
        """The announced step is taken now: parameters with a dense copy hold their dense values, unless an update
        replaces the step."""
        method = self.method
        index = method.owners.index(optimizer)
        step = self._steps[index]
        # in a replaced step nothing moves, at whatever rate
        self._hold.rates.want(index, None if step.replaced else step.rates)
        if not step.replaced:
            method.weights.swap_in(method.owners.steps[index])

    @property
    def dense_gradients(self) -> DenseGradients:
        """Dense gradients of the steps that are to come."""
        return self._care.dense

    def after_backward(
        self, scale: float = 1.0, reduced: bool = True, optimizers: Sequence[Optimizer] | None = None
    ) -> None:
        """Mask the gradients now, before anybody else uses them, and keep dense ones where a step needs them.

        In manual optimization the user may clip them at once; an optimizer of two passes perturbs weights by them, and
        only active ones may move.

        Args:
            scale: the factor by which a GradScaler has multiplied the gradients.
            reduced: whether the backward pass has reduced the gradients over ranks.
            optimizers: those whose gradients are masked; None: all.
        """
        self._care.after_backward(scale, reduced, self.method.owners.optimizers if optimizers is None else optimizers)

    def announce_by_hooks(self) -> None:
        """Announce the steps of optimizers that another one steps, which the host does not notice, by their own pre
        hooks: weights are back where they were then, and the gradients of the second pass complete."""
        self._hold.announce_by_hooks(self._care.two_pass, self._step_begins)

    def _step_begins(self, optimizer: Optimizer) -> None:
        if self.announce(optimizer, next_tick(optimizer, self)).replaced:
            self.withhold(optimizer)
        self.enter_step(optimizer)

    @property
    def has_two_passes(self) -> bool:
        """Some optimizer perturbs weights and takes gradients again before its step."""
        return bool(self._care.two_pass)

    def unseen_optimizers(self) -> list[tuple[str, list[str]]]:
        """Class of each optimizer that has taken no step in this run yet, and its parameters that no other has
        stepped."""
        owners, seen = self.method.owners, {n for i in self._seen for n in self.method.owners.steps[i]}
        return [
            (type(optimizer).__name__, [n for n in owners.owns[index] if n not in seen])
            for index, optimizer in enumerate(owners.optimizers)
            if index not in self._seen and owners.owns[index]
        ]

    @property
    def begun_steps(self) -> Set[int]:
        """Indices of the optimizers whose steps were announced by hooks since the last batch ended."""
        return self._hold.begun

    def withhold(self, optimizer: Optimizer) -> None:
        """Leave ``optimizer`` without gradients for the step that an update replaces."""
        if not isinstance(self.method, ReplacesSteps) and optimizer not in self._replaceable:
            refuse_replaced_steps(self.method, optimizer)  # nobody could know before that the method does so
            self._replaceable.append(optimizer)
        step = self._steps[self.method.owners.index(optimizer)]
        step.group_numbers = torch_optimizers.group_numbers(optimizer)
        self._care.dense.take_away(optimizer, step.tick)

    def after(self, optimizer: Optimizer, *_: object) -> None:
        """The optimizer's own post hook: it fires when a step was really taken, and not where a GradScaler skipped
        it."""
        method = self.method
        if optimizer not in method.owners.optimizers:
            return  # a wrapper around one of them, such as Fabric's, fires its hooks too: the step within is to come
        index = method.owners.index(optimizer)
        self._hold.rates.put_back(index)
        step = self._steps.get(index)
        if step is None and not method.host.announces_steps:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called past the host, so {type(method).__name__} saw no "
                "gradients. In manual "
                "optimization step through self.optimizers(), not through the raw torch optimizer."
            )
        stepped = method.owners.steps[index]
        method.weights.absorb(stepped)  # of a step that nobody announced: the copies were not swapped in for it
        # before an update too: a weight that it grows must start at zero
        method.write(stepped, self._care.finite is True)
        # a subclass that calls its parent's step fires the hooks of both
        if step is None or step.taken or not step.names:
            return
        step.taken = True
        self._seen.add(index)
        if self.recorder is not None:
            self.recorder.step_taken(method, step)
        for group, numbers in zip(optimizer.param_groups, step.group_numbers, strict=False):
            group.update(numbers)  # of a step that moved nothing: what optimizers count for a whole group stays too
        self._conclude(step)
        self._care.dense.forget(step.names)
        self._care.look_ahead(index)

    def _conclude(self, step: Step) -> None:
        """Count the step, and take the masks of the update that it brings."""
        method = self.method
        if step.replaced:
            self._take(step, method.new_masks(step))
            return
        if self._care.dense.withheld(step.optimizer, step.tick):
            return  # another callback on this optimizer replaced the step: nothing was stepped
        count = method.progress.counts[step.index]
        count.add(step.finite_flag)
        update = method.after_step(step)
        if update is not None:
            self._take(step, update)
        if count.at_most() % ROOTS_EVERY == 1:
            self._care.clean_state(step)
            refuse_unequal_weights(method, step.names)  # of methods without updates, and after the last one

    def _take(self, step: Step, update: Update) -> None:
        """Make the masks of an update those of the network, and keep its figures for the log."""
        method = self.method
        refuse_unequal_weights(method, step.names)  # before all ranks take one mask, behind which other weights may lie
        owners = method.owners if keeps_optimizers(method) else None
        ever_active = EverActive(method.aux, method.weights)
        new_weights, before = partial(method.new_weights, step), self.doctor.masks_before(update)

        def note(name: str, move: Move) -> None:
            self.doctor.note(name, move)
            if method.explores:
                ever_active.note(name, move)

        changed = topology.take(method.weights, owners, update.masks, new_weights, update.moves, note)
        method.progress.mark_done(step.index)
        self.events |= {**update.figures, "update/changed": changed}
        self.events |= changed_groups(method, method.weights.entries, before, method.weights.held_masks)
        if method.explores:
            ever_active.add(update.masks)
            self.events["update/ever_active"] = ever_active.share()
        method.after_update(step)
        self.doctor.updated(step, before, update.figures, changed)
        # of all, and last: a method may have ended dense copies
        mask_averages(method.owners.optimizers, method.weights, step.names)

    def passed(self, batch: Any, passes: int = 1) -> None:
        """A batch has passed through the network for the method to look at, and not to train.

        Args:
            batch: the batch.
            passes: what was computed, in forward passes.
        """
        if self.recorder is not None and self.method.attachment.in_training:
            self.recorder.passed(self.method, batch, passes)

    def record_by(self, recorder: RunRecorder) -> None:
        """Tell ``recorder`` of the run from here on, and of the warnings that were given before."""
        self.recorder = recorder
        for text in self.doctor.given:
            recorder.warned(text)

    def _warned(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.warned(text)

    def batch_over(self) -> None:
        """A batch is over: forget the gradients of replaced steps, and what a step that was not taken had prepared."""
        for step in self._steps.values():
            if step.names and not step.taken and not step.skipped:
                step.skipped = True  # the GradScaler found an inf and skipped the step
                self.skipped += 1
                self._care.skipped(step)
        self._hold.begun.clear()
        self._hold.rates.put_back()
        self.method.weights.swap_out(self.method.params)
        self._care.dense.free(self.method.owners.optimizers)

    def make_scores(self) -> None:
        """Let a new run make its masks by a score where the method has one. No weight is written, so that several methods of
        a model all score the weights that it came with."""
        if self._begins_anew and not self._has_scored and take_scores(self.method):
            warn_of_start(self.method)
        self._has_scored = True

    def begin_weights(self) -> None:
        """Training begins: a new run makes its masks by a score where the method has one. :meth:`write` the masks, and make
        the weights of a new run larger where the method rescales."""
        self.make_scores()
        if self._begins_anew:
            renew_weights(self.method)
        self.write()
        if self._begins_anew:
            rescale_fresh(self.method)
        self._begins_anew = False  # a run that goes on has weights that were rescaled when it began
        self.begin_window()

    def write(self) -> None:
        """Restore the invariant in all sparse parameters."""
        self.method.write(None, self._care.finite is True)
        mask_averages(self.method.owners.optimizers, self.method.weights)

    def begin_window(self) -> None:
        """Training begins or goes on, perhaps within an accumulation window: see :meth:`GradientCare.look_ahead`."""
        method = self.method
        method.weights.left_records = {}
        for index in range(len(method.owners.optimizers)):
            self._care.look_ahead(index)
        if method.saved is not None:
            put_back_records(method.weights.layers_stored, method.saved.records)

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs: tensors, numbers and strings only."""
        return state_of(self.method)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: hooks, optimizers and the step that is being taken stay behind."""
        return {name: getattr(self, name) for name in ("method", "events", "restart_wanted", "skipped")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self.recorder, self.doctor = None, Doctor(self.method, self._warned)
        self._silence, self._lost_writes = SilenceWarning(self.method), LostWrites(self.method)
        self._seen, self._begins_anew, self._has_scored = set(), False, False
        self._release()
