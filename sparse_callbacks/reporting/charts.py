"""Curves of recorded runs in one frame: what is drawn, the drawing, and its views."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_callbacks.core.record.record_file import RecordedRun
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.series import AXES, curve
from sparse_callbacks.reporting.style import arrange, drawing, figure_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (4.5, 2.9)
"""Inches: 330 pixels of a phone, where the text is as large as that of a caption."""


@dataclass(frozen=True)
class Line:
    """A figure over time.

    Attributes:
        label: its name.
        run: the run whose rows hold it.
        key: its key in the rows.
        colour: ``"#rrggbb"``.
        dashes: matplotlib's letters for a line.
        events: the events of the rows that it is read from; none for all rows.
        repeated: whether a row that repeats the row before has a point.
    """

    label: str
    run: RecordedRun
    key: str
    colour: str
    dashes: str = "-"
    events: tuple[str, ...] = ()
    repeated: bool = True

    def points(self, axis: str) -> tuple[list[float], list[float]]:
        """Places on an axis, and figures."""
        return curve(self.run, self.key, axis, self.events, self.repeated)


@dataclass(frozen=True)
class Chart:
    """Curves in one frame.

    Attributes:
        name: its name among the pictures of the run; a file name.
        title: what it shows.
        lines: the curves; those without a point are left out.
        caption: how it is read.
        write: how its numbers are written.
        limits: lower and upper end of the vertical axis; None where the curves decide.
    """

    name: str
    title: str
    lines: Sequence[Line]
    caption: str = ""
    write: Callable[[float | None], str] = readable.tick
    limits: tuple[float | None, float | None] = (None, None)


def chart_figure(chart: Chart, axis: str = "steps") -> "Figure | None":
    """The drawing of a chart; None where no row has both a figure and a place on the axis.

    Args:
        chart: what is drawn.
        axis: a key of :data:`~sparse_callbacks.reporting.series.AXES`.
    """
    drawn = [(place, line, points) for place, line in enumerate(chart.lines) if (points := line.points(axis))[0]]
    if not drawn:
        return None
    with drawing() as figures:
        figure: Figure = figures.Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for place, line, (xs, ys) in drawn:
            look = {"color": line.colour, "marker": _marker(line, xs), "markersize": 5}
            # the name that chart_views knows it by, as several may have one label
            axes.plot(xs, ys, line.dashes, label=_in_legend(line.label), gid=str(place), **look)
        axes.set_title(readable.shortened(chart.title, 44))
        axes.set_xlabel(AXES[axis][1])
        axes.set_ylim(*_limits(chart, [y for _, _, (_, ys) in drawn for y in ys]))
        axes.margins(x=0.02)
        axes.xaxis.set_major_formatter(_written(readable.tick))
        axes.yaxis.set_major_formatter(_written(chart.write))
        axes.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10])
        whole = all(y == int(y) for _, _, (_, ys) in drawn for y in ys)
        axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole)
        if [line.label for _, line, _ in drawn] != [chart.title]:
            # below the frame, where it hides no curve
            long = any(len(line.label) > 22 for _, line, _ in drawn)
            figure.legend(loc="outside lower left", ncols=1 if long else 2)
    # names and numbers of another axis are as high: the margins stay
    return arrange(figure)


def chart_views(chart: Chart, figure: "Figure", axes: Iterable[str]) -> list[tuple[str, str]]:
    """(axis, SVG) of a chart against each axis; the SVG is empty where no row has both.

    Args:
        chart: what is drawn.
        figure: its :func:`chart_figure`, which is changed: a new one for each axis would take twice as long.
        axes: keys of :data:`~sparse_callbacks.reporting.series.AXES`.
    """
    [frame] = figure.axes
    found = []
    for axis in axes:
        points = [chart.lines[int(str(drawn.get_gid()))].points(axis) for drawn in frame.lines]
        for drawn, (xs, ys) in zip(frame.lines, points, strict=True):
            drawn.set_data(xs, ys)
        frame.set_xlabel(AXES[axis][1])
        frame.relim()
        frame.autoscale_view(scaley=False)
        known = any(xs for xs, _ in points)
        found.append((axis, figure_svg(figure, chart_label(chart, axis)) if known else ""))
    return found


def _limits(chart: Chart, ys: Sequence[float]) -> tuple[float | None, float | None]:
    """The ends of the vertical axis, with a margin above the highest point."""
    low, high = chart.limits
    if low is None or high is not None:
        return low, high
    return low, low + 1.08 * (max(ys) - low) if max(ys) > low else low + 1


def _in_legend(label: str) -> str:
    """A label as matplotlib shows it: one that begins with an underscore would be left out of the legend."""
    short = readable.shortened(label, 48)
    return f" {short}" if short.startswith("_") else short


def _marker(line: Line, xs: Sequence[float]) -> str:
    """Points that are few are shown; of dashes one alone, which would be no line."""
    return "." if len(xs) == 1 or (len(xs) <= 30 and line.dashes == "-") else ""


def chart_label(chart: Chart, axis: str) -> str:
    """What a chart shows, for readers who cannot see it: each curve with its first and last number."""
    said = []
    for line in chart.lines:
        _, ys = line.points(axis)
        if ys:
            said.append(f"{line.label} from {chart.write(ys[0])} to {chart.write(ys[-1])}")
    return f"{chart.title} against {AXES[axis][1]}: {'; '.join(said)}"


def _written(write: Callable[[float | None], str]) -> Callable[[float, Any], str]:
    # 1e-16 beside ticks of 0.1 is a zero
    return lambda value, _: write(0.0 if abs(value) < 1e-12 else value)
