"""Runs that a SIGKILL ends resume bitwise from their last periodic checkpoint."""

import itertools
import os
from contextlib import closing
from pathlib import Path

import pytest

from kills import killing
from kills.killing import HEADER, Kill, Killer, random_kills


def test_a_killed_run_resumes_bitwise(tmp_path: Path) -> None:
    with closing(Killer(tmp_path, epochs=3)) as killer:
        row = killer.run(Kill("rigl", "csv", (13,)))
    assert row.resumed_from in [(10,), (15,)]
    assert not row.differs


def test_the_kills_are_spread_over_methods_loggers_and_the_run() -> None:
    kills = list(random_kills(50, seed=0))
    assert sum(kill.writing for kill in kills) == 10
    assert sum(len(kill.steps) == 2 for kill in kills) == 7
    assert {kill.steps[0] // 10 for kill in kills} == set(range(11))


@pytest.mark.parametrize("number", [5, 10, 17, 20, 21, 25])
def test_every_method_has_its_turn_with_either_logger(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [f"method {i}" for i in range(number)]
    monkeypatch.setattr(killing, "METHODS", methods)
    kills = list(random_kills(60 * number, seed=0))
    turns = [(kill.method, kill.logger) for kill in kills]
    assert set(turns[: 2 * number]) == set(itertools.product(methods, killing.LOGGERS))
    # what falls at every fifth kill or every seventh falls upon all of them in time
    assert {kill.method for kill in kills if kill.writing} == set(methods)
    assert {kill.method for kill in kills if len(kill.steps) == 2} == set(methods)


@pytest.mark.slow
def test_fifty_killed_runs_resume_bitwise(tmp_path: Path) -> None:
    """The log is printed: ``pytest -m slow -s tests/kills``; KILLS=10 KILL_SEED=3 give their number and seed."""
    differing = []
    print(f"\n{HEADER}")
    with closing(Killer(tmp_path)) as killer:
        for kill in random_kills(int(os.environ.get("KILLS", "50")), int(os.environ.get("KILL_SEED", "0"))):
            row = killer.run(kill)
            print(row, flush=True)
            differing += [row] if row.differs else []
    assert not differing
