"""Arguments that no run can use are refused, with their range; values by glob reach the right names."""

import math
from typing import Any

import pytest

from sparse_callbacks.core.arguments import by_glob, refuse_outside


def test_values_by_glob() -> None:
    names = ["conv1.weight", "conv2.weight", "fc.weight"]
    assert by_glob(0.5, names, "density") == dict.fromkeys(names, 0.5)
    found = by_glob({"conv1*": 0.1, "conv*": 0.2, "*": 1}, names, "density")
    assert found == dict(zip(names, (0.1, 0.2, 1.0), strict=True))
    assert list(by_glob({"fc*": 0.1, "*": 0.2}, names, "density")) == names
    with pytest.raises(
        ValueError, match=r"density= has a value for 'norm\*', which matches no gated parameter.*conv1\.weight"
    ):
        by_glob({"norm*": 0.1, "*": 0.5}, names, "density")
    with pytest.raises(ValueError, match=r"droprate= has no value for fc\.weight. Add a glob"):
        by_glob({"conv*": 0.1}, names, "droprate")


@pytest.mark.parametrize("value", [0, 0.5, 1, {"a*": 0.0, "*": 1.0}])
def test_numbers_in_range_are_taken(value: Any) -> None:
    refuse_outside(value, "density", 0.0, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.1, True, "0.5", None, math.nan, math.inf, {"a*": 0.5, "*": 2.0}])
def test_numbers_out_of_range_are_refused_with_the_range(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^density=.* is out of range\. Give a number that is at least 0 and at most 1\.$"
    ):
        refuse_outside(value, "density", 0.0, 1.0)


def test_a_range_without_an_upper_bound_and_the_reason_of_a_lower_one() -> None:
    refuse_outside(1e9, "l2", 0.0, math.inf)
    with pytest.raises(ValueError, match=r"Give a number that is at least 0\.$"):
        refuse_outside(math.inf, "l2", 0.0, math.inf)
    with pytest.raises(ValueError, match=r"at least 0\.05 and at most 1: gates cannot close further\.$"):
        refuse_outside(0.01, "density", 0.05, 1.0, "gates cannot close further")
    with pytest.raises(ValueError, match=r"at least 0\.05 and at most 1\.$"):
        refuse_outside(-1, "density", 0.05, 1.0, "gates cannot close further")
