"""Damaged files and states are refused in words, with the path, and nothing of them is executed or kept.

``PYTHONPATH=tests python -m support.damaged_inputs --show`` prints what comes of each.
"""

from collections import Counter
from pathlib import Path

import pytest
from support.damaged_inputs import BARE, CHANGED, REFUSED, WRONG, as_table, counted

pytestmark = pytest.mark.filterwarnings("ignore")


def none_is_accepted(each: int, seed: int, folder: Path) -> int:
    """Some inputs of each kind are refused in words or right as they are; gives the number of those refused."""
    found, lines = counted(each, seed, folder)
    total = sum(found.values(), Counter[str]())
    wrong = [line for line in lines if line.startswith((BARE, WRONG, CHANGED))]
    assert wrong == [], as_table(found)
    return total[REFUSED]


def test_damaged_inputs_of_every_kind_are_refused_in_words(tmp_path: Path) -> None:
    assert none_is_accepted(4, 0, tmp_path) > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_damaged_inputs_are_refused_in_words(seed: int, tmp_path: Path) -> None:
    assert none_is_accepted(20, seed, tmp_path) > 400
