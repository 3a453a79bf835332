"""Units of a sparse layer drawn at random: the same as masked storage draws, or by rejection where that is too large."""

import math

import torch
from torch import Tensor

from sparse_callbacks.core.moved_places import largest_in_rows
from sparse_callbacks.core.ops import keep_largest

LARGEST_SAME = 2**26  # units up to which the draw is that of masked storage


def drawn_units(
    shape: tuple[int, int], kept: Tensor, count: int, source: torch.Generator, per_block: bool = False
) -> Tensor:
    """Ascending keys of `count` uniformly drawn units outside of those that are kept.

    Up to `LARGEST_SAME` units the places are those that masked storage draws from the same generator.

    Args:
        shape: the number of blocks (rows, where each is its own block) and of inputs.
        kept: ascending keys of the units that stay.
        count: the number of units; of each block with ``per_block``.
        source: the generator of the random numbers.
        per_block: whether each block gets its own `count` units.

    Raises:
        ValueError: `count` is negative or exceeds the units that are free.
    """
    size = math.prod(shape)
    available = (size - kept.numel()) // (max(1, shape[0]) if per_block else 1)
    if not 0 <= count <= available:
        raise ValueError(f"count={count} units cannot be drawn: {available} are free. Give 0 to {available}.")
    # numbers are drawn on the CPU, so that they are the same wherever the layer is
    device, kept = kept.device, kept.cpu()
    if size > LARGEST_SAME:
        return rejected(*(shape if per_block else (1, size)), kept, count, source).to(device)
    # row blocks of one draw are the numbers of the draw as a whole
    scores = torch.rand(shape, dtype=torch.float64, generator=source)
    free = torch.ones(size, dtype=torch.bool).index_fill_(0, kept, False).view(shape)
    chosen = largest_in_rows(scores, count, free) if per_block else keep_largest(scores, count, free)
    return chosen.view(-1).nonzero().squeeze(1).to(device)


def rejected(blocks: int, inputs: int, kept: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Ascending keys of `count` free units in each block, in memory of the live units alone.

    Free units are numbered and numbers drawn until so many differ. The first `count` of the order of the draw are taken,
    so every choice is equally likely.

    Args:
        blocks: the number of blocks, which keep as many units each.
        inputs: the number of units of a block.
        kept: ascending keys of the units that stay.
        count: the number of units drawn in each block.
        source: the generator of the random numbers.
    """
    free = inputs - kept.numel() // blocks
    # where most are chosen it is quicker to draw those that are not
    few = min(count, free - count)
    drawn = kept.new_empty(0)
    lack = torch.full((blocks,), few)
    while int(lack.sum()):
        block = torch.repeat_interleave(torch.arange(blocks), lack + lack // 8 + 8 * (lack > 0))
        some = torch.randint(free, block.shape, generator=source).add_(block.mul_(free))
        drawn, lack = first_of_each_block(torch.cat([drawn, some]), blocks, free, few)
    numbers = drawn.sort().values
    if few < count:
        numbers = torch.ones(blocks * free, dtype=torch.bool).index_fill_(0, numbers, False).nonzero().squeeze(1)
    # the n-th free unit is behind as many kept ones as have at most n free units before them
    before = kept - torch.arange(kept.numel())
    return numbers + torch.searchsorted(before, numbers, right=True)


def first_of_each_block(numbers: Tensor, blocks: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Of each block the first `count` different numbers, in their order; and how many each block lacks.

    Args:
        numbers: ``block * size + number in the block``.
        blocks: the number of blocks.
        size: the number of numbers that a block can have.
        count: how many each block is to have.
    """
    ordered, where = numbers.sort(stable=True)
    again = torch.zeros(numbers.shape, dtype=torch.bool)
    again[where[1:]] = ordered[1:] == ordered[:-1]
    numbers = numbers[~again]
    block, order = torch.div(numbers, size, rounding_mode="floor").sort(stable=True)
    begins = torch.searchsorted(block, torch.arange(blocks))
    ranks = torch.arange(len(block)) - begins[block]
    first = ranks < count
    return numbers[order][first], count - torch.bincount(block[first], minlength=blocks)
