"""Ranks of one run: every rank holds the same masks."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes in the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def total(tensors: Iterable[Tensor]) -> None:
    """Give every rank the sum over ranks of each tensor, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def agree(masks: Iterable[Tensor]) -> None:
    """Give every rank the masks of rank 0, in place, in one message."""
    tensors = list(masks)
    if world_size() == 1 or not tensors:
        return
    packed = torch.cat([m.reshape(-1) for m in tensors]).to(torch.uint8)
    dist.broadcast(packed, src=0)
    for mask, part in zip(tensors, torch.split(packed, [m.numel() for m in tensors]), strict=True):
        mask.copy_(part.view(mask.shape).bool())


def mean(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The mean over ranks of each tensor, as new tensors."""
    copies = [t.detach().clone() for t in tensors]
    ranks = world_size()
    if ranks > 1:
        for copy in copies:
            dist.all_reduce(copy)
            copy /= ranks
    return copies


def from_owners(tensors: Mapping[str, Tensor], owner: Mapping[str, int]) -> dict[str, Tensor]:
    """Copies of the tensors of the ranks that own them, the same on every rank."""
    copies = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    for key, copy in copies.items():
        dist.broadcast(copy, src=owner[key])
    return copies


def gather(mine: Any) -> list[Any]:
    """What every rank has, in their order, on rank 0; nothing on the others."""
    everybody: list[Any] = [None] * world_size()
    dist.gather_object(mine, everybody if rank() == 0 else None)
    return everybody if rank() == 0 else []
