"""Measures which part of masking takes which part of the time that Static adds to a training step.

    pip install -e ".[all]"
    python benchmarks/masking_parts.py

Static runs whole, without its look at gradients, and without writing masked weights: two that train wrongly, and are there to
be timed. All runs take turns in one process with one thread, and the clock is its CPU time, as in overhead.py, which compares
methods with each other and with other packages. The table is printed and written to benchmarks/results/masking_parts.md.
"""

import argparse
import logging
import platform
import statistics
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from interleaved_runs import SPARSITY, Net, Run, Workload, in_turns, lightning_run, pruned
from overhead import WORKLOADS, spread
from step_limits import PRODUCT, products

from sparse_callbacks import Static
from sparse_callbacks.core.machine import processor

RESULTS = Path(__file__).parent / "results" / "masking_parts.md"
CASES = ("mlp-sgd", "mlp-sgd-fused")
WARM_UP = 40
PLAIN, WHOLE, PRUNE = "plain", "Static", "torch.nn.utils.prune"
PARTS = {
    "the look at gradients for inf and NaN": "Static without its look at gradients",
    "the masks on the weights": "Static without its masks on the weights",
    "hooks, and what else there is": "Static without both",
}


class Taken(pl.Callback):
    """Takes parts of masking out of a run: it is timed, and trains wrongly.

    Args:
        callback: the method of the run.
        look: whether gradients pass for finite without a look at them.
        masks: whether masked weights are not written any more.
    """

    def __init__(self, callback: Static, look: bool, masks: bool) -> None:
        self.callback, self.look, self.masks = callback, look, masks

    def on_train_start(self, *_: Any) -> None:
        if self.look:
            self.callback.engine._care._all_finite = lambda step: True  # type: ignore[method-assign]
        if self.masks:
            self.callback.write = lambda names, finite: None  # type: ignore[method-assign]


def runs_of(workload: Workload, rounds: Sequence[int]) -> dict[str, Run]:
    """The runs that take turns, by label."""

    def static(look: bool = False, masks: bool = False) -> Run:
        callback = Static(SPARSITY, print_plan=False)
        return lightning_run(workload, rounds, Net(workload), callback, [Taken(callback, look, masks)])

    look, masks, both = PARTS.values()
    return {
        PLAIN: lightning_run(workload, rounds, Net(workload)),
        WHOLE: static(),
        look: static(look=True),
        masks: static(masks=True),
        both: static(look=True, masks=True),
        PRUNE: lightning_run(workload, rounds, pruned(Net(workload))),
        PRODUCT: products(workload, rounds),
    }


def times_of(workload: Workload, count: int, steps: int) -> dict[str, list[float]]:
    """Mean milliseconds of a step in each round, by label."""
    runs = runs_of(workload, [WARM_UP, *[steps] * count])
    found: dict[str, list[float]] = {label: [] for label in runs}
    for label, steps_of_round in in_turns(runs, count):
        found[label].append(1e3 * statistics.mean(seconds for seconds, _ in steps_of_round))
    return found


def table(times: Mapping[str, Sequence[float]]) -> str:
    """What runs add to a plain step, and what of it goes with each part."""

    def above(label: str, base: str) -> list[float]:
        return [a - b for a, b in zip(times[label], times[base], strict=True)]

    look, masks, rest = PARTS
    rows = {
        PLAIN: times[PLAIN],
        PRODUCT: times[PRODUCT],
        f"{PRUNE} adds": above(PRUNE, PLAIN),
        f"{WHOLE} adds": above(WHOLE, PLAIN),
        f"of it {look}": above(WHOLE, PARTS[look]),
        f"of it {masks}": above(WHOLE, PARTS[masks]),
        f"of it {rest}": above(PARTS[rest], PLAIN),
    }
    product, pruning = statistics.median(times[PRODUCT]), statistics.median(rows[f"{PRUNE} adds"])
    lines = ["| run | ms a step (quartiles) | of one product | of what prune adds |", "| --- | --- | --- | --- |"]
    for name, values in rows.items():
        ratios = (
            "| |"
            if name in (PLAIN, PRODUCT)
            else " | ".join(f"{statistics.median(values) / of:.2f}" for of in (product, pruning)) + " |"
        )
        lines.append(f"| {name} | {spread(values, 2)} | {ratios}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    parts = [
        f"""# Parts of the cost of masking

Sparsity {SPARSITY}, one thread, CPU time of the process, {given.rounds} rounds of {given.steps} steps, interleaved. Python
{platform.python_version()}, torch {torch.__version__}, pytorch-lightning {version("pytorch-lightning")}; {processor()}.
Written by `python benchmarks/masking_parts.py`. The cost of a part is what Static is faster without it, round by round: parts warm
each other's caches, so that they need not add up.

The goals are 1.5 of one product of the weights in place, and a third of what `torch.nn.utils.prune` adds. The masks alone move as
much memory as such a product. The look at gradients is what lets a step with inf or NaN in the gradient of a pruned weight go on,
keeps such values out of the optimizer's state, and keeps such steps from counting: it reads each gradient once, and nothing that
reads less could promise that."""
    ]
    for name in CASES:
        workload = WORKLOADS[name]
        parts += [f"## {workload.title}", table(times_of(workload, given.rounds, given.steps))]
        print(parts[-2], parts[-1], sep="\n\n", flush=True)
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
