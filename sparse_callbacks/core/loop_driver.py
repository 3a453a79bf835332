"""Drives the engine of a run by the hooks of a hand-written loop's optimizers and parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core.cut_weights import ResumedWeights
from sparse_callbacks.core.hooks import BatchEnd
from sparse_callbacks.core.loop_batches import LoopBatches
from sparse_callbacks.core.loop_binding import LoopBinding, ValuesBeforeMasks
from sparse_callbacks.core.loop_hooks import LoopHooks
from sparse_callbacks.core.loop_steps import CalledOnce, StepInLoop, next_tick
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.record.loop_record import LoopRecord
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.unseen_steps import StepWatch
from sparse_callbacks.core.wrappers import plain_optimizer

Clip = Callable[[list[nn.Parameter]], object]
"""A function that clips the gradients of the parameters that it is given, in place."""

NOT_COPIED = "a run cannot be copied or pickled: its optimizers' hooks belong to it. Keep run.state_dict() instead."

# Every driver that goes on, by optimizer: those that share one take their steps together.
_drivers_on: WeakKeyDictionary[Optimizer, WeakSet["LoopDriver"]] = WeakKeyDictionary()
_numbers = count()


class LoopDriver:
    """Turns what happens in a loop into calls of the engine: backward passes, optimizer steps, batches.

    Args:
        binding: the hold of the run on the model and the optimizers.
        clip: clips gradients within each step; None where the loop clips none, or does so itself.
        on_restart: called where optimizers were started anew.
    """

    def __init__(self, binding: LoopBinding, clip: Clip | None, on_restart: Callable[[], object] | None) -> None:
        self._binding, self._clip, self._on_restart = binding, clip, on_restart
        self._engine, self._method, self._optimizers = binding.engine, binding.engine.method, binding.optimizers
        self._hooks = LoopHooks(binding.optimizers, binding.engine.method)
        self._number = next(_numbers)
        self.forget()

    def forget(self) -> None:
        """A run begins: nothing has happened in it yet."""
        self.batches = LoopBatches(self._method)
        """Where the loop stands in its batches."""
        self.before_masks = ValuesBeforeMasks({}, {})
        """What the masks have cut, until the first step."""
        self.resumed: ResumedWeights | None = None
        """The weights of the state that the run was given, until the first step."""
        self.record: LoopRecord | None = None
        """The record of the run, where the loop wants one."""
        self.has_stepped = False
        """An optimizer has taken a step since the run began, or went on."""
        self._steps = [StepInLoop() for _ in self._optimizers.steppers]
        self._watch: StepWatch | None = None
        self._trained: object = None  # who was trained at the last look

    def listen(self) -> None:
        """Masks are written: from here on the optimizers drive the engine."""
        self._watch = StepWatch(self._engine)
        self._trained = self._binding.who_is_trained()
        self._hooks.plant(self)
        for optimizer in self._optimizers.steppers:
            _drivers_on.setdefault(optimizer, WeakSet()).add(self)

    def stop(self) -> None:
        """The run is over, or was refused: no hook stays."""
        self._hooks.remove()
        for optimizer in self._optimizers.steppers:
            _drivers_on.get(optimizer, WeakSet()).discard(self)

    def _follow_the_model(self) -> None:
        """Go on where the parameters are, if the model was moved or converted since, as ``fabric.setup`` does."""
        binding, method = self._binding, self._method
        if binding.is_current:
            return
        untouched, entries = self.before_masks.untouched(method.params), binding.entries()
        # the hooks before a step stay: this may be called from one, and torch is going through them
        self._hooks.remove_after()
        binding.renew(entries)
        self._hooks.plant_after(self)
        self.before_masks = ValuesBeforeMasks(untouched, method.params)

    def _take_up_thawed(self) -> None:
        """Let layers that the loop has begun to train become sparse, unless a step of this batch was announced or taken
        already."""
        trained = self._binding.who_is_trained()
        if trained == self._trained or any(s.stepped or s.announced for s in self._steps):
            return
        self._trained = trained
        self._hooks.remove_after()  # those before a step stay, as above
        if self._binding.take_up():
            self.before_masks.drop()  # the masks of another state would be of fewer layers
            self._watch = StepWatch(self._engine)
        self._hooks.plant_after(self)

    # ------------------------------------------------------------------ one optimizer step

    def before_clipping(self, optimizer: Any) -> None:
        """Mask the gradients of ``optimizer`` now, for a loop that clips them itself.

        Raises:
            ValueError: the optimizer is not one of this run.
            RuntimeError: it was called for this step already.
        """
        index = self._optimizers.index(plain_optimizer(optimizer))
        if self._steps[index].announced:
            raise RuntimeError("before_clipping() was called twice for one step. Call it once, right before clipping.")
        self._announce(index, gradients_read=True)
        self._steps[index].announced = True

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The optimizer's pre hook. Where a GradScaler skips a step it does not fire, and nothing needs to be undone."""
        if optimizer not in self._optimizers.steppers:
            return None  # a wrapper, such as Fabric's, fires the hooks too, and before a GradScaler has looked
        # args begin with the optimizer itself
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            self._gradients_ready(self._optimizers.index(optimizer))
            return None
        if getattr(closure, "run", None) is self:
            return None  # a subclass that calls its parent's step fires the hooks of both
        rest = {k: v for k, v in kwargs.items() if k != "closure"}
        return (args[0], CalledOnce(self, optimizer, closure, self._closure_called), *args[2:]), rest

    def pass_over(self, stepper: Optimizer) -> None:
        """A backward pass may have run since the optimizer was last asked for something: only active weights move."""
        mine = self._steps[self._optimizers.index(stepper)]
        mine.called = True
        if not mine.announced:
            self._engine.dense_gradients.drop_replaced()
            self._engine.after_backward(optimizers=[stepper])

    def _closure_called(self, optimizer: Optimizer) -> None:
        self._gradients_ready(self._optimizers.index(optimizer))

    def _gradients_ready(self, index: int) -> None:
        """Gradients are complete, unscaled and finite as far as a GradScaler looks: the method edits them, then the
        loop's ``clip`` does."""
        optimizer, mine = self._optimizers.steppers[index], self._steps[index]
        if mine.running and not mine.window_open:
            return  # the inner step of a subclass that calls its parent's: no gradient came since the outer one
        torch_optimizers.refuse_scaled_step(optimizer)
        if optimizer in self._optimizers.two_pass and not mine.called:
            raise RuntimeError(
                f"the optimizer of two passes that holds this {type(optimizer).__name__} was called past the run, so its "
                "first pass has moved pruned weights. Give sparsify() the optimizer that the loop calls: after "
                "fabric.setup(), its wrapper."
            )
        mine.running = True
        if not mine.announced:
            step = self._announce(index, gradients_read=any(d._clip is not None for d in _sharing(optimizer)))
            if self._clip is not None:
                for other in _sharing(optimizer):
                    if not other._is_within_step(optimizer):  # it has not had its turn in this step yet
                        other.before_clipping(optimizer)
                if not step.replaced:
                    self._clip([p for group in optimizer.param_groups for p in group["params"]])
        mine.announced = mine.window_open = False
        self._engine.enter_step(optimizer)

    def _is_within_step(self, optimizer: Optimizer) -> bool:
        return self._steps[self._optimizers.index(optimizer)].running

    def _announce(self, index: int, gradients_read: bool) -> Step:
        self.batches.refuse_step_of_no_sample()
        self._refuse_foreign_weights()
        self._follow_the_model()
        self._take_up_thawed()
        # not between the steps of one batch, where another optimizer has yet to take its last step of the phase
        if self._engine.restart_wanted and not any(s.stepped for s in self._steps):
            self._restart()
        optimizer = self._optimizers.steppers[index]
        step = self._engine.announce(optimizer, next_tick(optimizer, self), gradients_read)
        if step.replaced:
            self._engine.withhold(optimizer)
        return step

    def after_step(self, optimizer: Optimizer, *_: object) -> None:
        """The optimizer's post hook, called behind the engine's."""
        if optimizer not in self._optimizers.steppers:
            return
        mine = self._steps[self._optimizers.index(optimizer)]
        if not mine.running:
            return  # the outer hook of a subclass that calls its parent's step
        if mine.stepped and self.record is not None:  # another optimizer of the loop steps more seldom
            self.record.batch_over()
        mine.running, mine.stepped, mine.window_open, mine.called = False, True, False, False
        self.has_stepped = True
        self.before_masks.drop()  # a step was taken: no other state can be loaded now
        drivers = _sharing(optimizer)
        if any(d._is_within_step(optimizer) for d in drivers):
            return  # its hook comes next, and it has yet to mask its weights and to read the gradients of this step
        for driver in drivers:
            if all(s.stepped for s in driver._steps):
                driver._next_batch()

    def _refuse_foreign_weights(self) -> None:
        """The first step of a run begins: from here on the weights are its own."""
        if self.resumed is not None:
            self.resumed.refuse_foreign()
            self.resumed = None

    def _next_batch(self) -> None:
        """Every optimizer has stepped: what comes next belongs to another batch."""
        for step in self._steps:
            step.stepped = False
        engine = self._engine
        engine.batch_over()
        engine.events |= self._method.batch_end(BatchEnd(False, False, False, engine.skipped))
        if self.record is not None:
            self.record.batch_over()
        self.batches.next()
        self._method.window_start(self.batches.number)

    def after_backward(self, index: int, parameter: Tensor) -> None:
        """A backward pass has reached a parameter of the optimizer.

        A gradient that is another tensor than the last one, with no step in between, tells of a step that a GradScaler
        skipped: its hooks did not fire. GaP lays its last phase by how many there were.
        """
        mine, gradient, skipped = self._steps[index], parameter.grad, self._engine.skipped
        if self._watch is not None:
            self._look_for_steps()
        self.batches.backward()
        if mine.announced or mine.running:  # by before_clipping() and then skipped, or the step failed half-way
            mine.announced = False
            self._engine.batch_over()
        elif (
            mine.window_open
            and mine.gradient() is not gradient
            and self._optimizers.steppers[index] not in self._optimizers.two_pass
        ):
            self._engine.skipped += 1
        mine.window_open, mine.running = True, False
        mine.remember(gradient)
        if self.record is not None:
            self.record.backward(index, self._engine.skipped > skipped)

    def _look_for_steps(self, epoch_over: bool = False) -> None:
        """A backward pass has begun a batch, or an epoch is over: were there steps of every optimizer?"""
        if self._watch is not None:
            self._watch.batch_begins()
            if not self._watch.batch_over(epoch_over):
                self._watch = None

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around forward and backward of each micro-batch, for a method that is told of them."""
        self.batches.refuse_nested()
        if self.batches.needed:  # within the block the weights are samples
            self._refuse_foreign_weights()
        self._follow_the_model()
        method, engine = self._method, self._engine
        if any(s.running for s in self._steps):
            engine.batch_over()  # of a step that failed half-way
        self._take_up_thawed()
        self.batches.enter()
        method.batch_start(self.batches.number)
        try:
            yield
            self._refuse_open_passes()
        finally:
            self.batches.leave()
            window_open = any(s.window_open for s in self._steps)
            engine.events |= method.batch_end(BatchEnd(False, False, window_open, engine.skipped))

    def _refuse_open_passes(self) -> None:
        """Weights leave their sample with the batch, and what a first pass has moved would be taken for the user's
        writing."""
        for optimizer, step in zip(self._optimizers.steppers, self._steps, strict=True):
            if self.batches.needed and step.window_open and optimizer in self._optimizers.two_pass:
                raise RuntimeError(
                    f"'with run.batch():' ended between the passes of an optimizer that takes two, and "
                    f"{type(self._method).__name__} needs the same sample of its gates in both. Take the whole step within "
                    "it."
                )

    def _restart(self) -> None:
        """A phase begins: new optimizers, in place."""
        method = self._method
        if isinstance(method, RestartsOptimizers):
            method.begin_optimizer_life()
        self._optimizers.start_anew()
        self._engine.restart_wanted = False
        if self._on_restart is not None:
            self._on_restart()

    # ------------------------------------------------------------------ epochs and the end

    def epoch_over(self) -> None:
        """An epoch and its validation are over."""
        self._engine.epoch_over()
        if not self.batches.needed:  # whose weights are samples while backward runs, and medians now
            self._look_for_steps(epoch_over=True)

    def finish(self) -> None:
        """The loop is over: a last pruning that skipped steps have delayed beyond it happens now."""
        engine = self._engine
        if not self.batches.needed:
            try:
                self._look_for_steps(epoch_over=True)
            except RuntimeError as error:  # the run is over: it is reported, and nothing else is lost
                self._method.host.warn(str(error))
        engine.batch_over()
        # a backward pass without a step: the GradScaler has skipped it, which shows at the next backward pass otherwise
        engine.skipped += any(s.window_open and not s.announced for s in self._steps)
        engine.events |= self._method.batch_end(BatchEnd(True, True, False, engine.skipped))
        engine.write()

    def __reduce__(self) -> Any:
        raise TypeError(NOT_COPIED)


def _sharing(optimizer: Optimizer) -> list[LoopDriver]:
    """The drivers of all runs that go on with this optimizer, in the order in which they began, the same on all ranks."""
    return sorted(_drivers_on.get(optimizer, ()), key=lambda driver: driver._number)
