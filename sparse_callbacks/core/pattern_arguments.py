"""What ``pattern=`` does not go together with, and methods that have no such argument."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from numbers import Real
from typing import Any

from sparse_callbacks.core.checkpoint import shown
from sparse_callbacks.core.constructors import argument_names, default_of
from sparse_callbacks.core.nm_masks import NMPattern
from sparse_callbacks.core.pattern_names import UNSTRUCTURED, parsed
from sparse_callbacks.core.state_layout import shown_short

_AS_SHOWN = 5e-5  # a plan shows four decimals
ELSEWHERE = {
    "pattern": "chooses weights by rules of its own, and takes no pattern=. Static, SET, RigL and SNFS keep one, GMP and DPF arrive "
    "at one, and NM trains under N:M.",
    "ablation": "takes no units away when it updates. SET, RigL and SNFS do, with pattern='fan_in'.",
}
"""By argument, what a method does that has no such argument, and which methods have it."""


def kept_pattern(pattern: str | None) -> str | None:
    """``pattern`` as a method keeps it: None for ``"unstructured"``, so that a run resumes under either word.

    Raises:
        ValueError: no such pattern is known.
    """
    return None if parsed(pattern) is None else pattern


def sparsity_beside(method: object, pattern: str | None, sparsity: Any, distribution: Any) -> Any:
    """The sparsity of a method that is made: under N:M it is 1 - N/M, and under another pattern what was given.

    Args:
        method: the method.
        pattern: its pattern.
        sparsity: as it was given, None where it was not.
        distribution: its distribution, None where it was not given; under N:M no other than the default of its class.

    Raises:
        ValueError: an argument contradicts N:M, which fixes how many weights each layer has.
    """
    asked = parsed(pattern)
    if not isinstance(asked, NMPattern):
        return sparsity
    if distribution is not None and distribution != default_of(type(method), "distribution"):
        raise ValueError(
            f"pattern={pattern!r} gives every layer the same share of weights, and distribution={shown(distribution)} another one. "
            "Leave distribution= out."
        )
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if sparsity is not None and not (number and abs(sparsity - asked.sparsity) <= _AS_SHOWN):
        raise ValueError(
            f"pattern={pattern!r} is a sparsity of {asked.sparsity:.4g}, and sparsity={shown_short(sparsity)} another one. Leave "
            "sparsity= out, or give a pattern of that sparsity."
        )
    return asked.sparsity


def refusing_pattern(init: Callable[..., None], shared: type) -> Callable[..., None]:
    """``init``, the constructor of a method, which refuses ``pattern=`` and ``ablation=`` in words where the method has no
    such argument.

    Args:
        init: the ``__init__`` of a class.
        shared: a TypedDict with the arguments that the class takes as ``**options`` and hands on.
    """
    absent = [name for name in ELSEWHERE if name not in signature(init).parameters]
    if not absent:
        return init

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in absent:
            # a class with such a parameter may be the base of one that has none, and gives it a value
            if name in kwargs and name not in argument_names(type(self), shared):
                given = kwargs.pop(name)
                if given is not None and given != UNSTRUCTURED:
                    raise ValueError(
                        f"{name}={shown_short(given)}: {type(self).__name__} {ELSEWHERE[name]} Leave it out."
                    )
        init(self, *args, **kwargs)

    return checked
