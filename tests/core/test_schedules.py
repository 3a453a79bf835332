"""Curves against the reference numbers and closed forms; times in steps and in fractions."""

import math
from typing import Any

import pytest
from oracles.rigl import COSINE, DROP_COUNTS, EXPONENTIAL

from sparse_callbacks import schedules
from sparse_callbacks.core.schedules import Schedule, as_schedule, parse, to_steps, with_curve

ALL = [
    schedules.constant(0.3),
    schedules.cosine(0.3),
    schedules.linear(0.3, 0.1),
    schedules.exponential(0.3, power=2),
    schedules.cubic(0.0, 0.9),
    schedules.polynomial(1e-3, 0.9, 2.5),
]


@pytest.mark.parametrize(
    ("initial", "stop", "values"),
    [
        (0.3, 25000, COSINE["alpha0.3_T25000"]),
        (0.3, 75000, COSINE["alpha0.3_T75000"]),
        (0.5, 1000, COSINE["alpha0.5_T1000"]),
    ],
)
def test_cosine_as_in_the_reference(initial: float, stop: int, values: dict[str, float]) -> None:
    for step, value in values.items():
        assert schedules.cosine(initial)(int(step), 0, stop) == pytest.approx(value, abs=1e-12)  # 12 digits are given


def test_exponential_as_in_the_reference() -> None:
    for step, value in EXPONENTIAL["alpha0.3_T1000_exp3"].items():
        assert schedules.exponential(0.3)(int(step), 0, 1000) == pytest.approx(value, abs=1e-12)
        assert schedules.cubic(0.3)(int(step), 0, 1000) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("case", DROP_COUNTS, ids=str)
def test_the_reference_drop_fractions_come_from_the_cosine(case: dict[str, float]) -> None:
    found = schedules.cosine(case["alpha"])(case["step"], 0, case["T_end"])
    assert found == pytest.approx(case["drop_fraction"], abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [
        (schedules.constant(0.4), 0.4, 0.4),
        (schedules.cosine(0.4, 0.2), 0.2 + 0.1 * (1 + math.sqrt(0.5)), 0.3),
        (schedules.linear(0.4, 0.2), 0.35, 0.3),
        (schedules.exponential(0.4, 0.2), 0.2 + 0.2 * 27 / 64, 0.225),
        (schedules.cubic(0.0, 0.64), 0.37, 0.56),
        (schedules.polynomial(0.4, 0.2, 2), 0.2 + 0.2 * 9 / 16, 0.25),
    ],
    ids=repr,
)
def test_curves_by_hand(schedule: Schedule, quarter: float, half: float) -> None:
    assert schedule(125, 100, 200) == pytest.approx(quarter, abs=1e-15)
    assert schedule(150, 100, 200) == pytest.approx(half, abs=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_ends_are_exact_and_hold_outside(schedule: Schedule) -> None:
    for step in (-5, 0, 100):
        assert schedule(step, 100, 200) == schedule.initial
    for step in (200, 201, 10**9):
        assert schedule(step, 100, 200) == schedule.final
    assert schedule(99, 100, 100) == schedule.initial
    assert schedule(100, 100, 100) == schedule.final


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_repr_is_what_parse_reads(schedule: Schedule) -> None:
    assert parse(repr(schedule)) == schedule
    assert hash(parse(repr(schedule))) == hash(schedule)


def test_schedules_are_plain_values() -> None:
    assert schedules.cosine(0.3) == schedules.cosine(0.3, 0.0) != schedules.linear(0.3)
    with pytest.raises(AttributeError, match=r"cannot assign"):
        schedules.cosine(0.3).initial = 0.5  # type: ignore[misc]
    assert repr(schedules.linear(0.3)) == "linear(0.3, 0.0)"


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("linear(0.3)", schedules.linear(0.3)),
        (" cosine( .3 , 0.05 ) ", schedules.cosine(0.3, 0.05)),
        ("exponential(0.3, power=2)", schedules.exponential(0.3, 0.0, 2)),
        ("linear(initial=-1, final=1e-3)", schedules.linear(-1, 1e-3)),
        ("constant(1)", schedules.constant(1.0)),
    ],
)
def test_parse(text: str, schedule: Schedule) -> None:
    assert parse(text) == schedule


