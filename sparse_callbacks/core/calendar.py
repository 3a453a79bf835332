"""Calendar of mask updates: the time arguments of a method, resolved against the length of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from sparse_callbacks.core.schedules import to_steps

# The default interval is shortened until this many updates fit between start and stop: a few hardly move a mask.
FEWEST_UPDATES = 10
# It is not shortened below this many steps: a weight that was grown needs time to become large enough to stay.
SHORTEST_INTERVAL = 10

NO_END = 2**62  # steps: later than any run ends, and a whole number, as calendars are saved
Time = int | float
"""Optimizer steps (int) or a fraction of the run (float)."""


@dataclass(frozen=True)
class RunLength:
    """How long a run is. Functions rather than numbers, because some hosts must make their loaders for the answer.

    Attributes:
        total: a function that returns the optimizer steps of the run; infinite where the run has no known end.
        epoch: a function that returns the optimizer steps of an epoch; infinite where the loader has no length.
        lenient: True for a trial run (``fast_dev_run``): times that do not fit are cut instead of refused.
        samples: the training samples of an optimizer step, over ranks and accumulation; None where the batch size is
            unknown.
    """

    total: Callable[[], float]
    epoch: Callable[[], float]
    lenient: bool = False
    samples: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class Calendar:
    """Updates at ``start``, ``start + every``, ... up to ``stop`` (included), in optimizer steps.

    With ``final`` there is an update at ``stop`` even where ``stop`` is not on that grid, for a method that must arrive
    at its target. With ``until`` the grid continues after ``stop``, where the method's curve ends, and a last update
    comes at ``until``.
    """

    every: int
    start: int
    stop: int
    final: bool = False
    until: int | None = None

    @property
    def last(self) -> int:
        """The last step that an update may come at."""
        return self.stop if self.until is None else self.until

    def times(self) -> list[int]:
        """The calendar as a list of whole numbers, which a checkpoint stores."""
        return [self.every, self.start, self.stop, *([] if self.until is None else [self.until])]

    def why_other_times(self, saved: Sequence[int], method: str) -> str:
        """Why a resumed run goes on with other times than it was saved with, as a sentence for the user; empty where it
        does not.

        Args:
            saved: what :meth:`times` gave when the run was saved; empty where it had no calendar.
            method: name of the method, for the sentence.
        """
        now = self.times()
        if not saved or list(saved) == now:
            return ""
        return (
            f"{method} goes on with other times than it was saved with, because the run's length or batch size differs: "
            f"(every, start, stop) were {list(saved)} steps and are {now}."
        )

    def next(self, number: int, first_update: int, done: int | None) -> int | None:
        """The first update at or after step ``number`` that is not the one already ``done``; None when none is left.

        Args:
            number: the number of the optimizer step to search from.
            first_update: the step at which the grid of updates begins.
            done: the step of the latest update that was made; None before the first update.
        """
        # an update that replaces its step does not count as a step: `number` is still that of the update just made
        first = max(number if done is None else max(number, done + 1), first_update)
        on_grid = first_update + -(-(first - first_update) // self.every) * self.every  # -(-a // b): rounded up
        found = [on_grid, *([self.stop] if self.final else []), *([] if self.until is None else [self.until])]
        return min((f for f in found if first <= f <= self.last), default=None)


def check_times(start: Time, stop: Time, every: Time | None) -> None:
    """Refuse times that are wrong whatever the length of the run, when a method is constructed.

    Raises:
        ValueError: a value that is not a time, ``stop`` before ``start``, or an interval longer than ``stop - start``.
    """
    # a run of one step stands for any length: only the values themselves are checked here
    for name, value in (("start", start), ("stop", stop)):
        to_steps(value, 1, name)
    if stop == 0:
        raise ValueError(
            f"stop={stop!r} is the beginning of the run, so no update would ever move a mask. Give a later stop=, or use "
            "Static to hold one mask."
        )
    # bool is an int: to_steps below refuses True and False with a message of its own
    if every is not None and not isinstance(every, bool) and isinstance(every, Real) and every <= 0:
        raise ValueError(
            f"every={every!r} is not an interval between updates. Give optimizer steps (1 or more) or a fraction of "
            "the run."
        )
    if every is not None:
        to_steps(every, 1, "every")
    # steps and fractions can be compared only when the length of the run is known
    if type(start) is type(stop) and stop < start:
        raise ValueError(f"stop={stop!r} lies before start={start!r}. Give a stop at or after the start.")
    if every is not None and type(start) is type(stop) is type(every) and every > stop - start:
        raise ValueError(_too_long(every, start, stop))


def check_time_of_one_update(when: Time, name: str) -> None:
    """Refuse a time of an only update that is wrong whatever the length of the run, when a method is constructed.

    Args:
        when: the time.
        name: the name of the argument.

    Raises:
        ValueError: a value that is not a time, or the beginning of the run.
    """
    to_steps(when, 1, name)
    if when == 0:
        raise ValueError(f"{name}={when!r} is before the first step. Give when='start' for that, or a later time.")


def calendar_of_one_update(when: Time, name: str, run: RunLength) -> Calendar:
    """The calendar of a run with an only update, at ``when``.

    Args:
        when: the time of the update.
        name: the name of the argument, for the errors.
        run: the length of the run.

    Raises:
        ValueError: a fraction of an endless run.
    """
    # the length is asked for only where it is needed, as in `resolve_times`
    step = when if isinstance(when, int) else max(1, to_steps(when, run.total(), name))  # no step would be before it
    return Calendar(1, step, step, final=True)


def resolve_times(
    every: Time | None,
    start: Time,
    stop: Time,
    published_every: int,
    run: RunLength,
    *,
    final: bool = False,
    inform: Callable[[str], None] = lambda _: None,
) -> Calendar:
    """The calendar of a run, its time arguments turned into optimizer steps.

    Args:
        every: the interval between updates. None: ``published_every``, which is shortened, to no less than ten steps,
            where fewer than ten updates would fit between start and stop; ``inform`` then receives a sentence about it.
        start: the time of the first update.
        stop: the time of the last update.
        published_every: the interval of the paper, in optimizer steps.
        run: the length of the run.
        final: whether an update comes at ``stop`` in any case; see :class:`Calendar`.
        inform: a function that shows a sentence to the user.

    Raises:
        ValueError: a fraction of an endless run, ``stop`` before ``start``, an interval longer than ``stop - start``.
    """

    def steps(value: Time, name: str) -> int:
        # the length is asked for only where it is needed: the host may have to make its loaders for the answer
        return value if isinstance(value, int) else to_steps(value, run.total(), name)

    first, last = steps(start, "start"), steps(stop, "stop")
    if final and last == 0 and stop > 0:
        last = 1  # a small fraction of a short run rounds to 0, and before the first step no update would come
    if last < first:
        if not run.lenient:
            raise ValueError(
                f"stop={stop!r} ({last} steps) lies before start={start!r} ({first} steps). Give a stop at or after "
                "the start."
            )
        last = first  # an integer start lies behind a stop that is a fraction of a few steps
    if last == first and not final and not run.lenient:
        raise ValueError(
            f"start={start!r} and stop={stop!r} are the same step ({first}): no update would move a mask. Give a "
            "later stop=, or use Static to hold one mask."
        )
    if every is None:
        fitting = max(SHORTEST_INTERVAL, (last - first) // FEWEST_UPDATES)
        interval = max(1, min(published_every, fitting, last - first))
        if interval < published_every:
            inform(
                f"every={interval}: the published interval of {published_every} steps would leave fewer than "
                f"{FEWEST_UPDATES} updates between step {first} and step {last}. Give every= to choose another."
            )
    else:
        interval = max(1, steps(every, "every"))  # a small fraction of a short run rounds to 0
        if interval > last - first:
            if not run.lenient:
                raise ValueError(_too_long(every, start, stop, f" ({interval} steps against {last - first})"))
            interval = max(1, last - first)
    return Calendar(interval, first, last, final)


def _too_long(every: Time, start: Time, stop: Time, steps: str = "") -> str:
    """The error for an interval longer than the time between start and stop."""
    return (
        f"every={every!r} is longer than stop - start with start={start!r}, stop={stop!r}{steps}: the masks would "
        "hardly ever move. Give a smaller every=, a later stop= or a longer run."
    )
