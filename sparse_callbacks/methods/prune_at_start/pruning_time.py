"""When a method that prunes once does so, and whether optimizers start anew after it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_callbacks.core import distance_trigger as trigger
from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.calendar import Calendar, RunLength, calendar_of_one_update, check_time_of_one_update
from sparse_callbacks.core.distance_trigger import When
from sparse_callbacks.core.distributions import decides_total
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.optimizer_needs import grows
from sparse_callbacks.core.step import Step

LATEST = 0.5  # published: EarlyCroP prunes in the first half of the run
PENDING = "pending"
_RUN, _LENGTH, _OPTIMIZERS = "trigger/run", "trigger/length", "trigger/optimizers"


class PrunesOnce(RestartsOptimizers, Method):
    """A method that prunes once: ``when`` says when, and ``lr_after`` whether optimizers and schedules then start anew.

    Before the pruning every weight is active.
    """

    with_restarts: ClassVar[str] = 'lr_after="restart"'
    without_restarts: ClassVar[str] = 'lr_after="continue"'
    when: When
    lr_after: str

    # ------------------------------------------------------------------ dense, and pruned

    @property
    def at_target(self) -> bool:
        if self.when == "start":
            return True
        return bool(self.masks) and not is_dense(self) and not _pending(self)

    def figures(self) -> dict[str, float]:
        """Whether the pruning has fallen, and with ``when="distance"`` the distance and the increment that is waited for."""
        if self.when == "start":
            return super().figures()
        share = trigger.tolerance(planned_sparsity(self))
        return super().figures() | self.own_figures(**trigger.trigger_figures(self, share))

    def shortfall(self) -> str:
        reached = self.measured_sparsity()["sparsity/total"]
        latest, argument = ("", "when=") if self.when != "distance" else (" at the latest", "stop=")
        return (
            f"{type(self).__name__} ended at sparsity {reached:.4f}, before its target of {self.plan().total:.4f}: {self.step} "
            f"steps were taken and the pruning is due at step {self.times.stop}{latest}. Train longer, or give an earlier "
            f"{argument}."
        )

    # ------------------------------------------------------------------ times

    def make_calendar(self, run: RunLength) -> Calendar:
        calendar = trigger.ending_with_pruning(self, self._calendar(run))
        if self.restarts:
            self.aux[_LENGTH] = torch.tensor(run.total(), dtype=torch.float64)
            pruned = self.aux.get(trigger.PRUNED)
            # a run that was saved between the pruning and the next batch
            if pruned is not None and not _pending(self) and int(self.aux[_OPTIMIZERS]) < int(pruned):
                self.host.request_restart()
        return calendar

    def _calendar(self, run: RunLength) -> Calendar:
        if isinstance(self.when, str):
            return trigger.distance_calendar(self.stop, run)
        return calendar_of_one_update(self.when, "when", run)

    # ------------------------------------------------------------------ optimizers

    @property
    def restarts(self) -> bool:
        """Whether optimizers start anew after the pruning, as ``lr_after=`` says."""
        return self.lr_after == "restart"

    @property
    def horizon(self) -> float | None:
        """Optimizer steps that the current optimizers live.

        To the pruning at the latest, or from there to the run's end; None with ``lr_after="continue"``.
        """
        return self._life(self.times.stop, self.aux) if self.restarts else None

    def optimizer_life(self, run: RunLength) -> float | None:
        """:attr:`horizon`, also before the run has begun; see :func:`sparse_callbacks.horizon`.

        Args:
            run: the length of the run.
        """
        self.horizon_asked = True
        if self.attachment.in_training or not self.restarts:
            return self.horizon
        if self.saved is not None and self.saved.times:
            return self._life(self.saved.times[2], self.saved.aux)
        begun = torch.tensor(self.step)  # what begin_trigger and make_calendar will write
        length = {_RUN: begun, _OPTIMIZERS: begun, _LENGTH: torch.tensor(run.total(), dtype=torch.float64)}
        return self._life(trigger.ending_with_pruning(self, self._calendar(run)).stop, self.aux | length)

    def _life(self, stop: int, aux: Mapping[str, Tensor]) -> float:
        configured, pruned = int(aux[_OPTIMIZERS]), aux.get(trigger.PRUNED)
        if pruned is None or configured < int(pruned):
            return stop - configured
        return float(aux[_RUN]) + float(aux[_LENGTH]) - configured

    @property
    def shortest_life(self) -> float | None:
        """Optimizer steps to the pruning at the latest, or from there to the run's end, whichever is less."""
        if not self.restarts:
            return None
        lives = [float(self.aux[_RUN]) + float(self.aux[_LENGTH]) - self.times.stop]
        if is_dense(self):
            lives.append(self.times.stop - int(self.aux[_OPTIMIZERS]))
        return min((life for life in lives if life > 0), default=None)

    def begin_optimizer_life(self) -> None:
        """The host is about to configure new optimizers."""
        self.aux[_OPTIMIZERS] = torch.tensor(self.step)


