"""A run of one method in a hand-written loop, driven by the hooks of its optimizers."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_callbacks.core import distributed
from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core.before_run import BeforeRun
from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.core.checkpoint import SavedRun, check_state, refuse_other_model
from sparse_callbacks.core.distributions import why_all_active
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.hooks import BatchEnd, Hooks
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.loop_host import LoopHost
from sparse_callbacks.core.loop_refusals import (
    epoch_length,
    epoch_of,
    groups_of,
    refuse_arguments,
    refuse_hostless,
    restarts_optimizers,
)
from sparse_callbacks.core.loop_steps import (
    AfterEachCall,
    CalledOnce,
    StepInLoop,
    group_values,
    next_tick,
    places_of,
)
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.optimizer_modes import mode_of, switch_through
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.selection import Entry, layer_shapes, select
from sparse_callbacks.core.state_claims import refuse_impossible
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.two_pass import CallFirst, steppers, two_pass, why_not_resumed
from sparse_callbacks.core.unseen_steps import StepWatch
from sparse_callbacks.core.wrappers import plain_model, plain_optimizer

Clip = Callable[[list[nn.Parameter]], object]
"""A function that clips the gradients of the parameters that it is given, in place."""

# Every run that goes on, by model: two methods may not claim the same parameter.
_runs_of: WeakKeyDictionary[nn.Module, WeakSet["SparseRun"]] = WeakKeyDictionary()
# The same runs by optimizer: those that share one take their steps together.
_runs_on: WeakKeyDictionary[Optimizer, WeakSet["SparseRun"]] = WeakKeyDictionary()
_numbers = count()


class SparseRun:
    """A run of one method in a hand-written loop; :func:`sparsify` begins it.

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
        refuse_arguments(method, model, steps, epoch, forward, clip, on_restart)
        self.method, self._number = method, next(_numbers)
        self._model = plain_model(model)
        listed = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        self._wrappers: list[Any] = listed
        self._given = [plain_optimizer(o) for o in listed]
        torch_optimizers.refuse(self._given, scaler=False)
        self._optimizers = steppers(self._given, scaler=False)
        self._two_pass = two_pass(self._given, self._optimizers)
        torch_optimizers.refuse(self._two_pass, scaler=False)
        for wrapper, plain in zip(listed, self._given, strict=True):
            switch_through(wrapper, plain)
        self._length = RunLength(lambda: float(steps), lambda: epoch_length(epoch, data))
        self._clip, self._on_restart = clip, on_restart
        self._engine = Engine(method)
        self._host = LoopHost(self._model, self._engine, type(method).__name__, data, forward)
        # a method that is told when a micro-batch begins, because it samples gates, say, needs `with run.batch():`
        self._needs_batches = type(method).batch_start is not Hooks.batch_start
        self._first_groups = [group_values(o) for o in self._restarted]
        self._epoch = 0
        self._begin(state)

    # ------------------------------------------------------------------ the run begins

    def _begin(self, state: Mapping[str, Any] | None) -> None:
        """Take hold of the model and write the masks; nothing is changed where something is refused."""
        method = self.method
        entries = self._entries()
        self._refuse_shared(e.name for e in entries if not e.reason)
        refuse_hostless(method, self._on_restart)
        self._steps = [StepInLoop() for _ in self._optimizers]
        self._before_masks: dict[str, tuple[Tensor, int]] = {}
        self._batches, self._in_batch, self._had_batch, self._bare_backward = 0, False, False, False
        self._handles: list[RemovableHandle] = []
        self._pre_handles: list[Any] = []
        before = BeforeRun(method)
        try:
            self._prepare(entries, state)
            before.keep_weights(method)
            self._start(before.values)
        except BaseException:
            self._release()
            before.bring_back(method)
            raise

    def _prepare(self, entries: Sequence[Entry], state: Mapping[str, Any] | None) -> None:
        """Everything that may be refused; no weight changes."""
        method = self.method
        method.saved = None
        if state is not None and not method.fresh_start:
            name = type(method).__name__
            path = "given as state="
            saved = SavedRun.of(check_state(state, method.arguments, name, path), path)
            # GaP puts back the values of the run's first call to sparsify, also in a resumed run
            self._epoch, self._first_groups = epoch_of(state, path), groups_of(state, self._first_groups, path)
            method.saved = saved
        elif method.attachment.model is not self._model or method.fresh_start:
            self._engine.forget()
        self._bind(entries)
        if method.start is not None:
            method.calendar = method.make_calendar(self._length)
        method.rehearse()
        if method.print_plan:
            self._host.inform(str(method.plan()))
        self._warn(entries)

    def _start(self, values: Mapping[str, Tensor]) -> None:
        """Write the masks, and listen to the optimizers.

        Args:
            values: the values of the sparse parameters before masks are written.
        """
        method, engine = self.method, self._engine
        engine.write()
        if method.saved is None:
            self._before_masks = {n: (t, method.params[n]._version) for n, t in values.items()}
        method.attachment.in_training = True
        engine.events |= method.begin_training(self._epoch)
        engine.expect_gradients(self._epoch, self._length.epoch())
        method.saved = None  # from here on the run speaks for itself
        self._watch: StepWatch | None = StepWatch(engine)
        self._pre_handles = [o.register_step_pre_hook(self._before_step) for o in self._optimizers]
        for wrapper, given, stepper in zip(self._wrappers, self._given, self._optimizers, strict=True):
            if given is not stepper:
                # a wrapper of Fabric is of a subclass, and has the methods of the class of its own
                wrappers: list[Any] = [given] if wrapper is given else [given, wrapper]
                self._pre_handles.append(given.register_step_pre_hook(self._before_passes))
                self._pre_handles += [CallFirst(o, partial(self._pass_over, stepper)) for o in wrappers]
        self._hook()
        _runs_of.setdefault(self._model, WeakSet()).add(self)
        for optimizer in self._optimizers:
            _runs_on.setdefault(optimizer, WeakSet()).add(self)
        method.epoch_start(self._epoch)
        method.window_start(self._batches)

    @property
    def _restarted(self) -> list[Optimizer]:
        """The optimizers that start anew with a phase: those of the loop, and those that these hold for their steps."""
        return [*self._given, *self._two_pass]

    def _entries(self) -> list[Entry]:
        method, trained = self.method, torch_optimizers.parameter_ids(*self._optimizers)
        return select(self._model, method.include, method.exclude, method.keep_dense, trained)

    def _bind(self, entries: Sequence[Entry]) -> None:
        # masked before the step only where somebody reads gradients in it; otherwise masking the weights is enough
        reads = [self._clip is not None or not torch_optimizers.is_elementwise(o) for o in self._given]
        self._engine.bind(self._model, entries, self._optimizers, reads, self._host, self._two_pass)
        self._placed = places_of(self.method)
        self._share_dense_values()

    @torch.no_grad()
    def _share_dense_values(self) -> None:
        """Before DistributedDataParallel wraps the model each process may have weights of its own, which it overwrites;
        of dense copies it does not know."""
        weights = self.method.weights
        if distributed.world_size() > 1:
            mine = {name: weights.dense_values(name) for name in weights.copied}
            for name, value in distributed.from_owners(mine, dict.fromkeys(mine, 0)).items():
                mine[name].copy_(value)

    def _refuse_shared(self, names: Iterable[str]) -> None:
        mine = set(names)
        for run in _runs_of.get(self._model, ()):
            if run is not self and (both := sorted(mine & run.method.params.keys())):
                raise ValueError(
                    f"{type(run.method).__name__} and {type(self.method).__name__} both claim {', '.join(both)}. Give "
                    "each its own layers with include= or exclude=, or close() the run that is over."
                )

    def _warn(self, entries: Sequence[Entry]) -> None:
        method, name = self.method, type(self.method).__name__
        if text := why_all_active(method.distribution, layer_shapes(entries)):
            self._host.inform(text)
        if text := why_not_resumed(self._given, self._optimizers):
            self._host.warn(text)
        if method.calendar is None:
            return
        if method.saved is not None:
            text = method.calendar.why_other_times(method.saved.times, name)
        else:
            text = method.progress.why_idle(method.calendar, self._length.total(), name)
        if text:
            self._host.warn(text)

    def _hook(self) -> None:
        """All hooks besides those before a step."""
        # behind the engine's own, which bind registered
        self._handles = [o.register_step_post_hook(self._after_step) for o in self._optimizers]
        for index in range(len(self._optimizers)):
            if names := self.method.owners.owns[index]:
                # one parameter shows that a backward pass has run: see _after_backward
                first: Any = self.method.params[names[0]]  # the hook has no types in torch
                self._handles.append(first.register_post_accumulate_grad_hook(_BackwardHook(self, index)))

    # ------------------------------------------------------------------ one optimizer step

    def before_clipping(self, optimizer: Any) -> None:
        """Mask the gradients of ``optimizer`` now, for a loop that clips them itself.

        Call it between ``scaler.unscale_(optimizer)`` and clipping. ``clip=`` of :func:`sparsify` needs no such call.

        Raises:
            ValueError: the optimizer is not one of this run.
            RuntimeError: it was called for this step already.
        """
        self._refuse_closed()
        index = self._index(plain_optimizer(optimizer))
        if self._steps[index].announced:
            raise RuntimeError("before_clipping() was called twice for one step. Call it once, right before clipping.")
        self._announce(index, gradients_read=True)
        self._steps[index].announced = True

    def _index(self, optimizer: Optimizer) -> int:
        for index, mine in enumerate(zip(self._given, self._optimizers, strict=True)):
            if optimizer in mine:
                return index
        raise ValueError(f"{type(optimizer).__name__} is not an optimizer of this run: sparsify() was not given it.")

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The optimizer's pre hook. Where a GradScaler skips a step it does not fire, and nothing needs to be undone."""
        if optimizer not in self._optimizers:
            return None  # a wrapper, such as Fabric's, fires the hooks too, and before a GradScaler has looked
        # args begin with the optimizer itself
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            self._gradients_ready(self._index(optimizer))
            return None
        if getattr(closure, "run", None) is self:
            return None  # a subclass that calls its parent's step fires the hooks of both
        rest = {k: v for k, v in kwargs.items() if k != "closure"}
        return (args[0], CalledOnce(self, optimizer, closure, self._closure_called), *args[2:]), rest

    def _before_passes(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The pre hook of an optimizer of two passes: gradients may be there, and its closure makes others."""
        index = next((i for i, given in enumerate(self._given) if given is optimizer), None)
        if index is None:
            return None  # a wrapper, such as Fabric's
        masked = partial(self._pass_over, self._optimizers[index])
        masked()

        def then_masked(closure: Any) -> Any:
            return AfterEachCall(closure, masked) if callable(closure) else closure

        # args begin with the optimizer itself
        return (args[0], *map(then_masked, args[1:])), {k: then_masked(v) for k, v in kwargs.items()}

    def _pass_over(self, stepper: Optimizer) -> None:
        """A backward pass may have run since the optimizer was last asked for something: only active weights move."""
        mine = self._steps[self._index(stepper)]
        mine.called = True
        if not mine.announced:
            self._engine.dense_gradients.drop_replaced()
            self._engine.after_backward(optimizers=[stepper])

    def _closure_called(self, optimizer: Optimizer) -> None:
        self._gradients_ready(self._index(optimizer))

    def _gradients_ready(self, index: int) -> None:
        """Gradients are complete, unscaled and finite as far as a GradScaler looks: the method edits them, then the
        loop's ``clip`` does."""
        optimizer, mine = self._optimizers[index], self._steps[index]
        if mine.running and not mine.window_open:
            return  # the inner step of a subclass that calls its parent's: no gradient came since the outer one
        torch_optimizers.refuse_scaled_step(optimizer)
        if optimizer in self._two_pass and not mine.called:
            raise RuntimeError(
                f"the optimizer of two passes that holds this {type(optimizer).__name__} was called past the run, so its "
                "first pass has moved pruned weights. Give sparsify() the optimizer that the loop calls: after "
                "fabric.setup(), its wrapper."
            )
        mine.running = True
        if not mine.announced:
            step = self._announce(index, gradients_read=any(r._clip is not None for r in _sharing(optimizer)))
            if self._clip is not None:
                for run in _sharing(optimizer):
                    if not run._steps[run._index(optimizer)].running:  # it has not had its turn in this step yet
                        run.before_clipping(optimizer)
                if not step.replaced:
                    self._clip([p for group in optimizer.param_groups for p in group["params"]])
        mine.announced = mine.window_open = False
        self._engine.enter_step(optimizer)

    def _announce(self, index: int, gradients_read: bool) -> Step:
        self._refuse_step_without_batch()
        self._follow_the_model()
        # not between the steps of one batch, where another optimizer has yet to take its last step of the phase
        if self._engine.restart_wanted and not any(s.stepped for s in self._steps):
            self._restart()
        optimizer = self._optimizers[index]
        step = self._engine.announce(optimizer, next_tick(optimizer, self), gradients_read)
        if step.replaced:
            self._engine.withhold(optimizer)
        return step

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        """The optimizer's post hook, called behind the engine's."""
        if optimizer not in self._optimizers:
            return
        mine = self._steps[self._index(optimizer)]
        if not mine.running:
            return  # the outer hook of a subclass that calls its parent's step
        mine.running, mine.stepped, mine.window_open, mine.called = False, True, False, False
        self._before_masks = {}  # a step was taken: no other state can be loaded now
        runs = _sharing(optimizer)
        if any(run._steps[run._index(optimizer)].running for run in runs):
            return  # its hook comes next, and it has yet to mask its weights and to read the gradients of this step
        for run in runs:
            if all(s.stepped for s in run._steps):
                run._next_batch()

    def _next_batch(self) -> None:
        """Every optimizer has stepped: what comes next belongs to another batch."""
        for step in self._steps:
            step.stepped = False
        self._had_batch = self._bare_backward = False
        engine = self._engine
        engine.batch_over()
        engine.events |= self.method.batch_end(BatchEnd(False, False, False, engine.skipped))
        self._batches += 1
        self.method.window_start(self._batches)

    def _after_backward(self, index: int, parameter: Tensor) -> None:
        """A backward pass has reached a parameter of the optimizer.

        A gradient that is another tensor than the last one, with no step in between, tells of a step that a GradScaler
        skipped: its hooks did not fire. GaP lays its last phase by how many there were.
        """
        mine, gradient = self._steps[index], parameter.grad
        if self._watch is not None:
            self._look_for_steps()
        self._bare_backward |= not self._in_batch
        if mine.announced or mine.running:  # by before_clipping() and then skipped, or the step failed half-way
            mine.announced = False
            self._engine.batch_over()
        elif mine.window_open and mine.gradient() is not gradient and self._optimizers[index] not in self._two_pass:
            self._engine.skipped += 1
        mine.window_open, mine.running = True, False
        mine.remember(gradient)

    def _look_for_steps(self, epoch_over: bool = False) -> None:
        """A backward pass has begun a batch, or an epoch is over: were there steps of every optimizer?"""
        if self._watch is not None:
            self._watch.batch_begins()
            if not self._watch.batch_over(epoch_over):
                self._watch = None

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around forward and backward of each micro-batch; only ConstrainedL0 needs it.

        Inside, weights hold the sample of their gates, one sample through an accumulation window; outside they hold the
        medians, so validation, saving and copies go on outside. ``optimizer.step()`` may be in either place.
        """
        self._refuse_closed()
        if self._in_batch:
            raise RuntimeError("run.batch() was entered inside of another run.batch(). Leave the first one before.")
        self._follow_the_model()
        method, engine = self.method, self._engine
        if any(s.running for s in self._steps):
            engine.batch_over()  # of a step that failed half-way
        self._in_batch = self._had_batch = True
        method.batch_start(self._batches)
        try:
            yield
            self._refuse_open_passes()
        finally:
            self._in_batch = False
            window_open = any(s.window_open for s in self._steps)
            engine.events |= method.batch_end(BatchEnd(False, False, window_open, engine.skipped))

    def _refuse_open_passes(self) -> None:
        """Weights leave their sample with the batch, and what a first pass has moved would be taken for the user's
        writing."""
        for optimizer, step in zip(self._optimizers, self._steps, strict=True):
            if self._needs_batches and step.window_open and optimizer in self._two_pass:
                raise RuntimeError(
                    f"'with run.batch():' ended between the passes of an optimizer that takes two, and "
                    f"{type(self.method).__name__} needs the same sample of its gates in both. Take the whole step within "
                    "it."
                )

    def _refuse_step_without_batch(self) -> None:
        if self._needs_batches and (not self._had_batch or self._bare_backward):
            self._bare_backward = False
            name = type(self.method).__name__
            raise RuntimeError(
                f"{name} samples its gates for each micro-batch, and this step's gradients are not of a sample. Put "
                "'with run.batch():' around forward and backward of each micro-batch (run = sparsify(...))."
            )

    def _restart(self) -> None:
        """New optimizers, in place: no state, and the groups' values of the call to :func:`sparsify`."""
        method = self.method
        if isinstance(method, RestartsOptimizers):
            method.begin_optimizer_life()
        for optimizer, groups in zip(self._restarted, self._first_groups, strict=True):
            optimizer.state.clear()
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                mode = mode_of(optimizer, group)
                for key in [k for k in group if k != "params" and k not in values]:
                    del group[key]  # of the loop's old schedule, such as "initial_lr", which the new one sets again
                group.update(copy.deepcopy(values) | mode)
        self._engine.restart_wanted = False
        if self._on_restart is not None:
            self._on_restart()

    def _follow_the_model(self) -> None:
        """Go on where the parameters are, if the model was moved or converted since, as ``fabric.setup`` does."""
        if places_of(self.method) == self._placed:
            return
        method, engine = self.method, self._engine
        untouched = {n: t for n, (t, version) in self._before_masks.items() if method.params[n]._version == version}
        skipped, restart_wanted, entries = engine.skipped, engine.restart_wanted, self._entries()
        method.saved = SavedRun.of(self.state_dict(), "of this run itself")
        # the hooks before a step stay: this may be called from one, and torch is going through them
        self._unhook()
        engine.unbind()
        self._bind(entries)
        engine.skipped, engine.restart_wanted = skipped, restart_wanted
        method.saved = None
        engine.write()
        method.attachment.in_training = True
        self._hook()
        self._before_masks = {n: (t, method.params[n]._version) for n, t in untouched.items()}

    # ------------------------------------------------------------------ epochs and the end

    def epoch_end(self, metrics: Mapping[str, Any] | None = None) -> None:
        """An epoch and its validation are over.

        Args:
            metrics: what the validation measured, by name; CTRE looks for its ``monitor`` there.
        """
        self._refuse_closed()
        self._engine.epoch_over()
        if not self._needs_batches:  # whose weights are samples while backward runs, and medians now
            self._look_for_steps(epoch_over=True)
        found = {name: float(value) for name, value in (metrics or {}).items()}
        self.method.validation_end(found, self._epoch)
        self.method.epoch_end(found, self._epoch)
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
        engine.batch_over()
        # a backward pass without a step: the GradScaler has skipped it, which shows at the next backward pass otherwise
        engine.skipped += any(s.window_open and not s.announced for s in self._steps)
        engine.events |= method.batch_end(BatchEnd(True, True, False, engine.skipped))
        engine.write()
        if not method.at_target:
            self._host.warn(method.shortfall())
        elif text := method.progress.why_unfinished(method.calendar, engine.skipped, type(method).__name__):
            self._host.warn(text)
        self._release()

    @property
    def is_closed(self) -> bool:
        """The run is over: steps of its optimizers are no longer masked."""
        return not self._engine.is_bound

    def _refuse_closed(self) -> None:
        if self.is_closed:
            raise RuntimeError("this run is closed. Begin another one with sparsify().")

    def _release(self) -> None:
        for handle in self._pre_handles:
            handle.remove()
        self._unhook()
        self._engine.unbind()
        _runs_of.get(self._model, WeakSet()).discard(self)
        for optimizer in self._optimizers:
            _runs_on.get(optimizer, WeakSet()).discard(self)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self.is_closed:  # it may have come between the optimizer's step and ours
            self._engine.write()
            self._engine.batch_over()
            self._release()

    # ------------------------------------------------------------------ what it has come to

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool mask by parameter name, True where a connection is active; shape of the parameter."""
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
        """Everything that a resume needs beside the model's and the optimizer's own states: tensors, numbers and strings,
        which ``torch.load(weights_only=True)`` reads."""
        groups = {"groups": copy.deepcopy(self._first_groups)} if restarts_optimizers(self.method) else {}
        # a checksum: no plan says what a run that was made shorter may have pruned
        zeros = {name: int((~mask).sum()) for name, mask in self.method.masks.items()}
        return {
            "method": type(self.method).__name__,
            **self._engine.state(),
            "zeros": zeros,
            "epoch": self._epoch,
            **groups,
        }

    def __reduce__(self) -> Any:
        raise TypeError(
            "a run cannot be copied or pickled: its optimizers' hooks belong to it. Keep run.state_dict() instead."
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, before the first step; the model may be loaded before or after.

        Raises:
            RuntimeError: a step was taken already.
            ValueError: the state is not of this method, these arguments and this model.
        """
        self._refuse_closed()
        if self.method.progress.most() or not self._before_masks:
            raise RuntimeError(
                "load_state_dict() comes too late: steps were taken already. Call it before the first step, or give "
                "sparsify(..., state=)."
            )
        name = type(self.method).__name__
        path = "given to load_state_dict()"
        saved = SavedRun.of(check_state(state, self.method.arguments, name, path), path)
        refuse_other_model(saved, self.method.params)
        epoch_of(state, path)
        groups_of(state, self._first_groups, path)
        planned = self.method.parameter_zeros(self.method.entries, self.method.targets)
        refuse_impossible(self.method, saved, self._model, planned, len(self._optimizers))
        kept, params = self._before_masks, self.method.params
        self._release()
        # what the initial masks of this run have cut comes back, unless the model was loaded since
        untouched = {n: values for n, (values, version) in kept.items() if params[n]._version == version}
        self.method.weights.write_values(untouched)
        self._begin(state)


class _BackwardHook:
    """Tells a run of a backward pass. It holds the run weakly: torch keeps such hooks where Python's collector of
    garbage does not see them, and a run that nobody closes must go with its optimizer."""

    def __init__(self, run: SparseRun, index: int) -> None:
        self._run, self._index = ref(run), index

    def __call__(self, parameter: Tensor) -> None:
        run = self._run()
        if run is not None:
            run._after_backward(self._index, parameter)


def _sharing(optimizer: Optimizer) -> list[SparseRun]:
    """Every run that goes on with this optimizer, in the order in which they began, which is the same on all ranks."""
    return sorted(_runs_on.get(optimizer, ()), key=lambda run: run._number)
