"""What is quoted of somebody else's error is one plain line."""

import pytest

from sparse_callbacks.core.error_text import first_line, with_class

COLOURED = "\x1b[1m\x1b[31mmat1 and mat2\x1b[0m cannot be multiplied\n  File x, line 1\n\x1b[0m"


@pytest.mark.parametrize(
    ("text", "line"),
    [(COLOURED, "mat1 and mat2 cannot be multiplied"), ("\n\n first\nsecond", "first"), ("", ""), ("\x1b[2K", "")],
)
def test_the_first_line_without_colours_is_quoted(text: str, line: str) -> None:
    assert first_line(RuntimeError(text)) == line
    assert with_class(RuntimeError(text)) == (f"RuntimeError: {line}" if line else "RuntimeError")
