"""Units of a sparse layer drawn at random: those of masked storage, or by rejection."""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_callbacks.core.sparse_layers.moved_places import NEVER, largest_ranked, places_without
from sparse_callbacks.core.sparse_layers.place_units import LivePlaces
from sparse_callbacks.core.sparse_layers.quick_places import counts_below, largest_places, others_above, true_places

LARGEST_SAME = 2**26  # units up to which the draw is that of masked storage
BITS = 53  # of a random float64: it is an integer of so many bits, over 2^53
SPREAD = 8.0  # standard deviations: one draw in 10^15 has to be repeated
DRAWN_AT_ONCE = 2**17  # numbers of a piece, which fit a core's cache
BLOCKS = 2**22  # numbers that are drawn at a time for blocks that choose by themselves


def drawn_units(
    shape: tuple[int, int],
    kept: Tensor,
    count: int,
    source: torch.Generator,
    per_block: bool = False,
    full: bool = False,
) -> Tensor:
    """Ascending keys of `count` uniformly drawn units outside of those that are kept.

    Up to `LARGEST_SAME` units the places are those that masked storage draws from the same generator.

    Args:
        shape: the number of blocks (rows, where each is its own block) and of inputs.
        kept: ascending keys of the units that stay; as many of each block with ``per_block``.
        count: the number of units; of each block with ``per_block``.
        source: the generator of the random numbers.
        per_block: whether each block gets its own `count` units.
        full: whether each block gets as many units as it lacks of `count`, whatever it keeps. The places are those of
            masked storage then in a layer of any size.

    Raises:
        ValueError: `count` is negative or exceeds the units that are free.
    """
    if full:
        refuse_more_than_free(count, shape[1])
        return largest_up_to(*shape, kept.cpu(), count, source).to(kept.device)
    size = math.prod(shape)
    blocks, inputs = shape if per_block else (1, size)
    refuse_more_than_free(count, inputs - kept.numel() // max(1, blocks))
    if not count or not blocks:
        return kept.new_empty(0)
    # drawn on the CPU, so that the numbers are the same wherever the layer is
    if size > LARGEST_SAME:
        drawn = rejected(blocks, inputs, kept.cpu(), count, source)
    elif per_block:
        drawn = largest_of_blocks(blocks, inputs, kept.cpu(), count, source)
    else:
        drawn = largest_of_all(size, kept.cpu(), count, source)
    return drawn.to(kept.device)


def refuse_more_than_free(count: int, free: int) -> None:
    """Refuse more units than are free.

    Raises:
        ValueError: `count` is negative or exceeds ``free``.
    """
    if not 0 <= count <= free:
        raise ValueError(f"count={count} units cannot come: {free} are free. Give 0 to {free}.")


def largest_of_all(size: int, kept: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Ascending places of the `count` largest of ``size`` random numbers, without those that are kept.

    Only numbers from a bound on are held, which is almost certainly below the least of them.
    """
    state, spread = source.get_state(), SPREAD
    while True:
        # the numbers above the bound are expected to be more than enough by so many standard deviations
        share = (count + spread * math.sqrt(count) + spread**2) / (size - kept.numel())
        places, numbers = numbers_above(max(-1, math.floor((1 - share) * 2**BITS)), size, kept, source)
        if len(places) >= count:
            return places.index_select(0, largest_places(numbers.to(torch.float64), count))
        spread *= 4
        source.set_state(state)


def numbers_above(bound: int, size: int, kept: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places and values of the numbers above a bound among ``size`` that are drawn, without those that are kept.

    Args:
        bound: at least -1, which all are above.
        size: how many numbers are drawn.
        kept: ascending places that do not count.
        source: the generator of the random numbers.
    """
    places, values = [], []
    ends = counts_below(kept, torch.arange(0, size + DRAWN_AT_ONCE, DRAWN_AT_ONCE)).tolist()
    mask = torch.empty(min(size, DRAWN_AT_ONCE), dtype=torch.bool)
    for piece, numbers in enumerate(random_numbers(size, source)):
        left_out = kept[ends[piece] : ends[piece + 1]]
        found = others_above(numbers, bound, left_out, piece * DRAWN_AT_ONCE, mask[: numbers.numel()])
        places.append(found[0])
        values.append(found[1])
    return torch.cat(places), torch.cat(values)


def random_numbers(size: int, source: torch.Generator) -> Iterator[Tensor]:
    """The numbers of ``torch.rand(size, dtype=float64)`` times 2^53, in pieces; each is there until the next one."""
    buffer = torch.empty(min(size, DRAWN_AT_ONCE), dtype=torch.int64)
    for start in range(0, size, DRAWN_AT_ONCE):
        numbers = buffer[: min(DRAWN_AT_ONCE, size - start)]
        if integers_are_same():
            yield numbers.random_(generator=source).bitwise_and_(2**BITS - 1)
        else:
            yield numbers.copy_(torch.rand(len(numbers), dtype=torch.float64, generator=source).mul_(2**BITS))


def numbers_of_live(places: LivePlaces, source: torch.Generator) -> Tensor:
    """A uniform number in [0, 1) for each live weight, float64, in the shape of the layer's values.

    Up to `LARGEST_SAME` weights they are the numbers of ``torch.rand(outputs, inputs, dtype=torch.float64)`` at these places.

    Args:
        places: the live places of the layer.
        source: the generator of the random numbers.
    """
    size, flat = places.outputs * places.inputs, places.keys().cpu()
    if places.group > 1:  # every row of a block reads the same inputs
        firsts = torch.arange(places.outputs).view(places.blocks, places.group, 1) * places.inputs
        flat = (flat.view(places.blocks, 1, -1).remainder(places.inputs) + firsts).flatten()
    if size > LARGEST_SAME:
        drawn = torch.rand(flat.numel(), dtype=torch.float64, generator=source)
    else:
        ends = counts_below(flat, torch.arange(0, size + DRAWN_AT_ONCE, DRAWN_AT_ONCE)).tolist()
        found = [
            numbers.index_select(0, flat[ends[piece] : ends[piece + 1]] - piece * DRAWN_AT_ONCE)
            for piece, numbers in enumerate(random_numbers(size, source))
        ]
        drawn = torch.cat([flat.new_empty(0), *found]).to(torch.float64).div_(2**BITS)
    return drawn.view(places.values_shape).to(places.device)


@functools.cache
def integers_are_same() -> bool:
    """Whether random integers have the bits of random floats in this torch; they are faster by a quarter."""
    floats = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    integers = torch.empty(64, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    return torch.equal(integers.bitwise_and_(2**BITS - 1), floats.mul_(2**BITS).to(torch.int64))


def largest_of_blocks(blocks: int, inputs: int, kept: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Ascending keys: of each block the places of its `count` largest random numbers, without those that are kept."""
    step = max(1, BLOCKS // inputs)
    columns = kept.view(blocks, -1) - torch.arange(blocks)[:, None] * inputs
    drawn = []
    for start in range(0, blocks, step):
        numbers = torch.rand(min(step, blocks - start), inputs, dtype=torch.float64, generator=source)
        numbers.scatter_(1, columns[start : start + step], NEVER)
        drawn.append(true_places(largest_ranked(numbers, count)).add_(start * inputs))
    return torch.cat(drawn)


def largest_up_to(blocks: int, inputs: int, kept: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Ascending keys: of each block the places of its largest random numbers, as many as it lacks of `count` units.

    Args:
        blocks: the number of blocks.
        inputs: the number of units of a block.
        kept: ascending keys of the units that stay, at most `count` of each block.
        count: the number of units that each block has in the end.
        source: the generator of the random numbers.
    """
    step, drawn = max(1, BLOCKS // inputs), [kept.new_empty(0)]
    ends = counts_below(kept, torch.arange(0, blocks + step, step) * inputs).tolist()
    for piece, start in enumerate(range(0, blocks, step)):
        numbers = torch.rand(min(step, blocks - start), inputs, dtype=torch.float64, generator=source)
        own = kept[ends[piece] : ends[piece + 1]] - start * inputs
        numbers.view(-1).index_fill_(0, own, 1.0)  # above all that are drawn
        taken = largest_ranked(numbers, count)
        drawn.append(true_places(taken.view(-1).index_fill_(0, own, False)).add_(start * inputs))
    return torch.cat(drawn)


def rejected(blocks: int, inputs: int, kept: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Ascending keys of `count` free units in each block, in memory of the live units alone.

    Free units are numbered, and numbers are drawn until so many differ: every choice is equally likely.

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
    numbers = kept.new_empty(0)
    lack = torch.full((blocks,), few)
    # never more than are lacking, so that none has to be taken back
    while lacking := int(lack.sum()):
        begins = torch.repeat_interleave(torch.arange(0, blocks * free, free), lack)
        some = torch.randint(free, (lacking,), generator=source).add_(begins)
        numbers = torch.unique(torch.cat([numbers, some]))
        lack = few - torch.searchsorted(numbers, torch.arange(0, (blocks + 1) * free, free)).diff()
    if few < count:
        numbers = places_without(numbers, blocks * free)
    # the n-th free unit comes after as many kept ones as have at most n free units before them
    before = kept - torch.arange(kept.numel())
    return numbers + torch.searchsorted(before, numbers, right=True)
