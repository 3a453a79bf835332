"""Curves of a recorded run, beside those of a dense run: what is drawn, and the drawing of it."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_callbacks.core.record.record_file import RecordedRun
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.series import AXES, curve, events_of, metrics
from sparse_callbacks.reporting.style import INK, PALETTE, arrange, colour, drawing, figure_svg

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
    """

    label: str
    run: RecordedRun
    key: str
    colour: str
    dashes: str = "-"
    events: tuple[str, ...] = ()

    def points(self, axis: str) -> tuple[list[float], list[float]]:
        """Places on an axis, and figures."""
        return curve(self.run, self.key, axis, self.events)


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
    drawn = [(line, points) for line in chart.lines if (points := line.points(axis))[0]]
    if not drawn:
        return None
    with drawing() as figures:
        figure: Figure = figures.Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for line, (xs, ys) in drawn:
            axes.plot(xs, ys, line.dashes, color=line.colour, marker=_marker(line, xs), markersize=5, label=line.label)
        axes.set_title(chart.title)
        axes.set_xlabel(AXES[axis][1])
        axes.set_ylim(*_limits(chart, [y for _, (_, ys) in drawn for y in ys]))
        axes.margins(x=0.02)
        axes.xaxis.set_major_formatter(_written(readable.tick))
        axes.yaxis.set_major_formatter(_written(chart.write))
        axes.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10])
        whole = all(y == int(y) for _, (_, ys) in drawn for y in ys)
        axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole)
        if [line.label for line, _ in drawn] != [chart.title]:
            # below the frame, where it hides no curve
            long = any(len(line.label) > 22 for line, _ in drawn)
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
    lines = {drawn.get_label(): drawn for drawn in frame.lines}
    found = []
    for axis in axes:
        points = {line.label: line.points(axis) for line in chart.lines}
        for label, drawn in lines.items():
            drawn.set_data(*points[str(label)])
        frame.set_xlabel(AXES[axis][1])
        frame.relim()
        frame.autoscale_view(scaley=False)
        known = any(points[str(label)][0] for label in lines)
        found.append((axis, figure_svg(figure, chart_label(chart, axis)) if known else ""))
    return found


def _limits(chart: Chart, ys: Sequence[float]) -> tuple[float | None, float | None]:
    """The ends of the vertical axis, with a margin above the highest point."""
    low, high = chart.limits
    if low is None or high is not None:
        return low, high
    return low, low + 1.08 * (max(ys) - low) if max(ys) > low else low + 1


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


def progress_charts(run: RecordedRun, dense: RecordedRun | None) -> list[Chart]:
    """Sparsity, accuracies, losses, and what else the run has logged, over time."""
    own = colour(run.run.method)
    zeros = [Line("sparse layers", run, "sparsity/total", own), Line("whole model", run, "sparsity/model", INK, ":")]
    charts = [
        Chart("sparsity", "Sparsity", zeros, "The share of weights that are zero.", readable.share, (0.0, 1.03)),
    ]
    left = metrics(run)
    accuracies = [name for name in left if readable.is_accuracy(name)]
    losses = [name for name in left if "loss" in name.lower()]
    if accuracies:
        shares = all(v is None or 0 <= v <= 1 for name in accuracies for v in curve(run, name)[1])
        lines = _metric_lines(run, dense, accuracies)
        charts.append(Chart("accuracy", "Accuracy", lines, "", readable.share if shares else readable.tick))
    if losses:
        charts.append(Chart("loss", "Loss", _metric_lines(run, dense, losses)))
    rates = [name for name in left if _is_rate(name)]
    if rates:
        charts.append(Chart("learning_rate", "Learning rate", _metric_lines(run, dense, rates), limits=(0.0, None)))
    others = [name for name in left if name not in {*accuracies, *losses, *rates}]
    # more than a handful would bury what the page is about; the record has them
    for name in others[:4]:
        lowest = 0.0 if all(value >= 0 for value in curve(run, name)[1]) else None
        charts.append(Chart(name, name, _metric_lines(run, dense, [name]), limits=(lowest, None)))
    return charts


