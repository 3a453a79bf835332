"""Exact selection of the largest magnitudes of tensors in shards, by counts over their processes.

A digit of eight bits at a time, every process counts its magnitudes by the next digit, and the sums of these counts say
in which bucket the threshold lies. Of the magnitudes that equal it those with the lower row-major index in the whole
tensor are kept; the counts of each process, and for shards of columns those of each row, say how many that are. No
process sees a magnitude of another one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_callbacks.core.shards import Shards

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_DIGIT = 8  # bits of a digit: a histogram of 256 counts is one small message
_NAN, _EXCLUDED = -1, -2  # keys that rank below all magnitudes


def ranked(values: Tensor, allowed: Tensor | None) -> Tensor:
    """Keys in row-major order, integers in the order of the magnitudes: their bits, NaN below all of them."""
    magnitudes = values.detach().abs().to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    keys = magnitudes.view(_BITS[magnitudes.dtype]).masked_fill(magnitudes.isnan(), _NAN)
    return (keys if allowed is None else keys.masked_fill(~allowed, _EXCLUDED)).reshape(-1)


@dataclass(frozen=True)
class Place:
    """Where the threshold lies.

    Attributes:
        key: the smallest key that is selected.
        ties: how many of the keys that equal it are.
    """

    key: int
    ties: int


def magnitude(place: Place, dtype: torch.dtype) -> float:
    """The magnitude at a threshold over values of ``dtype``; NaN where that is one."""
    wide = torch.promote_types(dtype, torch.float32)
    return math.nan if place.key == _NAN else float(torch.tensor(place.key, dtype=_BITS[wide]).view(wide))


def refuse_count(count: int, available: int) -> None:
    """Refuse to keep more positions than there are."""
    if not 0 <= count <= available:
        raise ValueError(f"count={count} positions cannot be kept: {available} are available. Give 0 to {available}.")


def locate(keys: Sequence[Tensor], layouts: Sequence[Shards], count: int) -> Place | None:
    """The threshold for ``count`` positions; None where that is 0.

    Raises:
        ValueError: ``count`` is negative or exceeds the positions available.
    """
    processes = layouts[0].processes
    joined = torch.cat(list(keys))
    both = torch.stack([(joined != _EXCLUDED).count_nonzero(), (joined >= 0).count_nonzero()])
    available, numbers = processes.sum(both).tolist()
    refuse_count(count, available)
    if count == 0:
        return None
    if count > numbers:
        return Place(_NAN, count - numbers)
    candidates, rank, found = joined[joined >= 0], count, 0
    for shift in range(8 * joined.element_size() - _DIGIT, -1, -_DIGIT):
        digits = (candidates >> shift) & (2**_DIGIT - 1)
        histogram = processes.sum(torch.bincount(digits, minlength=2**_DIGIT))
        from_top = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, rank))
        digit = 2**_DIGIT - 1 - place
        rank -= int(from_top[place] - histogram[digit])
        candidates = candidates[digits == digit]
        found = found << _DIGIT | digit
    return Place(found, rank)


def largest_in_shards(keys: Sequence[Tensor], layouts: Sequence[Shards], count: int) -> list[Tensor]:
    """Masks in row-major order of this process's parts, with together ``count`` True positions over all processes.

    Args:
        keys: those of each tensor, see :func:`ranked`.
        layouts: how each tensor lies; all lie over the same processes.
        count: positions to keep.

    Raises:
        ValueError: ``count`` is negative or exceeds the positions available.
    """
    place = locate(keys, layouts, count)
    if place is None:
        return [torch.zeros_like(k, dtype=torch.bool) for k in keys]
    ties = _first([k == place.key for k in keys], layouts, place.ties)
    return [(k > place.key) | tie for k, tie in zip(keys, ties, strict=True)]


def _first(ties: list[Tensor], layouts: Sequence[Shards], need: int) -> list[Tensor]:
    """The first ``need`` True positions: of the earlier tensor, then of the lower row-major index in the whole one."""
    counts = _by_process(torch.stack([tie.count_nonzero() for tie in ties]), layouts[0])
    kept = []
    for tie, layout, column in zip(ties, layouts, counts.unbind(1), strict=True):
        taken = min(need, int(column.sum()))
        need -= taken
        if taken == 0:
            kept.append(torch.zeros_like(tie))
        else:
            kept.append(tie if taken == column.sum() else _first_in(tie, layout, taken, column))
    return kept


def _first_in(tie: Tensor, layout: Shards, taken: int, counts: Tensor) -> Tensor:
    """The first ``taken`` True positions of one whole tensor, as far as they are this process's.

    Args:
        tie: this process's positions in row-major order.
        layout: how the tensor lies.
        taken: fewer than there are.
        counts: the number of True positions of each process.
    """
    outer = math.prod(layout.shape[: layout.dim])
    if outer == 1:  # each process's positions follow those of the one before it
        return _first_here(tie, taken - int(counts[: layout.processes.rank].sum()))
    # the whole goes row by row through all processes: whole rows, then the first positions of one row
    rows = tie.view(outer, -1)
    here = rows.count_nonzero(1)
    ends = layout.processes.sum(here).cumsum(0)
    row = int(torch.searchsorted(ends, taken))
    before = int(ends[row - 1]) if row else 0
    in_row = _by_process(here[row].reshape(1), layout)[:, 0]
    kept = rows.clone()
    kept[row:] = False
    kept[row] = _first_here(rows[row], taken - before - int(in_row[: layout.processes.rank].sum()))
    return kept.view(-1)


def _first_here(tie: Tensor, count: int) -> Tensor:
    places = tie.nonzero().squeeze(1)[: max(count, 0)]
    return torch.zeros_like(tie).index_fill_(0, places, True)


def _by_process(counts: Tensor, layout: Shards) -> Tensor:
    """The counts of every process, one row for each."""
    table = torch.zeros(layout.processes.size, counts.numel(), dtype=torch.int64)
    table[layout.processes.rank] = counts.cpu()
    return layout.processes.sum(table)
