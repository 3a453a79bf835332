"""Masks of N:M chosen by scores: first ones, those of a round of pruning, and moves within groups."""

import torch
from torch import Tensor

from sparse_callbacks.core.nm_masks import NMPattern, in_groups, nm_mask
from sparse_callbacks.core.ops import keep_largest
from sparse_callbacks.core.tiles import full_tiles, moved_tiles


def chosen_in_groups(scores: Tensor, pattern: NMPattern, axis: int = 1, among: Tensor | None = None) -> Tensor:
    """Mask of exactly N in each group, those with the largest scores; of a transposable pattern exactly N in each row and
    column of a tile, with a large sum of scores.

    Args:
        scores: numbers that are not negative, of the shape of the weight. The mask has their memory format.
        pattern: the pattern, which the shape can have.
        axis: the axis of the inputs.
        among: bool, of the shape of ``scores``, N or more in each group; others are taken only where a tile needs them. None:
            all.
    """
    if pattern.transposable:
        mask = full_tiles(scores if among is None else scores.masked_fill(~among, 0), pattern, axis)
    else:
        mask = nm_mask(scores, pattern.n, pattern.m, axis, among)
    return _lying_like(mask, scores)


def chosen_on_the_way(scores: Tensor, zeros: int, pattern: NMPattern, axis: int, among: Tensor) -> Tensor:
    """Mask with as many ``zeros`` in a layer on its way to the pattern: the smallest scores leave among the weights that the
    pattern would not keep. At the end of the way it is :func:`chosen_in_groups`.

    Args:
        scores: numbers that are not negative, of the shape of the weight.
        zeros: pruned weights of the layer, at most those of the pattern.
        pattern: the pattern.
        axis: the axis of the inputs.
        among: bool, the weights that are active before.
    """
    chosen = chosen_in_groups(scores, pattern, axis, among)
    more = scores.numel() - zeros - int(chosen.count_nonzero())
    return chosen | keep_largest(scores, more, among & ~chosen)


def regrown_in_groups(mask: Tensor, kept: Tensor, grow: Tensor, pattern: NMPattern, axis: int = 1) -> Tensor:
    """The mask after a move: each group grows as many as it has lost, those with the largest scores among all that were not
    kept, so that what has just left can come straight back.

    Of a transposable pattern each tile does, along the order of scores and where its row and column have room; see
    :func:`~sparse_callbacks.core.tiles.moved_tiles`.

    Args:
        mask: bool, the active weights before.
        kept: bool, those of them that stay.
        grow: score to come, by magnitude.
        pattern: the pattern, which ``mask`` is of.
        axis: the axis of the inputs.
    """
    if pattern.transposable:
        return _lying_like(moved_tiles(mask, kept, grow.abs(), pattern, axis), mask)
    lost = in_groups(mask, pattern.m, axis).sum(-1) - in_groups(kept, pattern.m, axis).sum(-1)
    return kept | nm_mask(grow.abs(), lost, pattern.m, axis, among=~kept)


def _lying_like(mask: Tensor, values: Tensor) -> Tensor:
    """``mask`` in the memory format of ``values``."""
    return torch.empty_like(values, dtype=torch.bool).copy_(mask)
