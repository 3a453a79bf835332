"""Puts this folder on the import path, so that tests in subfolders find the helper modules; one thread for
everything; no test may leave compiled code or Lightning's log switched off."""

import functools
import gc
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

# the networks are tiny: two threads gain nothing, and on a busy machine they wait for each other most of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning_fabric.utilities.registry as callbacks_of_others
import pytest
import torch
from lightning_utilities.core import rank_zero
from support.stance import stance

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# every Trainer reads the descriptions of all installed distributions, which takes as long as several short fits
callbacks_of_others.entry_points = functools.cache(callbacks_of_others.entry_points)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="run every combination of arguments of tests marked `combinations`",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked ``combinations`` leave as many as it takes that every value of every argument occurs."""
    if moving := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(
            f"names of tests hold addresses, so that two workers cannot agree on them: {moving}. Give ids=."
        )
    if config.getoption("--all-combinations"):
        return
    left_out = other_variants(items)
    by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("combinations") and hasattr(item, "callspec") and item not in left_out:
            by_test[f"{item.path}::{item.originalname}"].append(item)  # type: ignore[attr-defined]
    for tests in by_test.values():
        left_out |= {*tests} - {*covering(tests)}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def other_variants(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Of each test in classes whose marker ``variants`` has the same word all runs but one, which comes from each class in turn."""
    runs: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if marker := item.get_closest_marker("variants"):
            runs[marker.args[0], item.name].append(item)
    return {
        item
        for number, alike in enumerate(runs.values())
        for place, item in enumerate(alike)
        if place != number % len(alike)
    }


def pytest_collection_finish() -> None:
    """Thousands of tests and whatever they import stay to the end: Python need not look through them for garbage each time."""
    gc.collect()
    gc.freeze()


def covering(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Some of ``items``, runs of one test, in which each value of each argument occurs, and about as often as the others.

    The class of a test is one of its arguments: the contract is a class for each method.
    """
    values = {
        item: {("class", id(item.cls))} | {(name, known(value)) for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]
        for item in items
    }
    missing, times, kept = set().union(*values.values()), Counter[tuple[str, object]](), []
    while missing:
        # the first of equals, the same on every worker
        best = max(items, key=lambda item: (len(values[item] & missing), -sum(times[v] for v in values[item])))
        kept.append(best)
        missing -= values[best]
        times.update(values[best])
    return kept


def known(value: object) -> object:
    """What equal values have in common: themselves, or the object where they may not be hashable."""
    return (type(value), value) if isinstance(value, str | int | float | None) else id(value)


@pytest.fixture(autouse=True)
def _compiled_code_stays_compiled() -> Iterator[None]:
    """A stance that a test leaves would let every later test of the process run compiled code eagerly, silently."""
    yield
    if stance() != "default":
        gc.collect()  # a run that the test did not close, and that nobody can reach, ends now
    if (left := stance()) != "default":
        torch.compiler.set_stance("default")
        pytest.fail(f"the test has left torch.compiler's stance at {left!r}")


@pytest.fixture(autouse=True)
def _lightning_goes_on_telling() -> Iterator[None]:
    """A log that a test leaves switched off would be empty in every later test of the process that reads it."""
    imported = "pytorch_lightning" in sys.modules  # which sets up its log
    before = log_of_notices()
    yield
    if imported and (left := log_of_notices()) != before:
        pytest.fail(f"the test has left the log of Lightning with {left}, where it had {before}")


def log_of_notices() -> dict[str, object]:
    """Whatever decides that a notice of Lightning is told: its own log, what its log passes on to, and the switch of all logs."""
    log = rank_zero.log
    return {
        "level": log.getEffectiveLevel(),
        "disabled": log.disabled or bool(log.parent and log.parent.disabled),
        "propagate": log.propagate,
        "off below": logging.root.manager.disable,
    }
