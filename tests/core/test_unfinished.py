"""A run that ends in the middle of its updates says so."""

import warnings
from typing import Any

import pytest
from support.loops import METHODS, batches, data, loss_of, net, sgd

from sparse_callbacks import RigL, sparsify
from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.progress import Progress, StepCount


def progress(steps: int, updates: int = 0) -> Progress:
    found = Progress(1)
    found.counts, found.updates = {0: StepCount(steps), 1: StepCount(3)}, updates
    return found


@pytest.mark.parametrize(
    ("steps", "updates", "skipped", "is_told"),
    [(75, 0, 0, False), (66, 0, 0, False), (65, 0, 0, False), (64, 0, 0, True), (60, 5, 0, False), (60, 0, 5, False)],
)
def test_more_than_an_interval_must_be_missing(steps: int, updates: int, skipped: int, is_told: bool) -> None:
    """The optimizer with the most steps decides, and steps that were replaced or skipped were taken too."""
    text = progress(steps, updates).why_unfinished(Calendar(10, 0, 75), skipped, "RigL")
    assert bool(text) is is_told
    assert not is_told or f"{steps} steps were counted, and the last update is due at step 75" in text
    assert progress(steps).why_unfinished(None, skipped, "Static") == ""


def words(method: Any, promised: int, taken: int) -> list[str]:
    model = net()
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sparsify(method, model, optimizer, steps=promised) as run:
            for batch in batches(data(), 0, taken):
                optimizer.zero_grad()
                with run.batch():
                    loss_of(model, batch).backward()
                optimizer.step()
    return [str(w.message) for w in caught if "ended" in str(w.message)]


@pytest.mark.parametrize("method", ["rigl", "set", "snfs"])
def test_a_loop_that_takes_fewer_steps_than_it_promised_is_told(method: str) -> None:
    (text,) = words(METHODS[method](), promised=96, taken=24)
    assert "ended in the middle of its updates" in text
    assert "the last update is due at step 72" in text
    assert words(METHODS[method](), promised=24, taken=24) == []


def test_a_method_that_arrives_has_one_word_of_its_own() -> None:
    (text,) = words(METHODS["gmp"](), promised=96, taken=24)
    assert "before its target" in text


def test_updates_up_to_the_very_end_are_no_reason_to_warn() -> None:
    assert words(RigL(0.8, every=2, stop=1.0, print_plan=False), promised=24, taken=24) == []
