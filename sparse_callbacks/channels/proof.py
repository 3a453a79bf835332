"""What slimming changed, measured: outputs, parameters, FLOPs, latency."""

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.forward_flops import forward_flops
from sparse_callbacks.core.inspection import quiet, run, tensors_in

RUNS, SHORT, PATIENCE = 9, 3, 2.0
"""How often a forward pass is timed; and less often, but this often, where it takes longer than this many seconds altogether."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest relative difference of outputs that counts as equal; integers and bools must be the same."""
COARSE = 5e-2  # half precision: a wrong cut differs by more


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of outputs, and that divided by the largest absolute finite output of the same tensor."""

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.relative:.1e} relative, {self.absolute:.1e} absolute"


@dataclass(frozen=True)
class Cost:
    """Parameters, FLOPs of one forward pass (two for a multiplication and an addition), and its median latency in milliseconds."""

    parameters: int
    flops: int
    latency: float


@dataclass(frozen=True)
class Row:
    """What became of one group: units it had and lost, the channels that its first producer lost with them, and a word about it."""

    name: str
    size: int
    units: int = 0
    channels: int = 0
    note: str = ""


@dataclass(frozen=True)
class Proof:
    """The evidence that a slim model computes what the masked one did, and what it costs.

    Attributes:
        random, given: differences on random inputs and on those given, in the model's own precision, in eval mode.
        checked: difference on all of them in ``precision``, float64 where the model runs in it.
        before, after: costs, on the example input.
        rows: what became of each group.
    """

    random: Difference
    given: Difference
    checked: Difference
    precision: torch.dtype
    before: Cost
    after: Cost
    rows: tuple[Row, ...]

    @property
    def removed(self) -> int:
        """Channels removed, counted at the first producer of each group."""
        return sum(r.channels for r in self.rows)

    @property
    def left_out(self) -> dict[str, str]:
        """Why the groups that lost nothing stay, by name, where there is something to say."""
        return {r.name: r.note for r in self.rows if r.note and not r.units}

    def __str__(self) -> str:
        pairs = [
            ("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}", self.after.parameters / self.before.parameters),
            ("FLOPs", f"{self.before.flops:,}", f"{self.after.flops:,}", self.after.flops / max(1, self.before.flops)),
            ("latency", f"{self.before.latency:.2f} ms", f"{self.after.latency:.2f} ms", self.after.latency / self.before.latency),
        ]
        lines = [f"{'':12}{'before':>18}{'after':>18}{'ratio':>8}"]
        lines += [f"{name:12}{before:>18}{after:>18}{ratio:8.3f}" for name, before, after, ratio in pairs]
        lines += [f"outputs on given inputs:  {self.given}", f"outputs on random inputs: {self.random}"]
        lines += [f"outputs in {str(self.precision)[6:] + ':':14}{self.checked}", f"channels removed: {self.removed}", ""]
        width = max((len(r.name) for r in self.rows), default=5) + 2
        lines += [f"{'group':{width}}{'units':>7}{'removed':>9}  note"]
        return "\n".join(lines + [f"{r.name:{width}}{r.size:7}{r.units:9}  {r.note}".rstrip() for r in self.rows])


def outputs(model: nn.Module, samples: Sequence[Any]) -> list[Tensor]:
    """Tensors that ``model`` gives on each of ``samples``."""
    return [t.detach() for sample in samples for t in tensors_in(run(model, sample))]


def compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """Largest difference of two lists of tensors; infinite where shapes, numbers of tensors or values that are not finite differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return Difference(float("inf"), float("inf"))
    absolute = relative = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        gap, scale = _gap(_real(a), _real(b))
        absolute = max(absolute, gap)
        relative = max(relative, gap / max(scale, torch.finfo(torch.float64).tiny))
    return Difference(absolute, relative)


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _gap(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two tensors, and largest absolute value of the first; of finite ones, where all others agree."""
    finite = a.isfinite() & b.isfinite()
    if not torch.allclose(a[~finite], b[~finite], rtol=0, atol=0, equal_nan=True):
        return float("inf"), 1.0
    a, b = a[finite], b[finite]
    return (float((a - b).abs().max()), float(a.abs().max())) if a.numel() else (0.0, 1.0)


def mismatch(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float | None = None) -> str:
    """How two lists of tensors differ by more than their types allow, tensor by tensor; empty where they do not.

    Args:
        tolerance: largest relative difference of floating-point tensors; None: :data:`TOLERANCE` by their type.
    """
    if len(expected) != len(found):
        return f"outputs are {len(found)} in the place of {len(expected)}"
    for a, b in zip(expected, found, strict=True):
        limit = TOLERANCE.get(a.dtype, COARSE) if tolerance is None else tolerance
        gap = compare([a], [b]).relative
        if gap > (limit if a.is_floating_point() or a.is_complex() else 0.0):
            return f"outputs differ by {gap:.1e} (relative)"
    return ""


def prove(
    masked: nn.Module,
    small: nn.Module,
    rows: Sequence[Row],
    checked: tuple[Difference, torch.dtype],
    given: Sequence[Any],
    drawn: Sequence[Any],
) -> Proof:
    """Measure both models, ``given`` and ``drawn`` being inputs of which the first of ``given`` is timed."""
    masked, small = copy.deepcopy(masked), copy.deepcopy(small)  # forward passes may write to their modules
    with quiet(masked), quiet(small):
        differences = [compare(outputs(masked, x), outputs(small, x)) for x in (drawn, given)]
        before, after = (_cost(model, given[0]) for model in (masked, small))
    return Proof(differences[0], differences[1], *checked, before, after, tuple(rows))


def _cost(model: nn.Module, sample: Any) -> Cost:
    return Cost(sum(p.numel() for p in model.parameters()), forward_flops(model, sample), _milliseconds(model, sample))


def _milliseconds(model: nn.Module, sample: Any) -> float:
    """Median time of a forward pass."""
    times: list[float] = []
    while len(times) <= SHORT or (len(times) <= RUNS and sum(times) < 1e3 * PATIENCE):
        start = time.perf_counter()
        run(model, sample)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])  # the first one warms up
