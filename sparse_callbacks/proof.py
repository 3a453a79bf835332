"""What slimming changed, measured: outputs, parameters, FLOPs, latency."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_callbacks.probing import quiet, run, tensors_in

RUNS = 9


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of outputs, and that divided by the largest absolute output of the same tensor."""

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
    """Largest difference of two lists of tensors; infinite where shapes, numbers of tensors or non-finite values differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return Difference(float("inf"), float("inf"))
    absolute = relative = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        gap = float((a.double() - b.double()).abs().max())
        gap = gap if gap == gap else float("inf")
        absolute = max(absolute, gap)
        relative = max(relative, gap / max(float(a.double().abs().max()), torch.finfo(torch.float64).tiny))
    return Difference(absolute, relative)


def prove(
    masked: nn.Module,
    small: nn.Module,
    rows: Sequence[Row],
    checked: tuple[Difference, torch.dtype],
    given: Sequence[Any],
    drawn: Sequence[Any],
) -> Proof:
    """Measure both models, ``given`` and ``drawn`` being inputs of which the first of ``given`` is timed."""
    with quiet(masked), quiet(small):
        differences = [compare(outputs(masked, x), outputs(small, x)) for x in (drawn, given)]
        before, after = (_cost(model, given[0]) for model in (masked, small))
    return Proof(differences[0], differences[1], *checked, before, after, tuple(rows))


def _cost(model: nn.Module, sample: Any) -> Cost:
    with FlopCounterMode(display=False) as counter:
        run(model, sample)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops(), _milliseconds(model, sample))


def _milliseconds(model: nn.Module, sample: Any) -> float:
    """Median time of a forward pass."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run(model, sample)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])  # the first one warms up
