"""Refusing arguments that no run can use, and values given by glob."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any


def refuse_outside(given: Any, argument: str, low: float, high: float, too_low: str = "") -> None:
    """Refuse a number, or one of several by glob, that is not finite and in [``low``, ``high``].

    Args:
        given: the number, or a mapping of numbers by glob.
        argument: name of the argument, for the error.
        low, high: the bounds; ``high`` may be infinite.
        too_low: the reason why numbers from 0 to ``low`` are impossible, for the error.

    Raises:
        ValueError: a number is out of range.
    """
    for value in given.values() if isinstance(given, Mapping) else [given]:
        # a bool is a Real in Python, and never what somebody means by a rate or a share
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if number and low <= float(value) <= high:
            continue
        at_most = f" and at most {high:g}" if math.isfinite(high) else ""
        reason = f": {too_low}" if too_low and number and 0 <= float(value) < low else ""
        # of several numbers, which one it is
        which = f": {value!r}" if isinstance(given, Mapping) else ""
        raise ValueError(
            f"{argument}={given!r}{which} is out of range. Give a number that is at least {low:.4g}{at_most}{reason}."
        )


def refuse_unknown(given: Mapping[str, object], known: Mapping[str, Iterable[object]]) -> None:
    """Refuse words that an argument does not know.

    Args:
        given: the given word by argument.
        known: the words that each argument knows.

    Raises:
        ValueError: a word is not known.
    """
    for name, words in known.items():
        # of its type first: an array would compare itself with a word entry by entry
        if not any(isinstance(given[name], type(word)) and given[name] == word for word in words):
            raise ValueError(f"{name}={given[name]!r} is not known. Give {' or '.join(map(repr, words))}.")


def by_glob(values: float | Mapping[str, float], names: Iterable[str], argument: str) -> dict[str, float]:
    """One value for each of ``names``: the number itself, or the value of the first glob in ``values`` that matches.

    Args:
        values: a number, or a mapping of numbers by glob.
        names: names of the gated parameters.
        argument: name of the argument, for the error.

    Raises:
        ValueError: a name without a value, or a glob without a name.
    """
    names = list(names)
    if not isinstance(values, Mapping):
        return dict.fromkeys(names, float(values))
    for glob in values:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"{argument}= has a value for {glob!r}, which matches no gated parameter. Gated are: "
                f"{', '.join(names)}."
            )
    found: dict[str, float] = {}
    # the globs in the outer loop and in their order: the first that matches decides
    for glob, value in values.items():
        for name in names:
            if name not in found and fnmatchcase(name, glob):
                found[name] = float(value)
    missed = [name for name in names if name not in found]
    if missed:
        raise ValueError(
            f"{argument}= has no value for {', '.join(missed)}. Add a glob that matches, or '*' for all others."
        )
    return {name: found[name] for name in names}


def check_sparsity(sparsity: object) -> None:
    """Refuse what is not a fraction of zeros in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise ValueError(
            f"sparsity={sparsity!r} is not a number. It is the fraction of zeros: for 90 % zeros write 0.9."
        )
    if not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(
            f"sparsity={sparsity!r} is not in [0, 1): it is the fraction of zeros. For 90 % zeros write 0.9."
        )


def check_seed(seed: object) -> None:
    """Refuse what is not a whole number."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed={seed!r} is not a whole number. Give for example seed=0.")
