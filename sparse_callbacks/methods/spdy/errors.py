"""What pruning a layer by magnitude is taken to spoil, at each level of sparsity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_callbacks.core.ops import zeros_for

UNRESOLVED = 12  # of the 23 bits of a mantissa, so that intervals of magnitudes are 0.05 % wide


def magnitude_errors(weight: Tensor, levels: Sequence[float]) -> list[float]:
    """Share of a layer's squared weights that is removed at each level: the smallest floor(s * n) magnitudes go.

    For inputs x with uncorrelated entries of one variance v, the output W x changes by an expected squared norm of
    v * \\|\\|W - W_s\\|\\|^2, which is this share of its own, v * \\|\\|W\\|\\|^2. Layers whose outputs are normalised pass
    relative changes on, and to first order their squares add up if they are uncorrelated.

    Args:
        weight: the weight of one layer, of any shape.
        levels: sparsities in [0, 1).

    Returns:
        Numbers from 0 to 1, which ascend with the sparsity; all 0 where every weight is 0.

    >>> magnitude_errors(torch.tensor([1.0, -2.0, 0.0, 2.0]), [0.0, 0.5, 0.75])
    [0.0, 0.1111111111111111, 0.5555555555555556]
    """
    magnitudes = weight.detach().to("cpu").flatten().abs()
    zeros = len(magnitudes) - int(magnitudes.count_nonzero())
    live = magnitudes[magnitudes != 0] if zeros else magnitudes  # zeros leave first, and nothing goes with them
    removed = [max(0, zeros_for(s, len(magnitudes)) - zeros) for s in levels]
    *sums, total = sums_of_smallest(live, [*removed, len(live)])
    return [found / total if total else 0.0 for found in sums]


def sums_of_smallest(magnitudes: Tensor, counts: Sequence[int]) -> list[float]:
    """The sum of the squares of so many of the smallest ``magnitudes``, for each of ``counts``, in float64 on the CPU.

    Those alone are sorted that lie near to one of the limits: to sort all takes three times as long.

    Args:
        magnitudes: 1-d, on the CPU.
        counts: from 0 to their number.
    """
    # the bits of a float that is not negative ascend with it; the first of them are a fine scale of magnitudes
    interval = magnitudes.float().view(torch.int32) >> UNRESOLVED
    interval = interval - interval.amin() if len(interval) else interval
    sizes = torch.bincount(interval, minlength=1)
    sums = torch.bincount(interval, magnitudes.double().square(), minlength=len(sizes))
    until, limits = sizes.cumsum(0), torch.tensor(counts)
    split = torch.searchsorted(until, limits)  # the interval in which each limit lies
    is_split = torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, split, True)
    within = magnitudes[is_split[interval]].double().sort().values.square()
    # sums begin anew in each interval, as what is small before a large sum loses digits
    starts = torch.where(is_split, sizes, 0).cumsum(0) - sizes
    before = (until - sizes)[split].tolist()
    below = torch.cat([sums.new_zeros(1), sums.cumsum(0)])[split].tolist()
    return [
        whole + float(within[start : start + count - seen].sum())
        for whole, start, count, seen in zip(below, starts[split].tolist(), counts, before, strict=True)
    ]


def index_errors(levels: int) -> list[float]:
    """(i / (levels - 1))^2 for the level with index i: the error that SPDY gives every layer, before its coefficient.

    >>> index_errors(3)
    [0.0, 0.25, 1.0]
    """
    return [(i / max(1, levels - 1)) ** 2 for i in range(levels)]
