"""What the pictures of the documentation share: a light and a dark colour scheme, and how they become files."""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_callbacks.reporting.style import GRID, INK, PALETTE, drawing

IMAGES = Path(__file__).parents[1] / "images"
"""The folder of committed pictures."""


@dataclass(frozen=True)
class Scheme:
    """Colours of a picture beside text.

    Attributes:
        name: ``"light"`` or ``"dark"``; the end of the file's name.
        ink: text and axes.
        grid: grid lines, and what is not active.
        page: the background, of pictures that cannot be transparent.
        accent: curves, and what is active.
    """

    name: str
    ink: str
    grid: str
    page: str
    accent: str


SCHEMES = (
    Scheme("light", INK, GRID, "#ffffff", PALETTE[0]),
    Scheme("dark", "#e3e7ed", "#3d444f", "#0d1117", PALETTE[5]),
)


@contextmanager
def scheme_drawing(scheme: Scheme) -> Iterator[Any]:
    """As :func:`sparse_callbacks.reporting.style.drawing`, in the colours of a scheme; gives ``matplotlib.figure``."""
    import matplotlib as mpl

    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    colours = dict.fromkeys(parts, scheme.ink) | {"grid.color": scheme.grid, "axes.facecolor": "none"}
    # the generic family, as a reader's machine may not have the font that the text was measured in
    with drawing() as figures, mpl.rc_context({**colours, "font.family": "sans-serif"}):
        yield figures


def write_svg(figure: Any, path: Path, alt: str) -> None:
    """Write a figure as a transparent SVG whose title is ``alt``; the same figure gives the same file."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<\?xml.*?\?>|<!DOCTYPE.*?>", "", buffer.getvalue(), flags=re.DOTALL
    )
    # more digits than a screen has pixels would be half of the file
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+|\s*\n", r"\1", m[0]), text)
    text = re.sub(r"(<svg[^>]*>)", rf"\1<title>{html.escape(alt)}</title>", text, count=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\s*\n\s*", "\n", text.strip()) + "\n")
