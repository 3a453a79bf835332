"""Ranks of one run: every rank holds the same masks."""

from collections.abc import Iterable

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
