"""The clock: medians, readings that are long enough, calls that take turns, and slow ones that are timed less often."""

import pytest
import torch

from sparse_callbacks.core import clock
from sparse_callbacks.core.clock import milliseconds


def test_the_clock_gives_the_median_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 10.0 if calls[0] % 200 == 0 else 1e-5  # now and then something else runs

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    assert milliseconds([call], 15) == [pytest.approx(0.01)]
    assert calls[0] >= 15 * 50  # readings of half a millisecond


def test_readings_of_several_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], ""

    def call(name: str, seconds: float) -> None:
        nonlocal order
        order += name
        now[0] += seconds * (1 if len(order) <= 14 else 2)  # halfway the machine becomes slower

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    pair = [lambda: call("a", 0.001), lambda: call("b", 0.003)]
    a, b = milliseconds(pair, 11)
    assert order == "ab" * 12
    assert b / a == pytest.approx(3)


def test_a_longer_layer_takes_longer() -> None:
    times = milliseconds([lambda n=n: torch.ones(n, n) @ torch.ones(n, n) for n in (16, 512)], 5)
    assert 0 < 5 * times[0] < times[1]


@pytest.mark.parametrize(("patience", "calls"), [(100.0, 10), (0.0, 4)])
def test_slow_calls_are_timed_less_often(patience: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], [0]

    def call() -> None:
        called[0] += 1
        now[0] += 1.0

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    assert milliseconds([call], 9, patience=patience) == [1000.0]
    assert called[0] == calls  # one of them warms up


def test_calls_that_were_made_before_are_not_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], [0]

    def call() -> None:
        called[0] += 1
        now[0] += float(called[0])

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    assert milliseconds([call], 3, warm=True) == [2000.0]
    assert called[0] == 3  # and no more


def test_no_further_reading_is_taken_once_the_medians_answer_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called, asked = [0.0], [0], []

    def call() -> None:
        called[0] += 1
        now[0] += 1.0

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    assert milliseconds([call], 9, settled=lambda medians: asked.append(medians) or len(asked) == 2) == [1000.0]
    assert asked == [[1000.0], [1000.0]]
    assert called[0] == 3  # one of them warms up


def test_cpu_time_does_not_count_what_the_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [0.0]

    def call() -> None:
        own[0] += 0.001  # the wall clock does not matter

    monkeypatch.setattr(clock.time, "thread_time", lambda: own[0])
    assert milliseconds([call], 3, cpu_time=True) == [pytest.approx(1.0)]


def test_a_clock_that_stands_still_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 0.0)
    assert milliseconds([lambda: None], 3) == [0.0]


def test_every_gpu_that_works_for_the_calls_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    second = torch.device("cuda:1")
    milliseconds([lambda: None], 1, [torch.device("cpu"), second])
    assert set(waited) == {second}  # and not the current one, whatever it is
    assert len(waited) >= 2 * 2
