"""Arguments of methods under a budget: the values that they may have before the model is known."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TypeGuard

from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.method import Options
from sparse_callbacks.methods.channels import allocation, budget


def refuse_other_options(options: Mapping[str, object], method: type) -> None:
    """Refuse arguments that a method under a budget does not take.

    Args:
        options: the arguments that the method's constructor does not name.
        method: the method's class.

    Raises:
        ValueError: ``sparsity`` or ``distribution`` is among them, which other methods have in place of a budget.
        TypeError: an argument that is not known.
    """
    if "sparsity" in options:
        raise ValueError(
            f"sparsity= is not an argument of {method.__name__}. Give budget=, what is left of the network's cost: 0.5 for half "
            "of it."
        )
    if "distribution" in options:
        raise ValueError(
            f"distribution= is not an argument of {method.__name__}: how many channels of each layer go follows from the "
            "budget. Leave it out."
        )
    known = argument_names(method, Options)
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name}= is not an argument of {method.__name__}. It takes {', '.join(f'{k}=' for k in known)}."
            )


def refuse_budget_arguments(share: object, channels: Mapping[str, object], curve: object, cost: object) -> None:
    """Refuse arguments that no model can make right.

    Args:
        share: the budget, as a share of the dense network's cost.
        channels: the given number of channels by argument.
        curve: the name of a ramp's shape.
        cost: the name of a cost, or the path of a latency table.

    Raises:
        ValueError: an argument is out of range, or a word is not known.
    """
    if not _is_number(share) or not 0.0 < share < 1.0:
        raise ValueError(f"budget={share!r} is out of range. Give a number above 0 and below 1.")
    refuse_counts_below_one(channels, "channels")
    refuse_unknown({"curve": curve}, {"curve": allocation.CURVES})
    # whether there is a table at a path shows when training starts: it may be measured after the callback is made
    if cost not in budget.COSTS and not str(cost).endswith(".json"):
        raise ValueError(
            f"cost={cost!r} is not known. Give 'parameters', 'flops' or the path of a latency table (.json)."
        )


def refuse_counts_below_one(counts: Mapping[str, object], what: str) -> None:
    """Refuse what is not a whole number from 1 on.

    Args:
        counts: the given number by argument.
        what: what is counted, for the error.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} is not a number of {what}. Give a whole number from 1 on.")


def refuse_negative(**numbers: object) -> None:
    """Refuse what is not a finite number from 0 on.

    Args:
        **numbers: the given number by argument.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value in numbers.items():
        if not _is_number(value) or not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} is out of range. Give a number that is at least 0.")


def refuse_hysteresis(hysteresis: object) -> None:
    """Refuse what is not a number above 0 and at most 1.

    Args:
        hysteresis: the factor on scores of pruned channels.

    Raises:
        ValueError: it is out of range.
    """
    if not _is_number(hysteresis) or not 0.0 < hysteresis <= 1.0:
        raise ValueError(
            f"hysteresis={hysteresis!r} is not a factor on scores of pruned channels: 0 would make all of them equal, and more "
            "than 1 prefer them. Give a number above 0 and at most 1."
        )


def _is_number(value: object) -> TypeGuard[float]:
    # a bool is a Real in Python, and never what somebody means by a share
    return isinstance(value, Real) and not isinstance(value, bool)
