"""The calendar of updates against a step-by-step reference, and the resolution of its time arguments."""

import math
from typing import Any

import pytest
import torch

from sparse_callbacks.core.calendar import Calendar, RunLength, check_times, resolve_times
from sparse_callbacks.core.progress import StepCount

# begin, end, every, gradient steps, updates at these steps (the reference code of RigL)
OFFICIAL_RIGL = [
    (0, 300, 100, 450, [0, 100, 200, 300]),
    (0, 10, 5, 12, [0, 5, 10]),
    (1, 4, 2, 6, [1, 3]),
    (100, 300, 100, 450, [100, 200, 300]),
    (0, 10**9, 3, 10, [0, 3, 6, 9]),
]
OFFICIAL_SET = [(1, 4, 2, 5, [1, 3]), (0, 300, 100, 450, [1, 101, 201]), (0, 10, 5, 12, [1, 6])]


def walk(calendar: Calendar, steps: range, first_update: int) -> list[int]:
    done, updates = None, []
    for step in steps:
        if calendar.next(step, first_update, done) == step:
            updates.append(step)
            done = step
    return updates


def official(begin: int, end: int, every: int, steps: range) -> list[int]:
    """The reference code's rule: begin <= t <= end and t >= last update + every."""
    last, updates = -every, []
    for step in steps:
        if begin <= step <= end and step >= last + every:
            updates.append(step)
            last = step
    return updates


@pytest.mark.parametrize(("begin", "end", "every", "steps", "expected"), OFFICIAL_RIGL)
def test_updates_that_replace_a_step_follow_the_reference(
    begin: int, end: int, every: int, steps: int, expected: list[int]
) -> None:
    assert (
        walk(Calendar(every, begin, end), range(steps), begin) == expected == official(begin, end, every, range(steps))
    )


@pytest.mark.parametrize(("begin", "end", "every", "steps", "expected"), OFFICIAL_SET)
def test_updates_after_a_step_follow_the_reference(
    begin: int, end: int, every: int, steps: int, expected: list[int]
) -> None:
    counted = range(1, steps + 1)
    assert walk(Calendar(every, begin, end), counted, max(begin, 1)) == expected == official(begin, end, every, counted)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("length", [0, 1, 6, 13])
def test_next_equals_a_search_step_by_step(every: int, start: int, length: int) -> None:
    for final in (False, True):
        calendar = Calendar(every, start, start + length, final)
        grid = {*range(start, start + length + 1, every), *([start + length] if final else [])}
        for done in (None, *range(start + length + 1)):
            for step in range(start + length + 3):
                expected = next(
                    (s for s in range(step, start + length + 1) if s in grid and (done is None or s > done)), None
                )
                assert calendar.next(step, start, done) == expected


def test_an_update_that_could_not_happen_is_still_due_at_the_same_step() -> None:
    calendar = Calendar(10, 0, 50)
    assert calendar.next(20, 0, 10) == 20
    assert calendar.next(20, 0, 20) == 30


def made(every: Any, start: Any, stop: Any, total: float = 1000, **options: Any) -> tuple[Calendar, list[str]]:
    told: list[str] = []
    run = RunLength(lambda: total, lambda: total, options.pop("lenient", False))
    return resolve_times(every, start, stop, 100, run, inform=told.append, **options), told


@pytest.mark.parametrize(
    ("every", "start", "stop", "total", "expected"),
    [
        (None, 0, 0.75, 2000, (100, 0, 1500)),
        (50, 0.1, 0.5, 1000, (50, 100, 500)),
        (0.05, 10, 900, 1000, (50, 10, 900)),
        (0.0001, 0, 1.0, 1000, (1, 0, 1000)),
        (1000, 0, 1000, 1, (1000, 0, 1000)),
        (100, 0, 1.0, 453, (100, 0, 453)),
        (7, 5, 1.0, 12, (7, 5, 12)),
    ],
)
def test_times_are_steps_or_fractions_of_the_run(
    every: Any, start: Any, stop: Any, total: int, expected: tuple[int, ...]
) -> None:
    calendar, told = made(every, start, stop, total)
    assert (calendar.every, calendar.start, calendar.stop) == expected
    assert not told


def test_whole_steps_do_not_ask_how_long_the_run_is() -> None:
    def unknown() -> float:
        raise AssertionError("asked")

    run = RunLength(unknown, unknown)
    assert resolve_times(10, 0, 100, 100, run) == Calendar(10, 0, 100)
    assert resolve_times(None, 0, 5000, 100, run) == Calendar(100, 0, 5000)


@pytest.mark.parametrize(("stop", "expected"), [(1000, 100), (999, 99), (500, 50), (15, 10), (10, 10), (3, 3)])
def test_the_default_interval_is_shortened_with_a_word(stop: int, expected: int) -> None:
    calendar, told = made(None, 0, stop)
    assert calendar.every == expected
    if expected == 100:
        assert told == []
    else:
        assert told == [
            f"every={expected}: the published interval of 100 steps would leave fewer than 10 updates between "
            f"step 0 and step {stop}. Give every= to choose another."
        ]


