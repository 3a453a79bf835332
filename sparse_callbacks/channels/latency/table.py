"""The latency table of a model: milliseconds of its layers, by their numbers of inputs and outputs."""

import bisect
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_callbacks.channels.costs import Layer, size_text
from sparse_callbacks.channels.latency.table_layout import why_not_a_table
from sparse_callbacks.core.files import replacing
from sparse_callbacks.core.machine import processor_name

# raised when the keys of the file change; files of other versions are refused
TABLE_VERSION = 2
DOUBTFUL = 0.1
"""Relative error of the fit above which the user is warned."""
ROUND_UP = 8
"""Devices compute channels in blocks of this size: 61 of them take as long as 64."""
MEASURED, ROUNDED_UP, INTERPOLATED = WAYS = ("measured", "rounded up", "interpolated")
"""How a time may be found in a table."""
COMMAND = "python -m sparse_callbacks.latency MODEL --batch N --input C H W --out FILE"


def signature(layer: Layer, map_size: Sequence[int]) -> str:
    """Everything except its numbers of channels that decides how long a layer takes, as text.

    Args:
        layer: the layer.
        map_size: one of ``layer.maps``.
    """
    if not layer.kernel:
        return f"linear map {size_text(map_size)}"
    groups = f"depthwise x{layer.outputs // layer.inputs}" if layer.depthwise else f"groups {layer.groups}"
    return f"conv kernel {size_text(layer.kernel)} {layer.settings} {groups} map {size_text(map_size)}"


