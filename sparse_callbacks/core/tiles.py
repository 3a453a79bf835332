"""Tiles of M outputs by M inputs, of which every row and column keeps N: full ones, and moves that keep their count."""

import torch
from torch import Tensor

from sparse_callbacks.core.nm_masks import NMPattern


def tiles_of(tensor: Tensor, m: int, axis: int = 1) -> Tensor:
    """The tiles of a weight, (tiles, M outputs, M inputs).

    Args:
        tensor: of the shape of a weight, (outputs, inputs, *kernel); with ``axis=0`` its inputs come first.
        m: the side of a tile, which divides outputs and inputs.
        axis: the axis of the inputs.
    """
    last = tensor.movedim((1 - axis, axis), (-2, -1))
    *kernel, outputs, inputs = last.shape
    return last.reshape(*kernel, outputs // m, m, inputs // m, m).transpose(-3, -2).reshape(-1, m, m)


def out_of_tiles(tiles: Tensor, shape: torch.Size, axis: int = 1) -> Tensor:
    """The inverse of :func:`tiles_of`, of the shape of the weight."""
    m, kernel = tiles.shape[-1], shape[2:]
    rows, columns = shape[1 - axis] // m, shape[axis] // m
    last = tiles.reshape(*kernel, rows, columns, m, m).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return last.movedim((-2, -1), (1 - axis, axis))


def full_tiles(scores: Tensor, pattern: NMPattern, axis: int = 1) -> Tensor:
    """Mask with exactly N in each row and column of every tile, and a large sum of scores.

    Positions are taken in the order of their scores where row and column have room, and exchanged where that ends before
    the tile is full.

    Args:
        scores: numbers that are not negative, of the shape of a weight.
        pattern: a transposable pattern.
        axis: the axis of the inputs.
    """
    tiles = _finite(tiles_of(scores, pattern.m, axis))
    lines = torch.arange(pattern.m, device=tiles.device)
    ring = (lines[None] - lines[:, None]) % pattern.m < pattern.n  # a full tile, for those that stay short
    before = ring.expand(tiles.shape)
    return out_of_tiles(_moved(before, torch.zeros_like(before), tiles, pattern.n), scores.shape, axis)


def moved_tiles(mask: Tensor, kept: Tensor, scores: Tensor, pattern: NMPattern, axis: int = 1) -> Tensor:
    """The mask after a move in which every tile grows as many as it has lost, and no row or column of it exceeds N.

    Of all positions that were not kept the one with the largest score comes where its row and column have room, and so on.
    Where that ends before the tile has its count, a grown position (a, b) makes way for (a, c) and (d, b), if (d, c) alone has
    room: the exchange with the largest sum of scores. A tile that is short then stays as it was.

    Args:
        mask: bool, the active weights before, which is of the pattern.
        kept: bool, those of them that stay.
        scores: score to come, not negative.
        pattern: a transposable pattern.
        axis: the axis of the inputs.
    """
    before, stay = tiles_of(mask, pattern.m, axis), tiles_of(kept, pattern.m, axis)
    found, moved = before.clone(), (before != stay).any(-1).any(-1)
    tiles = _finite(tiles_of(scores, pattern.m, axis)[moved])
    found[moved] = _moved(before[moved], stay[moved], tiles, pattern.n)
    return out_of_tiles(found, mask.shape, axis)


def _finite(scores: Tensor) -> Tensor:
    """Scores whose sums are numbers; NaN ranks below all others."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.nan_to_num(-1.0, torch.finfo(wide.dtype).max / 4)


def _moved(before: Tensor, kept: Tensor, scores: Tensor, n: int) -> Tensor:
    """Tiles that have as many as ``before``, with all that is ``kept``."""
    count = before.sum((1, 2))
    found = _grown(kept, scores, count, n)
    short = found.sum((1, 2)) < count
    while bool(short.any()):
        better, done = _exchanged(found[short], kept[short], scores[short], n)
        better[~done] = before[short][~done]
        found[short] = better
        short = found.sum((1, 2)) < count
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
