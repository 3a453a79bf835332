"""Two processes exchange layers of networks that differ, and at speeds that differ."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sparse_callbacks.core.storages.auto_storage as auto_storage
from sparse_callbacks import SparseLinear, exchange_layers
from sparse_callbacks.methods import SET, Static


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def places(model: nn.Module) -> dict[str, Any]:
    return {n: m.places.saved() for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def exchanged(rank: int) -> dict[str, Any]:
    found = {}
    for start in ("random", "magnitude", "nonzero"):
        for name, more in (("sparse", {}), ("grouped", {"group": 4})):
            model = net(rank)
            if start == "nonzero":
                if name == "grouped":
                    continue
                with torch.no_grad():
                    for i in (0, 2, 4):
                        model[i].weight *= torch.rand_like(model[i].weight) < 0.5
            exchange_layers(SET(initial_mask=start, storage=name, **more), model)
            found[f"{start} {name}"] = places(model)
    # the first rank finds sparse storage faster, the second one masked
    auto_storage.times_of = lambda *_: {"masked": 2.0, "sparse": 1.0 if rank == 0 else 9.0}  # type: ignore[assignment]
    model, method = net(0), Static(0.5, storage="auto", rows=8)
    exchange_layers(method, model)
    found["auto"] = places(model)
    found["remark"] = method.plan(model)["0.weight"].remark
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    torch.save(exchanged(dist.get_rank()), Path(sys.argv[2]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
