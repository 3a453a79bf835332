"""Gradients between the backward pass and the optimizer's step: masked, kept dense, and kept finite."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core.gradient_mask import MasksGradients, refuse_unannounced_mask
from sparse_callbacks.core.gradients import DenseGradients
from sparse_callbacks.core.live.live_records import Recorder, are_finite, forget_records
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.step import Step


class GradientCare:
    """What the engine does to gradients before an optimizer steps, so that pruned weights change nothing of it.

    Args:
        method: the method of the run.
        params: the sparse parameters by name; none where no run goes on.
        gradients_read: for each optimizer, whether anybody reads gradients between backward and its step.
        two_pass: those of the optimizers that take the steps of another one, which perturbs weights before.
        recorder: switches the records of exchanged layers, which may have begun under an earlier care of the same run.
    """

    def __init__(
        self,
        method: Method,
        params: Mapping[str, nn.Parameter],
        gradients_read: Sequence[bool] = (),
        two_pass: Sequence[Optimizer] = (),
        recorder: Recorder | None = None,
    ) -> None:
        self.dense = DenseGradients(params)
        """Dense gradients of the steps that are to come."""
        self.two_pass = list(two_pass)
        """Optimizers that take the steps of another one."""
        self.finite: Tensor | bool = True
        """Whether the gradients of the latest step were finite; a tensor where nobody has waited for it yet."""
        self.recorder = Recorder() if recorder is None else recorder
        """Switches the records of exchanged layers."""
        self._method, self._gradients_read = method, list(gradients_read)
        self._masks_early = False  # gradients were masked after a backward pass, by the masks of the weights

    def begin_step(self, index: int, tick: int, gradients_read: bool) -> Step:
        """The step of an optimizer whose gradients are complete.

        Args:
            index: the position of the optimizer in the run.
            tick: the number of the optimizer step in the run.
            gradients_read: whether somebody reads the gradients of this step in any case.
        """
        method = self._method
        method.weights.follow_parts()
        if method.owners.optimizers[index] in self.two_pass:
            # of the second pass: the first one has moved only weights that are active
            for name in method.owners.steps[index]:
                if method.weights.has_copy(name) or isinstance(method, MasksGradients):
                    self.dense.give_back(name, method.weights)
        return self._step(index, tick, gradients_read)

    def note_finite(self, step: Step) -> None:
        """Note whether the gradients of the step are finite, and keep what is not from pruned weights."""
        step.finite_flag = self._all_finite(step)
        if not are_finite(self._exchanged(step.names)):
            step.finite_flag = False
        if step.finite_flag is not True:
            self._keep_from_pruned(step)
        self.finite = step.finite_flag

    def edited(self, step: Step) -> None:
        """The method has edited the gradients of the step: refuse it where it found other ones than it expects."""
        if self._masks_early:
            refuse_unannounced_mask(self._method, step)

    def after_backward(self, scale: float, reduced: bool, optimizers: Sequence[Optimizer]) -> None:
        """Mask the gradients now, and keep dense ones where a step needs them.

        Args:
            scale: the factor by which a GradScaler has multiplied the gradients.
            reduced: whether the backward pass has reduced the gradients over ranks.
            optimizers: those whose gradients are masked.
        """
        method = self._method
        for index, optimizer in enumerate(method.owners.optimizers):
            if optimizer not in optimizers:
                continue
            coming = self._step(index, tick=-1)
            if isinstance(method, MasksGradients) and optimizer not in self.two_pass:
                for name in coming.names:
                    method.mask_gradient(name)
                continue
            wanted = method.wants_dense_gradients(coming) or isinstance(method, MasksGradients)
            copied = [name for name in coming.names if method.weights.has_copy(name)]
            # a GradScaler that finds inf skips the step; without one a clip would spread it
            if copied and scale == 1.0 and self._all_finite(coming) is not True:
                self._keep_from_pruned(coming)
            exchanged = method.weights.layers_stored
            others = [name for name in coming.names if name not in copied and name not in exchanged]
            kept = [*(others if wanted else ()), *(copied if optimizer in self.two_pass else ())]
            self.dense.keep_and_mask(kept, method.weights, scale, reduced)
            if not wanted:
                for name in others:
                    method.weights.mask_gradient(name)
            self._masks_early |= bool(others)

    def clean_state(self, step: Step) -> None:
        """Clear what the optimizer's state of pruned weights should not hold for long."""
        exchanged = self._method.weights.layers_stored
        for name in (n for n in step.names if n not in exchanged):
            p, pruned = self._method.params[name], ~self._method.weights.masks[name]
            if step.masked_gradients:
                fresh = self._method.owners.fresh[step.index]
                torch_optimizers.avoid_slow_square_roots(step.optimizer, fresh, p, pruned)
            elif step.finite_flag is not True:  # nobody has waited for it, and gradients were not masked
                torch_optimizers.clear_non_finite_state(step.optimizer, p, pruned)

    def look_ahead(self, index: int) -> None:
        """A window of an optimizer begins: let exchanged layers record what an update at its end looks at.

        Args:
            index: the position of the optimizer in the run.
        """
        method = self._method
        if not (layers := self._exchanged(method.owners.owns[index])):
            return
        calendar, progress = method.calendar, method.progress
        wanted = progress.may_be_due(index) and method.wants_dense_gradients(self._step(index, tick=-1))
        if wanted and calendar is not None:
            wanted = progress.due(index, calendar)  # exactly, where it is near
        for layer in layers:
            self.recorder.record(layer, wanted)

    def skipped(self, step: Step) -> None:
        """A GradScaler has skipped the step: its gradients count for nothing."""
        forget_records(self._exchanged(step.names))

    def end(self) -> None:
        """The run is over: nothing is recorded any more. What an open window has recorded is kept for a checkpoint."""
        self._method.weights.keep_records()
        self.recorder.end()

    def _exchanged(self, names: Sequence[str]) -> list[SparseLinear]:
        layers = self._method.weights.layers_stored
        return [layers[n] for n in names if n in layers] if layers else []

    def _step(self, index: int, tick: int, gradients_read: bool = False) -> Step:
        method = self._method
        return Step(
            index,
            tick,
            method.owners,
            method.weights,
            method.progress,
            method.calendar,
            self.dense,
            gradients_read or self._gradients_read[index],
        )

    def _all_finite(self, step: Step) -> Tensor | bool:
        # of all that the optimizer steps: a parameter of two optimizers belongs to one of them
        names = self._method.owners.steps[step.index]
        found = torch_optimizers.all_finite([g for n in names if (g := step.gradient(n)) is not None])
        return self._method.weights.everywhere(found)

    def _keep_from_pruned(self, step: Step) -> None:
        """A gradient may be inf or NaN: where it is one of a pruned weight, active weights step all the same."""
        weights = self._method.weights
        weights.may_hold_inf = True
        for name in self._method.owners.steps[step.index]:
            if weights.has_copy(name):  # neither the dense values nor the optimizer's momentum must keep it
                weights.mend_gradient(name)
        if not self._method.reads_dense_gradients:
            # gradients of pruned weights may be anything: only those of active ones decide
            for name in step.names:
                weights.mask_gradient(name)
            step.finite_flag = self._all_finite(step)