def environment(device: str) -> dict[str, Any]:
    """What else decides how long a layer takes: the machine, the device and its chip, threads, torch's version."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "device": f"{device} {_chip(device)}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _chip(device: str) -> str:
    """Name of the GPU or processor."""
    if torch.device(device).type == "cuda":
        try:
            return torch.cuda.get_device_name(device)
        except (RuntimeError, AssertionError):  # torch raises either where there is no such device
            return "that is not there"
    return processor_name()


def changed_place(about: Mapping[str, Any], name: str) -> list[str]:
    """Sentences about a table that was measured on another machine, device, number of threads or version of torch than the
    current ones.

    Args:
        about: what the table states of these; a key that it lacks raises no doubt.
        name: the table, for the sentences.
    """
    device = str(about.get("device", "cpu")).partition(" ")[0]
    current = environment(device)
    phrases = {"machine": "on {}", "device": "on {}", "threads": "with {} threads", "torch": "with torch {}"}
    if device.startswith("cuda"):
        del phrases["threads"]  # which do not compute there
    return [
        f"{name} was measured {phrase.format(about[key])}, and here it is {current[key]}. Times may differ: measure where the "
        "model is to be fast."
        for key, phrase in phrases.items()
        if about.get(key, current[key]) != current[key]
    ]


@dataclass(frozen=True)
class Grid:
    """Milliseconds of one kind of layer.

    Attributes:
        inputs, outputs: numbers of channels that were measured, ascending.
        ms: ``ms[i][j]`` is the time with ``inputs[i]`` and ``outputs[j]``. A depthwise layer has one column:
            ``ms[i][0]`` is its time with ``inputs[i]`` and ``outputs[i]``.
    """

    inputs: list[int]
    outputs: list[int]
    ms: list[list[float]]

    @property
    def depthwise(self) -> bool:
        """Whether inputs and outputs go together."""
        # a grid that has just begun has no rows
        return len(self.ms) > 0 and len(self.ms[0]) < len(self.outputs)

    def look_up(self, inputs: int, outputs: int) -> tuple[float, str]:
        """Milliseconds, and how they were found: one of :data:`WAYS`.

        A number that was not measured is rounded up to the next multiple of 8 if that was measured, and no measured
        number lies between. Any other is interpolated between its measured neighbours. So more channels never take less
        time unless they did so when measured.

        Raises:
            LookupError: a number lies outside of what was measured.
        """
        i, o = _rounded_up(self.inputs, inputs), outputs
        rows = _neighbours(self.inputs, i, "inputs")
        columns = [(0, 1.0)]
        if not self.depthwise:
            o = _rounded_up(self.outputs, outputs)
            columns = _neighbours(self.outputs, o, "outputs")
        # bilinear between up to four neighbours; a measured number has itself as its only neighbour
        ms = math.fsum(a * b * self.ms[row][column] for row, a in rows for column, b in columns)
        if len(rows) > 1 or len(columns) > 1:
            return ms, INTERPOLATED
        return ms, MEASURED if (i, o) == (inputs, outputs) else ROUNDED_UP

    def __call__(self, inputs: int, outputs: int) -> float:
        """Milliseconds, see :meth:`look_up`."""
        return self.look_up(inputs, outputs)[0]


def _rounded_up(measured: Sequence[int], number: int) -> int:
    """``number``, or the multiple of 8 above it if that is the next measured one."""
    # -(-a // b) is a / b rounded up
    above, rounded = bisect.bisect_left(measured, number), -(-number // ROUND_UP) * ROUND_UP
    return rounded if above < len(measured) and measured[above] == rounded else number


def _neighbours(measured: Sequence[int], number: int, name: str) -> list[tuple[int, float]]:
    """Positions of the measured numbers around ``number``, with the weights that interpolate between them."""
    if not measured[0] <= number <= measured[-1]:
        raise LookupError(f"{number} {name} lie outside of the {measured[0]} to {measured[-1]} that were measured")
    above = bisect.bisect_left(measured, number)
    if measured[above] == number:
        return [(above, 1.0)]
    share = (number - measured[above - 1]) / (measured[above] - measured[above - 1])
    return [(above - 1, 1 - share), (above, share)]


@dataclass(frozen=True)
class Table:
    """Latency of a model on one machine, in milliseconds a batch.

    It is a layer cost for :class:`~sparse_callbacks.channels.network_cost.Network`, with ``constant`` as the cost of
    everything that is not a layer.

    Attributes:
        about: machine, device, threads, torch, model, batch, input, model_ms (time of the whole dense model), and how
            the table was measured.
        grids: the grid of each kind of layer, by :func:`signature`.
        constant, factor: the whole model takes ``constant + factor * sum`` milliseconds, where the sum is that of its
            layers measured alone.
    """

    about: dict[str, Any]
    grids: dict[str, Grid]
    constant: float = 0.0
    factor: float = 1.0
    # what was looked up, by kind and numbers of channels: searches ask for the same sizes thousands of times
    _seen: dict[tuple[str, int, int], tuple[float, str]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, layer: Layer, inputs: int, outputs: int) -> float:
        """Milliseconds that all uses of a layer with these numbers of channels take in the whole model.

        Raises:
            ValueError: the table does not cover it.
        """
        try:
            alone = math.fsum(self._look_up(signature(layer, map_size), inputs, outputs) for map_size in layer.maps)
        except LookupError as error:
            # a KeyError names the kind of layer that is missing, any other error says what lies outside
            reason = f"no {error.args[0]!r} was measured" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"the latency table of {self.about.get('model')} (input {self.about.get('input')}) does not cover "
                f"{layer.name} with {inputs} inputs and {outputs} outputs: {reason}. "
                f"Measure this model at the size of the example input: {COMMAND}."
            ) from None
        return self.factor * alone

    def _look_up(self, kind: str, inputs: int, outputs: int) -> float:
        sizes = kind, inputs, outputs
        if sizes not in self._seen:
            self._seen[sizes] = self.grids[kind].look_up(inputs, outputs)
        return self._seen[sizes][0]

    @property
    def lookups(self) -> dict[str, int]:
        """Number of sizes of layers that were looked up since the table was made, by :data:`WAYS`.

        A size that is looked up again does not count again.
        """
        found = Counter(way for _, way in self._seen.values())
        # in a fixed order, and with the ways that nothing was found by
        return {way: found[way] for way in WAYS}

    def lookup_report(self) -> str:
        """:attr:`lookups` in a line."""
        parts = ", ".join(f"{count} {way}" for way, count in self.lookups.items())
        return f"of {len(self._seen)} sizes of layers looked up in the latency table: {parts}"

    def doubts(self, size: Sequence[int]) -> list[str]:
        """Sentences about what makes the table doubtful here.

        These are a bad fit, and another machine, device, number of threads or version of torch than the current ones.

        Args:
            size: size of one sample that the model is given, without the batch.

        Raises:
            ValueError: the table was measured with inputs of another size, or measuring it was interrupted.
        """
        about, name = self.about, f"the latency table of {self.about.get('model')}"
        # a key that a table lacks raises no doubt
        if list(about.get("input", size)) != list(size):
            raise ValueError(
                f"{name} is of inputs of size {about['input']}, and here they are {list(size)}. "
                f"Measure anew: {COMMAND}."
            )
        if not about.get("finished", True):
            raise ValueError(
                f"measuring {name} was interrupted. Run the same command again; it goes on where it stopped: {COMMAND}."
            )
        doubts = []
        # the largest relative error of the fit, see Fit.about
        error = float(about.get("off", 0.0))
        if error > DOUBTFUL:
            most = f"{name} is off by up to {100 * error:.0f} % at the models that it was fitted to"
            doubts.append(f"{most}. Measure anew on a quiet machine: {COMMAND}.")
        doubts += changed_place(about, name)
        return doubts

    def save(self, path: str | Path) -> None:
        """Write JSON; the file is whole at any time, the old one or the new one."""
        grids = {k: asdict(g) for k, g in self.grids.items()}
        fit = {"constant": self.constant, "factor": self.factor}
        content = {"version": TABLE_VERSION, "about": self.about} | fit | {"grids": grids}
        with replacing(path) as beside:
            beside.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is missing, or is not a table of this version.
        """
        try:
            content = json.loads(Path(path).read_text())
            if why := why_not_a_table(content, TABLE_VERSION):
                raise ValueError(why)
            grids = {k: Grid(**g) for k, g in content["grids"].items()}
            return cls(content["about"], grids, float(content["constant"]), float(content["factor"]))
        except (OSError, ValueError, RecursionError) as error:  # a deep nest of brackets is a RecursionError
            raise ValueError(
                f"{path} is not a latency table of version {TABLE_VERSION} ({type(error).__name__}: {error}). "
                f"Measure one: python -m sparse_callbacks.latency MODEL --batch N --input C H W --out {path}."
            ) from error
