"""How often a record has a row."""

import math

ROWS = 200  # about so many rows of a run where nobody says how often


def steps_between_rows(given: int | None, length: float, least: int = 50) -> int:
    """Optimizer steps between two rows.

    Args:
        given: what the user wants; None: about 200 rows of the run.
        length: optimizer steps of the run; infinite where nobody knows.
        least: the fewest steps that nobody has asked for.

    >>> steps_between_rows(None, 78_000), steps_between_rows(None, 900), steps_between_rows(10, 900)
    (390, 50, 10)
    """
    if given is not None:
        return given
    return least if math.isinf(length) else max(least, int(length) // ROWS)


def refuse_interval(every: object) -> None:
    """Refuse what is not a number of steps between two rows.

    Raises:
        ValueError: neither a whole number from 1 on nor None.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"every={every!r} is not a number of optimizer steps. Give a whole number from 1 on, or None.")
