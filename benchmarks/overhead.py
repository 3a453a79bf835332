"""Measures the time of a training step with our callbacks, without them and with other packages.

    pip install -e ".[dev]"
    python benchmarks/overhead.py --rounds 15 --steps 20

All runs of a case are in one process, each Trainer in its own thread, and take turns: in every round each run makes the
same number of steps, in an order that rotates from round to round. A ratio is the median over rounds of the run's time
divided by its baseline's time in the same round. With one thread the clock is the CPU time of the process, so that
other jobs on the machine disturb little; with several threads it is wall time. Steps with a topology update are timed
separately and counted as one in a hundred, those of DPF as one in sixteen, those of SMCP as one in eighty, those of CTRE
as one in an epoch. Below each table stand the limit that the speed of a copy sets, what comes once in many steps, and
peaks of memory. All is printed and written to benchmarks/results/overhead.md, which says more.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from interleaved_runs import (
    SPARSITY,
    Cycled,
    Net,
    PeerNet,
    Run,
    StepTime,
    Workload,
    gated,
    in_turns,
    lightning_run,
    parametrized,
    pruned,
    raw_run,
)
from step_limits import COPY, PRODUCT, copies, known, limits, memory, products, rare_costs
from torch import nn

from sparse_callbacks import CTRE, DPF, SMCP, ConstrainedL0, RigL, SparsityCallback, SparsityReport, Static, slim
from sparse_callbacks.core.machine import processor
from sparse_callbacks.tasks.models import mlp, resnet20

EVERY = 100  # steps between two updates that "ms a step" stands for
EPOCH = 600  # steps: 60,000 images in batches of 100
RUN = 10 * EPOCH  # steps of a short run, at whose end the network is slimmed
WARM_UP = 10  # steps before the first round, at a share of 1
RESULTS = Path(__file__).parent / "results" / "overhead.md"


def _sgd(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, **options)


def _adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, **options)


def _large_mlp() -> nn.Module:
    return mlp((1, 28, 28), 10, hidden=(1000, 1000, 1000))


def _tiny_mlp() -> nn.Module:
    return mlp((32,), 10, hidden=(32,))


def _resnet20() -> nn.Module:
    return resnet20((3, 32, 32), 10)


WORKLOADS = {
    "mlp-sgd": Workload(
        "MLP 784-1000-1000-1000-10, batch 100, SGD momentum 0.9 (default, not fused)",
        _large_mlp,
        (100, 784),
        _sgd,
        peers=True,
        gates=True,
    ),
    "mlp-sgd-fused": Workload(
        "the same MLP, SGD(fused=True) momentum 0.9", _large_mlp, (100, 784), lambda p: _sgd(p, fused=True)
    ),
    "mlp-adamw-fused": Workload(
        "the same MLP, AdamW(fused=True), clipping to norm 1.0",
        _large_mlp,
        (100, 784),
        lambda p: _adamw(p, fused=True),
        clip=1.0,
    ),
    "mlp-adamw": Workload(
        "the same MLP, AdamW (default), clipping to norm 1.0", _large_mlp, (100, 784), _adamw, clip=1.0
    ),
    "resnet20-sgd": Workload(
        "ResNet-20, 3x32x32, batch 128, SGD momentum 0.9 (default, not fused)",
        _resnet20,
        (128, 3, 32, 32),
        _sgd,
        peers=True,
        gates=True,
        share=0.2,
    ),
    "tiny-sgd": Workload(
        "MLP 32-32-10, batch 16, SGD momentum 0.9 (default, not fused)", _tiny_mlp, (16, 32), _sgd, share=10
    ),
}


BASE, RAW, RIGL, DPF_LABEL, SMCP_LABEL = "Lightning, no callback", "raw loop", "ours: RigL", "ours: DPF", "ours: SMCP"
RECORDED, CTRE_LABEL = "ours: RigL + record", "ours: CTRE"
# the published numbers of steps between two updates where they are not EVERY
PUBLISHED_EVERY = {DPF_LABEL: 16, SMCP_LABEL: 80}


Slimmed = list[tuple[Net, SMCP]]
"""The module and the callback of each run whose network is slimmed when it is over."""


def runs_of(
    workload: Workload, rounds: Sequence[int], slimmed: Slimmed, peers: bool = True
) -> dict[str, tuple[str, Run]]:
    """The runs of a table: the label of its baseline and the run itself, by the label of the run.

    Args:
        workload: what is trained.
        rounds: the number of steps of each round.
        slimmed: gets the runs whose networks can be slimmed.
        peers: whether other packages take part.
    """
    # a short run too has several updates to time
    every = max(2, min(EVERY, sum(rounds) // 5))

    dpf_every = min(every, PUBLISHED_EVERY[DPF_LABEL])

    def lightning(
        callback: SparsityCallback | None = None, module: Net | None = None, further: Sequence[pl.Callback] = ()
    ) -> Run:
        return lightning_run(workload, rounds, module or Net(workload), callback, further)

    def rigl() -> RigL:
        return RigL(SPARSITY, every=every, stop=1.0, print_plan=False)

    found = {
        BASE: (BASE, lightning()),
        "ours: Static": (BASE, lightning(Static(SPARSITY, print_plan=False))),
        RIGL: (BASE, lightning(rigl())),
        # a row of each update, and one between two of them
        RECORDED: (RIGL, lightning(rigl(), further=[SparsityReport(tempfile.mkdtemp(), every=every, page=False)])),
        DPF_LABEL: (BASE, lightning(DPF(f"constant({SPARSITY})", every=dpf_every, stop=1.0, print_plan=False))),
    }
    if workload.gates:
        units = ConstrainedL0(0.5, unit="channel", print_plan=False)
        weights = ConstrainedL0(0.5, unit="weight", print_plan=False)
        channels = SMCP(0.5, round_to=4, every=every, start=1, stop=sum(rounds), print_plan=False)
        network = Net(workload)
        slimmed.append((network, channels))
        # the pass is over an epoch, which is shorter in a short run
        batches = Cycled(workload.data(), epoch_of(rounds))
        similar = CTRE(SPARSITY, every=every, start=1, stop=1.0, statistics_dataloader=batches, print_plan=False)
        found |= {
            SMCP_LABEL: (BASE, lightning(channels, network)),
            CTRE_LABEL: (BASE, lightning(similar)),
            "ours: ConstrainedL0, units": (BASE, lightning(units)),
            "ours: ConstrainedL0, weights": (BASE, lightning(weights)),
            "gates by autograd, units": (BASE, lightning(module=gated(Net(workload), units=True))),
            "gates by autograd, weights": (BASE, lightning(module=gated(Net(workload), units=False))),
        }
    if workload.peers and peers:
        found |= {
            "torch.nn.utils.prune": (BASE, lightning(module=pruned(Net(workload)))),
            "parametrization w * mask": (BASE, lightning(module=parametrized(Net(workload)))),
            "rigl-torch 0.5.2 under Lightning": (BASE, lightning(module=PeerNet(workload, every))),
            RAW: (RAW, raw_run(workload, rounds)),
            "rigl-torch 0.5.2 in a raw loop": (RAW, raw_run(workload, rounds, every)),
            COPY: (COPY, copies(workload, rounds)),
            PRODUCT: (PRODUCT, products(workload, rounds)),
        }
    return found


def epoch_of(rounds: Sequence[int]) -> int:
    """Batches that a pass of CTRE goes over in a run of ``rounds``."""
    return min(EPOCH, max(2, sum(rounds)))


@dataclass
class Timing:
    """Times of one run in seconds.

    Attributes:
        every: the number of steps between two updates that `amortised` stands for.
        ordinary: the mean step without an update, of each round.
        updates: every step with an update.
    """

    every: int = EVERY
    ordinary: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)

    def add(self, steps: Sequence[StepTime]) -> None:
        """Take in the steps of one round."""
        self.ordinary.append(statistics.mean(t for t, updated in steps if not updated))
        self.updates += [t for t, updated in steps if updated]

    def amortised(self) -> list[float]:
        """The mean step of each round if one in ``every`` steps had an update."""
        if not self.updates:
            return self.ordinary
        return [(t * (self.every - 1) + statistics.median(self.updates)) / self.every for t in self.ordinary]


def measure(workload: Workload, count: int, steps: int, slimmed: Slimmed) -> dict[str, tuple[str, Timing]]:
    """The label of its baseline and the times of each run, by label, over ``count`` rounds; ``slimmed`` as in :func:`runs_of`."""
    rounds = rounds_of(workload, count, steps)
    runs = runs_of(workload, rounds, slimmed)
    published = {**PUBLISHED_EVERY, CTRE_LABEL: epoch_of(rounds)}
    timings = {label: (base, Timing(published.get(label, EVERY))) for label, (base, _) in runs.items()}
    for label, steps_of_round in in_turns({label: run for label, (_, run) in runs.items()}, count):
        timings[label][1].add(steps_of_round)
    return timings


def rounds_of(workload: Workload, count: int, steps: int) -> list[int]:
    """The number of steps of each round, the first of which warms up; of two steps in a row one has no update."""
    return [max(2, round(WARM_UP * workload.share)), *[max(2, round(steps * workload.share))] * count]


def limits_of(workload: Workload, timings: dict[str, tuple[str, Timing]]) -> str:
    """What the runs add to a step, beside the limit that the speed of a copy sets."""
    return "#### The limit\n\n" + limits(workload, added_by(timings), timings[COPY][1].ordinary)


def added_by(timings: dict[str, tuple[str, Timing]]) -> dict[str, list[float]]:
    """The seconds that each run under Lightning adds to a plain step in each round, by label; updates are left out."""
    return {
        label: [a - b for a, b in zip(timing.ordinary, timings[base][1].ordinary, strict=True)]
        for label, (base, timing) in timings.items()
        if base == BASE
    }


def comparison_of(timings: dict[str, tuple[str, Timing]]) -> str:
    """What the runs take beside each other and beside peers, as Markdown; updates are left out."""
    plain = {label: timing.ordinary for label, (_, timing) in timings.items()}
    prune = "torch.nn.utils.prune"
    added = {label: known(seconds) for label, seconds in added_by(timings).items()}
    static, units, weights = "ours: Static", "ours: ConstrainedL0, units", "ours: ConstrainedL0, weights"
    surpluses = {
        f"what Static adds, of what {prune} adds": added[prune],
        f"what Static adds, of {PRODUCT}": statistics.median(plain[PRODUCT]),
    }
    lines = ["#### Beside each other", "", "| without updates | ratio (quartiles) |", "| --- | --- |"]
    for what, of in surpluses.items():
        lines.append(f"| {what} | {f'{added[static] / of:.2f}' if added[static] and of else 'below the noise'} |")
    for label, of_label in (
        (RIGL, static),
        (DPF_LABEL, static),
        (SMCP_LABEL, static),
        (units, "gates by autograd, units"),
        (weights, "gates by autograd, weights"),
    ):
        found = [a / b for a, b in zip(plain[label], plain[of_label], strict=True)]
        lines.append(f"| {label}, of {of_label} | {spread(found, 3)} |")
    return "\n".join(lines) + "\n"


def rare_costs_of(workload: Workload, timings: dict[str, tuple[str, Timing]], slimmed: Slimmed) -> str:
    """What comes once in many steps: solves, refreshes, passes and slimming."""
    names = {
        RIGL: "RigL's update",
        DPF_LABEL: "DPF's refresh of its masks",
        SMCP_LABEL: "SMCP's solve",
        CTRE_LABEL: "CTRE's pass over an epoch, and its update",
    }
    rows = []
    for label, name in names.items():
        timing = timings[label][1] if label in timings else Timing()
        if timing.updates:
            # on top of what an ordinary step takes
            cost = statistics.median(timing.updates) - statistics.median(timing.ordinary)
            rows.append((name, cost, timing.every))
    for module, callback in slimmed:
        masks = {name.removeprefix("net."): mask for name, mask in callback.masks.items()}
        began = time.perf_counter()
        slim(module.net, masks, workload.data()[0][0][:1])
        rows.append((f"slim, once in a run of {RUN:,} steps", time.perf_counter() - began, RUN))
    return "#### What comes seldom\n\n" + rare_costs(rows, statistics.median(timings[BASE][1].ordinary))


def memory_of(workload: Workload) -> str:
    """Peaks of memory of all runs with our callbacks and of the plain one, over some steps with updates."""
    rounds = [10, 1]

    def through(label: str) -> None:
        for _ in runs_of(workload, rounds, [], peers=False)[label][1]:
            pass

    labels = [label for label, (base, _) in runs_of(workload, rounds, [], peers=False).items()]
    return "#### Memory\n\n" + memory({label: partial(through, label) for label in labels}, BASE, workload)


def ratios(timing: Timing, base: Timing) -> list[float]:
    """The run's mean step over the baseline's, in each round."""
    return [a / b for a, b in zip(timing.amortised(), base.amortised(), strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Median and quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(workload: Workload, timings: dict[str, tuple[str, Timing]]) -> str:
    """The table of a workload as Markdown."""
    peers = [label for label in timings if label.startswith("rigl-torch")]
    head = [
        "run",
        "ms a step",
        "ratio to its baseline (quartiles)",
        "without updates",
        "ms added a step",
        "update step, ms",
    ]
    head += [f"of {p}" for p in peers]
    lines = [f"### {workload.title}", "", " | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    for label, (base, timing) in timings.items():
        own, against = timing.amortised(), timings[base][1].amortised()
        cells = [label, f"{1e3 * statistics.median(own):.3g}"]
        if label == base:
            cells += ["1", "", ""]
        else:
            plain = [a / b for a, b in zip(timing.ordinary, timings[base][1].ordinary, strict=True)]
            cells += [spread(ratios(timing, timings[base][1]), 3), spread(plain, 3) if timing.updates else ""]
            cells += [spread([1e3 * (a - b) for a, b in zip(own, against, strict=True)], 3)]
        cells += [f"{1e3 * statistics.median(timing.updates):.3g} (n={len(timing.updates)})" if timing.updates else ""]
        cells += [spread(ratios(timing, timings[p][1]), 3) if label.startswith("ours") else "" for p in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def preface(rounds: int, threads: int) -> str:
    """What comes before the tables."""
    dpf_every, smcp_every = PUBLISHED_EVERY[DPF_LABEL], PUBLISHED_EVERY[SMCP_LABEL]
    measured = "1 thread, CPU time of the process" if threads == 1 else f"{threads} threads, wall time"
    return f"""# Time of a training step

