"""What is quoted of somebody else's error."""

import re

# how a terminal is asked for colours, with which torch marks the frames of compiled code
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def first_line(error: Exception) -> str:
    """The first line of an error's text, without the colours of a terminal: torch's go on for many."""
    return next(iter(_COLOURS.sub("", str(error)).strip().splitlines()), "")


def with_class(error: Exception) -> str:
    """The class of an error, and the first line of its text where there is one."""
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
