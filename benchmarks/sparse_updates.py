"""Measures an update of one truly sparse layer over a training step of the same layer.

    pip install -e .
    python benchmarks/sparse_updates.py --rounds 9

A step is forward, backward and AdamW of the layer alone; an update moves its values and both of AdamW's moments. All rows
of a layer take turns in one process with one thread, and each ratio is of two times of the same round; the clock is the CPU
time of the process. Places are checked against masked storage. The table is printed and written to
benchmarks/results/sparse_updates.md.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparse_callbacks import SparseLinear, ops
from sparse_callbacks.core.sparse_layers import grown_places
from sparse_callbacks.core.sparse_layers.drawn_places import drawn_units, random_numbers
from sparse_callbacks.core.sparse_layers.grown_places import largest_units
from sparse_callbacks.core.sparse_layers.moved_places import merged, surviving_units

DROP_FRACTION = 0.3
RESULTS = Path(__file__).parent / "results" / "sparse_updates.md"
# RigL at 0.98 may take as long as the dense gradient in row blocks besides
GOALS = {0.9: {"SET": 3, "RigL": 6}, 0.98: {"SET": 4, "RigL": 4}}
ROWS = ("step", "SET", "RigL", "dense gradient", "random numbers")

Storage = Literal["sparse", "grouped"]
Seconds = dict[str, list[float]]


@dataclass
class Case:
    """One square layer in training.

    Args:
        width: the number of inputs and outputs.
        batch: the number of rows of a batch.
        sparsity: the fraction of zeros.
        storage: how the layer holds its weights.
        group: rows of a block of "grouped".
    """

    width: int
    batch: int
    sparsity: float
    storage: Storage
    group: int = 1

    def __post_init__(self) -> None:
        fan_in = round(self.width * (1 - self.sparsity))
        self.layer = SparseLinear.random(self.width, self.width, fan_in, storage=self.storage, group=self.group)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1e-3)
        # feature-major, as the layer before hands its outputs on
        self.x = torch.randn(self.width, self.batch).t().requires_grad_()
        self.dy = torch.randn(self.width, self.batch).t()
        self.source = torch.Generator().manual_seed(0)
        self.per_block = self.storage == "grouped"
        units = fan_in if self.per_block else fan_in * self.width
        self.units, self.count = units, ops.drop_count(units, DROP_FRACTION)

    def step(self) -> None:
        self.layer(self.x).backward(self.dy)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    def records(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.x.detach().t(), self.dy.t())]

    def update(self, grown: Callable[[Tensor], Tensor]) -> None:
        layer, state = self.layer, self.optimizer.state[self.layer.values]
        old = layer.keys()
        kept = surviving_units(layer.unit_magnitudes(), self.count, self.units if self.per_block else None)
        move = merged(old, kept, grown(old.index_select(0, kept)))
        layer.move_to(move.keys, [state["exp_avg"], state["exp_avg_sq"]], move.slots)

    def drawn(self, kept: Tensor) -> Tensor:
        return drawn_units((self.layer.block_rows, self.width), kept, self.count, self.source, self.per_block)

    def largest(self, kept: Tensor) -> Tensor:
        shape = (self.width, self.width)
        return largest_units(
            self.records(), shape, self.layer.group, kept, self.count, dtype=torch.float32, per_block=self.per_block
        )

    def dense_gradient(self) -> None:
        """The dense gradient in the row blocks in which RigL looks at it."""
        rows = max(1, grown_places.LOOKED_AT // self.width)
        into = torch.empty(rows, self.width)
        for start in range(0, self.width, rows):
            stop = min(start + rows, self.width)
            grown_places.row_block(self.records(), slice(start, stop), into[: stop - start], None)

    def numbers(self) -> None:
        """The random numbers of masked storage, which SET looks at one by one."""
        for _ in random_numbers(self.layer.block_rows * self.width, self.source):
            pass

    def rows(self) -> dict[str, Callable[[], None]]:
        run = (
            self.step,
            lambda: self.update(self.drawn),
            lambda: self.update(self.largest),
            self.dense_gradient,
            self.numbers,
        )
        return dict(zip(ROWS, run, strict=True))

    def check(self) -> None:
        """One update of SET by both storages.

        Raises:
            RuntimeError: masks differ.
        """
        if self.per_block:
            return  # tests compare it with masked storage
        state = self.source.get_state()
        mask, weight = self.layer.mask, self.layer.weight.detach()
        self.update(self.drawn)
        self.source.set_state(state)
        scores = torch.rand(mask.shape, dtype=torch.float64, generator=self.source)
        if not torch.equal(self.layer.mask, ops.drop_and_grow(mask, weight, scores, self.count)):
            raise RuntimeError("sparse storage has other masks than masked storage; do not trust the times")


def timed(case: Case, rounds: int) -> Seconds:
    """Seconds of each row in each round; the first round warms up and is left out. A step counts as the mean of three."""
    rows, seconds = case.rows(), {name: [] for name in ROWS}
    for turn in range(rounds + 1):
        for place in range(len(ROWS)):
            name = ROWS[(turn + place) % len(ROWS)]
            repeats = 3 if name == "step" or turn == 0 else 1
            start = time.process_time()
            for _ in range(repeats):
                rows[name]()
            if turn:
                seconds[name].append((time.process_time() - start) / repeats)
    case.check()
    return seconds


def steps_of(seconds: Seconds, kind: str, less: str | None = None) -> float:
    """Median, over the rounds, of a row's time over the step's of the same round, another row's time taken off."""
    off = seconds[less] if less else [0.0] * len(seconds[kind])
    return statistics.median((a - b) / step for a, b, step in zip(seconds[kind], off, seconds["step"], strict=True))


