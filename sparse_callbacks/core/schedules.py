"""Schedules: numbers that change over the run, and times in steps or fractions of it."""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from sparse_callbacks.core.argument_types import checked_after
from sparse_callbacks.core.arguments import check_sparsity
from sparse_callbacks.core.state_layout import LARGEST_COUNT

__all__ = [
    "CURVES",
    "Schedule",
    "as_schedule",
    "constant",
    "cosine",
    "cubic",
    "exponential",
    "linear",
    "parse",
    "polynomial",
    "pruning_curve",
    "to_steps",
    "with_curve",
]

CURVES = ("constant", "cosine", "linear", "exponential", "cubic", "polynomial")


@dataclass(frozen=True, repr=False)
class Schedule:
    """A number that moves from `initial` at `start` to `final` at `stop` and holds outside; `parse(repr(s)) == s`.

    With x = clamp((step - start) / (stop - start), 0, 1) and d = initial - final:
    cosine: final + d (1 + cos(pi x)) / 2; linear: final + d (1 - x);
    cubic: final + d (1 - x)^3; exponential and polynomial: final + d (1 - x)^power; constant: initial, always.

    Build it with the functions `constant`, `cosine`, `linear`, `exponential`, `cubic`, `polynomial`.

    Args:
        curve: name of the curve, one of `CURVES`.
        initial: the number up to `start`.
        final: the number from `stop` on.
        power: exponent of exponential and polynomial, above 0.

    Raises:
        ValueError: an unknown curve, a number that is not finite, or a power that is not positive.

    >>> cosine(0.3)(step=50, start=0, stop=100)
    0.15
    """

    curve: str
    initial: float
    final: float
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_curve(self.curve)
        for name in ("initial", "final", "power"):
            value = getattr(self, name)
            # a bool is a Real in Python, and never what somebody means by a rate
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{self.curve}: {name}={value!r} is not a finite number. Give one, e.g. {name}=0.3.")
            # around the guard of a frozen class: cosine(1) and cosine(1.0) become equal, with the same repr
            object.__setattr__(self, name, float(value))
        if self.power <= 0:
            raise ValueError(
                f"{self.curve}: power={self.power:g} is not positive, so the curve never falls. Give e.g. 3."
            )

    def __call__(self, step: float, start: float, stop: float) -> float:
        """Value at `step`.

        Args:
            step: optimizer step that the value is asked for.
            start: optimizer step at which the curve begins.
            stop: optimizer step at which the curve ends.

        Raises:
            ValueError: `stop` lies before `start`.
        """
        if self.curve == "constant":
            return self.initial
        left = 1.0 - _elapsed(step, start, stop)
        left = (1.0 + math.cos(math.pi * (1.0 - left))) / 2.0 if self.curve == "cosine" else left**self.power
        # in this form both ends are exact: initial + (final - initial) is not always final
        return self.initial * left + self.final * (1.0 - left)

    def way(self, step: float, start: float, stop: float) -> float:
        """Part of the way from `initial` to `final` that is done at `step`, in [0, 1]; 1 for a constant.

        Args:
            step: optimizer step that is asked for.
            start: optimizer step at which the curve begins.
            stop: optimizer step at which the curve ends.

        >>> cubic(0.0, 0.0).way(step=50, start=0, stop=100)
        0.875
        """
        return 1.0 if self.curve == "constant" else Schedule(self.curve, 0.0, 1.0, self.power)(step, start, stop)

    def __repr__(self) -> str:
        # `final` even where it is the default: of a text with one number, some arguments make a rising curve
        numbers = [self.initial] if self.curve == "constant" else [self.initial, self.final]
        if self.curve in ("exponential", "polynomial"):
            numbers.append(self.power)
        return f"{self.curve}({', '.join(f'{number!r}' for number in numbers)})"


def _elapsed(step: float, start: float, stop: float) -> float:
    """Share of the way from `start` to `stop`, in [0, 1]; an empty way is done at once."""
    if stop < start:
        raise ValueError(f"stop={stop} lies before start={start}. Give a stop at or after the start.")
    # before the start is looked at: an empty way is over, and nothing is divided by its length
    if step >= stop:
        return 1.0
    return 0.0 if step <= start else (step - start) / (stop - start)


