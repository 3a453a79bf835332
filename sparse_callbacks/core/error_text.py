"""What is quoted of somebody else's error."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# how a terminal is asked for colours, with which torch marks the frames of compiled code
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def first_line(error: Exception) -> str:
    """The first line of an error's text, without the colours of a terminal: torch's go on for many."""
    return next(iter(_COLOURS.sub("", str(error)).strip().splitlines()), "")


def with_class(error: Exception) -> str:
    """The class of an error, and the first line of its text where there is one."""
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")


@contextmanager
def naming(given: str, whose: str) -> Iterator[None]:
    """Errors of values inside say what was given, and that the arguments they advise of are those of another object.

    Args:
        given: the argument and its value, such as ``"distribution=Spdy(budget=0.5)"``.
        whose: a sentence that says where the arguments belong.
    """
    try:
        yield
    except ValueError as error:
        sentences = f"{given}: {error} {whose}"
        raise ValueError(sentences) from error
