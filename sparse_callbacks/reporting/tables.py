"""Tables and texts of a report: plan, dead units, channels, configuration, reproduction."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_callbacks.core.record.record_file import LayerRecord, RecordedRow, RecordedRun
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.gains import channel_costs
from sparse_callbacks.reporting.series import layer_figures, layer_rows, number

ROWS = 400
"""Rows of a table at most; the record has all of them."""
LETTERS = 120_000
"""Letters of a text at most."""


@dataclass(frozen=True)
class Table:
    """A table: its column titles, its rows of texts, which columns hold numbers, and how many rows were left out."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    left_out: int = 0


def _cut(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> Table:
    """A table without the columns that no row fills, and with as many rows as a page takes."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    cells = [[row[i] for i in kept] for row in rows[:ROWS]]
    right = [kept.index(i) for i in numbers if i in kept]
    return Table(caption, [head[i] for i in kept], cells, right, max(0, len(rows) - ROWS))


def cut_text(text: str) -> str:
    """A text that does not make the page too large; says where it was cut."""
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}\n… ({len(text):,} letters; the record has all of them)"


def plan_table(run: RecordedRun) -> Table:
    """Every parameter: its planned and its reached sparsity, or why it stays dense."""
    rows = layer_rows(run)
    end: RecordedRow = rows[-1] if rows else {"layers": {}}
    lines = [_plan_row(layer, layer_figures(end, layer.name)) for layer in run.run.layers]
    head = ("parameter", "shape", "weights", "target", "reached", "active", "fan-in", "fan-out", "why dense")
    caption = "Every parameter of the model. Fan-in and fan-out: minimum / median / maximum at the end."
    return _cut(caption, head, lines, (2, 3, 4, 5, 6, 7))


def _plan_row(layer: LayerRecord, figures: Mapping[str, Any]) -> list[str]:
    active = number(figures, "active")
    # of masked layers alone: elsewhere all are active, which is no news
    reached = "" if active is None or not layer.sparse else readable.share(1 - active / max(1, layer.size))
    target = "" if not layer.sparse else "in training" if layer.target is None else readable.share(layer.target)
    return [
        layer.name,
        readable.shape_text(layer.shape),
        f"{layer.size:,}",
        target,
        reached,
        "" if active is None or not layer.sparse else f"{round(active):,}",
        _spread(figures.get("fan_in")),
        _spread(figures.get("fan_out")),
        layer.reason,
    ]


def _spread(found: Any) -> str:
    """Minimum, median and maximum as ``"3 / 12 / 40"``; empty where they are not three numbers."""
    if not isinstance(found, list | tuple) or len(found) != 3:
        return ""
    known = [number({"": value}, "") for value in found]
    return " / ".join(f"{value:g}" for value in known if value is not None) if None not in known else ""


def dead_table(run: RecordedRun) -> Table | None:
    """Units without connections in each sparse layer at the end; None where no row tells."""
    heads = {"dead_in": "no input", "dead_out": "no output", "on_no_path": "on no path"}
    rows = layer_rows(run)
    if not rows:
        return None
    names = [layer.name for layer in run.run.layers if layer.sparse]
    told = {name: [number(layer_figures(rows[-1], name), key) for key in heads] for name in names}
    lines = [
        [name, *("" if n is None else f"{n:,g}" for n in counts)]
        for name, counts in told.items()
        if any(n is not None for n in counts)
    ]
    caption = "Units at the end: of each layer's outputs those without an active input, of its inputs those without an active output, "
    caption += "and hidden units that no path from input to output leads through."
    return _cut(caption, ["layer", *heads.values()], lines, (1, 2, 3)) if lines else None


def cost_table(run: RecordedRun) -> Table | None:
    """Parameters, FLOPs and latency before and after slimming; None without slimming."""
    before, after = channel_costs(run, "before"), channel_costs(run, "after")
    lines = []
    samples = number(run.run.channels, "samples")
    names = {
        "parameters": "parameters",
        "flops": "FLOPs of one sample at inference",
        "latency": "latency" if samples is None else f"latency of {samples:,g} samples",
    }
    for key, name in names.items():
        if key in before and key in after:
            words = ("faster", "slower") if key == "latency" else ("fewer", "more")
            change = readable.fewer(after[key], before[key], words=words)
            lines.append([name, *(_cost_text(key, costs[key]) for costs in (before, after)), change])
    if not lines:
        return None
    caption = "Of the masked network, which multiplies by its zeros too, and of the slim one."
    return Table(caption, ("", "before", "after", "change"), lines, (1, 2, 3))


def _cost_text(key: str, value: float) -> str:
    return (
        readable.milliseconds(value)
        if key == "latency"
        else f"{value:,.0f}"
        if key == "parameters"
        else readable.count(value)
    )


def group_table(run: RecordedRun) -> Table | None:
    """What every channel group has lost, and why units stay; None without slimming."""
    groups = run.run.channels.get("groups")
    if not isinstance(groups, Sequence) or not groups:
        return None
    lines = []
    for group in (g for g in groups if isinstance(g, Mapping)):
        units, removed = number(group, "units"), number(group, "removed")
        left = "" if units is None or removed is None else f"{units - removed:,g}"
        said = ["" if n is None else f"{n:,g}" for n in (units, removed)]
        lines.append([str(group.get("name", "")), *said, left, str(group.get("reason") or "")])
    return _cut(
        "Channel groups.", ("group", "units before", "removed", "units after", "why units stay"), lines, (1, 2, 3)
    )


def configuration_text(run: RecordedRun) -> str:
    """The configuration, a line for each value with the names that lead to it: ``model.width=300``; empty without one."""
    return cut_text("\n".join(f"{name}={text}" for name, text in _flat(run.run.configuration)))


def _flat(values: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(values, Mapping) and values:
        return [pair for key, value in values.items() for pair in _flat(value, f"{path}.{key}" if path else str(key))]
    if not path:
        return []
    return [(path, values if isinstance(values, str) else json.dumps(values, default=str, ensure_ascii=False))]


def constructor_text(run: RecordedRun) -> str:
    """The method as it would be constructed; empty for a dense run."""
    if run.run.method == "dense":
        return ""
    given = ", ".join(f"{name}={value}" for name, value in run.run.arguments.items())
    return cut_text(f"{run.run.method}({given})")


def reproduction_table(run: RecordedRun) -> Table:
    """What the run depended on: seed, steps, batch, calendar, machine and versions."""
    said = run.run
    reached = max((n for row in run.rows if (n := number(row, "step")) is not None), default=None)
    steps = "" if reached is None else f"{reached:,.0f}"
    planned = "" if said.length is None else f"{said.length:,}"
    times = ", ".join(f"{key} {value:,}" for key, value in said.calendar.items() if value is not None)
    pairs = {
        "started": readable.moment(said.started),
        "seed": "" if said.seed is None else str(said.seed),
        "optimizer steps": f"{steps} of {planned} planned" if steps and planned else steps or planned,
        "samples of a step": "" if said.batch is None else f"{said.batch:,}",
        "updates of the masks": f"{times} (optimizer steps)" if times else "",
        "machine": ", ".join(f"{key} {value}" for key, value in said.machine.items()),
        "versions": ", ".join(f"{key} {value}" for key, value in said.libraries.items()),
    }
    lines = [[name, text] for name, text in pairs.items() if text]
    return Table("What the run depended on.", ("", ""), lines)