Sparsity {SPARSITY}, {measured}; {rounds} rounds, interleaved. Python {platform.python_version()},
torch {torch.__version__}, pytorch-lightning {pl.__version__}; {processor()}, {platform.machine()}.
The data is random and made before the clock starts. Written by `python benchmarks/overhead.py`.

- A ratio is the median over rounds of the run's time divided by its baseline's time in the same round, with the quartiles
  in brackets. The baseline of everything under Lightning is the same Trainer, module and data without a callback; that of
  a raw loop is a raw loop.
- "ms a step" and its ratio hold one update in {EVERY} steps, for DPF one in {dpf_every}, for SMCP one in {smcp_every}.
  The ratio "without updates" leaves the updates out, and the "update step" stands alone (median; n of them were timed).
  RigL's update replaces the optimizer's step; DPF's, a global mask from the dense weights, comes on top of it, and so does
  SMCP's, a knapsack.
- The baseline of the recorded run is the same method without SparsityReport; each of its updates has a row.
- The gates of ConstrainedL0 have no updates: every step samples them, and steps gates and multiplier. "Gates by autograd"
  is the parametrization w * z as it is usually written, without a constraint.
- "{COPY}" and "{PRODUCT}" are of all matrices and kernels, timed alone after each step of the raw loop.
- **The limit**: the bytes that a method's rule must read and write in a step without an update, at the speed of that copy;
  masks count nothing, as they could be bits. What a step adds beyond it is masks of four bytes a weight, the look at
  gradients for inf and NaN (a sum, which reads them once), and the callback's hooks.
