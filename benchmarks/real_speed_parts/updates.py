"""One topology update over one step of the layer, for SET and RigL in every storage."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from interleaved_runs import Run, Workload, lightning_run
from torch import nn

from real_speed_parts.networks import GROUP, OPTIMIZERS, TrainedNet
from sparse_callbacks import SET, RigL

WIDTHS = {1000: 100, 2048: 128, 4096: 128}  # the layer's width, and its batch
SPARSITIES = (0.9, 0.98)
METHODS = {"SET": SET, "RigL": RigL}
STORAGES = ("masked", "sparse", "grouped")
STEPS = 4  # of a round; every other one has an update
BLOCK = 2**22  # entries of a block of the dense gradient
ABOUT = (
    "One layer, AdamW, 0.3 of its weights moved; an update is the time that a step with one takes longer than a step without "
    "one, over a step without one. (RigL's update replaces the optimizer's step, whose time is not added.) "
    "The dense gradient is what RigL cannot do without, `dY' X` in row blocks, alone. 1000: batch 100, else 128; where 64 "
    "does not divide the width, groups of 50."
)
Row = dict[str, Any]


def runs_of(width: int, sparsity: float, rounds: int) -> dict[tuple[str, str], Run]:
    """A run for each method and storage, by both."""
    workload = Workload(
        f"{width}", lambda: nn.Sequential(nn.Linear(width, width)), (WIDTHS[width], width), OPTIMIZERS["adamw"]
    )
    lengths = [STEPS] * (rounds + 1)
    runs = {}
    for method, make in METHODS.items():
        for storage in STORAGES:
            callback = make(
                sparsity, distribution="uniform", every=2, start=0, stop=sum(lengths), drop_fraction="constant(0.3)",
                print_plan=False, storage=storage, group=GROUP if width % GROUP == 0 else 50, rows=WIDTHS[width],
            )  # fmt: skip
            runs[method, storage] = lightning_run(workload, lengths, TrainedNet(workload), callback)
    return runs


def dense_gradient(width: int, repeats: int) -> float:
    """Milliseconds of the layer's dense gradient in row blocks: the median of some repeats."""
    dy, x = torch.randn(width, WIDTHS[width]), torch.randn(width, WIDTHS[width])
    rows = max(1, BLOCK // width)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        for block in dy.split(rows):
            block @ x.t()
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times)


def measure(widths: Sequence[int], rounds: int) -> Iterator[Row]:
    """One row for each width, sparsity, method and storage."""
    for width in widths:
        for sparsity in SPARSITIES:
            runs = runs_of(width, sparsity, rounds)
            times: dict[tuple[str, str], list[tuple[float, bool]]] = {key: [] for key in runs}
            for turn in range(rounds + 1):
                for key in runs:
                    steps = next(runs[key])
                    times[key] += steps if turn else []
            gradient = dense_gradient(width, rounds)
            for (method, storage), found in times.items():
                step = 1e3 * statistics.median(t for t, updated in found if not updated)
                update = 1e3 * statistics.median(t for t, updated in found if updated) - step
                yield {
                    "width": width, "sparsity": sparsity, "method": method, "storage": storage,
                    "step_ms": step, "update_ms": update, "gradient_ms": gradient,
                }  # fmt: skip


def table(rows: list[Row]) -> str:
    """A line for each layer and storage."""
    lines = [
        "| layer, sparsity | storage | method | step, ms | update, ms | update in steps | dense gradient, ms |",
        "|" + " --- |" * 7,
    ]
    lines += [
        f"| {row['width']} x {row['width']}, {row['sparsity']:g} | {row['storage']} | {row['method']} | {row['step_ms']:.3g} "
        f"| {row['update_ms']:.3g} | **{in_steps(row):.1f}** | {row['gradient_ms']:.3g} |"
        for row in rows
    ]
    return "\n".join(lines)


def in_steps(row: Row) -> float:
    """How many steps of the layer an update takes."""
    return float(row["update_ms"] / row["step_ms"])


def goal(row: Row) -> float:
    """The largest number of steps that an update may take."""
    if row["sparsity"] == 0.9:
        return 3.0 if row["method"] == "SET" else 6.0
    return 4.0 + (row["gradient_ms"] / row["step_ms"] if row["method"] == "RigL" else 0.0)


def goals(rows: list[Row]) -> str:
    """The goals of sparse and grouped storage, and the layers that miss them."""
    found = [row for row in rows if row["storage"] != "masked"]
    missed = [
        f"{row['width']} at {row['sparsity']:g}, {row['storage']}, {row['method']}: {in_steps(row):.1f} of {goal(row):.1f}"
        for row in found
        if in_steps(row) > goal(row)
    ]
    text = (
        "Goals, in steps of the layer: at 0.9 at most 3 (SET) and 6 (RigL); at 0.98 at most 4, for RigL 4 and the dense gradient. "
        f"Met: {len(found) - len(missed)} of {len(found)}."
    )
    return text + (f" Missed: {'; '.join(missed)}." if missed else "")
