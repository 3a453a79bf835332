"""Figures of a comparison: the metric against sparsity and FLOPs, with the Pareto front."""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sparse_callbacks.core.inspection import extra
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.compared_settings import Problem, Setting, Spread
from sparse_callbacks.reporting.comparison import COMPARED_AXES, Axis, front
from sparse_callbacks.reporting.style import INK, arrange, colour, drawing, marker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.5, 3.0
"""Inches of a figure."""
LETTERS_OF_A_NAME = 46
"""In a line of the legend."""
_DASHES = ("-", "--", ":", "-.")  # of lines of one method, which share its colour
_DENSE: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (5, 3))}
_FRONT: dict[str, Any] = {
    "color": INK,
    "alpha": 0.16,
    "linewidth": 9,
    "solid_capstyle": "round",
    "solid_joinstyle": "round",
}
Point = tuple[float, Spread]
"""The place on the axis, and the metric over the seeds."""


def comparison_figure(problem: Problem, metric: str, axis_name: str) -> "Figure | None":
    """The metric of every setting against an axis, means with standard deviations; None where no run has both.

    Sparsity is drawn by the logarithm of the weights that are left: from 0.9 to 0.99 is as far as from 0.99 to 0.999.
    FLOPs are drawn by their logarithm. Dense runs are a horizontal line, and against FLOPs a point too.

    Args:
        problem: the settings.
        metric: the metric of the vertical axis.
        axis_name: a key of :data:`~sparse_callbacks.reporting.comparison.COMPARED_AXES`.
    """
    axis = COMPARED_AXES[axis_name]
    lines = {line: points for line in _lines(problem) if (points := _points(problem, line, metric, axis))}
    if not lines:
        return None
    with drawing() as figures:
        figure: Figure = figures.Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        _draw_dense(axes, problem, metric)
        at_front = _places(front(problem, metric, axis), metric, axis)
        axes.plot([x for x, _ in at_front], [spread.mean for _, spread in at_front], zorder=2, **_FRONT)
        styles = _styles(problem)
        for line, points in lines.items():
            _draw_line(axes, points, styles[line])
        _write_places(axes, [x for points in lines.values() for x, _ in points], axis)
        axes.set_title(f"{metric} against {axis.short}")
        axes.set_xlabel(axis.title)
        axes.locator_params(axis="y", nbins=6)
        if readable.is_accuracy(metric):
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    return arrange(figure)


def legend_figure(problem: Problem, metric: str) -> "Figure":
    """The lines of the figures of a problem by colour and marker, in a drawing of its own."""
    names = [line for line in _lines(problem) if any(s.over_seeds(metric) for s in problem.settings if s.line == line)]
    columns = 1 if max(map(len, names), default=0) > 24 else 2
    # a long name would end outside of the figure
    texts = {name: textwrap.fill(name, LETTERS_OF_A_NAME, subsequent_indent="  ") for name in names}
    rows = sum(text.count("\n") + 1 for text in texts.values()) + 1
    with drawing() as figures:
        make = extra("matplotlib.lines", "report").Line2D
        figure: Figure = figures.Figure(figsize=(WIDTH, 0.205 * math.ceil(rows / columns) + 0.04))
        styles = _styles(problem)
        handles = [make([], [], label=texts[name], **styles[name]) for name in names]
        handles.append(make([], [], label="Pareto front", **_FRONT))
        figure.legend(handles=handles, loc="upper left", ncols=columns, borderaxespad=0, handlelength=2.6)
    return figure


def _lines(problem: Problem) -> list[str]:
    return list(dict.fromkeys(setting.line for setting in problem.settings))


def _styles(problem: Problem) -> dict[str, dict[str, Any]]:
    """How each line is drawn: the colour and marker of its method; of two lines of one, the second is dashed and open."""
    found: dict[str, dict[str, Any]] = {}
    drawn: dict[str, int] = {}
    for setting in problem.settings:
        method = setting.method
        if setting.line in found:
            continue
        number = drawn[method] = drawn.get(method, -1) + 1
        style = {"color": colour(method), "marker": marker(method), "markersize": 5.5, "linestyle": _DASHES[number % 4]}
        if number:
            style["markerfacecolor"] = "none"
        found[setting.line] = style | (_DENSE if method == "dense" else {})
    return found


