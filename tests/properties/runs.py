"""Trains a random run, and once more where it says so."""

import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from properties.cases import Case
from properties.fitting import train_under_a_trainer
from properties.loop import train_in_a_loop
from properties.setup import Refused, loads_exactly, why_not_in_torch
from sparse_callbacks.testing.comparison import differences


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``trained``, ``refused`` or ``not in torch``."""

    kind: str
    words: str = ""
    updates: int = 0
    born: int = 0


def run(case: Case) -> Outcome:
    """Train a run, and once more where it says so.

    Raises:
        AssertionError: a property does not hold.
        Exception: whatever the run raised and is not a documented refusal.
    """
    if words := why_not_in_torch(case):
        return Outcome("not in torch", words)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        train = train_under_a_trainer if case.host == "trainer" else train_in_a_loop
        try:
            first, watched = train(case, Path(folder), None)
        except Refused as refused:
            return Outcome("refused", str(refused.__cause__))
        if case.twist == "again":
            found = differences(first, train(case, Path(folder), None)[0])
            assert not found, f"another run differs: {found}"
        elif case.twist and loads_exactly(case):
            other = replace(case, network=replace(case.network, seed=77))  # everything comes from the checkpoint
            found = differences(first, train(other, Path(folder), case.twist)[0])
            assert not found, f"the resumed run differs: {found}"
        return Outcome("trained", "", watched.method.updates, watched.born)
