"""A run of one method in a hand-written loop, driven by the hooks of its optimizers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from sparse_callbacks.core.agreement import refuse_unequal_runs
from sparse_callbacks.core.averages import HeldAverages
from sparse_callbacks.core.before_run import BeforeRun
from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.core.checkpoint import refuse_other_model
from sparse_callbacks.core.cut_weights import ResumedWeights
from sparse_callbacks.core.data_pass import batch_size
from sparse_callbacks.core.distributed import world_size
from sparse_callbacks.core.distributions import why_all_active
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.fresh_weights import refuse_rescaled_checkpoint
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.idle_run import why_idle
from sparse_callbacks.core.loop_binding import LoopBinding, ValuesBeforeMasks
from sparse_callbacks.core.loop_driver import NOT_COPIED, Clip, LoopDriver
from sparse_callbacks.core.loop_host import LoopHost
from sparse_callbacks.core.loop_optimizers import LoopOptimizers
from sparse_callbacks.core.loop_refusals import averaged_model, refuse_arguments, refuse_hostless
from sparse_callbacks.core.loop_state import LoopState, saved_state
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.recorded_loop import RecordedLoop
from sparse_callbacks.core.selection import Entry, layer_shapes
from sparse_callbacks.core.state_claims import refuse_impossible
from sparse_callbacks.core.storages.exchanged import Exchanged
from sparse_callbacks.core.storages.loop_exchange import FirstBatchOfLoop, exchange_for_loop
from sparse_callbacks.core.wrappers import plain_model, set_up_by


class SparseRun(RecordedLoop):
    """A run of one method in a hand-written loop; :func:`~sparse_callbacks.sparsify` begins it.

    Use it as a context manager, or call :meth:`close` after the loop.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: Any | Sequence[Any],
        steps: float,
        epoch: int | None,
        data: Any | None,
        forward: Forward | None,
        clip: Clip | None,
        state: Mapping[str, Any] | None,
        on_restart: Callable[[], object] | None,
    ) -> None:
        super().__init__()
        refuse_arguments(method, model, steps, epoch, forward, clip, on_restart)
        self.method, self._model = method, plain_model(model)
        self._optimizers = LoopOptimizers(optimizer)
        self._length = RunLength(
            lambda: float(steps), lambda: _epoch_length(epoch, data), samples=lambda: _samples_of_step(epoch, data)
        )
        self._on_restart = on_restart
        self._engine = Engine(method)
        self._host = LoopHost(self._model, self._engine, type(method).__name__, data, forward)
        self._binding = LoopBinding(self._engine, self._model, self._optimizers, self._host, clip is not None)
        self._driver = LoopDriver(self._binding, clip, on_restart)
        self._epoch = 0
        self._averages, self._averaged = HeldAverages(), list[nn.Module]()
        self._wrapper = set_up_by(model, self._optimizers.called)
        self._first_batch: FirstBatchOfLoop | None = None
        self._called = model
        self._begin(state)

    # ------------------------------------------------------------------ the run begins

    def _begin(self, state: Mapping[str, Any] | None) -> None:
        """Take hold of the model and write the masks; nothing is changed where something is refused."""
        method = self.method
        refuse_hostless(method, self._on_restart)
        self._driver.forget()
        before, exchanged = BeforeRun(method), ExitStack()
        try:
            done = self._exchange(state)
            exchanged.callback(done.undo)
            entries = self._binding.entries()
            self._binding.refuse_shared(e.name for e in entries if not e.reason)
            self._prepare(entries, state)
            before.keep_weights(method)
            self._start(before.values, done.foreign)
        except BaseException:
            self._release()
            before.bring_back(method)
            exchanged.close()
            raise
        if done.report:
            self._host.inform(done.report)
        done.forget()
        self._first_batch = FirstBatchOfLoop(done, self._optimizers.steppers, self._host.warn)
        self._begin_record(None if state is None or method.fresh_start else state.get("record"))

    def _exchange(self, state: Mapping[str, Any] | None) -> Exchanged:
        """Let the model have the layers that the method's storage asks for."""
        optimizers, goes_on = self._optimizers, state is not None and not self.method.fresh_start
        saved = self._read(state, "given as state=").run if state is not None and goes_on else None
        held = [*optimizers.given, *optimizers.steppers]
        with self.method.attachment.begins(self._host):
            return exchange_for_loop(
                self.method, self._model, held, saved, wrapper=self._wrapper, rows=self._host.rows_seen
            )

    def _prepare(self, entries: Sequence[Entry], state: Mapping[str, Any] | None) -> None:
        """Everything that may be refused; no weight changes."""
        method = self.method
        method.saved = None
        if state is not None and not method.fresh_start:
            saved = self._read(state, "given as state=")
            # GaP puts back the values of the run's first call to sparsify, also in a resumed run
            self._epoch, self._optimizers.first_groups = saved.epoch, saved.groups
            method.saved = saved.run
            self._averages = HeldAverages(saved.run.averages)
        elif state is not None:
            refuse_rescaled_checkpoint(method, "given as state=")
            self._engine.forget()
        elif method.attachment.model is not self._model or method.fresh_start:
            self._engine.forget()
        self._binding.bind(entries)
        if method.start is not None:
            method.calendar = method.make_calendar(self._length)
        refuse_unequal_runs(method, self._length.total)
        method.rehearse()
        if method.print_plan:
            self._host.inform(str(method.plan()))
        self._warn(entries)

    def _start(self, values: Mapping[str, Tensor], foreign: Sequence[str]) -> None:
        """Write the masks, and listen to the optimizers.

        Args:
            values: the values of the sparse parameters before masks are written.
            foreign: names of exchanged layers whose weights were not those of the saved run that goes on.
        """
        method, engine, driver = self.method, self._engine, self._driver
        engine.begin_weights()
        if method.saved is None:
            driver.before_masks = ValuesBeforeMasks(values, method.params)
        else:
            driver.resumed = ResumedWeights(method, method.saved, values, foreign)
        method.attachment.in_training = True
        engine.events |= method.begin_training(self._epoch)
        engine.expect_gradients(self._epoch, self._length.epoch())
        method.saved = None  # from here on the run speaks for itself
        driver.listen()
        self._binding.claim()
        method.epoch_start(self._epoch)
        method.window_start(driver.batches.number)

    def _warn(self, entries: Sequence[Entry]) -> None:
        method, name = self.method, type(self.method).__name__
        if text := why_all_active(method.distribution, layer_shapes(entries)):
            self._host.inform(text)
        if text := self._optimizers.why_not_resumed:
            self._host.warn(text)
        if method.calendar is None:
            return
        if method.saved is not None:
            text = method.calendar.why_other_times(method.saved.times, name)
        else:
            text = why_idle(method, self._length.total())
        if text:
            self._host.warn(text)
        elif method.saved is None:
            self._engine.doctor.length_known(self._length.total())

    # ------------------------------------------------------------------ in the loop

    def before_clipping(self, optimizer: Any) -> None:
        """Mask the gradients of ``optimizer`` now, for a loop that clips them itself.

        Call it between ``scaler.unscale_(optimizer)`` and clipping. ``clip=`` of :func:`~sparse_callbacks.sparsify` needs no such
        call.

        Args:
            optimizer: an optimizer of the run.

        Raises:
            ValueError: the optimizer is not one of this run.
            RuntimeError: it was called for this step already.
        """
        self._refuse_closed()
        self._driver.before_clipping(optimizer)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around forward and backward of each micro-batch; only ConstrainedL0 needs it.

        Inside, weights hold the sample of their gates, one sample through an accumulation window; outside they hold the
        medians, so validation, saving and copies go on outside. ``optimizer.step()`` may be in either place.
        """
        self._refuse_closed()
        with self._driver.batch():
            yield

    def average(self, averaged: nn.Module) -> None:
        """Hold an average of the weights, torch's ``AveragedModel``, to the masks until the run is over.

        Whenever ``averaged.update_parameters(model)`` is called, it averages effective weights. Pruned weights are zero in
        it at any time, and the average of a grown weight begins anew at its present value.

        Args:
            averaged: an ``AveragedModel`` of the model. In a resumed run give the same ones in the same order.

        Raises:
            ValueError: it holds no average of the sparse weights.
        """
        self._refuse_closed()
        inner = averaged_model(averaged, self.method.params)
        self._averages.hold(str(len(self._averaged)), averaged, inner, self.method)
        self._averaged.append(averaged)

    def epoch_end(self, metrics: Mapping[str, Any] | None = None) -> None:
        """An epoch and its validation are over.

        Args:
            metrics: what the validation measured, by name; CTRE looks for its ``monitor`` there.
        """
        self._refuse_closed()
        self._driver.epoch_over()
        found = {name: float(value) for name, value in (metrics or {}).items()}
        self.method.validation_end(found, self._epoch)
        self.method.epoch_end(found, self._epoch)
        if self._driver.record is not None:
            self._driver.record.epoch_end(found)
        self._epoch += 1
        self.method.epoch_start(self._epoch)

    def close(self) -> None:
        """The run is over: masks stay in the weights, and all hooks go.

        A last pruning that skipped steps have delayed beyond the run happens now. A target that was not reached is
        reported with a warning.
        """
        if self.is_closed:
            return
        engine, method = self._engine, self.method
        status = "failed"
        try:
            self._driver.finish()
            if not method.at_target:
                self._host.warn(method.shortfall())
            elif text := method.progress.why_unfinished(method.calendar, engine.skipped, type(method).__name__):
                self._host.warn(text)
            status = "finished"
        finally:  # a warning may be an error
            self._release(status)

    @property
    def is_closed(self) -> bool:
        """The run is over: steps of its optimizers are no longer masked."""
        return not self._engine.is_bound

    def _refuse_closed(self) -> None:
        if self.is_closed:
            raise RuntimeError("this run is closed. Begin another one with sparsify().")

    def _release(self, status: str = "stopped") -> None:
        self._end_record(status)
        if self._first_batch is not None:
            self._first_batch.end()
        self._engine.end_window()
        self._averages.end()
        self._driver.stop()
        self._binding.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self.is_closed:
            try:  # it may have come between the optimizer's step and ours
                self._engine.write()
                self._engine.batch_over()
            finally:
                self._release("failed" if issubclass(kind, Exception) else "stopped")

    # ------------------------------------------------------------------ what it has come to

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bool mask by parameter name, True where a connection is active; shape of the weight."""
        return self.method.masks

    @property
    def step(self) -> int:
        """Gradient steps taken, the most of any optimizer. A step that an update replaced does not count."""
        return self.method.step

    @property
    def updates(self) -> int:
        """Topology updates done."""
        return self.method.updates

    def plan(self) -> Plan:
        """The table of every parameter, its shape, its target and, where it stays dense, why."""
        return self.method.plan()

    def measured_sparsity(self) -> dict[str, float]:
        """``sparsity/total``, ``sparsity/model`` and ``sparsity/<parameter>``: fractions of zeros by the masks."""
        return self.method.measured_sparsity()

    def figures(self) -> dict[str, float]:
        """A row for a logger: :meth:`measured_sparsity`, the method's own figures and those of its latest update."""
        return self.measured_sparsity() | self.method.figures() | self._engine.events

    # ------------------------------------------------------------------ its state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs beside the model's and the optimizer's own states.

        Tensors, numbers and strings, which ``torch.load(weights_only=True)`` reads.
        """
        state = saved_state(self._engine, self._epoch, self._optimizers.first_groups)
        return state | self._averages.state() | self._record_state()

    def _read(self, state: Mapping[str, Any], path: str) -> LoopState:
        return LoopState.read(state, self.method, self._optimizers.first_groups, path)

    def __reduce__(self) -> Any:
        raise TypeError(NOT_COPIED)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, before the first step; the model may be loaded before or after.

        With ``storage="sparse"`` or ``"grouped"`` load it after: the layers that this run has exchanged have no pruned weights
        left. ``sparsify(..., state=)`` takes a model that was loaded before.

        Args:
            state: the saved state.

        Raises:
            RuntimeError: a step was taken already.
            ValueError: the state is not of this method, these arguments and this model.
        """
        self._refuse_closed()
        method, before = self.method, self._driver.before_masks
        if method.progress.most() or not before:
            raise RuntimeError(
                "load_state_dict() comes too late: steps were taken already. Call it before the first step, or give "
                "sparsify(..., state=)."
            )
        saved = self._read(state, "given to load_state_dict()").run
        dense = {e.name: e.reason for e in method.entries if e.reason}
        refuse_other_model(saved, method.params, method.weights.layers_stored, dense)
        planned = method.parameter_zeros(method.entries, method.targets)
        refuse_impossible(method, saved, self._model, planned, len(self._optimizers.steppers))
        self._release()
        # what the initial masks of this run have cut comes back, unless the model was loaded since
        method.weights.write_values(before.untouched(method.params))
        averaged, self._averaged = self._averaged, []
        self._begin(state)
        for one in averaged:
            self.average(one)


def _samples_of_step(epoch: int | None, data: Any | None) -> float | None:
    """Training samples of an optimizer step, over processes; None where nobody knows."""
    size, batches = batch_size(data), _epoch_length(None, data)
    if size is None:
        return None
    # fewer steps in an epoch than batches: the loop accumulates gradients
    accumulated = batches / epoch if epoch is not None and math.isfinite(batches) else 1.0
    return size * max(1.0, accumulated) * world_size()


def _epoch_length(epoch: int | None, data: Any | None) -> float:
    """Optimizer steps of an epoch; infinite where nobody knows."""
    if epoch is not None:
        return float(epoch)
    try:
        return float(len(data))  # type: ignore[arg-type]
    except TypeError:
        return math.inf