def _points(problem: Problem, line: str, metric: str, axis: Axis) -> list[Point]:
    return _places([setting for setting in problem.settings if setting.line == line], metric, axis)


def _places(settings: Sequence[Setting], metric: str, axis: Axis) -> list[Point]:
    """Where settings lie, from left to right; those without a place are left out, as dense ones on the axis of sparsity."""
    found = []
    for setting in settings:
        x, y = setting.over_seeds(axis.key), setting.over_seeds(metric)
        if x is not None and y is not None and (place := _place(x.mean, axis)) is not None:
            found.append((place, y))
    return sorted(found, key=lambda point: point[0])


def _place(value: float, axis: Axis) -> float | None:
    """Where a value lies on an axis: the logarithm of the weights that are left, or of the FLOPs."""
    if axis.more_is_better:
        return -math.log10(1 - value) if 0 < value < 1 else None
    return math.log10(value) if value > 0 else None


def _draw_dense(axes: Any, problem: Problem, metric: str) -> None:
    for setting in problem.settings:
        spread = setting.over_seeds(metric)
        if setting.method == "dense" and spread is not None:
            axes.axhline(spread.mean, color=INK, zorder=1, **_DENSE)
            half = spread.deviation or 0.0
            axes.axhspan(spread.mean - half, spread.mean + half, color=INK, alpha=0.07, linewidth=0, zorder=0.5)


def _draw_line(axes: Any, points: Sequence[Point], style: dict[str, Any]) -> None:
    xs, means = [x for x, _ in points], [spread.mean for _, spread in points]
    deviations = [spread.deviation or 0.0 for _, spread in points]
    axes.errorbar(xs, means, yerr=deviations, capsize=2.5, elinewidth=1.0, zorder=3, **style)


def _write_places(axes: Any, places: Sequence[float], axis: Axis) -> None:
    """Ticks: at the sparsities that there are, or at 1, 2 and 5 times powers of ten."""
    if axis.more_is_better:
        texts = {place: f"{1 - 10**-place:.3g}" if place < 2 else f"{1 - 10**-place:.4g}" for place in sorted(places)}
        # of sparsities that are written alike the first has the tick
        ticks = {text: place for place, text in reversed(texts.items())}
        values = sorted(ticks.values())
    else:
        first, last = math.floor(min(places)) - 1, math.ceil(max(places)) + 1
        every = [power + math.log10(factor) for power in range(first, last) for factor in (1, 2, 5)]
        values = [tick for tick in every if min(places) - 0.31 <= tick <= max(places) + 0.31]
        texts = {tick: readable.count(float(f"{10**tick:.3g}")) for tick in values}
    shown = _apart(values, 0.1 if axis.more_is_better else 0.14)
    axes.set_xticks(shown, [texts[tick] for tick in shown])


def _apart(ticks: Sequence[float], share: float) -> list[float]:
    """Those of the ticks that leave a share of the axis between each other, so that their texts do not touch."""
    kept = list(ticks[:1])
    for tick in ticks[1:]:
        if tick - kept[-1] >= share * (ticks[-1] - ticks[0]):
            kept.append(tick)
    return kept


def figure_label(problem: Problem, metric: str, axis_name: str, written: Callable[[Setting], str]) -> str:
    """What a figure shows, for readers who cannot see it.

    Args:
        problem, metric, axis_name: as of :func:`comparison_figure`.
        written: the score of a setting as text.
    """
    axis = COMPARED_AXES[axis_name]
    best = "; ".join(f"{s.name}: {written(s)}" for s in front(problem, metric, axis))
    return f"{problem.title}: {metric} against {axis.title}. On the Pareto front: {best}."