def reached(value: float, goal: float) -> str:
    return f"{value:.1f} ({'met' if value <= goal else 'missed'})"


def line(case: Case, seconds: Seconds) -> str:
    """A row of the table: medians in milliseconds, and updates in steps."""
    middle = {name: f"{1e3 * statistics.median(times):.1f}" for name, times in seconds.items()}
    goals = GOALS[case.sparsity]
    less = "dense gradient" if case.sparsity == 0.98 else None
    cells = [
        f"{case.width} x {case.width}, {case.batch}",
        f"{case.sparsity}",
        case.storage if case.group == 1 else f"{case.storage} {case.group}",
        middle["step"],
        middle["SET"],
        reached(steps_of(seconds, "SET"), goals["SET"]),
        middle["random numbers"],
        middle["RigL"],
        f"{steps_of(seconds, 'RigL'):.1f}" + (f", less gradient {steps_of(seconds, 'RigL', less):.1f}" if less else ""),
        "met" if steps_of(seconds, "RigL", less) <= goals["RigL"] else "missed",
        middle["dense gradient"],
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of measured rounds, after one that warms up")
    parser.add_argument("--seed", type=int, default=0, help="seed of patterns, values and data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    text = (
        "# Updates of truly sparse layers\n\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
        f"one thread, float32. {arguments.rounds} rounds,\ninterleaved; medians of CPU time in milliseconds. A step is "
        "forward, backward and AdamW of the layer; an update replaces 30 % of its\nlive weights and moves both of AdamW's "
        "moments. Written by `python benchmarks/sparse_updates.py`.\n\n"
        "Goals, in steps of the layer: at 0.9 SET 3, RigL 6; at 0.98 SET 4, RigL 4 and the dense gradient in row blocks.\n"
        "SET cannot be faster than its random numbers, which are those of masked storage.\n\n"
        "| layer, batch | sparsity | storage | step | SET | in steps | its random numbers | RigL | in steps | goal "
        "| dense gradient |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    print(text, end="")
    for width, batch, sparsity in ((1000, 100, 0.9), (2048, 128, 0.9), (4096, 128, 0.9), (4096, 128, 0.98)):
        for storage, group in (("sparse", 1), ("grouped", 64 if width % 64 == 0 else 50)):
            case = Case(width, batch, sparsity, storage, group)
            row = line(case, timed(case, arguments.rounds))
            print(row, flush=True)
            text += row + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
