"""Figures of a recorded run over time, and its last ones: rows with gaps as numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_callbacks.core.record.record_file import RecordedRow, RecordedRun

AXES = {
    "steps": ("step", "optimizer steps"),
    "epochs": ("epoch", "epochs"),
    "samples": ("samples", "samples"),
    "flops": ("flops/training", "training FLOPs"),
}
"""What curves are drawn against: the key in the rows and its name."""
POINTS = 300
"""Points of one line at most: more are not seen, and make pages large."""
_OURS = ("sparsity/", "flops/", "active/", "bytes/", "topology/", "slim/")
_TIMES = ("step", "epoch", "samples", "seconds", "event", "layers")


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The number under a key; None where there is none, or what is there is not finite."""
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return found


def last(run: RecordedRun, key: str) -> float | None:
    """The last number that the rows have under a key; None where they have none."""
    return next((found for row in reversed(run.rows) if (found := number(row, key)) is not None), None)


def stayed_zero(run: RecordedRun, key: str) -> bool:
    """Whether the rows have numbers under a key, and all of them are zero."""
    found = [value for row in run.rows if (value := number(row, key)) is not None]
    return bool(found) and not any(found)


def best(run: RecordedRun, key: str, largest: bool = True) -> float | None:
    """The best number that the rows have under a key; None where they have none."""
    found = [value for row in run.rows if (value := number(row, key)) is not None]
    return (max if largest else min)(found) if found else None


def curve(
    run: RecordedRun, key: str, axis: str = "steps", events: Sequence[str] = (), repeated: bool = True
) -> tuple[list[float], list[float]]:
    """Where, and how large: the points of a figure over time, at most :data:`POINTS` of them with the last one.

    Args:
        run: the recorded run.
        key: the figure's key in the rows.
        axis: a key of :data:`AXES`.
        events: the rows that are read, by their event; none, or where no row has one of them: all.
        repeated: whether a figure that is that of the row before is a point, but for the last one.
    """
    against = AXES[axis][0]
    rows = [row for row in run.rows if row.get("event") in events and number(row, key) is not None] or run.rows
    points = [(number(row, against), number(row, key)) for row in rows]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if not repeated:
        known = [p for i, p in enumerate(known) if i in (0, len(known) - 1) or p[1] != known[i - 1][1]]
    shown = thinned(known, POINTS)
    return [x for x, _ in shown], [y for _, y in shown]


VALIDATIONS = ("validation", "end")


def events_of(run: RecordedRun, key: str) -> tuple[str, ...]:
    """The events that a metric is taken at: those of validations where other rows only repeat it, else none in particular.

    A row repeats what was logged last: drawn at every row, an accuracy of validations would look like stairs.
    """
    before, seen = None, False
    for row in run.rows:
        found = number(row, key)
        if found is None:
            continue
        seen = seen or row.get("event") == "validation"
        if found != before and row.get("event") not in VALIDATIONS:
            return ()
        before = found
    return VALIDATIONS if seen else ()


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def metrics(run: RecordedRun) -> list[str]:
    """Names of the metrics that the run has logged: all but the figures that the record itself takes."""
    names: dict[str, None] = {}
    for row in run.rows:
        names |= {key: None for key in row if key not in names and number(row, key) is not None}
    return [name for name in names if name not in _TIMES and not name.startswith(_OURS)]


def layer_rows(run: RecordedRun) -> list[RecordedRow]:
    """The rows that have figures of layers."""
    return [row for row in run.rows if isinstance(row.get("layers"), Mapping) and row["layers"]]


def layer_figures(row: RecordedRow, name: str) -> Mapping[str, Any]:
    """The figures of one layer in a row; empty where it has none."""
    found = row["layers"].get(name)
    return found if isinstance(found, Mapping) else {}


def active_weights(run: RecordedRun) -> int | None:
    """Weights of the whole model that are not masked at the end; None where no row tells."""
    sparsity = last(run, "sparsity/model")
    whole = sum(layer.size for layer in run.run.layers)
    return round((1 - sparsity) * whole) if sparsity is not None and whole else None
