"""The networks that real_speed.py trains, dense, sparse by our callbacks, and as other packages have them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from interleaved_runs import Net, Run, Workload
from torch import Tensor, nn

CLASSES = 10
GROUP = 64
STORAGES = ("masked", "sparse", "grouped", "auto")


class Block(nn.Module):
    """The MLP block of a transformer, and a head on the mean over tokens.

    Args:
        features: the width of the tokens.
        hidden: the width of the block's hidden layer.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.head = nn.Linear(features, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.down(nn.functional.gelu(self.up(self.norm(tokens))))
        return self.head(tokens.mean(1))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, and a head of ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


@dataclass(frozen=True)
class Network:
    """A network of the tables.

    Args:
        title: its name in the tables.
        make: makes it.
        batch: the shape of a batch of inputs.
        steps: the number of steps of a round.
        group: the rows that read the same inputs under grouped storage; 64 does not divide 1000.
        goals: for "sparse" and "grouped", the largest share of the dense network's time that is the goal at a sparsity of 0.9.
    """

    title: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    steps: int
    group: int
    goals: tuple[float, float]

    @property
    def rows(self) -> int:
        """The number of rows that each of its sparse layers sees."""
        return torch.Size(self.batch[:-1]).numel()

    def workload(self, optimizer: str) -> Workload:
        """The network with random data and an optimizer."""
        return Workload(self.title, self.make, self.batch, OPTIMIZERS[optimizer])


NETWORKS = {
    "mlp-1000": Network(
        "784-1000x3-10, batch 100", lambda: mlp(784, 1000, 1000, 1000), (100, 784), 10, 50, (0.45, 0.32)
    ),
    "mlp-2048": Network("4 x 2048, batch 128", lambda: mlp(*[2048] * 5), (128, 2048), 3, GROUP, (0.42, 0.25)),
    "mlp-4096": Network("4 x 4096, batch 128", lambda: mlp(*[4096] * 5), (128, 4096), 1, GROUP, (0.38, 0.20)),
    "block": Network(
        "512-2048-512 block, 8 x 256 tokens", lambda: Block(512, 2048), (8, 256, 512), 3, GROUP, (0.75, 0.45)
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def sparse_layers(net: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and layers that the tables make sparse: all linear ones but the head."""
    linear = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    yield from linear[:-1]


class TrainedNet(Net):
    """The module of a run, without an example input: auto is told its rows by ``rows=``."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.example_input_array = None


def rounds_of(runs: dict[str, Run], count: int) -> dict[str, list[float]]:
    """Milliseconds of an ordinary step of each run in each of ``count`` rounds, after one that warms up.

    The runs take turns in an order that rotates from round to round.
    """
    labels = list(runs)
    times: dict[str, list[float]] = {label: [] for label in labels}
    for turn in range(count + 1):
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            steps = next(runs[label])
            if turn:
                ordinary = [seconds for seconds, updated in steps if not updated]
                times[label].append(1e3 * sum(ordinary) / len(ordinary))
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [
        float(q) for q in torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    ]
