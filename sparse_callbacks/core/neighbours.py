"""Methods that train one model side by side."""

from collections.abc import Iterable
from functools import singledispatch

from sparse_callbacks.core.method import Method


@singledispatch
def why_no_neighbour(method: Method, other: Method) -> str:
    """Why ``other`` cannot have layers of the model that ``method`` trains, as a sentence; empty where it can.

    Args:
        method: a method, for whose class a function may be registered.
        other: a method that prunes other layers of the same model.
    """
    return ""


def refuse_neighbours(mine: Method, others: Iterable[Method]) -> None:
    """Refuse methods that cannot train one model side by side.

    Args:
        mine: the method that is about to begin.
        others: the methods that already have their parameters.

    Raises:
        ValueError: says which, why, and what to give.
    """
    for other in others:
        if why := why_no_neighbour(mine, other) or why_no_neighbour(other, mine):
            raise ValueError(why)
