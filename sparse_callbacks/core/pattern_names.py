"""Patterns of masks by their names: N:M, transposable N:M, and a constant fan-in."""

import re
from dataclasses import dataclass

from sparse_callbacks.core.nm_masks import NMPattern, nm_pattern
from sparse_callbacks.core.state_layout import shown_short

UNSTRUCTURED = "unstructured"
_FAN_IN = re.compile(r"fan_in(?:/([1-9][0-9]*))?")


@dataclass(frozen=True)
class FanIn:
    """A constant fan-in: every output of a layer reads as many inputs.

    Args:
        group: consecutive outputs that read the same inputs (``"fan_in/64"``); None: each output has its own
            (``"fan_in"``).
    """

    group: int | None = None

    def __str__(self) -> str:
        return "fan_in" if self.group is None else f"fan_in/{self.group}"


def parsed(pattern: str | None) -> NMPattern | FanIn | None:
    """The pattern of a name; None for ``"unstructured"`` and None, which are masks without one.

    Raises:
        ValueError: no such pattern is known.

    >>> parsed("2:4"), parsed("fan_in/64"), parsed("unstructured")
    (NMPattern(n=2, m=4, transposable=False), FanIn(group=64), None)
    """
    if pattern is None or (isinstance(pattern, str) and pattern == UNSTRUCTURED):
        return None
    if (kept := nm_pattern(pattern)) is not None:
        return kept
    found = _FAN_IN.fullmatch(pattern) if isinstance(pattern, str) else None
    if found is None:
        # YAML 1.1 reads 2:4 as a number of base 60
        quotes = " In a YAML file write it in quotes: pattern: '2:4'." if isinstance(pattern, int) else ""
        raise ValueError(
            f"pattern={shown_short(pattern)} is not known. Give '2:4', in which 2 of every 4 inputs are kept (or other whole "
            "numbers, the first below the second), 'transposable 2:4', 'fan_in/64', in which every 64 consecutive output "
            f"rows of a linear layer read the same inputs, 'fan_in', or 'unstructured' for masks without a pattern.{quotes}"
        )
    return FanIn(None if found[1] is None else int(found[1]))


def asked_pattern(method: object) -> NMPattern | FanIn | None:
    """The pattern that a method was asked for; None without one, and for a method that has no such argument."""
    return parsed(getattr(method, "pattern", None))


def asked_nm(method: object) -> NMPattern | None:
    """The N:M that a method was asked for; None for another pattern, or none."""
    asked = asked_pattern(method)
    return asked if isinstance(asked, NMPattern) else None
