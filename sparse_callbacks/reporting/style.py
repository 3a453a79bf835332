"""The look of figures: colours of methods, text that follows the page, SVG and PNG."""

import hashlib
import html
import io
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_callbacks.core.inspection import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1f26"
"""Colour of text, axes and the dense run: the text colour of the page (``currentColor``) in SVG."""
GRID = "#d5d9e0"
"""Colour of grid lines: the variable ``--grid`` of the page in SVG."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#999999")
"""Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that a white page swallows."""
MORE = ("#AA4499", "#8C564B", "#999933")
"""Further ones: the package has more methods than Okabe and Ito have colours."""
MARKERS = "osD^vPX*<>hp"
METHODS = {
    "dense": (INK, "s"),
    "RigL": (PALETTE[0], "o"),
    "GMP": (PALETTE[1], "^"),
    "SNFS": (PALETTE[2], "D"),
    "SET": (PALETTE[3], "v"),
    "DPF": (PALETTE[4], "P"),
    "NM": (PALETTE[4], "*"),
    "CTRE": (PALETTE[5], "X"),
    "Static": (PALETTE[6], "d"),
    "PruneAtStart": (PALETTE[6], "H"),
    "EarlyCroP": (PALETTE[5], "D"),
    "SMCP": (MORE[0], "h"),
    "ChannelPruning": (MORE[0], "p"),
    "L0": (MORE[1], "*"),
    "GaP": (MORE[2], "<"),
    "ParallelGaP": (MORE[2], ">"),
}
_RC = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.labelsize": 9.0,
    "axes.titlelocation": "left", "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.7,
    "grid.color": GRID, "figure.facecolor": "white", "image.interpolation": "none", "lines.linewidth": 1.8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK),
    "svg.fonttype": "none", "svg.hashsalt": "sparse_callbacks", "svg.image_inline": True, "path.simplify": True,
    # a name such as `a_$b$` is a text and not mathematics
    "text.parse_math": False, "text.usetex": False, "axes.formatter.useoffset": False,
}  # fmt: skip


def colour(method: str) -> str:
    """The colour of a method, the same in every picture: ``"#rrggbb"``.

    Args:
        method: the class of the method, such as ``"RigL"``; ``"dense"`` where there is none. A name that the package does
            not have takes a colour that depends on the name alone.

    Example:
        >>> colour("RigL"), colour("dense")
        ('#0072B2', '#1b1f26')
    """
    if method in METHODS:
        return METHODS[method][0]
    others = PALETTE + MORE
    return others[zlib.crc32(method.encode()) % len(others)]


def marker(method: str) -> str:
    """The marker of a method, in matplotlib's letters: tells methods apart where colours do not."""
    if method in METHODS:
        return METHODS[method][1]
    return MARKERS[zlib.crc32(method.encode()[::-1]) % len(MARKERS)]


@contextmanager
def drawing() -> Iterator[Any]:
    """The context that figures are made and saved in: gives the module ``matplotlib.figure``, and puts the settings back.

    Who makes many figures opens it once around all of them.

    Raises:
        ImportError: matplotlib is missing; the message names the extra `report`.

    Example:
        with drawing() as figures:
            figure = figures.Figure(figsize=(4.4, 2.8), layout="constrained")
            figure.subplots().plot([1, 2], color=colour("RigL"))
    """
    matplotlib, figures = extra("matplotlib", "report"), extra("matplotlib.figure", "report")
    if matplotlib.rcParams["svg.hashsalt"] == _RC["svg.hashsalt"]:
        # inside another: to set 300 values anew for each figure would take longer than to draw it
        yield figures
        return
    cycle = {"axes.prop_cycle": f"cycler('color', {list(PALETTE)})"}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_RC, **cycle}), warnings.catch_warnings():
        # names in a script that the font lacks: pages take other fonts, and pictures have boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield figures


def arrange(figure: "Figure") -> "Figure":
    """Place what a finished figure consists of, once for every file that is made of it; gives the figure back.

    A layout that is computed anew for each file doubles the time of a page.
    """
    with drawing():
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)
            figure.set_layout_engine(None)
    return figure


def figure_svg(figure: "Figure", label: str = "") -> str:
    """A figure as ``<svg>`` for the inside of a page, which it takes its text colour and its fonts from.

    Args:
        figure: a figure that was made in :func:`drawing`.
        label: what it shows, for readers who cannot see it. Its ids are made of the drawing and the label: give figures of
            one page different labels.

    Returns:
        The element, without a size of its own: its width is that of what it stands in.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = _unique_ids(text, label)
    # the names of XML, which HTML knows, would look like addresses of other sites
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'style="[^"]*"', lambda found: _of_the_page(found[0]), text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+|\s*\n", r"\1", m[0]), text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    ratio = f"{float(size[1]):.0f} / {float(size[2]):.0f}" if size else "auto"
    said = f'role="img" aria-label="{html.escape(label)}"' if label else 'aria-hidden="true"'
    opening = f'{said} style="aspect-ratio: {ratio}">'
    # a function, since a label may hold backslashes
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"<svg {found[1]} {opening}", text, count=1)
    return re.sub(r"\n\s*", "\n", text).strip()


def figure_png(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, dark on white.

    Args:
        figure: a figure that was made in :func:`drawing`.
        path: where to; its folder is made.
        dpi: pixels per inch.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with drawing():
        figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def _of_the_page(style: str) -> str:
    """The style of a part of a drawing, with colours and fonts of the page that it stands in."""
    style = re.sub(rf"(?<=: ){INK}(?=[;\"])", "currentColor", style)
    style = re.sub(rf"(?<=: ){GRID}(?=[;\"])", "var(--grid)", style)
    # the page's fonts are narrower than the one that matplotlib has measured, so that nothing overlaps
    style = re.sub(r"font-family: [^;\"]*;? ?", "", style)
    # as matplotlib writes it before 3.10: weight, size and family in one
    weighted = re.sub(r"(?<=[; \"])font: (bold|\d+) ([\d.]+px)[^;\"]*", r"font-weight: \1; font-size: \2", style)
    return re.sub(r"(?<=[; \"])font: ([\d.]+px)[^;\"]*", r"font-size: \1", weighted)


def _unique_ids(text: str, label: str) -> str:
    """Without the ids that nothing refers to; the others begin with letters of this figure."""
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    names = {name for pair in used for name in pair if name}
    prefix = "f" + hashlib.sha1(f"{label}\n{text}".encode()).hexdigest()[:8]
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in names else "", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