def test_a_window_of_no_steps_is_refused_unless_the_method_arrives_there() -> None:
    with pytest.raises(
        ValueError,
        match=r"start=7 and stop=7 are the same step \(7\): no update would move a mask\. Give a later stop=",
    ):
        made(None, 7, 7)
    with pytest.raises(ValueError, match=r"start=0\.5 and stop=20 are the same step \(20\)"):
        resolve_times(None, 0.5, 20, 100, RunLength(lambda: 40, lambda: 40))
    assert resolve_times(None, 7, 7, 100, RunLength(lambda: 40, lambda: 40), final=True).stop == 7
    assert resolve_times(None, 7, 7, 100, RunLength(lambda: 40, lambda: 40, lenient=True)).stop == 7


def test_an_arrival_at_a_small_share_of_a_short_run_comes_after_its_first_step() -> None:
    run = RunLength(lambda: 20, lambda: 20)
    assert resolve_times(None, 0, 0.01, 100, run, final=True) == Calendar(1, 0, 1, True)
    assert resolve_times(None, 0, 0, 100, run, final=True).stop == 0  # as it was given


def test_the_shortened_interval_leaves_at_least_ten_updates_where_there_are_a_hundred_steps() -> None:
    for stop in range(100, 1200):
        calendar, _ = made(None, 0, stop)
        assert len(walk(calendar, range(stop + 1), 0)) >= 10


@pytest.mark.parametrize(
    ("every", "start", "stop", "message"),
    [
        (0, 0, 10, r"every=0 is not an interval between updates\. Give optimizer steps \(1 or more\)"),
        (0.0, 0, 1.0, r"every=0\.0 is not an interval"),
        (-5, 0, 10, r"every=-5 is not an interval between updates\. Give optimizer steps \(1 or more\)"),
        (True, 0, 10, r"every=True is not a time"),
        (None, "later", 10, r"start='later' is not a time"),
        (None, 0, 1.5, r"stop=1\.5 is outside \[0, 1\].*write an int"),
        (None, -1, 10, r"start=-1 lies before the run.*Give 0 or more"),
        (None, 20, 10, r"stop=10 lies before start=20\. Give a stop at or after the start"),
        (None, 0.5, 0.25, r"stop=0\.25 lies before start=0\.5"),
        (
            11,
            0,
            10,
            r"every=11 is longer than stop - start with start=0, stop=10: .* Give a smaller every=, a later stop= or a longer run",
        ),
        (0.5, 0.25, 0.5, r"every=0\.5 is longer than stop - start"),
        (math.nan, 0, 10, r"every=nan is outside"),
    ],
)
def test_impossible_times_are_refused_without_a_run(every: Any, start: Any, stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_times(start, stop, every)


@pytest.mark.parametrize(
    ("every", "start", "stop"), [(None, 0, 0.75), (100, 0, 0.01), (0.5, 0, 10), (10, 5, 15), (None, 100, 0.1)]
)
def test_times_of_different_units_wait_for_the_run(every: Any, start: Any, stop: Any) -> None:
    check_times(start, stop, every)


@pytest.mark.parametrize(
    ("every", "start", "stop", "total", "message"),
    [
        (
            None,
            100,
            0.5,
            100,
            r"stop=0\.5 \(50 steps\) lies before start=100 \(100 steps\)\. Give a stop at or after the start",
        ),
        (
            100,
            0,
            0.75,
            100,
            r"every=100 is longer than stop - start .* \(100 steps against 75\).*Give a smaller every=, a later stop=",
        ),
        (0.5, 0, 10, 1000, r"every=0\.5 is longer than .*\(500 steps against 10\)"),
        (
            None,
            0,
            0.75,
            math.inf,
            r"stop=0\.75 is a fraction of a run whose length is not known.*max_steps=.*integer steps",
        ),
        (0.1, 0, 50, math.inf, r"every=0\.1 is a fraction of a run whose length is not known"),
        (None, 0.1, 50, 0, r"start=0\.1 is a fraction of a run whose length is not known"),
    ],
)
def test_impossible_times_are_refused_in_the_run(every: Any, start: Any, stop: Any, total: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(every, start, stop, total)


def test_a_trial_run_cuts_what_does_not_fit() -> None:
    assert made(100, 0, 0.75, 1, lenient=True)[0] == Calendar(1, 0, 1)
    assert made(100, 0, 0.75, 20, lenient=True)[0] == Calendar(15, 0, 15)
    assert made(10, 500, 0.75, 4, lenient=True)[0] == Calendar(1, 500, 500)


def test_steps_with_a_non_finite_gradient_are_not_counted_and_nobody_waits_for_the_device() -> None:
    class Watched(torch.Tensor):
        read = 0

        def __int__(self) -> int:
            Watched.read += 1
            return super().__int__()

        def __bool__(self) -> bool:
            Watched.read += 1
            return super().__bool__()

    count = StepCount()
    for finite in (True, False, True, False, False):
        count.add(torch.tensor(finite).as_subclass(Watched))
    assert Watched.read == 0
    assert count.at_most() == 5
    assert Watched.read == 0
    assert count.read() == 2 == count.at_most()
    assert Watched.read == 1
    assert count.read() == 2
    assert Watched.read == 1
    count.add(torch.tensor(False).as_subclass(Watched))
    assert (count.at_most(), count.read()) == (3, 2)
    count.add(True)  # known on the CPU at once: such a step never enters the upper bound
    count.add(False)
    assert (count.at_most(), count.read()) == (3, 3)
