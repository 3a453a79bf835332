"""Uniform random patterns of a given fan-in, drawn in the memory of their live places."""

import torch
from torch import Tensor

DRAWN = 2**19  # entries of a block of rows, drawn at a time


def fan_in_columns(blocks: int, inputs: int, fan_in: int, source: torch.Generator | None) -> Tensor:
    """Ascending columns of ``fan_in`` different inputs for each of ``blocks`` rows, each set of inputs equally likely.

    Args:
        blocks: The number of rows.
        inputs: The number of inputs to choose from.
        fan_in: How many of them each row reads.
        source: The random generator, on the CPU; torch's own where it is None.

    Returns:
        int32 ``[blocks, fan_in]``.
    """
    columns = torch.empty(blocks, fan_in, dtype=torch.int32, device="cpu")
    if not fan_in:
        return columns
    # where many places are live, looking at all of them is faster than drawing until they fit
    dense = 4 * fan_in > inputs
    draw = chosen_of_all if dense else drawn_apart
    step = max(1, DRAWN // max(1, inputs if dense else fan_in))
    for start in range(0, blocks, step):
        rows = min(step, blocks - start)
        columns[start : start + rows] = draw(rows, inputs, fan_in, source)
    return columns


def chosen_of_all(rows: int, inputs: int, fan_in: int, source: torch.Generator | None) -> Tensor:
    """Ascending columns: of each row those of its ``fan_in`` largest random numbers."""
    keys = torch.rand(rows, inputs, dtype=torch.float64, generator=source, device="cpu")
    return keys.topk(fan_in, dim=1, sorted=False).indices.sort(dim=1).values


def drawn_apart(rows: int, inputs: int, fan_in: int, source: torch.Generator | None) -> Tensor:
    """Ascending columns: repeated ones are drawn again until all of a row differ.

    The first occurrence of each stays. What is drawn again is uniform over the others, so each set is equally likely.
    """
    columns = torch.randint(inputs, (rows, fan_in), dtype=torch.int32, generator=source, device="cpu")
    unsettled = torch.arange(rows, device="cpu")
    while unsettled.numel():
        some = columns[unsettled].sort(dim=1).values
        repeated = torch.zeros_like(some, dtype=torch.bool)
        repeated[:, 1:] = some[:, 1:] == some[:, :-1]
        again = torch.randint(inputs, (int(repeated.sum()),), dtype=torch.int32, generator=source, device="cpu")
        columns[unsettled] = some.masked_scatter_(repeated, again)
        unsettled = unsettled[repeated.any(1)]
    return columns