@checked_after
def constant(value: float) -> Schedule:
    """`value` at every step, before `start` and after `stop` as well.

    Args:
        value: the number.
    """
    return Schedule("constant", value, value)


def cosine(initial: float, final: float = 0.0) -> Schedule:
    """Half a cosine wave from `initial` to `final` (RigL's published decay).

    Args:
        initial: the number up to `start`.
        final: the number from `stop` on.
    """
    return Schedule("cosine", initial, final)


def linear(initial: float, final: float = 0.0) -> Schedule:
    """A straight line from `initial` to `final`.

    Args:
        initial: the number up to `start`.
        final: the number from `stop` on.
    """
    return Schedule("linear", initial, final)


def exponential(initial: float, final: float = 0.0, power: float = 3) -> Schedule:
    """final + (initial - final) (1 - x)^power; RigL's reference code calls this power law exponential.

    Args:
        initial: the number up to `start`.
        final: the number from `stop` on.
        power: the exponent, above 0.
    """
    return Schedule("exponential", initial, final, power)


def cubic(initial: float, final: float = 0.0) -> Schedule:
    """final + (initial - final) (1 - x)^3 (Zhu and Gupta 2017, eq. 1: gradual pruning is `cubic(0, sparsity)`).

    Args:
        initial: the number up to `start`.
        final: the number from `stop` on.
    """
    return Schedule("cubic", initial, final, 3)


def polynomial(initial: float, final: float, power: float) -> Schedule:
    """final + (initial - final) (1 - x)^power.

    Args:
        initial: the number up to `start`.
        final: the number from `stop` on.
        power: the exponent, above 0.
    """
    return Schedule("polynomial", initial, final, power)


_MAKERS: dict[str, Callable[..., Schedule]] = {
    maker.__name__: maker for maker in (constant, cosine, linear, exponential, cubic, polynomial)
}


def _check_curve(name: str) -> None:
    if not isinstance(name, str) or name not in CURVES:
        raise ValueError(f"{name!r} is not a curve. Known curves: {', '.join(CURVES)}, e.g. 'cosine(0.3)'.")


def _read(text: str) -> tuple[str, list[float], dict[str, float]]:
    """Curve name, positional and named numbers of a text like `exponential(0.3, power=2)`."""
    complaint = (
        f"{text!r} is not a schedule. Write a curve with its numbers, e.g. 'cosine(0.3)'; curves: {', '.join(CURVES)}."
    )
    # parsed and never evaluated: the text of a configuration must not be able to run code
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError(complaint)
        numbers = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    # without the parser's own error, which is about Python and not about curves
    except (SyntaxError, ValueError):
        raise ValueError(complaint) from None
    _check_curve(call.func.id)
    return call.func.id, numbers, named


def _make(name: str, numbers: list[float], named: dict[str, float]) -> Schedule:
    try:
        return _MAKERS[name](*numbers, **named)
    # the signature of the curve's function tells which numbers are missing or too many
    except TypeError as error:
        raise ValueError(f"{name} does not take these numbers: {error}. Example: {_example(name)}.") from None


def _example(name: str) -> str:
    return "'polynomial(0.3, 0.0, 2)'" if name == "polynomial" else f"'{name}(0.3)'"


@checked_after
def parse(text: str) -> Schedule:
    """Schedule written as text, e.g. `linear(0.3)`, `cosine(0.3, 0.05)`, `exponential(0.3, power=2)`.

    Args:
        text: name of a curve, and its numbers in parentheses.

    Raises:
        ValueError: not of this form, an unknown curve, or numbers that the curve does not take.

    >>> parse("linear(0.3)")
    linear(0.3, 0.0)
    """
    return _make(*_read(text))


@checked_after
def with_curve(curve_name: str, number: float, rising: bool = False) -> Schedule:
    """`number` on the curve of that name: falling from it to 0, or `rising` from 0 up to it; `constant` holds it.

    Args:
        curve_name: name of the curve, one of `CURVES`.
        number: the end of the curve that is not 0.
        rising: whether the curve rises.

    Raises:
        ValueError: an unknown curve, or one that one number does not determine (polynomial).

    >>> with_curve("cubic", 0.9, rising=True)
    cubic(0.0, 0.9)
    """
    _check_curve(curve_name)
    return _make(curve_name, [0.0, number] if rising and curve_name != "constant" else [number], {})


