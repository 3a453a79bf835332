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

COSTS = {"curvature/milliseconds", "curvature/share_of_step"}


class Rows(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.setdefault(int(step or 0), {}).update(metrics)

    def curvature(self) -> dict[int, dict[str, float]]:
        """Rows of the monitor by step, without costs and prefix."""
        found = {}
        for step, row in self.rows.items():
            if kept := {
                k.partition("/")[2]: v for k, v in row.items() if k.startswith("curvature/") and k not in COSTS
            }:
                found[step] = kept
        return found


def measure(rank: int) -> dict[str, Any]:
    """What brute force finds for the first batch of this rank, and what is logged."""
    batches = Batches(rank=rank, world=2)
    x, y = next(iter(batches))
    net = conv_net().double()
    layers = {f"net.{name}": some for name, some in watchable_layers(net).items()}
    own = radii(layers, lambda: nn.functional.cross_entropy(net(x.double()), y), len(x))
    monitor, rows = CurvatureMonitor(iterations=1000, tolerance=0.0), Rows()
    fit(Classifier(conv_net().double()), monitor, loader=batches, devices=2, strategy="ddp", logger=rows, max_steps=2)
    return {"own": own, "logged": rows.curvature().get(0), "radii": monitor.radii}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    found = measure(rank)
    torch.save(found, Path(sys.argv[2]) / f"{rank}.pt")
