"""A table of times for SPDY: milliseconds of each layer of a model at each sparsity, as a JSON file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_callbacks.channels.latency.table import changed_place
from sparse_callbacks.core.files import replacing
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.state_layout import shown_short
from sparse_callbacks.methods.spdy.levels import LayerCosts

TIMES_VERSION = 1
MEASURE = "python -m sparse_callbacks.allocate MODEL --input SIZE --measure --out FILE"


@dataclass(frozen=True)
class TimeTable:
    """Milliseconds of the layers of a model, in a training step on one machine.

    The file is ``{"version": 1, "about": {...}, "ms": {layer: {sparsity: milliseconds}}}``; only ``ms`` is needed in one
    that is written by hand. Every layer has a time for sparsity 0; its sparsities are the levels that it may have.

    Attributes:
        about: what was measured, and where.
        ms: milliseconds by sparsity, by the name of the layer in the model that was measured.
    """

    about: Mapping[str, Any]
    ms: Mapping[str, Mapping[float, float]]

    def costs(self, entries: Sequence[Entry]) -> LayerCosts:
        """What the selected layers of a model cost; other layers of the table cost what they do when dense.

        Layers of the model may have longer names, all by the same prefix, as a network inside a LightningModule has.

        Args:
            entries: all parameters of the model; those without a reason are selected.

        Raises:
            ValueError: the table lacks a selected layer.
        """
        selected = [layer for e in entries if not e.reason for layer in e.layers]
        prefix = self._prefix(selected)
        ms = {layer: dict(sorted(self.ms[layer.removeprefix(prefix)].items())) for layer in selected}
        others = {f"{prefix}{layer}": times[0.0] for layer, times in self.ms.items() if f"{prefix}{layer}" not in ms}
        return LayerCosts(
            {layer: tuple(times) for layer, times in ms.items()},
            {layer: tuple(times.values()) for layer, times in ms.items()},
            math.fsum(others.values()),
            "milliseconds of the table",
        )

    def _prefix(self, selected: Sequence[str]) -> str:
        """What the names of the model's layers have before those of the table."""
        first = selected[0]
        prefixes = [first[: -len(name)] for name in self.ms if first == name or first.endswith(f".{name}")]
        short = {p: [n for n in selected if n.removeprefix(p) not in self.ms or not n.startswith(p)] for p in prefixes}
        for prefix, missing in short.items():
            if not missing:
                return prefix
        missing = min(short.values(), key=len, default=list(selected))
        raise ValueError(
            f"the table of times has no layer for {', '.join(missing)}. It has {', '.join(self.ms)}. Measure this model: "
            f"{MEASURE}; or leave the layers out with exclude=."
        )

    def doubts(self, path: str | Path) -> list[str]:
        """Sentences about what makes the table doubtful here: it was measured on another machine or with another torch."""
        return changed_place(self.about, f"the table of times {path}")

    def save(self, path: str | Path) -> None:
        """Write JSON; the file is whole at any time, the old one or the new one."""
        ms = {layer: {repr(s): time for s, time in times.items()} for layer, times in self.ms.items()}
        content = {"version": TIMES_VERSION, "about": dict(self.about), "ms": ms}
        with replacing(path) as beside:
            beside.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "TimeTable":
        """Read what :meth:`save` wrote, or somebody by hand.

        Raises:
            ValueError: the file is missing, or is not such a table.
        """
        try:
            content = json.loads(Path(path).read_text())
            if why := _why_not_times(content):
                raise ValueError(why)
            about = content.get("about", {})
            return cls(about, {n: {float(s): float(t) for s, t in ms.items()} for n, ms in content["ms"].items()})
        except (OSError, ValueError, RecursionError) as error:  # a deep nest of brackets is a RecursionError
            raise ValueError(
                f"cost={str(path)!r} is not a table of times ({type(error).__name__}: {error}). Measure one: {MEASURE}."
            ) from error


def _why_not_times(content: Any) -> str:
    """What is wrong with the content of a file, as a clause; empty where nothing is."""
    if not isinstance(content, Mapping) or not isinstance(content.get("ms"), Mapping) or not content["ms"]:
        return 'it has no "ms", milliseconds by sparsity by layer'
    if content.get("version", TIMES_VERSION) != TIMES_VERSION:
        return f"it is one of version {shown_short(content['version'])}, written by another release"
    about = content.get("about", {})
    if not isinstance(about, Mapping) or not all(isinstance(about.get(k, ""), str) for k in ("device", "torch")):
        return f"about in it is {shown_short(about)}"
    if why := next((why for layer, ms in content["ms"].items() if (why := _why_no_times(layer, ms))), ""):
        return why
    dense = sum(float(ms[key]) for ms in content["ms"].values() for key in ms if float(key) == 0)
    return "" if 0 < dense < math.inf else f"its dense layers take {dense:g} milliseconds together"


def _why_no_times(layer: str, ms: Any) -> str:
    if not isinstance(ms, Mapping):
        return f"ms of {layer} is {shown_short(ms)} and not milliseconds by sparsity"
    try:
        levels = [float(s) for s in ms]
    except ValueError:
        return f"ms of {layer} has a sparsity that is no number"
    if len(set(levels)) < len(levels) or not all(0 <= s < 1 for s in levels) or 0.0 not in levels:
        return f"the sparsities of {layer} are {', '.join(ms)}, and must be different, in [0, 1), with 0 among them"
    bad = [t for t in ms.values() if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t < math.inf]
    return f"a time of {layer} is {shown_short(bad[0])} and not a number of milliseconds" if bad else ""
