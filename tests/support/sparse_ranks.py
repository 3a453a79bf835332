"""Two processes that train truly sparse layers under DistributedDataParallel."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_callbacks import SparseLinear
from support.sparse_layers import STORAGES


def replicas(rank: int) -> dict[str, Any]:
    """Three steps of each storage, of which the second is followed by a move of the places."""
    return {storage: trained(storage, rank) for storage in STORAGES}


def trained(storage: str, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = SparseLinear.random(10, 12, 3, storage=storage, group=4)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.values.add_(rank)  # DDP sends those of the first rank
    net = DistributedDataParallel(nn.Sequential(layer, nn.BatchNorm1d(12)), broadcast_buffers=False)
    before, sent = layer.values.detach().clone(), []
    original = dist.broadcast
    dist.broadcast = lambda *args, **kwargs: sent.append(args) or original(*args, **kwargs)  # type: ignore[func-returns-value]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        net(torch.randn(6, 10, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean().backward()
        optimizer.step()
        if step == 1:
            source = torch.Generator().manual_seed(5)
            layer.move_to(SparseLinear.random(10, 12, 3, storage=storage, group=4, generator=source).keys())  # type: ignore[arg-type]
    dist.broadcast = original
    pattern = [tensor for _, tensor in layer.places.tensors()]
    return {
        "state": [layer.values.detach(), *pattern],
        "before": before,
        "buffers_sent": sum(1 for name, _ in net.named_buffers() if "module.0" in name),
        "broadcasts_of_steps": len(sent),
    }


if __name__ == "__main__":
    program, folder = sys.argv[1:]
    dist.init_process_group("gloo", rank=(rank := int(__import__("os").environ["LOCAL_RANK"])), world_size=2)
    torch.save({"replicas": replicas}[program](rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