- **Beside each other**: what a run adds is its time less that of its baseline, round by round, of which the median counts.
- **What comes seldom**: time on top of an ordinary step, and its share of a run without anything else. CTRE passes over an
  epoch of {EPOCH} batches, or of as many as a shorter run has.
  DPF's refresh ranks all dense weights under one threshold, and comes as often as published. SMCP's solve scores all
  channels and fills a knapsack of their groups. CTRE's pass is a forward pass over the epoch with, for each batch, a product
  of the activations of neighbouring layers, which has as many operations again; as published it comes once an epoch.
- **Memory**: the largest resident memory of a process that makes 11 steps, with an update in every two, above that of one
  without a callback. On ResNet-20 activations take a thousand times what the weights do, and the order in which they come
  and go moves the peak by more than the buffers of a method.
- Our masks are drawn by Erdos-Renyi-kernel over all layers; rigl-torch leaves the first layer dense, so it masks fewer
  weights.
- rigl-torch's `step` takes no closure, so under Lightning it needs an override of `optimizer_step` that calls the closure
  by hand.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    steps_help = "steps of the large MLP in a round; the other networks make a fixed multiple"
    parser.add_argument("--steps", type=int, default=20, help=steps_help)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    parts = [preface(arguments.rounds, arguments.threads)]
    # before anything has run here: each of these runs is forked from this process
    peaks = {name: memory_of(WORKLOADS[name]) for name in arguments.cases if WORKLOADS[name].peers}
    for name in arguments.cases:
        workload, slimmed = WORKLOADS[name], Slimmed()
        timings = measure(workload, arguments.rounds, arguments.steps, slimmed)
        parts.append(table(workload, timings))
        if workload.peers:
            parts += [comparison_of(timings), limits_of(workload, timings)]
            parts += [rare_costs_of(workload, timings, slimmed), peaks[name]]
        print(*parts[-5 if workload.peers else -1 :], sep="\n", flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
