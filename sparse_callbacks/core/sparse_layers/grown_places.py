"""Units of a sparse layer with the largest gradients, in row blocks or among candidates."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_callbacks.core.ops import keep_largest
from sparse_callbacks.core.patterns import block_sums, column_sums
from sparse_callbacks.core.sparse_layers.best_units import Best, BestOfBlocks
from sparse_callbacks.core.sparse_layers.drawn_places import drawn_units, refuse_more_than_free
from sparse_callbacks.core.sparse_layers.moved_places import BELOW_ZERO, largest_ranked
from sparse_callbacks.core.sparse_layers.quick_places import true_places
from sparse_callbacks.core.sparse_layers.sparse_kernels import add_sampled
from sparse_callbacks.core.sparse_layers.unit_gradients import UnitGradients

LOOKED_AT = 2**20  # entries of a row block of the dense gradient, which stay in a core's cache
ENTRIES = 2**22  # of one that is summed over processes: fewer and larger messages
SAMPLE = 2**16  # entries of the gradient from which a bound is guessed
SPARE = 2  # times as many as are needed are expected above the bound, since rows and columns differ in scale

Pairs = Sequence[tuple[Tensor, Tensor]]
Reduce = Callable[[Tensor], Tensor]


def largest_units(
    records: Pairs,
    shape: tuple[int, int],
    group: int,
    kept: Tensor,
    count: int,
    *,
    dtype: torch.dtype,
    per_block: bool = False,
    full: bool = False,
    reduce: Reduce | None = None,
    direct: UnitGradients | None = None,
) -> Tensor:
    """Ascending keys of the `count` units with the largest dense gradient outside of those that are kept.

    The gradient is made in row blocks and never as a whole. That of a unit is the sum of its rows' magnitudes.

    Args:
        records: inputs ``[inputs, width]`` and output gradients ``[outputs, width]`` of the layer's backward passes.
        shape: the number of outputs and of inputs.
        group: the number of rows in a block.
        kept: ascending keys of the units that stay; as many of each block with ``per_block``.
        count: the number of units; of each block with ``per_block``.
        dtype: the type of the gradient.
        per_block: whether each block gets its own `count` units.
        full: whether each block gets as many units as it lacks of `count`, whatever it keeps.
        reduce: sums a row block of the gradient over processes, and is called as often in each; None for one process.
        direct: what this process adds to the gradient of single units; None where it adds nothing.

    Raises:
        ValueError: `count` is negative or exceeds the units that are free.
    """
    blocks, inputs = shape[0] // group, shape[1]
    free = inputs - kept.numel() // max(1, blocks) if per_block else blocks * inputs - kept.numel()
    refuse_more_than_free(count, inputs if full else free)
    if not count:
        return kept.new_empty(0)
    if per_block or full:
        best: Best | BestOfBlocks = BestOfBlocks(count, full)
    else:
        best = Best(count, probable_bound(records, shape, count, dtype, reduce, kept.device))
    look_at_all(best, records, shape, group, kept, dtype, reduce, direct)
    if not best.enough:
        best = Best(count, None)
        look_at_all(best, records, shape, group, kept, dtype, reduce, direct)
    return best.keys()


def look_at_all(
    best: Best | BestOfBlocks,
    records: Pairs,
    shape: tuple[int, int],
    group: int,
    kept: Tensor,
    dtype: torch.dtype,
    reduce: Reduce | None,
    direct: UnitGradients | None,
) -> None:
    """Let ``best`` look at the scores of all units, in row blocks."""
    blocks, inputs = shape[0] // group, shape[1]
    rows = max(1, (LOOKED_AT if reduce is None else ENTRIES) // max(1, group * inputs))
    ends = torch.searchsorted(kept, torch.arange(0, blocks + rows, rows, device=kept.device) * inputs).tolist()
    buffer = torch.empty(min(rows, blocks) * group, inputs, dtype=dtype, device=kept.device)
    for number, start in enumerate(range(0, blocks, rows)):
        stop = min(start + rows, blocks)
        gradient = buffer[: (stop - start) * group]
        gradient = row_block(records, slice(start * group, stop * group), gradient, reduce, direct)
        scores = gradient.abs_() if group == 1 else column_sums(gradient, group)
        best.add(scores, kept[ends[number] : ends[number + 1]] - start * inputs, start * inputs)


def row_block(
    records: Pairs, rows: slice, into: Tensor, reduce: Reduce | None, direct: UnitGradients | None = None
) -> Tensor:
    """Some rows of the dense gradient."""
    into.zero_()
    for x, dy in records:
        if dy.dtype is into.dtype:
            into.addmm_(dy[rows], x.t())
        else:
            into.add_(dy[rows] @ x.t())
    if direct is not None:
        direct.add_to(into, rows.start)
    return into if reduce is None else reduce(into)


def probable_bound(
    records: Pairs,
    shape: tuple[int, int],
    count: int,
    dtype: torch.dtype,
    reduce: Reduce | None,
    device: torch.device,
) -> float | None:
    """A magnitude that likely more than `count` of the gradient exceed, from a grid of rows and columns.

    None where the gradient is so small that all of it can be held.
    """
    size = shape[0] * shape[1]
    if size <= SAMPLE:
        return None
    # odd strides, so that they do not stay in one column of an image
    stride = math.ceil(math.sqrt(size / SAMPLE)) | 1
    grid = [(x[::stride], dy[::stride]) for x, dy in records]
    rows, columns = (-(-length // stride) for length in shape)
    into = torch.empty(rows, columns, dtype=dtype, device=device)
    sample = row_block(grid, slice(0, rows), into, reduce).abs_().nan_to_num_(BELOW_ZERO, torch.inf).view(-1)
    expected = SPARE * count / size * len(sample)
    # three standard deviations more, since few of the sample say little
    rank = math.ceil(expected + 3 * math.sqrt(expected)) + 1
    return None if rank > len(sample) else float(sample.kthvalue(len(sample) + 1 - rank).values)


def candidate_units(
    records: Pairs,
    shape: tuple[int, int],
    group: int,
    kept: Tensor,
    count: int,
    candidates: int,
    source: torch.Generator,
    *,
    dtype: torch.dtype,
    per_block: bool = False,
    reduce: Reduce | None = None,
    direct: UnitGradients | None = None,
) -> Tensor:
    """Ascending keys of the `count` units with the largest gradient among randomly drawn ones.

    Args:
        records, shape, group, kept, count, dtype, per_block, reduce, direct: as in `largest_units`.
        candidates: the number of units that are drawn outside of those that stay; of each block with ``per_block``.
        source: the generator of the draw.

    Raises:
        ValueError: `count` exceeds the candidates, or `candidates` the units that are free.
    """
    blocks, inputs = shape[0] // group, shape[1]
    drawn = drawn_units((blocks, inputs), kept, candidates, source, per_block)
    if not per_block:
        gradient = gradient_of_keys(records, drawn, shape, dtype)
        gradient = gradient if direct is None else gradient + direct.at(drawn)[:, 0]
        gradient = gradient if reduce is None else reduce(gradient)
        return drawn[true_places(keep_largest(gradient, count))]
    columns = drawn.view(blocks, -1) - torch.arange(blocks, device=drawn.device)[:, None] * inputs
    gradients = gradient_of_columns(records, columns, group, dtype)
    if direct is not None:
        gradients += direct.at(drawn).view(blocks, -1, group).transpose(1, 2)
    gradients = gradients if reduce is None else reduce(gradients)
    ranked = block_sums(gradients).nan_to_num_(BELOW_ZERO, torch.inf)
    return drawn[true_places(largest_ranked(ranked, count))]


def gradient_of_keys(records: Pairs, keys: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The gradient at ascending keys of single weights."""
    outputs, inputs = shape
    crow = torch.searchsorted(keys, torch.arange(outputs + 1, device=keys.device) * inputs)
    rows = torch.repeat_interleave(torch.arange(outputs, device=keys.device), crow.diff())
    col = (keys - rows * inputs).to(torch.int32)
    total = torch.zeros(keys.numel(), dtype=dtype, device=keys.device)
    for x, dy in records:
        add_sampled(crow.to(torch.int32), col, dy.to(dtype), x.to(dtype), total)
    return total


def gradient_of_columns(records: Pairs, columns: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The gradient of each block of rows at columns of its own: ``[blocks, group, columns]``."""
    blocks, chosen = columns.shape
    total = torch.zeros(blocks, group, chosen, dtype=dtype, device=columns.device)
    for x, dy in records:
        inputs = x.index_select(0, columns.flatten()).view(blocks, chosen, -1)
        total += torch.bmm(dy.view(blocks, group, -1), inputs.transpose(1, 2))
    return total
