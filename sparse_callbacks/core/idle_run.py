"""Runs in which no update can fall, as users should know before the first batch."""

from functools import singledispatch

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.step import ReplacesSteps


@singledispatch
def why_idle(method: Method, length: float) -> str:
    """Why no update of a method can fall in its run that begins, as a sentence for the user; empty where one can. A method
    whose updates come at other times too registers a function of its own.

    Args:
        method: a method with a calendar.
        length: the optimizer steps of the run.
    """
    replaces = isinstance(method, ReplacesSteps)
    return method.progress.why_idle(method.times, length, type(method).__name__, replaces=replaces)
