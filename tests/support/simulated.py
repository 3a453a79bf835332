"""Processes that share parameters, simulated by threads."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.shards import Shards, lying_as


class Meeting:
    """Where simulated processes bring their tensors."""

    def __init__(self, size: int) -> None:
        self.barrier, self.brought = threading.Barrier(size, timeout=30), [torch.empty(0)] * size
        self.messages: list[int] = []
        """The elements of each tensor that was summed or collected."""


class SimulatedProcess:
    """One of several processes, see :class:`sparse_callbacks.core.shards.Processes`."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def sum(self, numbers: Tensor) -> Tensor:
        return torch.stack(self._all(numbers)).sum(0)

    def collect(self, part: Tensor) -> list[Tensor]:
        found = self._all(part)
        return found if self.rank == 0 else []

    def _all(self, mine: Tensor) -> list[Tensor]:
        meeting = self._meeting
        meeting.brought[self.rank] = mine
        if self.rank == 0:
            meeting.messages.append(mine.numel())
        meeting.barrier.wait()
        found = list(meeting.brought)
        assert len({(t.shape, t.dtype) for t in found}) == 1
        meeting.barrier.wait()
        return found


def layouts(shape: Sequence[int], dim: int, lengths: Sequence[int], meeting: Meeting) -> list[Shards]:
    """The layout on each process of a tensor whose slices along ``dim`` have these lengths."""
    assert sum(lengths) == shape[dim]
    return [
        Shards(torch.Size(shape), dim, sum(lengths[:rank]), length, SimulatedProcess(rank, len(lengths), meeting))
        for rank, length in enumerate(lengths)
    ]


def parts(whole: Tensor, dim: int, lengths: Sequence[int], meeting: Meeting) -> list[Tensor]:
    """The part of a tensor that each process holds."""
    return [lying_as(layout.part(whole), layout) for layout in layouts(whole.shape, dim, lengths, meeting)]


def on_each(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """What ``function`` gives on each process, with that process's element of each of ``arguments``."""
    found: list[Any] = [None] * len(arguments[0])
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = function(*(a[rank] for a in arguments))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def random_lengths(size: int, count: int, generator: torch.Generator) -> list[int]:
    """Lengths of ``count`` slices that add up to ``size``; some may be 0."""
    cuts = sorted(torch.randint(0, size + 1, (count - 1,), generator=generator).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
