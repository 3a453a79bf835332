"""Two processes that merge tickets: a network with batch norms, whose statistics each of them sees a share of the data for."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_callbacks import SET, RigL, SupTickets
from sparse_callbacks.testing.comparison import snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, fit
from support.processes import matrices

STOP = 13  # within the last cycle


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(50, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 4, bias=False)
    ).double()


def train(base: type[Any], net: nn.Module, rank: int, world: int, *more: Any, ckpt_path: Any = None) -> dict[str, Any]:
    """All state after 16 steps of which the last eight are two cycles."""
    inner = base(0.8, every=2, print_plan=False)
    method = SupTickets(inner, share=0.5, cycles=2, low_lr=0.01, high_lr=0.05)
    module = Classifier(net)
    trainer = fit(
        module,
        method,
        *more,
        loader=Batches(rank=rank, world=world),
        ckpt_path=ckpt_path,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
    )
    found = snapshot(trainer, module, method)
    return {"end": found, "buffers": dict(module.named_buffers()), "tickets": method.tickets, "masks": method.masks}


def main(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    found = {}
    for base in (RigL, SET):
        stops = Stops(folder / f"{base.__name__}", (STOP,))
        whole = train(base, with_norm(), rank, 2, stops)
        resumed = train(base, with_norm(), rank, 2, ckpt_path=stops.path(STOP))
        alike = train(base, matrices(0), rank, 2)
        found[base.__name__] = {"whole": whole, "resumed": resumed, "alike": alike}
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
