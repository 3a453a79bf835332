"""When the masks move: the time arguments of a method, resolved against a run, and the count of its steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from sparse_callbacks.core.schedules import to_steps

UPDATES_WORTH_HAVING = 10  # a default interval leaves this many in the window where it can
STEPS_BETWEEN = 10  # and this many steps for grown weights to grow in

Time = int | float


@dataclass(frozen=True)
class Calendar:
    """Updates at ``start``, ``start + every``, ... up to ``stop`` (included), in optimizer steps.

    With ``final`` there is one at ``stop`` too, also off the grid (a method that must arrive at its target). With ``until`` the
    grid goes on behind ``stop`` (where the method's curve ends) up to a last update at ``until``.
    """

    every: int
    start: int
    stop: int
    final: bool = False
    until: int | None = None

    @property
    def last(self) -> int:
        """No update comes after this step."""
        return self.stop if self.until is None else self.until

    def times(self) -> list[int]:
        """In whole numbers, for a checkpoint."""
        return [self.every, self.start, self.stop, *([] if self.until is None else [self.until])]

    def next(self, step: int, anchor: int, done: int | None) -> int | None:
        """First update at or after ``step`` that is not the one already ``done``; None when there is none left."""
        first = max(step if done is None else max(step, done + 1), anchor)
        on_grid = anchor + -(-(first - anchor) // self.every) * self.every
        found = [on_grid, *([self.stop] if self.final else []), *([] if self.until is None else [self.until])]
        return min((f for f in found if first <= f <= self.last), default=None)


def check_times(start: Time, stop: Time, every: Time | None) -> None:
    """Refuse what no run can make right, before there is a run.

    Raises:
        ValueError: a value that is no time, ``stop`` before ``start``, or an interval longer than ``stop - start``.
    """
    for name, value in (("start", start), ("stop", stop)):
        to_steps(value, 1, name)
    if every is not None and not isinstance(every, bool) and isinstance(every, Real) and every <= 0:
        raise ValueError(f"every={every!r} is no interval between updates. Give optimizer steps (1 or more) or a fraction of the run.")
    if every is not None:
        to_steps(every, 1, "every")
    if type(start) is type(stop) and stop < start:
        raise ValueError(f"stop={stop!r} lies before start={start!r}. Give a stop at or after the start.")
    if every is not None and type(start) is type(stop) is type(every) and every > stop - start:
        raise ValueError(_too_long(every, start, stop))


def resolve(
    every: Time | None,
    start: Time,
    stop: Time,
    published_every: int,
    total: Callable[[], float],
    *,
    final: bool = False,
    lenient: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Calendar:
    """The calendar of a run.

    Args:
        every, start, stop: as in :func:`check_times`; ``every=None`` is ``published_every``, shortened down to ten where a short
            run leaves fewer than ten updates (``tell`` says so).
        total: gives the optimizer steps of the run; called only if an argument needs it; infinite when unknown.
        final: see :class:`Calendar`.
        lenient: a trial run (``fast_dev_run``): whatever does not fit is cut instead of refused.
        tell: takes a sentence for the user.

    Raises:
        ValueError: a fraction of an endless run, ``stop`` before ``start``, an interval longer than ``stop - start``.
    """

    def steps(value: Time, name: str) -> int:
        return value if isinstance(value, int) else to_steps(value, total(), name)

    first, last = steps(start, "start"), steps(stop, "stop")
    if last < first:
        if not lenient:
            raise ValueError(
                f"stop={stop!r} ({last} steps) lies before start={start!r} ({first} steps). Give a stop at or after the start."
            )
        last = first
    if last == first and not final and not lenient:
        raise ValueError(
            f"start={start!r} and stop={stop!r} are the same step ({first}): no update would move a mask. Give a later stop=, or use "
            "Static to hold one mask."
        )
    if every is None:
        fitting = max(STEPS_BETWEEN, (last - first) // UPDATES_WORTH_HAVING)
        interval = max(1, min(published_every, fitting, last - first))
        if interval < published_every:
            tell(
                f"every={interval}: the published interval of {published_every} steps would leave fewer than {UPDATES_WORTH_HAVING} "
                f"updates between step {first} and step {last}. Give every= to choose another."
            )
    else:
        interval = max(1, steps(every, "every"))
        if interval > last - first:
            if not lenient:
                raise ValueError(_too_long(every, start, stop, f" ({interval} steps against {last - first})"))
            interval = max(1, last - first)
    return Calendar(interval, first, last, final)


def _too_long(every: Time, start: Time, stop: Time, steps: str = "") -> str:
    return (
        f"every={every!r} is longer than stop - start with start={start!r}, stop={stop!r}{steps}: the masks would hardly ever move. "
        "Give a smaller every=, a later stop= or a longer run."
    )


@dataclass
class StepCount:
    """Gradient steps taken by one optimizer, those with a non-finite gradient left out.

    Whether a gradient was finite is kept on its device until somebody needs the number, so that counting never makes a GPU wait.
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
        anchor: the earliest step of an update; the grid of a calendar that starts before begins there.
    """

    def __init__(self, anchor: int) -> None:
        self._anchor = anchor
        self.counts: dict[int, StepCount] = {}
        self.done: dict[int, int] = {}
        self._due_from: dict[int, int] = {}

    def begin(self, optimizers: int) -> None:
        """A run with so many optimizers starts or goes on."""
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
        upcoming = calendar.next(step, max(calendar.start, self._anchor), self.done.get(index))
        self._due_from[index] = calendar.last + 1 if upcoming is None else upcoming
        return upcoming == step

    def upcoming(self, calendar: Calendar) -> int | None:
        """The first update that is still to come for any optimizer; None if there is none."""
        anchor = max(calendar.start, self._anchor)
        found = [calendar.next(c.read(), anchor, self.done.get(i)) for i, c in self.counts.items()]
        return min((f for f in found if f is not None), default=None)

    def mark_done(self, index: int) -> None:
        """The update at the present count needs no repetition."""
        self.done[index] = self.counts[index].read()

    def most(self) -> int:
        """The largest count of any optimizer."""
        return max((count.read() for count in self.counts.values()), default=0)

    def state(self) -> dict[str, dict[str, int]]:
        return {
            "steps": {str(i): c.read() for i, c in self.counts.items()},
            "done": {str(i): s for i, s in self.done.items()},
        }

    def load(self, state: dict[str, dict[str, int]]) -> None:
        self.counts = {int(i): StepCount(s) for i, s in state["steps"].items()}
        self.done = {int(i): s for i, s in state["done"].items()}