@pytest.mark.parametrize(
    "text", ["linear", "0.3", "", "linear(0.3", "a.b(1)", "linear(x)", "linear(*[1])", "linear(0.3)(2)", "lambda: 1"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a schedule. Write a curve with its numbers"):
        parse(text)


def test_unknown_curves_are_refused_with_the_known_ones() -> None:
    known = "'quadratic' is not a curve. Known curves: constant, cosine, linear, exponential, cubic, polynomial"
    for attempt in (
        lambda: parse("quadratic(0.3)"),
        lambda: with_curve("quadratic", 0.3),
        lambda: as_schedule(0.3, "quadratic"),
        lambda: as_schedule("quadratic(0.3)", "cosine"),
        lambda: Schedule("quadratic", 0.3, 0.0),
    ):
        with pytest.raises(ValueError, match=known):
            attempt()


@pytest.mark.parametrize(
    "text",
    [
        "linear()",
        "cosine(1, 2, 3)",
        "constant(0.3, power=2)",
        "polynomial(0.3)",
        "linear(0.3, initial=1)",
        "linear(**{})",
    ],
)
def test_numbers_that_a_curve_does_not_take_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not take these numbers: .* Example: '"):
        parse(text)


def test_a_curve_that_one_number_does_not_determine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"polynomial does not take these numbers: .* 'polynomial\(0.3, 0.0, 2\)'"):
        with_curve("polynomial", 0.3)


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.3", None])
def test_numbers_must_be_finite(value: Any) -> None:
    with pytest.raises(ValueError, match=r"cosine: initial=.* is not a finite number"):
        schedules.cosine(value)


@pytest.mark.parametrize("power", [0, -1])
def test_powers_must_be_positive(power: float) -> None:
    with pytest.raises(ValueError, match=r"exponential: power=.* is not positive"):
        schedules.exponential(0.3, power=power)


def test_stop_before_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop=100 lies before start=200"):
        schedules.cosine(0.3)(150, 200, 100)


@pytest.mark.parametrize(
    ("value", "curve", "rising", "schedule"),
    [
        (0.3, "cosine", False, schedules.cosine(0.3)),
        (0.9, "cubic", True, schedules.cubic(0.0, 0.9)),
        (0.9, "constant", True, schedules.constant(0.9)),
        ("linear(0.2)", "cosine", False, schedules.linear(0.2)),
        ("linear(0.9)", "cubic", True, schedules.linear(0.0, 0.9)),
        ("exponential(0.9, power=2)", "cubic", True, schedules.exponential(0.0, 0.9, 2)),
        ("constant(0.9)", "cubic", True, schedules.constant(0.9)),
        ("linear(0.1, 0.9)", "cubic", True, schedules.linear(0.1, 0.9)),
        ("linear(0.1, final=0.9)", "cubic", True, schedules.linear(0.1, 0.9)),
        ("linear(initial=0.1, final=0.9)", "cubic", True, schedules.linear(0.1, 0.9)),
        (schedules.cosine(0.9, 0.1), "cubic", True, schedules.cosine(0.9, 0.1)),
    ],
)
def test_as_schedule(value: Any, curve: str, rising: bool, schedule: Schedule) -> None:
    assert as_schedule(value, curve, rising=rising) == schedule


@pytest.mark.parametrize("curve", ["constant", "cosine", "linear", "exponential", "cubic"])
@pytest.mark.parametrize("rising", [False, True])
def test_with_curve_keeps_the_number(curve: str, rising: bool) -> None:
    schedule = with_curve(curve, 0.8, rising=rising)
    first, last = schedule(0, 0, 10), schedule(10, 0, 10)
    assert (first, last) == ((0.8, 0.8) if curve == "constant" else (0.0, 0.8) if rising else (0.8, 0.0))


@pytest.mark.parametrize(
    ("when", "total", "steps"),
    [
        (0, 100, 0),
        (250, 100, 250),
        (7, math.inf, 7),
        (0.0, 100, 0),
        (0.75, 1000, 750),
        (1.0, 99, 99),
        (0.333, 10, 3),
        (1, 50, 1),
    ],
)
def test_to_steps(when: float, total: float, steps: int) -> None:
    found = to_steps(when, total, "stop")
    assert found == steps
    assert type(found) is int


@pytest.mark.parametrize("when", [True, False, "0.5", None])
def test_what_is_no_time_is_refused(when: Any) -> None:
    with pytest.raises(ValueError, match=r"stop=.* is not a time: an int counts optimizer steps"):
        to_steps(when, 100, "stop")


def test_times_outside_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start=-1 lies before the run"):
        to_steps(-1, 100, "start")
    for when in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"every=.* is outside \[0, 1\]: .* write an int, e.g. every=1000"):
            to_steps(when, 100, "every")


@pytest.mark.parametrize("total", [math.inf, -1, 0, math.nan])
def test_fractions_of_a_run_without_known_length_are_refused(total: float) -> None:
    with pytest.raises(
        ValueError,
        match=r"length is not known. Give Trainer\(max_steps=...\) or the steps of sparsify\(\), or stop in integer steps",
    ):
        to_steps(0.75, total, "stop")
