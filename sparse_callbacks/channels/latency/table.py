"""Latency tables: milliseconds of layers by their numbers of channels, as :mod:`sparse_callbacks.latency` measures them."""

import bisect
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_callbacks.channels.costs import Layer

VERSION = 2
DOUBTFUL = 0.1  # relative error of the fit that is worth a word
ROUND_UP = 8  # devices compute in blocks: 61 channels take as long as 64
WAYS = ("measured", "rounded up", "interpolated")
COMMAND = "python -m sparse_callbacks.latency MODEL --batch N --input C H W --out FILE"


def signature(layer: Layer, inner: Sequence[int]) -> str:
    """Everything that decides how long a layer takes but its numbers of channels; ``inner``: one of ``layer.maps``."""
    groups = f"depthwise x{layer.outputs // layer.inputs}" if layer.depthwise else f"groups {layer.groups}"
    kind = f"conv kernel {_by(layer.kernel)} {layer.settings} {groups}" if layer.kernel else "linear"
    return f"{kind} map {_by(inner)}"


def _by(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def here(device: str) -> dict[str, Any]:
    """What decides how long a layer takes besides the layer: machine, device with its chip, threads of torch, torch's version."""
    return {
        "machine": f"{platform.system()} {platform.machine()}", "device": f"{device} {_chip(device)}",
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def _chip(device: str) -> str:
    if torch.device(device).type == "cuda":
        try:
            return torch.cuda.get_device_name(device)
        except (RuntimeError, AssertionError):  # which torch raises where there is none
            return "that is not there"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


@dataclass(frozen=True)
class Grid:
    """Milliseconds of one kind of layer, ``ms[i][j]`` with ``inputs[i]`` and ``outputs[j]``; depthwise: one of each, ``ms[i][0]``."""

    inputs: list[int]
    outputs: list[int]
    ms: list[list[float]]

    @property
    def depthwise(self) -> bool:
        return len(self.ms) > 0 and len(self.ms[0]) < len(self.outputs)

    def look(self, inputs: int, outputs: int) -> tuple[float, str]:
        """Milliseconds, and how they were found: one of :data:`WAYS`.

        Numbers that were not measured are rounded up to a multiple of 8 that was, where no measured one lies between, first the inputs,
        then the outputs, then both; others are interpolated between their neighbours. So more channels never take less time where
        no more channels measured did.

        Raises:
            LookupError: the numbers lie outside of what was measured.
        """
        i, o = _up(self.inputs, inputs), outputs if self.depthwise else _up(self.outputs, outputs)
        rows = _neighbours(self.inputs, i, "inputs")
        columns = [(0, 1.0)] if self.depthwise else _neighbours(self.outputs, o, "outputs")
        ms = math.fsum(a * b * self.ms[row][column] for row, a in rows for column, b in columns)
        return ms, WAYS[2] if len(rows) * len(columns) > 1 else WAYS[(i, o) != (inputs, outputs)]

    def __call__(self, inputs: int, outputs: int) -> float:
        """Milliseconds, see :meth:`look`."""
        return self.look(inputs, outputs)[0]


def _up(grid: Sequence[int], number: int) -> int:
    """``number``, or the multiple of 8 above it if that is the next one in ``grid``."""
    above, rounded = bisect.bisect_left(grid, number), -(-number // ROUND_UP) * ROUND_UP
    return rounded if above < len(grid) and grid[above] == rounded else number


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
    """Latency of a model on one machine, in milliseconds a batch: a cost for :class:`~sparse_callbacks.channels.costs.Network`, of which
    ``constant`` is the cost of everything that is no layer.

    Attributes:
        about: machine, device, threads, torch, model, batch, input, model_ms (the whole dense model), and how it was measured.
        grids: by :func:`signature`.
        constant, factor: milliseconds of the whole model are ``constant + factor * those of its layers measured alone``.
    """

    about: dict[str, Any]
    grids: dict[str, Grid]
    constant: float = 0.0
    factor: float = 1.0
    _seen: dict[tuple[str, int, int], tuple[float, str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, layer: Layer, inputs: int, outputs: int) -> float:
        """Milliseconds of all uses of a layer with so many inputs and outputs, in the whole model: times ``factor``.

        Raises:
            ValueError: nothing like it was measured.
        """
        try:
            return self.factor * math.fsum(self._look(signature(layer, inner), inputs, outputs) for inner in layer.maps)
        except LookupError as error:
            why = f"no {error.args[0]!r} was measured" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"the latency table of {self.about.get('model')} (input {self.about.get('input')}) does not cover {layer.name} with "
                f"{inputs} inputs and {outputs} outputs: {why}. Measure this model at the size of the example input: {COMMAND}."
            ) from None

    def _look(self, kind: str, inputs: int, outputs: int) -> float:
        sizes = kind, inputs, outputs
        if sizes not in self._seen:
            self._seen[sizes] = self.grids[kind].look(inputs, outputs)
        return self._seen[sizes][0]

    @property
    def lookups(self) -> dict[str, int]:
        """How many sizes of layers were looked up since the table was made, by :data:`WAYS`; the same size counts once."""
        found = Counter(way for _, way in self._seen.values())
        return {way: found[way] for way in WAYS}

    def told(self) -> str:
        """:attr:`lookups` in a line."""
        parts = ", ".join(f"{count} {way}" for way, count in self.lookups.items())
        return f"of {len(self._seen)} sizes of layers looked up in the latency table: {parts}"

    def check(self, size: Sequence[int]) -> list[str]:
        """What makes the table doubtful here: sentences about its fit, another machine, device, number of threads or version of torch.

        Args:
            size: of one sample that the model is given, without the batch.

        Raises:
            ValueError: the table is of inputs of another size, or measuring it was interrupted.
        """
        about, name = self.about, f"the latency table of {self.about.get('model')}"
        if list(about.get("input", size)) != list(size):
            raise ValueError(f"{name} is of inputs of size {about['input']}, and here they are {list(size)}. Measure anew: {COMMAND}.")
        if not about.get("finished", True):
            raise ValueError(f"measuring {name} was interrupted. Run the same command again; it goes on where it stopped: {COMMAND}.")
        device = str(about.get("device", "cpu")).partition(" ")[0]
        now, after = here(device), "Times may differ: measure where the model is to be fast."
        words = {"machine": "on {}", "device": "on {}", "threads": "with {} threads", "torch": "with torch {}"}
        doubts = []
        if (off := float(about.get("off", 0.0))) > DOUBTFUL:
            most = f"{name} is off by up to {100 * off:.0f} % at the models that it was fitted to"
            doubts = [f"{most}. Measure anew on a quiet machine: {COMMAND}."]
        differs = {k for k in words if about.get(k, now[k]) != now[k]} - ({"threads"} if device.startswith("cuda") else set())
        return doubts + [
            f"{name} was measured {w.format(about[k])}, and here it is {now[k]}. {after}" for k, w in words.items() if k in differs
        ]

    def save(self, path: str | Path) -> None:
        """Write JSON; the file is whole at any time, the old one or the new one."""
        grids = {k: asdict(g) for k, g in self.grids.items()}
        content = {"version": VERSION, "about": self.about, "constant": self.constant, "factor": self.factor, "grids": grids}
        part = Path(f"{path}.part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, path)

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
            grids = {k: Grid(**g) for k, g in content["grids"].items()}
            return cls(content["about"], grids, float(content["constant"]), float(content["factor"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no latency table of version {VERSION} ({type(error).__name__}: {error}). Measure one: "
                f"python -m sparse_callbacks.latency MODEL --batch N --input C H W --out {path}."
            ) from error
