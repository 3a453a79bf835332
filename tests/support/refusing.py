"""A refusal at a place of the test's choice, before the first batch."""

from typing import Any


class RefusedError(ValueError):
    """Raised by the hook under test."""


def refuse(*_: Any, **__: Any) -> None:
    raise RefusedError
