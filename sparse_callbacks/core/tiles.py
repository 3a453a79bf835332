"""Tiles of a transposable pattern in training: full ones, and moves that keep their counts."""

import torch
from torch import Tensor

from sparse_callbacks.core.nm_masks import NMPattern
from sparse_callbacks.core.transposable import in_tiles, out_of_tiles, transposable_mask


def full_tiles(scores: Tensor, pattern: NMPattern, axis: int = 1) -> Tensor:
    """Mask with exactly N in each row and column of every tile, and a large sum of scores: a layer that begins with it has the
    sparsity of the pattern.

    It is :func:`~sparse_callbacks.core.transposable.transposable_mask`, whose tiles may have fewer; those are filled by the
    exchanges of :func:`moved_tiles`.

    Args:
        scores: numbers that are not negative, of the shape of a weight.
        pattern: a transposable pattern.
        axis: the axis of the inputs.
    """
    found = in_tiles(transposable_mask(scores, pattern.n, pattern.m, axis), pattern.m, axis)
    lines = torch.arange(pattern.m, device=found.device)
    ring = (lines[None] - lines[:, None]) % pattern.m < pattern.n  # a full tile, for those that no exchange fills
    full, none = ring.expand(found.shape), torch.zeros_like(found)
    return out_of_tiles(
        _filled(found, full, none, _finite(in_tiles(scores, pattern.m, axis)), pattern.n), scores.shape, axis
    )


def moved_tiles(mask: Tensor, kept: Tensor, scores: Tensor, pattern: NMPattern, axis: int = 1) -> Tensor:
    """The mask after a move in which every tile grows as many as it has lost, and no row or column of it exceeds N.

    Of all positions that were not kept the one with the largest score comes where its row and column have room, and so on.
    Where that ends before the tile has its count, row d and column c have room and (d, c) is taken; then a grown position (a, b)
    makes way for (a, c) and (d, b), in the exchange with the largest sum of scores. A tile that is short then stays as it was.
    A tile that loses a single weight therefore gets it back, as its row and its column alone have room.

    Args:
        mask: bool, the active weights before, which is of the pattern.
        kept: bool, those of them that stay.
        scores: score to come, not negative.
        pattern: a transposable pattern.
        axis: the axis of the inputs.
    """
    before, stay = in_tiles(mask, pattern.m, axis), in_tiles(kept, pattern.m, axis)
    found, moved = before.clone(), (before != stay).any(-1).any(-1)
    tiles = _finite(in_tiles(scores, pattern.m, axis)[moved])
    grown = _grown(stay[moved], tiles, before[moved].sum((1, 2)), pattern.n)
    found[moved] = _filled(grown, before[moved], stay[moved], tiles, pattern.n)
    return out_of_tiles(found, mask.shape, axis)


def _finite(scores: Tensor) -> Tensor:
    """Scores whose sums are numbers; NaN ranks below all others."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.nan_to_num(-1.0, torch.finfo(wide.dtype).max / 4)


def _filled(found: Tensor, before: Tensor, kept: Tensor, scores: Tensor, n: int) -> Tensor:
    """Tiles that have as many as ``before``, by exchanges of what is not ``kept``; without one they are as before."""
    count, found = before.sum((1, 2)), found.clone()
    while bool((short := found.sum((1, 2)) < count).any()):
        better, done = _exchanged(found[short], kept[short], scores[short], n)
        found[short] = torch.where(done[:, None, None], better, before[short])
    return found


def _grown(kept: Tensor, scores: Tensor, count: Tensor, n: int) -> Tensor:
    """Tiles that take positions in the order of scores, up to ``count`` and where row and column have room."""
    m = kept.shape[-1]
    found, every = kept.clone(), torch.arange(len(kept), device=kept.device)
    rows, columns, left = n - kept.sum(2), n - kept.sum(1), count - kept.sum((1, 2))
    order = scores.flatten(1).sort(dim=1, descending=True, stable=True).indices
    for place in order.unbind(1):
        row, column = place // m, place % m
        takes = (rows[every, row] > 0) & (columns[every, column] > 0) & (left > 0) & ~found[every, row, column]
        found[every, row, column] |= takes
        for room, at in ((rows, row), (columns, column)):
            room[every, at] -= takes.long()
        left = left - takes.long()
    return found


def _exchanged(found: Tensor, kept: Tensor, scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Tiles with one more position, by the best exchange for the first row and the first column that have room; and whether
    there was one."""
    m, every = found.shape[-1], torch.arange(len(found), device=found.device)
    row, column = (found.sum(2) < n).long().argmax(1), (found.sum(1) < n).long().argmax(1)
    free_in_row, free_in_column = ~found[every, row], ~found[every, :, column]
    may_leave = found & ~kept & free_in_row[:, None, :] & free_in_column[:, :, None]
    gain = scores[every, row][:, None, :] + scores[every, :, column][:, :, None] - scores
    best = gain.masked_fill(~may_leave, -torch.inf).flatten(1).argmax(1)
    done = may_leave.flatten(1).any(1)
    a, b, at = best[done] // m, best[done] % m, every[done]
    found = found.clone()
    found[at, a, b] = False
    found[at, row[done], b] = True
    found[at, a, column[done]] = True
    return found, done
