"""Units of a sparse layer with the largest gradients, found in row blocks of the dense gradient or among candidates."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_callbacks.core.drawn_places import drawn_units
from sparse_callbacks.core.moved_places import largest_in_rows
from sparse_callbacks.core.ops import keep_largest

ENTRIES = 2**22  # of a row block of the dense gradient

Records = Sequence[tuple[Tensor, Tensor]]


def largest_units(
    records: Records,
    shape: tuple[int, int],
    group: int,
    kept: Tensor,
    count: int,
    *,
    dtype: torch.dtype,
    per_block: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Ascending keys of the `count` units with the largest dense gradient outside of those that are kept.

    The gradient is made in row blocks and never as a whole. Of a block of rows it is the sum of magnitudes.

    Args:
        records: inputs ``[inputs, width]`` and output gradients ``[outputs, width]`` of the layer's backward passes.
        shape: the number of outputs and of inputs.
        group: the number of rows in a block.
        kept: ascending keys of the units that stay.
        count: the number of units; of each block with ``per_block``.
        dtype: the type of the gradient.
        per_block: whether each block gets its own `count` units.
        reduce: sums a row block of the gradient over processes, and is called as often in each; None for one process.

    Raises:
        ValueError: `count` is negative or exceeds the units that are free.
    """
    blocks, inputs = shape[0] // group, shape[1]
    free_units = blocks * inputs - kept.numel()
    if not per_block and not 0 <= count <= free_units:
        raise ValueError(f"count={count} units cannot grow: {free_units} are free. Give 0 to {free_units}.")
    step = max(1, ENTRIES // max(1, group * inputs))
    keys, values = kept.new_empty(0), torch.empty(0, dtype=dtype, device=kept.device)
    least = -1.0
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        scores = block_scores(records, slice(start * group, stop * group), inputs, group, dtype, reduce, kept.device)
        first, last = torch.searchsorted(
            kept, torch.tensor([start * inputs, stop * inputs], device=kept.device)
        ).tolist()
        free = torch.ones(scores.numel(), dtype=torch.bool, device=kept.device)
        free[kept[first:last] - start * inputs] = False
        if per_block:
            found = largest_in_rows(scores, count, free.view(scores.shape)).view(-1).nonzero().squeeze(1)
            keys = torch.cat([keys, found + start * inputs])
            continue
        if values.numel() >= count:
            # an equal magnitude further on loses; NaN is above nothing
            free &= scores.view(-1) > least
        found = free.nonzero().squeeze(1)
        keys, values = torch.cat([keys, found + start * inputs]), torch.cat([values, scores.view(-1)[found]])
        if values.numel() >= count:
            largest = keep_largest(values, count)
            keys, values = keys[largest], values[largest]
            least = float(values.nan_to_num(-1.0, torch.inf).min()) if count else torch.inf
    return keys


def block_scores(
    records: Records,
    rows: slice,
    inputs: int,
    group: int,
    dtype: torch.dtype,
    reduce: Callable[[Tensor], Tensor] | None,
    device: torch.device,
) -> Tensor:
    """Magnitudes of the dense gradient in some rows, summed over the rows of each block: ``[blocks, inputs]``."""
    gradient = torch.zeros(rows.stop - rows.start, inputs, dtype=dtype, device=device)
    for x, dy in records:
        gradient += dy[rows] @ x.t()
    if reduce is not None:
        gradient = reduce(gradient)
    magnitudes = gradient.abs_()
    return magnitudes if group == 1 else magnitudes.view(-1, group, inputs).sum(1)


def candidate_units(
    records: Records,
    shape: tuple[int, int],
    group: int,
    kept: Tensor,
    count: int,
    candidates: int,
    source: torch.Generator,
    *,
    dtype: torch.dtype,
    per_block: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Ascending keys of the `count` units with the largest gradient among randomly drawn ones.

    Args:
        candidates: the number of units that are drawn outside of those that stay; of each block with ``per_block``.
        source: the generator of the draw.
        records, shape, group, kept, count, dtype, per_block, reduce: as in `largest_units`.
    """
    blocks = shape[0] // group
    drawn = drawn_units((blocks, shape[1]), kept, candidates, source, per_block)
    scores = unit_scores(records, drawn, shape[1], group, dtype, reduce)
    if per_block:
        return drawn[largest_in_rows(scores.view(blocks, -1), count).view(-1)]
    return drawn[keep_largest(scores, count)]


def unit_scores(
    records: Records,
    keys: Tensor,
    inputs: int,
    group: int,
    dtype: torch.dtype,
    reduce: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Magnitudes of the gradient of some units, each summed over its rows."""
    blocks = torch.div(keys, inputs, rounding_mode="floor")
    columns = keys - blocks * inputs
    total = torch.zeros(keys.numel(), group, dtype=dtype, device=keys.device)
    for x, dy in records:
        for start in range(0, keys.numel(), step := max(1, ENTRIES // (group * x.shape[1]))):
            some = slice(start, start + step)
            dys = dy.view(-1, group, dy.shape[1])[blocks[some]]
            total[some] += torch.bmm(dys, x[columns[some], :, None]).squeeze(2)
    if reduce is not None:
        total = reduce(total)
    return total.abs_().sum(1)
