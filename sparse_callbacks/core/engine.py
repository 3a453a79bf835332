"""The engine: drives one method over one model and its optimizers, and keeps the invariant."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core import topology
from sparse_callbacks.core.checkpoint import VERSION, SavedRun, refuse_foreign_weights, refuse_other_model
from sparse_callbacks.core.first_gradients import STEPS, FirstGradients
from sparse_callbacks.core.gradients import DenseGradients
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_modes import DenseInSwitch, is_schedule_free, mask_averages
from sparse_callbacks.core.optimizer_needs import keeps_optimizers, refuse_optimizers, refuse_replaced_steps
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.restored import aux_on_devices
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.state_claims import PLAN_CHANGED, refuse_impossible
from sparse_callbacks.core.step import ReplacesSteps, Step
from sparse_callbacks.core.topology import EverActive, Update
from sparse_callbacks.core.weights import SparseWeights

ROOTS_EVERY = 100  # steps between two calls of optimizers.avoid_slow_square_roots: what it writes decays


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
        self._first_gradients = FirstGradients(0, 0)
        self._release()

    def _release(self) -> None:
        """The fields that live as long as the engine is bound to optimizers."""
        self._handles: list[RemovableHandle] = []
        self._switches: list[DenseInSwitch] = []
        self._gradients = DenseGradients({})
        self._gradients_read: list[bool] = []
        self._steps: dict[int, Step] = {}
        self._finite: Tensor | bool = True

    # ------------------------------------------------------------------ a run begins and ends

    def bind(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        optimizers: Sequence[Optimizer],
        gradients_read: Sequence[bool],
        host: Host,
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
        """
        method, saved = self.method, self.method.saved
        self.skipped, self.restart_wanted = 0, False
        members = list(method.further_members(model, entries))
        parameters = dict(model.named_parameters())
        sparse = {e.name: e for e in members if not e.reason}
        params = {name: parameters[name] for name in sparse}
        kept = self._masks_of_last_run(model, params)
        if saved is not None:
            refuse_other_model(saved, params)
        targets = method.share_out(entries)
        if saved is not None:
            planned = method.parameter_zeros(members, targets)
            refuse_impossible(method, saved, model, planned, len(optimizers))
            dense = saved.dense
        else:
            refuse_foreign_weights(kept, params)
            dense = {n: method.weights.dense_values(n) for n in method.weights.copied if n in kept}
        owners = Ownership(optimizers, params)
        refuse_optimizers(method, owners)
        earlier = method.params.keys()
        method.entries, method.targets = members, targets
        method.owners = owners
        method.weights = SparseWeights(params, sparse, {})  # initial masks are made from the parameters
        masks = self._begin_masks(saved, kept, earlier)
        method.progress.begin(len(optimizers))
        method.weights = SparseWeights(params, sparse, masks)
        if method.keeps_dense:
            method.start_copies(dense, new=() if saved is not None else params.keys() - kept.keys())
        if method.explores:
            EverActive(method.aux, method.weights).add(params)
        method.attachment.enter(model, host)
        self._take_hold(owners, gradients_read)
        method.attach(model)

    def _masks_of_last_run(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Masks that go on where a second fit of the same model begins without a checkpoint."""
        if self.method.attachment.model is not model:
            return {}
        return {n: m for n, m in self.method.masks.items() if n in params and m.shape == params[n].shape}

    def _begin_masks(self, saved: SavedRun | None, kept: Mapping[str, Tensor], earlier: Any) -> Mapping[str, Tensor]:
        """The masks that the run begins with; counters and method state are restored, go on or are made anew with
        them."""
        method = self.method
        params = method.params
        if saved is not None:
            method.progress = Progress.restored(method.first_update, saved.progress)
            method.aux = aux_on_devices(saved.aux, params)
            return saved.masks
        if kept:  # layers that were added since the last run start like in a first one
            gone = (params.keys() | earlier) - kept.keys()
            went_on = {k: t for k, t in method.aux.items() if k.partition("/")[2] not in gone}
            method.aux = aux_on_devices(went_on, params)
            if gone:  # the targets of other layers may be others, and these masks keep their counts
                method.aux[PLAN_CHANGED] = torch.tensor(True)
            return kept if len(kept) == len(params) else {**method.initial_masks(), **kept}
        self.forget()
        return method.initial_masks()

    def forget(self) -> None:
        """Start anew: no masks, no counters, no state of the method."""
        method = self.method
        method.aux, method.progress, method.calendar = {}, Progress(method.first_update), None
        method.weights = SparseWeights(method.params, method.weights.entries, {})
        method.attachment.forget()
        self.events = {}

    def rebind(self, optimizers: Sequence[Optimizer], gradients_read: Sequence[bool]) -> None:
        """Go on with other optimizers for the same parameters, in the same order."""
        owners = Ownership(optimizers, self.method.params)
        refuse_optimizers(self.method, owners)
        self._take_hold(owners, gradients_read)

    def _take_hold(self, owners: Ownership, gradients_read: Sequence[bool]) -> None:
        method = self.method
        for switch in self._switches:
            switch.release()
        self._unhook()
        self._gradients = DenseGradients(method.params)
        self._gradients_read = list(gradients_read)
        method.owners = owners
        self._handles = [o.register_step_post_hook(self.after) for o in owners.optimizers]
        self._switches = [
            DenseInSwitch(o, method.weights, names)
            for o, names in zip(owners.optimizers, owners.steps, strict=True)
            if is_schedule_free(o)
        ]

    def expect_gradients(self, epoch: int, steps: float = math.inf) -> None:
        """Training begins: warn of sparse parameters without a gradient when enough steps are over, or the first epoch.

        Args:
            epoch: the epoch (from 0) that begins or goes on.
            steps: the number of optimizer steps in an epoch, as far as it is known.
        """
        resumed = self.method.saved is not None and (
            epoch > 0 or self.method.step >= STEPS
        )  # the first run has said it
        self._first_gradients = FirstGradients(0 if resumed else len(self.method.owners.optimizers), steps)

    def epoch_over(self) -> None:
        """An epoch is over; of interest is the first one, see :meth:`expect_gradients`."""
        self._warn_of_silence(self._first_gradients.end())

    def _warn_of_silence(self, names: Sequence[str]) -> None:
        if names:
            method = self.method
            method.host.warn(self._first_gradients.words(names, method.params, type(method).__name__))

    def unbind(self) -> None:
        """The run is over: take all hooks away; masks and counters stay."""
        method = self.method
        if method.attachment.in_training:  # a last pruning, which no step has followed
            mask_averages(method.owners.optimizers, method.weights)
        for switch in self._switches:
            switch.end_run()
        self._unhook()
        method.attachment.leave()
        method.owners = Ownership.between_runs(method.owners.owns, method.params, len(method.owners.owns))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._release()

    @property
    def is_bound(self) -> bool:
        """A run is going on."""
        return bool(self._handles)

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
        last = self._steps.get(index)
        if last is not None and last.tick == tick:
            raise ValueError(torch_optimizers.several_closures(type(optimizer).__name__))
        step = self._steps[index] = self._step(index, tick, gradients_read)
        if step.names:
            if index in self._first_gradients.looks_at:
                self._warn_of_silence(self._first_gradients.look(step))
            step.finite_flag = self._all_finite(step)
            if step.finite_flag is not True and not method.reads_dense_gradients:
                # gradients of pruned weights may be anything: only those of active ones decide
                for name in step.names:
                    method.weights.mask_gradient(name, finite=False)
                step.finite_flag = self._all_finite(step)
            self._finite = step.finite_flag
            method.before_step(step)
        return step

    def enter_step(self, optimizer: Optimizer) -> None:
        """The announced step is taken now: parameters with a dense copy hold their dense values, unless an update
        replaces the step."""
        method = self.method
        index = method.owners.index(optimizer)
        if not self._steps[index].replaced:
            method.weights.swap_in(method.owners.steps[index])

    def _step(self, index: int, tick: int, gradients_read: bool = False) -> Step:
        method = self.method
        return Step(
            index,
            tick,
            method.owners,
            method.weights,
            method.progress,
            method.calendar,
            self._gradients,
            gradients_read or self._gradients_read[index],
        )

    def _all_finite(self, step: Step) -> Tensor | bool:
        return torch_optimizers.all_finite([g for n in step.names if (g := step.gradient(n)) is not None])

    @property
    def dense_gradients(self) -> DenseGradients:
        """Dense gradients of the steps that are to come."""
        return self._gradients

    def after_backward(self, scale: float = 1.0, reduced: bool = True) -> None:
        """Manual optimization: mask the gradients now, before the user clips them, and keep dense ones where a step
        needs them.

        Args:
            scale: the factor by which a GradScaler has multiplied the gradients.
            reduced: whether the backward pass has reduced the gradients over ranks.
        """
        method = self.method
        for index in range(len(method.owners.optimizers)):
            coming = self._step(index, tick=-1)
            names = [name for name in coming.names if not method.weights.has_copy(name)]
            if method.wants_dense_gradients(coming):
                self._gradients.keep_and_mask(names, method.weights, scale, reduced)
            else:
                for name in names:
                    method.weights.mask_gradient(name)

    def withhold(self, optimizer: Optimizer) -> None:
        """Leave ``optimizer`` without gradients for the step that an update replaces."""
        if not isinstance(self.method, ReplacesSteps):
            refuse_replaced_steps(self.method, optimizer)  # nobody could know before that the method does so
        step = self._steps[self.method.owners.index(optimizer)]
        step.group_numbers = torch_optimizers.group_numbers(optimizer)
        self._gradients.take_away(optimizer, step.tick)

    def after(self, optimizer: Optimizer, *_: object) -> None:
        """The optimizer's own post hook: it fires when a step was really taken, and not where a GradScaler skipped
        it."""
        method = self.method
        if optimizer not in method.owners.optimizers:
            return  # a wrapper around one of them, such as Fabric's, fires its hooks too: the step within is to come
        index = method.owners.index(optimizer)
        step = self._steps.get(index)
        if step is None and not method.host.announces_steps:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called past the host, so {type(method).__name__} saw no "
                "gradients. In manual "
                "optimization step through self.optimizers(), not through the raw torch optimizer."
            )
        stepped = method.owners.steps[index]
        method.weights.absorb(stepped)  # of a step that nobody announced: the copies were not swapped in for it
        method.write(stepped, self._finite is True)  # before an update too: a weight that it grows must start at zero
        # a subclass that calls its parent's step fires the hooks of both
        if step is None or step.taken or not step.names:
            return
        step.taken = True
        for group, numbers in zip(optimizer.param_groups, step.group_numbers, strict=False):
            group.update(numbers)  # of a step that moved nothing: what optimizers count for a whole group stays too
        self._conclude(step)
        self._gradients.forget(step.names)

    def _conclude(self, step: Step) -> None:
        """Count the step, and take the masks of the update that it brings."""
        method = self.method
        if step.replaced:
            self._take(step, method.new_masks(step))
            return
        if self._gradients.withheld(step.optimizer, step.tick):
            return  # another callback on this optimizer replaced the step: nothing was stepped
        count = method.progress.counts[step.index]
        count.add(step.finite_flag)
        update = method.after_step(step)
        if update is not None:
            self._take(step, update)
        if step.masked_gradients and count.at_most() % ROOTS_EVERY == 1:
            for name in step.names:
                torch_optimizers.avoid_slow_square_roots(
                    step.optimizer,
                    method.owners.fresh[step.index],
                    method.params[name],
                    ~method.weights.masks[name],
                )

    def _take(self, step: Step, update: Update) -> None:
        """Make the masks of an update those of the network, and keep its figures for the log."""
        method = self.method
        owners = method.owners if keeps_optimizers(method) else None
        changed = topology.take(method.weights, owners, update.masks, lambda name: method.new_weights(step, name))
        method.progress.mark_done(step.index)
        self.events |= {**update.figures, "update/changed": changed}
        if method.explores:
            ever_active = EverActive(method.aux, method.weights)
            ever_active.add(update.masks)
            self.events["update/ever_active"] = ever_active.share()
        method.after_update(step)
        # of all, and last: a method may have ended dense copies
        mask_averages(method.owners.optimizers, method.weights, step.names)

    def batch_over(self) -> None:
        """A batch is over: forget the gradients of replaced steps, and what a step that was not taken had prepared."""
        for step in self._steps.values():
            if step.names and not step.taken and not step.skipped:
                step.skipped = True  # the GradScaler found an inf and skipped the step
                self.skipped += 1
        self.method.weights.swap_out(self.method.params)
        self._gradients.free(self.method.owners.optimizers)

    def write(self) -> None:
        """Restore the invariant in all sparse parameters."""
        self.method.write(None, self._finite is True)
        mask_averages(self.method.owners.optimizers, self.method.weights)

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs: tensors, numbers and strings only."""
        method = self.method
        return {
            "version": VERSION,
            "arguments": method.arguments,
            "times": [] if method.calendar is None else method.calendar.times(),
            **method.progress.state(),
            "masks": {n: m.clone() for n, m in method.masks.items()},
            "aux": {n: t.clone() for n, t in method.aux.items()},
            "dense": {n: method.weights.dense_values(n).clone() for n in method.weights.copied},
        }

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: hooks, optimizers and the step that is being taken stay behind."""
        return {name: getattr(self, name) for name in ("method", "events", "restart_wanted", "skipped")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._first_gradients = FirstGradients(0, 0)
        self._release()
