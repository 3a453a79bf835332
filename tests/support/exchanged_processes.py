"""Runs of two processes with sparse storage: what each rank has after every batch, beside one process on all of the data."""

import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_callbacks.core.live.live_records import gathered_records
from sparse_callbacks.core.sparse_layers.product_records import Records
from sparse_callbacks.testing.comparison import snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, fit, watch
from support.exchanged import patterns_of, sparse
from support.processes import matrices

RUNS = {(name, storage): {} for name in ("static", "set", "rigl") for storage in ("sparse", "grouped")}
STOP = 7  # inside an accumulation window


def train(
    name: str, storage: str, rank: int, world: int, *more: Any, seed: int = 0, ckpt_path: Any = None, **changes: Any
) -> dict[str, Any]:
    """Places after every batch, and all state at the end. Ranks begin with other weights, and take those of the first."""
    module, callback = Classifier(matrices(seed)), sparse(name, storage, every=2, stop=8)
    places: list[Any] = []
    see = watch(lambda *_: places.append(patterns_of(module)))
    options = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "devices": world,
        "strategy": "ddp" if world > 1 else "auto",
    }
    loader = Batches(size=12, rank=rank, world=world)
    trainer = fit(module, callback, see, *more, loader=loader, ckpt_path=ckpt_path, **(options | changes))
    return {"places": places, "end": snapshot(trainer, module, callback)}


class Unused(Classifier):
    """Has a layer that no batch calls."""

    def __init__(self) -> None:
        super().__init__(matrices(0))
        self.unused = nn.Linear(8, 8).double()


def without_a_layer(rank: int, world: int) -> dict[str, Any]:
    """Training with a layer that gets no gradient."""
    module, callback = Unused(), sparse("rigl", every=2, stop=8)
    strategy = DDPStrategy(find_unused_parameters=True)
    trainer = fit(module, callback, loader=Batches(rank=rank, world=world), devices=world, strategy=strategy)
    return snapshot(trainer, module, callback)


def broadcast_buffers(rank: int, world: int) -> Counter[str]:
    """How many tensors DistributedDataParallel broadcasts in its forward passes, of which patterns are none."""
    counted: Counter[str] = Counter()
    usual = DistributedDataParallel._sync_buffers

    def sync(self: Any) -> None:
        counted["buffers"] += len(list(self.module.buffers()))
        usual(self)

    DistributedDataParallel._sync_buffers = sync  # type: ignore[method-assign]
    try:
        train("set", "sparse", rank, world)
    finally:
        DistributedDataParallel._sync_buffers = usual  # type: ignore[method-assign]
    return counted


def moved_apart(rank: int, world: int) -> str:
    """What is said where one rank has other places than the others."""
    module, callback = Classifier(matrices(0)), sparse("set", every=2, stop=8)

    def move(trainer: Any, _: Any, batches: int) -> None:
        if rank == 1 and batches == 2:
            layer = module.net[1]
            keys = layer.keys()
            gone = torch.ones(layer.out_features * layer.in_features, dtype=torch.bool)
            gone[keys] = False
            keys[0] = gone.nonzero()[0]
            layer.set_places(keys.sort().values)

    try:
        fit(module, callback, watch(move), loader=Batches(rank=rank, world=world), devices=world, strategy="ddp")
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def records_of_rank(rank: int) -> dict[str, Records]:
    """Records of three layers: each rank has seen another number of passes of the first, one alone the second, and nobody the
    third."""

    def pairs(layer: int, count: int) -> Records:
        numbers = [100 * rank + 10 * layer + i for i in range(count)]
        return Records((torch.full((3, 2), float(n)), torch.full((4, 2), -float(n))) for n in numbers)

    return {"a": pairs(0, 1 + rank), "b": pairs(1, rank), "c": pairs(2, 0)}


def main(folder: Path) -> None:
    rank, world = int(os.environ["LOCAL_RANK"]), 2
    found: dict[Any, Any] = {}
    for name, storage in RUNS:
        stops = Stops(folder / f"{name}-{storage}", (STOP,))
        whole = train(name, storage, rank, world, stops, seed=rank)
        dist.barrier()
        resumed = train(name, storage, rank, world, seed=rank + 5, ckpt_path=stops.path(STOP))
        saved = next(iter(torch.load(stops.path(STOP), weights_only=True)["callbacks"].values()))
        found[name, storage] = {"whole": whole, "resumed": resumed, "records": saved.get("records", {})}
    found["unused"] = without_a_layer(rank, world)
    found["buffers"] = broadcast_buffers(rank, world)
    found["apart"] = moved_apart(rank, world)
    dist.barrier()
    found["gathered"] = gathered_records(records_of_rank(rank))
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[2]))