# ---------------------------------------------------------------------- what such a method does at which time


def set_pruning_time(method: PrunesOnce, when: Any, stop: Any, lr_after: str) -> None:
    """Keep the time arguments, once they were found possible.

    Args:
        method: the method that is made.
        when: see :data:`~sparse_callbacks.core.distance_trigger.When`.
        stop: the latest time, with ``when="distance"``; not read otherwise.
        lr_after: ``"continue"`` or ``"restart"``.

    Raises:
        ValueError: an argument that is not known, or that says nothing beside the others.
    """
    if isinstance(when, str):
        if when not in ("start", "distance"):
            raise ValueError(
                f"when={when!r} is not known. Give 'start' or 'distance', or a time in optimizer steps (int) or as a fraction of the "
                "run (float)."
            )
    else:
        check_time_of_one_update(when, "when")
    check_time_of_one_update(stop, "stop")
    refuse_unknown({"lr_after": lr_after}, {"lr_after": ("continue", "restart")})
    if lr_after == "restart" and when == "start":
        raise ValueError(
            "lr_after='restart' starts optimizers anew after the pruning, and with when='start' they have not begun before. "
            "Leave lr_after= out, or give a later when=."
        )
    method.when, method.lr_after, method.stop = when, lr_after, stop
    if when != "start":
        method.every, method.start = None, 0  # without a start there is no calendar
        method.arrives_at_stop = True  # type: ignore[misc]  # as methods that begin dense do


def planned_sparsity(method: PrunesOnce) -> float:
    """The sparsity that the pruning comes to: the target, or what a distribution plans that need not keep to it."""
    given = method.distribution
    if isinstance(given, str) and not decides_total(given):
        return method.target_sparsity
    return method.plan().total


def is_dense(method: PrunesOnce) -> bool:
    """The pruning is still to come."""
    return method.when != "start" and trigger.PRUNED not in method.aux


def pruned_now(method: PrunesOnce, step: Step) -> bool:
    """The pruning falls at this step, which was taken."""
    if not is_dense(method) or not step.due:
        return False
    if method.when == "distance":
        return trigger.falls_now(method, step, trigger.tolerance(planned_sparsity(method)))
    method.aux[trigger.PRUNED] = torch.tensor(step.number)
    return True


def part_of_step(method: PrunesOnce, step: Step, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``masks`` of the parameters of the step's optimizer; the others take theirs with a step of their own."""
    mine = set(step.names)
    method.aux |= {f"{PENDING}/{name}": mask for name, mask in masks.items() if name not in mine}
    return {name: mask for name, mask in masks.items() if name in mine}


def waiting_for_step(method: PrunesOnce, step: Step) -> dict[str, Tensor]:
    """Masks that an earlier step of another optimizer has made for those of this one."""
    waiting = [n for n in step.names if f"{PENDING}/{n}" in method.aux]
    return {n: method.aux.pop(f"{PENDING}/{n}") for n in waiting}


def _pending(method: PrunesOnce) -> list[str]:
    """Names of the parameters whose optimizer has yet to take a step with their new masks."""
    return [key.partition("/")[2] for key in method.aux if key.startswith(f"{PENDING}/")]


def begin_trigger(method: PrunesOnce) -> None:
    """Keep what the trigger and the lives of optimizers are measured from; nothing that a run has kept already."""
    if method.attachment.host is None:
        return
    goes_on = method.attachment.in_training or (method.saved is not None and method.saved.times)
    if method.restarts and not goes_on:
        method.aux[_RUN] = method.aux[_OPTIMIZERS] = torch.tensor(method.step)
    if method.when == "distance" and method.attachment.in_training:
        trigger.keep_initial(method)


def restart_if_pruned(method: PrunesOnce) -> None:
    """The masks of an update were taken: ask for new optimizers where all of them were."""
    if method.restarts and method.at_target:
        # asked for, not done: the optimizer whose hook called this is still in its step
        method.host.request_restart()


@grows.register
def _(method: PrunesOnce) -> bool:
    return False  # whenever it prunes
