"""The pictures of a recorded run: its curves, heat maps and masks, drawn, named and described."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_callbacks.core.record.record_file import RecordedRun
from sparse_callbacks.reporting.charts import Chart, chart_figure, chart_label, chart_views
from sparse_callbacks.reporting.heat_maps import heat_map_figure, heat_map_label, heat_maps, short_names
from sparse_callbacks.reporting.mask_pictures import input_figure, mask_figure, mask_label, pictured
from sparse_callbacks.reporting.run_charts import cost_charts, dead_charts, movement_charts, progress_charts
from sparse_callbacks.reporting.series import AXES, number
from sparse_callbacks.reporting.style import figure_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: its name among those of the run, which is also that of its PNG file.
        figure: the drawing; of curves, the one against the first axis that the run has.
        label: what it shows, for readers who cannot see it.
        caption: how it is read.
        chart: what the curves are, to draw them against other axes; None for another picture.
    """

    name: str
    figure: "Figure"
    label: str
    caption: str = ""
    chart: Chart | None = None

    def views(self, axes: Iterable[str]) -> list[tuple[str, str]]:
        """(axis, SVG) of curves against each of the axes, which changes ``figure``; one without an axis for another picture."""
        if self.chart is None:
            return [("", figure_svg(self.figure, self.label))]
        return chart_views(self.chart, self.figure, axes)


def known_axes(run: RecordedRun) -> list[str]:
    """The axes that the rows have places on."""
    return [axis for axis, (key, _) in AXES.items() if any(number(row, key) is not None for row in run.rows)]


def pictures(run: RecordedRun, dense: RecordedRun | None = None) -> dict[str, list[Picture]]:
    """The pictures of each section of the report: ``progress``, ``layers``, ``moved``, ``cost``, ``masks``, ``dead``.

    Args:
        run: the recorded run.
        dense: a dense run, whose curves are drawn beside.

    Raises:
        ImportError: matplotlib is missing; the message names the extra `report`.
    """
    axes = known_axes(run)
    found = {
        "progress": _charts(progress_charts(run, dense), axes),
        "layers": [Picture(h.name, heat_map_figure(h), heat_map_label(h), h.caption) for h in heat_maps(run)],
        "moved": _charts(movement_charts(run), axes),
        "cost": _charts(cost_charts(run, dense), axes),
        "masks": list(_masks(run)),
        "dead": _charts(dead_charts(run), axes),
    }
    return _named_apart(found)


def figures(run: RecordedRun, dense: RecordedRun | None = None) -> dict[str, "Figure"]:
    """Every figure of the report by its name, such as ``"sparsity"``, ``"layers_churn"`` or ``"mask_net.0.weight"``.

    Args:
        run: the recorded run.
        dense: a dense run, whose curves are drawn beside.

    Raises:
        ImportError: matplotlib is missing; the message names the extra `report`.
    """
    return {picture.name: picture.figure for section in pictures(run, dense).values() for picture in section}


def _charts(charts: Sequence[Chart], axes: Sequence[str]) -> list[Picture]:
    found = []
    for chart in charts:
        # the first axis that it has points on
        drawn = next(((axis, f) for axis in axes if (f := chart_figure(chart, axis)) is not None), None)
        if drawn is not None:
            found.append(Picture(chart.name, drawn[1], chart_label(chart, drawn[0]), chart.caption, chart))
    return found


def _masks(run: RecordedRun) -> Iterator[Picture]:
    seen = input_figure(run)
    if seen is not None:
        caption = "How many active connections read each pixel at the end, over all colours."
        yield Picture("mask_inputs", seen, "Active connections of each input pixel at the end", caption)
    layers = pictured(run)
    for layer, name in zip(layers, short_names([layer.name for layer in layers]), strict=True):
        yield Picture(f"mask_{layer.name}", mask_figure(run, layer, name), mask_label(run, layer))


def _named_apart(sections: dict[str, list[Picture]]) -> dict[str, list[Picture]]:
    """With names that are file names, and different ones."""
    taken: set[str] = set()
    found: dict[str, list[Picture]] = {}
    for section, given in sections.items():
        found[section] = []
        for p in given:
            bare = re.sub(r"[^\w.-]+", "_", p.name).strip("._")[:80] or "figure"
            name = next(
                n for i in range(len(taken) + 1) if (n := f"{bare}_{i + 1}" if i else bare).lower() not in taken
            )
            # file systems that do not tell capital letters apart would lose one
            taken.add(name.lower())
            found[section].append(Picture(name, p.figure, p.label, p.caption, p.chart))
    return found
