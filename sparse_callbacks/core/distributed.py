"""Collective operations that keep masks and statistics the same on every rank of a run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PART = 40  # bits of the parts in which whole numbers of any size are summed


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
            # collectives need contiguous memory, which tensors in channels_last or transposed ones do not have
            summed = tensor.contiguous()
            dist.all_reduce(summed)
            if summed is not tensor:
                tensor.copy_(summed)


def sums_of(numbers: Sequence[int]) -> list[int]:
    """The sum over ranks of each whole number, exactly, however large: up to 2^120."""
    if world_size() == 1:
        return list(numbers)
    # in parts, as torch knows no such numbers; gloo sums on the CPU, NCCL on the device alone
    device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    parts = [[number >> (PART * i) & ((1 << PART) - 1) for i in range(3)] for number in numbers]
    sums = torch.tensor(parts, dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    return [sum(part << (PART * i) for i, part in enumerate(row)) for row in sums.tolist()]


def masks_of_first_rank(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of rank 0 by name, the same on every rank, in one broadcast.

    New tensors on several ranks: masks of channels may be expanded views, whose elements share their memory.
    """
    if world_size() == 1 or not masks:
        return dict(masks)
    # bytes, because not every backend sends bools; one message, because each has a latency of its own
    packed = torch.cat([m.reshape(-1) for m in masks.values()]).to(torch.uint8)
    dist.broadcast(packed, src=0)
    parts = torch.split(packed, [m.numel() for m in masks.values()])
    # a clone has the strides of its mask, or those of a new tensor where elements share their memory
    return {
        name: mask.clone().copy_(part.view(mask.shape)) for (name, mask), part in zip(masks.items(), parts, strict=True)
    }


def mean(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The mean over ranks of each tensor, as new tensors."""
    copies = [t.detach().clone() for t in tensors]  # of the same strides, unless elements share their memory
    total(copies)
    return [copy / world_size() for copy in copies] if world_size() > 1 else copies


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


def extremes(mine: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value over ranks of each element."""
    both = torch.stack([-mine, mine])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return -both[0], both[1]


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


def of_first_rank(mine: Any) -> Any:
    """The object that rank 0 gives, copied to every rank."""
    if world_size() == 1:
        return mine
    sent = [mine if rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]
