"""Figures of a comparison: the metric against sparsity and FLOPs, with the Pareto front."""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sparse_callbacks.core.inspection import extra
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.compared_settings import Problem, Setting, Spread
from sparse_callbacks.reporting.comparison import COMPARED_AXES, Axis, front, goodness, is_better_when_lower
from sparse_callbacks.reporting.shown_range import worst_shown
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
    FLOPs are drawn by their logarithm. Where a few settings have collapsed, the axis ends above them: each has its marker
    there, with an arrow and its mean. Dense runs are a horizontal line, and against FLOPs a point too.

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
        if off := _off_axis(problem, metric, axis):
            _end_axis(axes, problem, metric, axis, off)
            _draw_off_axis(axes, [(x, spread, styles[s.line]) for s, x, spread in off], metric)
        _write_places(axes, [x for points in lines.values() for x, _ in points], axis)
        axes.set_title(f"{metric} against {axis.short}")
        axes.set_xlabel(axis.title)
        axes.locator_params(axis="y", nbins=6)  # after the limits, which would bring their own ticks
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


# ---------------------------------------------------------------------- settings that have collapsed


def _drawn(problem: Problem, metric: str, axis: Axis) -> list[tuple[Setting, float, Spread]]:
    """The settings that have a place on an axis, with it and the metric."""
    found = []
    for setting in problem.settings:
        [*places] = _places([setting], metric, axis)
        found += [(setting, x, spread) for x, spread in places]
    return found


def _off_axis(problem: Problem, metric: str, axis: Axis) -> list[tuple[Setting, float, Spread]]:
    """The few that have collapsed, without which the others can be told apart: they are left off the axis of the metric."""
    good, drawn = goodness(metric), _drawn(problem, metric, axis)
    limit = worst_shown([good(spread.mean) for _, _, spread in drawn])
    return [] if limit is None else [point for point in drawn if good(point[2].mean) < limit]


def _end_axis(
    axes: Any, problem: Problem, metric: str, axis: Axis, off: Sequence[tuple[Setting, float, Spread]]
) -> None:
    """Let the axis of the metric end beyond the other settings, with room for what is said of those off it."""
    good, names = goodness(metric), {setting.name for setting, _, _ in off}
    spreads = [spread for setting, _, spread in _drawn(problem, metric, axis) if setting.name not in names]
    spreads += [spread for s in problem.settings if s.method == "dense" and (spread := s.over_seeds(metric))]
    means = [good(spread.mean) for spread in spreads]
    best, worst = max(means), min(means)
    length = best - worst
    # a bar may be longer than all else
    above = max(min(s.deviation or 0.0, length) + good(s.mean) for s in spreads) + 0.06 * length
    below = min(good(s.mean) - min(s.deviation or 0.0, length / 2) for s in spreads) - 0.3 * length
    axes.set_ylim(*sorted((good(below), good(above))))


def _draw_off_axis(axes: Any, points: Sequence[tuple[float, Spread, dict[str, Any]]], metric: str) -> None:
    """A marker at the end of the axis for each point beyond it, with an arrow and its mean."""
    low, high = axes.get_xlim()
    lower, written = not is_better_when_lower(metric), list[tuple[float, int]]()
    for x, spread, style in sorted(
        points, key=lambda point: goodness(metric)(point[1].mean)
    ):  # the worst at the very end
        beside = {row for place, row in written if abs(place - x) < 0.3 * (high - low)}
        row = next(row for row in range(len(points)) if row not in beside)
        written.append((x, row))
        share = 0.045 + 0.085 * row
        where = (x, share if lower else 1 - share)
        across = axes.get_xaxis_transform()
        axes.plot(*where, transform=across, clip_on=False, zorder=4, **{**style, "linestyle": "none"})
        left = x > (low + high) / 2
        value = f"{100 * spread.mean:.1f} %" if readable.is_accuracy(metric) else f"{spread.mean:.3g}"
        axes.annotate(
            f"{'↓' if lower else '↑'} {value}", where, xycoords=across, xytext=(-6 if left else 6, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=8, zorder=4,
        )  # fmt: skip


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
    beyond = "; ".join(f"{s.name}: {written(s)}" for s, _, _ in _off_axis(problem, metric, axis))
    said = f" Off the axis: {beyond}." if beyond else ""
    return f"{problem.title}: {metric} against {axis.title}. On the Pareto front: {best}.{said}"


def has_off_axis(problem: Problem, metric: str, axis_name: str) -> bool:
    """Whether a figure leaves settings off its axis, and gives their means beside an arrow."""
    return bool(_off_axis(problem, metric, COMPARED_AXES[axis_name]))
