"""Measures what each score of PruneAtStart costs: time in training steps, and memory.

    python benchmarks/score_costs.py

Each score has a process of its own, in which a network is built, scored and pruned with random data, and then trained for
some steps; another one only trains. Time is CPU time of one thread. Memory is the peak over what the process held with the
network built, in sizes of the weights. Writes benchmarks/results/score_costs.md.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from sparse_callbacks import PruneAtStart, sparsify
from sparse_callbacks.core.machine import processor
from sparse_callbacks.core.score_rules import SCORES
from sparse_callbacks.tasks.models import lenet_300_100, resnet20

TRAINING, STEPS = "training", 5


class Case(NamedTuple):
    """A network and its batches.

    Attributes:
        title: how the table calls it.
        build: makes the network.
        batch: shape of a batch of inputs.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: tuple[int, ...]


CASES = {
    "lenet_300_100": Case("LeNet-300-100, batches of 100", lambda: lenet_300_100((1, 28, 28), 10), (100, 1, 28, 28)),
    "resnet20": Case("ResNet-20, batches of 128 x 28 x 28", lambda: resnet20((1, 28, 28), 10), (128, 1, 28, 28)),
    "resnet18": Case(
        "ResNet-18 of torchvision, batches of 16 x 64 x 64", lambda: resnet18(num_classes=10), (16, 3, 64, 64)
    ),
}
Figures = Mapping[str, float]


def peak() -> int:
    """Bytes that the process held at most until now."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured(case: Case, score: str) -> dict[str, float]:
    """What one score costs in this process, or training alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x, y = case.build(), torch.randn(case.batch), torch.randint(10, case.batch[:1])

    def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    def step() -> None:
        loss_of(net, (x, y)).backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    before, begun = peak(), time.process_time()
    if score == TRAINING:
        step()
    else:
        of_loss = SCORES[score].of_loss
        options = {"loss": loss_of, "batches": [(x, y)]} if of_loss else {}
        method = PruneAtStart(0.9, score=score, print_plan=False, **options)  # type: ignore[arg-type]
        sparsify(method, net, optimizer, 10**6, data=None if of_loss else [(x, y)])
    seconds, most = time.process_time() - begun, peak()
    steps = []
    for _ in range(STEPS):
        begun = time.process_time()
        step()
        steps.append(time.process_time() - begun)
    return {"seconds": seconds, "memory": (most - before) / weights, "step": statistics.median(steps)}


def table(found: Mapping[str, Mapping[str, Figures]]) -> str:
    lines = ["| network | score | seconds | training steps | memory, in sizes of the weights |", "| --- " * 5 + "|"]
    for name, rows in found.items():
        training = rows[TRAINING]
        lines.append(
            f"| {CASES[name].title} | a training step | {training['step']:.3f} | 1 | {training['memory']:.1f} |"
        )
        for score, figures in rows.items():
            if score != TRAINING:
                # of the process's own steps: the machine may be slower for a while
                steps = figures["seconds"] / figures["step"]
                lines.append(f"| | {score} | {figures['seconds']:.2f} | {steps:.1f} | {figures['memory']:.1f} |")
    return "\n".join(lines)


def text(found: Mapping[str, Mapping[str, Figures]]) -> str:
    return f"""# What the scores of PruneAtStart cost

Written by `python benchmarks/score_costs.py` on {processor()}; Python {platform.python_version()}, torch {torch.__version__}, one thread.

One batch, 90 % zeros; SynFlow has its 100 rounds with one sample in float64, the others one round. Seconds are CPU time from the
call of `sparsify` to the pruned network, with what every method does there (checks, masks, hooks): the rows of magnitude and random
show little else. Training steps are those of the same process afterwards. Memory is the peak over what the process held before,
in sizes of the network's weights in float32; activations are most of it.

{table(found)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES], help="networks that are measured")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a network and a score, measured in this process
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "score_costs.md")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(CASES[given.one[0]], given.one[1])))
        return
    found: dict[str, dict[str, Figures]] = {}
    for name in given.cases:
        for score in (TRAINING, *SCORES):
            command = [sys.executable, __file__, "--one", name, score]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.setdefault(name, {})[score] = json.loads(printed.splitlines()[-1])
            print(name, score, printed.splitlines()[-1], flush=True)
    given.out.write_text(text(found))


if __name__ == "__main__":
    main()