def _is_rate(name: str) -> bool:
    """Whether a metric is a learning rate: one may be logged under several names, and each group of parameters has its own."""
    return re.fullmatch(r"(.*/)?(lr|learning_rate)([-_/].*)?", name, re.IGNORECASE) is not None


def _metric_lines(run: RecordedRun, dense: RecordedRun | None, names: Sequence[str]) -> list[Line]:
    """The curves of metrics: those of the dense run are dashed in the same order, dark."""
    # metrics of validation first: they are what runs are compared by
    ordered = sorted(names, key=lambda name: ("val" not in name.lower(), names.index(name)))[:6]
    own = colour(run.run.method)
    colours = [own, *(c for c in PALETTE if c != own)]
    lines = [
        Line(name, run, name, colours[i % len(colours)], "-", events_of(run, name)) for i, name in enumerate(ordered)
    ]
    if dense is not None:
        known = set(metrics(dense))
        compared = [name for name in ordered if name in known][:2]
        lines += [
            Line(f"dense: {name}", dense, name, INK, "--" if i == 0 else ":", events_of(dense, name))
            for i, name in enumerate(compared)
        ]
    return lines


def movement_charts(run: RecordedRun) -> list[Chart]:
    """What moved: connections exchanged at each update, how far the masks went, and how old connections are."""
    own = colour(run.run.method)
    others = [c for c in PALETTE if c != own]
    moved = [
        # between updates nothing moves: rows of other events would be zeros between them
        Line("churn", run, "topology/churn", own, events=("update",)),
        Line("distance to the previous mask", run, "topology/distance_previous", others[0], events=("update",)),
    ]
    gone = [
        Line("distance to the first mask", run, "topology/distance_first", own),
        Line("ever active", run, "topology/ever_active", others[1]),
    ]
    ages = [Line("Mean age of active connections", run, "topology/mean_age", own)]
    paths = [Line("Paths from inputs to outputs", run, "topology/paths", own)]
    return [
        Chart(
            "churn", "Connections that moved at an update", moved,
            "Churn: the share of active connections that an update has exchanged. Distance: Jaccard, the share of "
            "connections in either mask that are not in both.",
            readable.share, (0.0, None),
        ),
        Chart(
            "exploration", "How far the masks went", gone,
            "Distance to the first mask (Jaccard), and the share of all weights that were active at some time.",
            readable.share, (0.0, 1.03),
        ),
        Chart(
            "age", "Mean age of active connections", ages,
            "Optimizer steps since a connection was last grown; it rises by one a step where nothing moves.",
            readable.tick, (0.0, None),
        ),
        Chart(
            "paths", "Paths from inputs to outputs", paths,
            "Ways through active connections, one of each layer.", readable.tick, (0.0, None),
        ),
    ]  # fmt: skip


def cost_charts(run: RecordedRun, dense: RecordedRun | None) -> list[Chart]:
    """FLOPs of training so far, and of inference, beside those of a dense network."""
    own = colour(run.run.method)
    trained = [
        Line("this run", run, "flops/training", own),
        Line("the same steps, dense", run, "flops/training_dense", INK, "--"),
    ]
    if dense is not None:
        trained.append(Line("the dense run", dense, "flops/training", INK, ":"))
    inference = [
        Line("this network", run, "flops/inference", own),
        Line("dense network", run, "flops/inference_dense", INK, "--"),
    ]
    return [
        Chart(
            "training_flops", "FLOPs of training so far", trained,
            "Forward and backward passes of all samples, whole model; a multiply-add is two FLOPs.", limits=(0.0, None),
        ),
        Chart(
            "inference_flops", "FLOPs of one sample at inference", inference,
            "What the masks leave of a forward pass, whole model.", limits=(0.0, None),
        ),
    ]  # fmt: skip


def dead_chart(run: RecordedRun) -> Chart:
    """Dead units over time."""
    lines = [Line("Dead units", run, "topology/dead_units", colour(run.run.method))]
    caption = "Units whose connections to inputs are all masked."
    return Chart("dead_units", "Dead units", lines, caption, limits=(0.0, None))
