"""Layers over time: heat maps of their sparsity, and of what moved in them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_callbacks.core.inspection import extra
from sparse_callbacks.core.record.record_file import LayerRecord, RecordedRun
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.series import layer_figures, layer_rows, number, thinned
from sparse_callbacks.reporting.style import arrange, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 160
"""Times of a heat map."""
LABELS = 40
"""Layers that a heat map has the names of; of more every second, third, ... is named."""


@dataclass(frozen=True)
class HeatMap:
    """A figure of every sparse layer over time.

    Attributes:
        name: its name among the pictures of the run.
        title: what it shows.
        caption: how it is read.
        names: names of the layers, from the input on.
        steps: the optimizer step of each column.
        values: [layers, columns], float; not a number where a row has none.
    """

    name: str
    title: str
    caption: str
    names: Sequence[str]
    steps: Sequence[float]
    values: Tensor


_MAPS = {
    "sparsity": ("Sparsity of the layers", "The share of each layer's weights that are zero."),
    "churn": ("Connections exchanged in the layers", "The share of each layer's active connections that an update has exchanged."),
    "distance_first": ("Distance to the first mask", "Jaccard: the share of connections in either mask that are not in both."),
    "ever_active": ("Weights ever active", "The share of each layer's weights that were active at some time."),
}  # fmt: skip


def heat_maps(run: RecordedRun) -> list[HeatMap]:
    """The heat maps that the rows have figures for."""
    rows = [row for row in layer_rows(run) if number(row, "step") is not None]
    layers = [layer for layer in run.run.layers if layer.sparse]
    names = short_names([layer.name for layer in layers])
    found = []
    for key, (title, caption) in _MAPS.items():
        # rows without this figure would leave gaps
        known = [row for row in rows if any(not math.isnan(_value(row, layer, key)) for layer in layers)]
        # between updates nothing moves: rows of other events would be zeros between them
        updates = [row for row in known if row.get("event") == "update"] if key == "churn" else []
        told = thinned(updates or known, COLUMNS)
        if told:
            steps = [number(row, "step") or 0.0 for row in told]
            values = torch.tensor([[_value(row, layer, key) for row in told] for layer in layers])
            if key != "sparsity" and len(set(values[~values.isnan()].tolist())) == 1:
                continue  # one colour: the curves say the same
            found.append(HeatMap(f"layers_{key}", title, caption, names, steps, values))
    return found


def _value(row: Mapping[str, Any], layer: LayerRecord, key: str) -> float:
    figures = layer_figures(row, layer.name)
    found = number(figures, "active" if key == "sparsity" else key)
    if found is None:
        return float("nan")
    return 1 - found / max(1, layer.size) if key == "sparsity" else float(found)


def short_names(names: Sequence[str], most: int = 20) -> list[str]:
    """Names without ``.weight``; long ones without the part that all begin with, or without their middle."""
    bare = [name.removesuffix(".weight") for name in names]
    if len(bare) > 1 and max(map(len, bare)) > most:
        parts = [name.split(".") for name in bare]
        # the last part stays, also of a name that is the beginning of another
        shared = next(i for i in range(len(parts[0])) if i + 1 in map(len, parts) or len({p[i] for p in parts}) > 1)
        bare = [".".join(p[shared:]) for p in parts]
    return [readable.shortened(name, most) for name in bare]


def heat_map_figure(heat: HeatMap) -> "Figure":
    """The drawing of a heat map."""
    layers = len(heat.names)
    named = range(0, layers, -(-layers // LABELS))
    with drawing() as figures:
        height = 1.0 + min(6.5, max(0.9, 0.19 * layers))
        figure: Figure = figures.Figure(figsize=(4.5, height), layout="constrained")
        axes = figure.subplots()
        grid = _even(heat)
        end = heat.steps[-1] if heat.steps[-1] > heat.steps[0] else heat.steps[0] + 1
        low, high = _range(grid)
        image = axes.imshow(
            grid.numpy(), aspect="auto", cmap="viridis", interpolation="none", vmin=low, vmax=high,
            extent=(heat.steps[0], end, layers - 0.5, -0.5),
        )  # fmt: skip
        # drawn to its edges, whatever the ticks
        axes.set(xlim=(heat.steps[0], end), ylim=(layers - 0.5, -0.5), autoscale_on=False)
        axes.grid(False)
        axes.set_title(heat.title)
        axes.set_yticks(list(named), [heat.names[i] for i in named], fontsize=8.5 if layers <= 24 else 7)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("optimizer steps")
        axes.xaxis.set_major_formatter(lambda value, _: readable.tick(value))
        axes.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])
        ticks = extra("matplotlib.ticker", "report").MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30 if layers > 12 else 10, ticks=ticks)
        bar.ax.yaxis.set_major_formatter(lambda value, _: readable.share(value))
        bar.outline.set_visible(False)
    return arrange(figure)


def _range(grid: Tensor) -> tuple[float, float]:
    """The ends of the colours: those of the figures, or around them where all are the same."""
    known = grid[~grid.isnan()]
    low, high = float(known.min()), float(known.max())
    return (low, high) if high - low > 1e-6 else (max(0.0, low - 0.05), min(1.0, low + 0.05))


def _even(heat: HeatMap) -> Tensor:
    """The columns at even distances in steps, each with the figures of the last row before its end."""
    steps = torch.tensor(heat.steps, dtype=torch.float64)
    if len(steps) == 1:
        return heat.values
    ends = torch.linspace(0, 1, COLUMNS + 1, dtype=torch.float64)[1:] * (steps[-1] - steps[0]) + steps[0]
    ends[-1] = steps[-1]
    return heat.values[:, torch.searchsorted(steps, ends, right=True) - 1]


def heat_map_label(heat: HeatMap) -> str:
    """What a heat map shows, for readers who cannot see it: the last figure of the lowest and of the highest layer."""
    ends = [(row[~row.isnan()], name) for row, name in zip(heat.values, heat.names, strict=True)]
    known = sorted((float(row[-1]), name) for row, name in ends if len(row))
    (low, lowest), (high, highest) = known[0], known[-1]
    said = f"from {readable.share(low)} in {lowest} to {readable.share(high)} in {highest}"
    return f"{heat.title} against optimizer steps, {len(heat.names)} layers: at the end {said}"
