"""Fits under FSDP2 in two processes on the CPU, and the same fits in one process; a program of its own."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, trainer_for, watch
from support.methods import method

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("static", {}),
    "set": ("set", {"every": 2, "stop": 14}),
    "rigl": ("rigl", {"every": 2, "stop": 14}),
    "gmp": ("gmp", {"every": 2, "stop": 12}),
    "dpf": ("dpf", {"every": 2, "stop": 12}),
    "dpf by layer": ("dpf", {"every": 2, "stop": 8, "distribution": "uniform", "finetune": 12}),
}
"""Methods and arguments that are exact on shards."""
STOP = 7


class Mixed(nn.Module):
    """Uneven rows (7 over two processes), stacked matrices, one row fewer than processes, and columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(50, 7)
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.columns = nn.Linear(6, 6)
        self.single = nn.Linear(7, 1)
        self.last = nn.Linear(7, 4)
        self.double()

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x.flatten(1)))[:, None]
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        mixed = torch.tanh(self.columns(hidden[..., :6])) + self.single(hidden)
        return self.last((hidden + nn.functional.pad(mixed, (0, 1)))[:, 0])


class Sharded(Classifier):
    """Sharded where the strategy has a mesh: columns of one layer, rows of the others."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(Mixed(), optimizer)

    def configure_model(self) -> None:
        mesh: Any = getattr(self, "_device_mesh", None)
        if mesh is None or any(hasattr(p, "to_local") for p in self.parameters()):
            return
        columns = self.net.columns.weight
        fully_shard(
            self.net, mesh=mesh["data_parallel"], shard_placement_fn=lambda p: Shard(1) if p is columns else None
        )


def whole(tensor: Any) -> Tensor:
    """A tensor, or all of a sharded one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    name: str, world: int, *more: pl.Callback, split: bool = False, folder: bool = True, ckpt_path: Any = None, **options: Any
) -> dict[str, Any]:
    """The callback's state and the weights at the end, both whole."""
    base, arguments = RUNS[name]
    callback = method(base, **arguments)
    module = Sharded(options.pop("optimizer", "sgd"))
    strategy: Any = "auto"
    if world > 1:
        strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=folder)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    loader = Batches(rank=rank, world=world) if split else Batches()
    trainer = trainer_for([callback, *more], devices=world, strategy=strategy, use_distributed_sampler=False, **options)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    weights = {n: whole(p.detach()).clone() for n, p in module.named_parameters()}
    masks = {n: m.clone() for n, m in callback.masks.items()}
    counts = dict(callback.weights.active_counts)
    return {"state": callback.state_dict(), "weights": weights, "masks": masks, "counts": counts, "updates": callback.updates}
