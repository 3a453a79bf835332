"""Collective operations that keep masks and statistics the same on every rank of a run."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes in the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def total(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_masks(masks: Iterable[Tensor]) -> None:
    """Replace the masks of every rank by those of rank 0, in place, in one broadcast."""
    tensors = list(masks)
    if world_size() == 1 or not tensors:
        return
    # bytes, because not every backend sends bools; one message, because each has a latency of its own
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


def mean_of_any(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks of each tensor that some rank has, as new tensors; a rank that lacks one has zeros.

    Args:
        tensors: the tensors of this rank by key.
        like: tensors of the same shapes by key, with all keys that any rank may have, the same on every rank.
    """
    has = torch.tensor([key in tensors for key in like], dtype=torch.float32)
    if world_size() > 1:
        has = has.to(next(iter(like.values())).device)
        dist.all_reduce(has)
    keys = [key for key, ranks in zip(like, has.tolist(), strict=True) if ranks]
    mine = [tensors[key] if key in tensors else torch.zeros_like(like[key]) for key in keys]
    return dict(zip(keys, mean(mine), strict=True))


def from_owners(tensors: Mapping[str, Tensor], owner: Mapping[str, int]) -> dict[str, Tensor]:
    """Each tensor as the rank that owns it has it, copied to every rank.

    Args:
        tensors: the tensors of this rank by key; keys, shapes and their order are the same on every rank.
        owner: the rank whose tensor is copied, by key.
    """
    # collectives need contiguous memory, which parameters in channels_last do not have
    copies = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    for key, copy in copies.items():
        dist.broadcast(copy, src=owner[key])
    return copies


def gather(mine: Any) -> list[Any]:
    """The objects of all ranks in the order of the ranks, on rank 0; an empty list on the other ranks."""
    everybody: list[Any] = [None] * world_size()
    dist.gather_object(mine, everybody if rank() == 0 else None)
    return everybody if rank() == 0 else []
