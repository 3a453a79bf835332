"""Every argument of every public constructor and function refuses values of other types in words.

``PYTHONPATH=tests python -m support.bad_arguments --show`` prints what comes of each call.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.bad_arguments import BARE, WRONG, counted
from torch import nn

from sparse_callbacks import (
    CTRE,
    GMP,
    SET,
    SNFS,
    RigL,
    Update,
    channel_groups,
    combine,
    distributions,
    load_compact,
    methods,
    ops,
    save_compact,
    schedules,
    sparsify,
)

_SIX = torch.arange(6.0)


def test_every_constructor_and_function_refuses_values_of_other_types_in_words() -> None:
    found, lines = counted()
    assert found.keys() >= {f"sparse_callbacks.{name}" for name in methods.__all__}
    assert found.keys() >= {"ops.keep_largest", "schedules.to_steps", "distributions.clipped", "sparse_callbacks.slim"}
    assert [line for line in lines if line.startswith((BARE, WRONG))] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RigL(distribution={}), "distribution={} says nothing of any layer. Give globs"),
        (
            lambda: RigL(distribution={1: 0.5}),
            "distribution={1: 0.5} is not of a type that RigL takes. Give a text",
        ),
        (lambda: CTRE(data_fraction="1"), "data_fraction='1'"),
        (lambda: RigL().plan("model"), "model='model' is not a torch module"),
        (lambda: GMP(stop=0.0), "stop=0.0 is the beginning of the run, so no update would ever move a mask"),
        (lambda: RigL(drop_fraction=math.nan), "drop_fraction=nan"),
        (lambda: SNFS(seed="a"), "seed='a' is not a whole number"),
        (lambda: SET(print_plan="no"), "print_plan='no' is not of a type that SET takes. Give True or False"),
        (lambda: RigL(distribution={"*": math.nan}), "the sparsity nan of '*' is not a number between 0 and 1"),
        (
            lambda: GMP(distribution={"a": 0.5, "*": math.inf}),
            "the sparsity inf of '*' is not a number between 0 and 1",
        ),
        (lambda: RigL(every=10**30), f"every={10**30} is later than any run ends"),
        (lambda: RigL(start=0, stop=2**62 + 1), f"stop={2**62 + 1} is later than any run ends"),
        (lambda: RigL(print_plan="no"), "print_plan='no' is not of a type that RigL takes. Give True or False"),
    ],
)
def test_the_error_names_the_argument_and_says_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.to_steps(0.5, None, "stop"), "total=None is not of a type that to_steps takes"),  # type: ignore[arg-type]
        (lambda: schedules.to_steps(3, True, "stop"), "total=True is not of a type that to_steps takes"),
        (lambda: schedules.Schedule(np.array([1, 2]), 0.5, 0.0), "is not a curve"),  # type: ignore[arg-type]
        (lambda: ops.zeros_for(math.inf, 10), "sparsity=inf of size=10 weights is not a number of zeros"),
        (lambda: ops.drop_count(10, math.inf), "fraction=inf of active=10 connections is too large"),
        (lambda: ops.drop_count(10, 1e300), "fraction=1e+300 of active=10 connections is too large"),
        (lambda: ops.keep_largest(_SIX, 2, among=_SIX[:5] > 0), "among=<tensor [5]> has another shape than [6]"),
        # of as many positions, and in one that torch would spread over the others
        (lambda: ops.keep_largest(_SIX, 2, among=_SIX.view(2, 3) > 0), "among=<tensor [2, 3]>"),
        (lambda: ops.drop_and_grow(_SIX > 2, _SIX[:1], _SIX, 1), "drop=<tensor [1]> has another shape than [6]"),
        (lambda: ops.drop_and_grow(_SIX > 2, _SIX, _SIX.view(2, 3), 1), "grow=<tensor [2, 3]>"),
        (lambda: distributions.clipped("uniform", None), "shapes=None is not of a type that clipped takes"),  # type: ignore[arg-type]
        (lambda: distributions.clipped({1: 0.5}, {"a": (2, 2)}), "distribution={1: 0.5}"),  # type: ignore[dict-item]
        (lambda: distributions.erdos_renyi({"a": (4, 3)}, 0.5, power=math.inf), "power=inf leaves no proportion"),
        (lambda: distributions.erdos_renyi({"a": (1, 1)}, 0.5, power=1e300), "power=1e+300 leaves no proportion"),
        (lambda: combine([], {}), "workers=[] leaves nothing to combine"),
        (lambda: combine(3, {}), "Give a list (a mapping from a text to anything each)"),  # type: ignore[arg-type]
        (lambda: Update(3), "masks=3 is not a mapping of tensors. Give bool tensors by parameter name"),  # type: ignore[arg-type]
        (lambda: Update({"a": 1}), "masks={'a': 1} is not a mapping"),  # type: ignore[dict-item]
        (lambda: Update({}, {"a": "b"}), "figures={'a': 'b'} is not a mapping"),  # type: ignore[dict-item]
        (lambda: channel_groups(nn.Linear(2, 2), torch.ones(1, 2), seconds=0), "seconds=0 leaves no time"),
        (lambda: save_compact(nn.Linear(2, 2), ""), "path='.' has no file name"),
        (lambda: load_compact(nn.Linear(2, 2), ""), "path='.' has no file name"),
        (lambda: sparsify(RigL(), nn.Linear(2, 2), None, steps=np.array([1, 2])), "steps=array([1, 2])"),  # type: ignore[arg-type]
        (lambda: sparsify(RigL(), nn.Linear(2, 2), None, steps=torch.ones(2)), "steps=tensor([1., 1.])"),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_the_right_type_that_fits_nothing_is_refused_in_words(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert message in str(raised.value)
