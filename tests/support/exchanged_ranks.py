"""Loops over exchanged layers in two processes: plain DistributedDataParallel with accumulation, and Fabric."""

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_callbacks import SET, RigL, SparseLinear, SparsityCallback, exchange_layers, sparsify
from sparse_callbacks.core.live.live_masks import exchanged_layers
from support.exchanged_loops import MOVING, batches, loss_of, net

WINDOW, STEPS = 2, 8


def methods() -> dict[str, SparsityCallback]:
    grouped = {"storage": "grouped", "group": 4}
    return {
        "set": SET(0.8, storage="sparse", **MOVING),
        "rigl": RigL(0.8, storage="sparse", **MOVING),
        "rigl grouped": RigL(0.8, **MOVING | grouped),
        "rigl candidates": RigL(0.8, storage="sparse", candidates=1.5, **MOVING),
    }


def places(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.keys() for name, layer in exchanged_layers(model).items()}


def train(method: SparsityCallback, rank: int, world: int) -> dict[str, Any]:
    """Keys after each step, and the live values at the end; each micro-batch is divided among the processes."""
    model = net(seed=0)
    exchange_layers(method, model)
    wrapped: Any = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    run, seen, data = sparsify(method, wrapped, optimizer, 10**6), [], batches(size=16)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for micro in range(WINDOW):
            x, y = next(data)
            last = micro == WINDOW - 1
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                loss_of(wrapped, (x[rank::world], y[rank::world])).backward()
        optimizer.step()
        seen.append(places(model))
    return {"seen": seen, "updates": run.updates, "values": {n: p.detach() for n, p in model.named_parameters()}}


def train_in_fabric(set_up_first: bool) -> dict[str, Any]:
    """The same under Fabric; refused where the layers were not exchanged before ``fabric.setup``."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    method, model = RigL(0.8, storage="sparse", **MOVING), net(seed=fabric.global_rank, dtype=torch.float32)
    if not set_up_first:
        exchange_layers(method, model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = fabric.setup(model, optimizer)
    try:
        run = sparsify(method, wrapped, optimizer, 10**6)
    except ValueError as error:
        return {"refused": str(error), "exchanged": any(isinstance(m, SparseLinear) for m in model.modules())}
    data = batches(first=100 * fabric.global_rank, size=8, dtype=torch.float32)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for micro in range(WINDOW):
            with fabric.no_backward_sync(wrapped, enabled=micro < WINDOW - 1):
                fabric.backward(loss_of(wrapped, next(data)))
        optimizer.step()
    return {"updates": run.updates, "places": places(model), "values": [p.detach() for p in model.parameters()]}


def refused(rank: int) -> str:
    """A rank that holds other places is found at the next update."""
    method, model = SET(0.8, storage="sparse", **MOVING), net()
    exchange_layers(method, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsify(method, model, optimizer, 10**6)
    layer: Any = model[0]
    if rank:
        keys = layer.keys()
        layer.set_places(torch.arange(keys.numel()), layer.values.detach().clone())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def run_all(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    os.environ["RANK"] = os.environ["LOCAL_RANK"]
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: train(method, rank, 2) for name, method in methods().items()}
    found["refused"] = refused(rank)
    found["fabric"] = train_in_fabric(set_up_first=False)
    found["fabric first"] = train_in_fabric(set_up_first=True)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run_all(Path(sys.argv[2]))
