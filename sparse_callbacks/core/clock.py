"""The time of a call: the one clock, for layers that are measured alone and for whole models."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

SHORTEST = 5e-4
"""Seconds that a reading lasts at least. Shorter ones would measure the clock itself, so fast calls are repeated."""
MOST_CALLS = 1 << 14
"""Calls in one reading at most, so that a clock that stands still cannot hold a reading up for ever."""
FEWEST = 3
"""Readings that are taken of every call, however slow it is."""


def milliseconds(
    calls: Sequence[Callable[[], Any]],
    readings: int,
    devices: Iterable[torch.device] = (),
    patience: float = math.inf,
    settled: Callable[[list[float]], bool] = lambda medians: False,
    cpu_time: bool = False,
    warm: bool = False,
) -> list[float]:
    """Median time of one call of each of ``calls``.

    Args:
        calls: functions that are called without arguments, in the grad mode that is set outside.
        readings: number of readings of which the median is taken, of 0.5 ms or more each. One more warms up, unless ``warm``.
        devices: devices that work for the calls; a reading ends when the GPUs among them are idle.
        patience: seconds after which no reading beyond the :data:`FEWEST` is taken.
        settled: asked after each reading of every call whether these medians, in the order of ``calls``, answer the
            caller's question; no further reading is taken then.
        cpu_time: whether only the CPU time of this thread counts, which other processes do not lengthen: for calls that
            work in this thread alone. Where the system counts it too coarsely it is the time on the wall all the same.
        warm: whether all of ``calls`` were made before; then no reading is spent on warming up.
    """
    fine = time.get_clock_info("thread_time").resolution < SHORTEST / 10
    now = time.thread_time if cpu_time and fine else time.perf_counter
    working = {*devices}

    def reading(call: Callable[[], Any], repeats: int) -> float:
        wait_for(working)
        begun = now()
        for _ in range(repeats):
            call()
        wait_for(working)
        return now() - begun

    spent = 0.0

    def repeats_of(call: Callable[[], Any]) -> tuple[int, float]:
        """How often a call must be repeated to last long enough, and the seconds that it takes then."""
        nonlocal spent
        repeats = 1
        while True:
            seconds = reading(call, repeats)
            spent += seconds
            if seconds >= SHORTEST or repeats >= MOST_CALLS:
                return repeats, seconds
            repeats = max(2 * repeats, math.ceil(repeats * SHORTEST / max(seconds, 1e-9)))

    warmed_up = [repeats_of(call) for call in calls]
    rounds = [[seconds / repeats for repeats, seconds in warmed_up]] if warm else []
    medians = [1e3 * seconds for seconds in rounds[0]] if warm else []
    while len(rounds) < readings and (len(rounds) < FEWEST or spent < patience):
        # the calls take turns, so that what slows the machine down for a while slows all of them down
        seconds = [reading(call, repeats) for call, (repeats, _) in zip(calls, warmed_up, strict=True)]
        rounds.append([s / repeats for s, (repeats, _) in zip(seconds, warmed_up, strict=True)])
        spent += sum(seconds)
        medians = [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]
        if settled(medians):
            break
    return medians


def wait_for(devices: Iterable[torch.device]) -> None:
    """Return when the GPUs among ``devices`` are idle."""
    for device in devices:  # each by itself: synchronize() alone would wait for the current GPU, which may be another
        if device.type == "cuda":
            torch.cuda.synchronize(device)
