"""Two processes under DDP that measure curvature, each on batches of its own; run as a program of each rank."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from oracles.curvature import radii
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn

from sparse_callbacks import CurvatureMonitor
from sparse_callbacks.core.watched_layers import watchable_layers
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import fit


class Rows(DummyLogger):
    """Keeps the figures of the monitor in the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, float] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if step == 0:
            self.first |= {k.partition("/")[2]: v for k, v in metrics.items() if k.startswith("curvature/")}


def measure(rank: int) -> dict[str, Any]:
    """What brute force finds for the first batch of this rank, and what is logged."""
    batches = Batches(rank=rank, world=2)
    x, y = next(iter(batches))
    net = conv_net().double()
    layers = {f"net.{name}": some for name, some in watchable_layers(net).items()}
    own = radii(layers, lambda: nn.functional.cross_entropy(net(x.double()), y), len(x))
    monitor, rows = CurvatureMonitor(iterations=1000, tolerance=0.0), Rows()
    fit(
        Classifier(conv_net().double()), monitor, loader=batches, devices=2, strategy="ddp", logger=rows, max_steps=2
    )
    logged = {name: value for name, value in rows.first.items() if name not in ("milliseconds", "share_of_step")}
    return {"own": own, "logged": logged, "radii": monitor.radii}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    found = measure(rank)
    torch.save(found, Path(sys.argv[2]) / f"{rank}.pt")
