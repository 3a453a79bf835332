"""Every argument of every method refuses values of other types in words.

``PYTHONPATH=tests python -m support.bad_arguments --show`` prints what comes of each call, also of the functions.
"""

import math
from typing import Any

import pytest
from support.bad_arguments import BARE, WRONG, counted

from sparse_callbacks import CTRE, GMP, RigL, methods


def test_every_method_refuses_values_of_other_types_in_words() -> None:
    found, lines = counted(methods)
    assert len(found) == len(methods.__all__)
    assert [line for line in lines if line.startswith((BARE, WRONG))] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RigL(distribution={}), "distribution={} says nothing of any layer. Give globs"),
        (
            lambda: RigL(distribution={1: 0.5}),
            "distribution={1: 0.5} is not of a type that DropAndGrow takes. Give a text",
        ),
        (lambda: CTRE(data_fraction="1"), "data_fraction='1'"),
        (lambda: RigL().plan("model"), "model='model' is not a torch module"),
        (lambda: GMP(stop=0.0), "stop=0.0 is the beginning of the run, so no update would ever move a mask"),
        (lambda: RigL(drop_fraction=math.nan), "drop_fraction=nan"),
        (lambda: RigL(print_plan="no"), "print_plan='no' is not of a type that DropAndGrow takes. Give True or False"),
    ],
)
def test_the_error_names_the_argument_and_says_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert message in str(raised.value)
