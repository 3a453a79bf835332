"""Latency tables: milliseconds of layers by their numbers of channels, as :mod:`sparse_callbacks.latency` measures them."""

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_callbacks.costs import Layer

VERSION = 1
ROUND_UP = 8  # devices compute in blocks: 61 channels take as long as 64


def signature(layer: Layer, inner: Sequence[int]) -> str:
    """Everything that decides how long a layer takes but its numbers of channels; ``inner``: one of ``layer.maps``."""
    groups = f"depthwise x{layer.outputs // layer.inputs}" if layer.depthwise else f"groups {layer.groups}"
    kind = f"conv kernel {_by(layer.kernel)} {layer.settings} {groups}" if layer.kernel else "linear"
    return f"{kind} map {_by(inner)}"


def _by(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def fallback(inputs: int, outputs: int, multiple: int = ROUND_UP) -> list[tuple[int, int]]:
    """Numbers of channels to look up in turn: as they are, the inputs rounded up, the outputs, both.

    >>> fallback(61, 100)
    [(61, 100), (64, 100), (61, 104), (64, 104)]
    """
    more_in, more_out = (-(-n // multiple) * multiple for n in (inputs, outputs))
    return list(dict.fromkeys([(inputs, outputs), (more_in, outputs), (inputs, more_out), (more_in, more_out)]))


@dataclass(frozen=True)
class Grid:
    """Milliseconds of one kind of layer, ``ms[i][j]`` with ``inputs[i]`` and ``outputs[j]``; depthwise: one of each, ``ms[i][0]``."""

    inputs: list[int]
    outputs: list[int]
    ms: list[list[float]]

    @property
    def depthwise(self) -> bool:
        return len(self.ms) > 0 and len(self.ms[0]) < len(self.outputs)

    def __call__(self, inputs: int, outputs: int) -> float:
        """Measured where it was, also with numbers rounded up as in :func:`fallback`; otherwise interpolated between neighbours.

        Raises:
            LookupError: the numbers lie outside of what was measured.
        """
        for i, o in fallback(inputs, outputs):
            if i in self.inputs and (self.depthwise or o in self.outputs):
                return self.ms[self.inputs.index(i)][0 if self.depthwise else self.outputs.index(o)]
        rows = _neighbours(self.inputs, inputs, "inputs")
        columns = [(0, 1.0)] if self.depthwise else _neighbours(self.outputs, outputs, "outputs")
        return math.fsum(a * b * self.ms[i][j] for i, a in rows for j, b in columns)


def _neighbours(grid: Sequence[int], number: int, name: str) -> list[tuple[int, float]]:
    """Positions in ``grid`` around ``number``, with their weights."""
    if not grid[0] <= number <= grid[-1]:
        raise LookupError(f"{number} {name} lie outside of the {grid[0]} to {grid[-1]} that were measured")
    above = bisect.bisect_left(grid, number)
    if grid[above] == number:
        return [(above, 1.0)]
    share = (number - grid[above - 1]) / (grid[above] - grid[above - 1])
    return [(above - 1, 1 - share), (above, share)]


@dataclass(frozen=True)
class Table:
    """Latency of a model's layers on one machine: a cost for :class:`~sparse_callbacks.costs.Network`, in milliseconds a batch.

    Attributes:
        about: machine, device, threads, torch, model, batch, input, model_ms (the whole dense model), and how it was measured.
        grids: by :func:`signature`.
    """

    about: dict[str, Any]
    grids: dict[str, Grid]

    def __call__(self, layer: Layer, inputs: int, outputs: int) -> float:
        """Milliseconds of all uses of a layer with so many inputs and outputs.

        Raises:
            ValueError: nothing like it was measured.
        """
        try:
            return math.fsum(self.grids[signature(layer, inner)](inputs, outputs) for inner in layer.maps)
        except LookupError as error:
            why = f"no {error.args[0]!r} was measured" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"the latency table of {self.about.get('model')} (input {self.about.get('input')}) does not cover {layer.name} with "
                f"{inputs} inputs and {outputs} outputs: {why}. Measure this model at the size of the example input: "
                "python -m sparse_callbacks.latency MODEL --batch N --input C H W --out FILE."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        content = {"version": VERSION, "about": self.about, "grids": {k: asdict(g) for k, g in self.grids.items()}}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: no such table.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["version"] != VERSION:
                raise ValueError(f"it is one of version {content['version']}, written by another release")
            return cls(content["about"], {k: Grid(**g) for k, g in content["grids"].items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no latency table of version {VERSION} ({type(error).__name__}: {error}). Measure one: "
                f"python -m sparse_callbacks.latency MODEL --batch N --input C H W --out {path}."
            ) from error