@checked_after
def as_schedule(value: float | str | Schedule, default_curve: str, rising: bool = False, name: str = "") -> Schedule:
    """What a schedulable argument means.

    A number keeps the method's own curve (`default_curve`), a `Schedule` is taken as it is, and so is a text, except
    that a text with a single number follows `rising` like a bare number does: `"linear(0.9)"` rises from 0 to 0.9.

    Args:
        value: a number, a schedule, or its text.
        default_curve: name of the curve that a number takes.
        rising: whether that curve rises from 0 to the number, in place of falling from it to 0.
        name: name of the argument, for the errors.

    Raises:
        ValueError: neither a number nor a schedule, or a text that `parse` refuses.

    >>> as_schedule(0.3, "cosine"), as_schedule("linear(0.9)", "cubic", rising=True)
    (cosine(0.3, 0.0), linear(0.0, 0.9))
    """
    if isinstance(value, Schedule):
        return value
    try:
        if not isinstance(value, str):
            return with_curve(default_curve, value, rising)
        curve, numbers, named = _read(value)
        # where `final` is named, the one other number is the beginning
        if rising and curve != "constant" and len(numbers) == 1 and "final" not in named:
            numbers = [0.0, *numbers]
        return _make(curve, numbers, named)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}" if name else str(error)) from None


def pruning_curve(sparsity: float | str | Schedule) -> Schedule:
    """The curve of a gradual pruning: a number becomes a cubic from 0 up to it, a schedule or its text stays as it is.

    Args:
        sparsity: target fraction of zeros, a schedule of fractions, or its text, such as ``"linear(0.5, 0.9)"``.

    Raises:
        ValueError: it begins or ends outside of [0, 1), or the text is not a schedule.

    Example:
        >>> from sparse_callbacks import pruning_curve
        >>> curve = pruning_curve(0.8)
        >>> curve, curve(step=100, start=0, stop=100)
        (cubic(0.0, 0.8), 0.8)
    """
    if not isinstance(sparsity, str | Schedule):
        check_sparsity(sparsity)
    curve = as_schedule(sparsity, "cubic", rising=True, name="sparsity")
    check_sparsity(curve.initial)  # `final` is the target, which the method checks as its sparsity
    return curve


@checked_after
def to_steps(when: float, total: float, name: str) -> int:
    """A time argument in optimizer steps.

    Args:
        when: an int counts optimizer steps (at least 0); a float in [0, 1] is a fraction of the run.
        total: optimizer steps of the whole run; infinite or not positive when unknown.
        name: the name of the argument, for the errors.

    Raises:
        ValueError: a bool, a negative int, a float outside [0, 1], or a fraction of a run without known length.

    >>> to_steps(0.75, 1000, "stop"), to_steps(200, 1000, "stop")
    (750, 200)
    """
    meaning = "an int counts optimizer steps, a float in [0, 1] is a fraction of the run"
    if isinstance(when, bool) or not isinstance(when, Real):
        raise ValueError(f"{name}={when!r} is not a time: {meaning}.")
    # the type decides, as 1 is one step and 1.0 the whole run
    if isinstance(when, Integral):
        if when < 0:
            raise ValueError(f"{name}={when} lies before the run: {meaning}. Give 0 or more.")
        if when > LARGEST_COUNT:  # which a checkpoint of the run could not be resumed with
            raise ValueError(f"{name}={when} is later than any run ends: {meaning}. Give at most {LARGEST_COUNT}.")
        return int(when)
    if not 0.0 <= when <= 1.0:
        raise ValueError(f"{name}={when!r} is outside [0, 1]: {meaning}. For steps write an int, e.g. {name}=1000.")
    if not (math.isfinite(total) and total > 0):
        raise ValueError(
            f"{name}={when!r} is a fraction of a run whose length is not known. "
            f"Give Trainer(max_steps=...) or the steps of sparsify(), or {name} in integer steps, e.g. {name}=1000."
        )
    return round(float(when) * total)  # not cut off: 0.29 * 100 is 28.999999999999996
