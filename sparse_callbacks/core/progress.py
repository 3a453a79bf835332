"""How far a run has come: gradient steps and topology updates, counted for each optimizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.calendar import Calendar


@dataclass
class StepCount:
    """Gradient steps taken by one optimizer, those with a non-finite gradient left out.

    Whether a gradient was finite is kept on its device until somebody needs the number, so that counting never makes a
    GPU wait.
    """

    taken: int = 0
    failed: Tensor | None = field(default=None, repr=False)

    def add(self, finite: Tensor | bool) -> None:
        if isinstance(finite, bool):
            self.taken += finite
        else:
            self.taken += 1
            missed = torch.logical_not(finite).long()
            self.failed = missed if self.failed is None else self.failed + missed

    def at_most(self) -> int:
        """An upper bound that asks no device."""
        return self.taken

    def read(self) -> int:
        if self.failed is not None:
            self.taken -= int(self.failed)
            self.failed = None
        return self.taken


class Progress:
    """How far each optimizer (by index) has come on a calendar: steps counted, updates done.

    Args:
        first_update: the earliest step of an update; the grid of a calendar that starts before begins there.
    """

    def __init__(self, first_update: int) -> None:
        self._first_update = first_update
        self.counts: dict[int, StepCount] = {}
        """Gradient steps of each optimizer."""
        self.done: dict[int, int] = {}
        """The step of each optimizer's latest update."""
        self.updates = 0
        """Topology updates of all optimizers together."""
        # the next update's step, kept from the last look at the calendar: most steps then need one comparison, and on a
        # GPU no wait for the count
        self._due_from: dict[int, float] = {}

    def grid_start(self, calendar: Calendar) -> int:
        """Where the grid of updates begins on ``calendar``."""
        return max(calendar.start, self._first_update)

    def begin(self, optimizers: int) -> None:
        """A run starts or goes on.

        Args:
            optimizers: the number of optimizers of the run.
        """
        self._due_from = {}
        for index in range(optimizers):
            self.counts.setdefault(index, StepCount())

    def may_be_due(self, index: int) -> bool:
        """False where no update can be due, found from an upper bound and without asking a device."""
        return self.counts[index].at_most() >= self._due_from.get(index, 0)

    def due(self, index: int, calendar: Calendar) -> bool:
        """An update is due at the present count of steps."""
        if not self.may_be_due(index):
            return False
        step = self.counts[index].read()
        upcoming = calendar.next(step, self.grid_start(calendar), self.done.get(index))
        self._due_from[index] = math.inf if upcoming is None else upcoming
        return upcoming == step

    def upcoming(self, calendar: Calendar) -> int | None:
        """The first update that is still to come for any optimizer; None if there is none."""
        begin = self.grid_start(calendar)
        found = [calendar.next(c.read(), begin, self.done.get(i)) for i, c in self.counts.items()]
        return min((f for f in found if f is not None), default=None)

    def why_idle(self, calendar: Calendar, length: float, method: str, *, replaces: bool) -> str:
        """Why no update can fall in a new run, as a sentence for the user; empty where one can.

        Args:
            calendar: when updates fall.
            length: the optimizer steps of the run.
            method: name of the method, for the sentence.
            replaces: an update takes the place of the coming step, so that none can fall after the last one.
        """
        upcoming, taken = self.upcoming(calendar), self.most()
        if upcoming is not None and upcoming - taken <= length - replaces:
            return ""
        if upcoming is not None:
            when = f"the first would be at step {upcoming}, after the run's {length:g}"
        else:
            when = f"{taken} steps were counted before, in an earlier fit, and the last update was due at step "
            when += str(calendar.stop)
        return (
            f"{method} will not move a mask in this run: {when}. Give other times, or a new callback or "
            "fresh_start=True for a new start."
        )

    def why_unfinished(self, calendar: Calendar | None, skipped: int, method: str) -> str:
        """What a run that is over has missed of its calendar, as a sentence for the user; empty where its curve has
        ended, or less than an interval is missing.

        Args:
            calendar: when updates fall; None for a method without times.
            skipped: the steps of the run that a GradScaler has skipped.
            method: name of the method, for the sentence.
        """
        # steps that were replaced or skipped do not count, so a run may end a little before a calendar that fits it
        if calendar is None or calendar.stop - (self.most() + self.updates + skipped) <= calendar.every:
            return ""
        return (
            f"{method} ended in the middle of its updates: {self.most()} steps were counted, and the last update is due "
            f"at step {calendar.stop}. Where the run was to end here, give an earlier stop=; otherwise it had fewer "
            "optimizer steps than its length promised."
        )

    def mark_done(self, index: int) -> None:
        """The update at the present count has happened and needs no repetition."""
        self.done[index] = self.counts[index].read()
        self.updates += 1

    def join(self, index: int) -> None:
        """An optimizer that has had no sparse parameter, so that its steps were not counted, goes on at the step of the
        others; the masks that its parameters begin with are an update."""
        most = self.most()
        if self.counts[index].read() < most:
            self.counts[index] = StepCount(most)
            self.mark_done(index)

    def most(self) -> int:
        """The largest count of any optimizer."""
        return max((count.read() for count in self.counts.values()), default=0)

    def state(self) -> dict[str, Any]:
        """Numbers for a checkpoint."""
        return {
            "steps": {str(i): c.read() for i, c in self.counts.items()},
            "done": {str(i): s for i, s in self.done.items()},
            "updates": self.updates,
        }

    @classmethod
    def restored(cls, first_update: int, state: Mapping[str, Any]) -> "Progress":
        """What :meth:`state` gave, found again in a checkpoint."""
        progress = cls(first_update)
        progress.counts = {int(i): StepCount(s) for i, s in state["steps"].items()}
        progress.done = {int(i): s for i, s in state["done"].items()}
        progress.updates = state["updates"]
        return progress
