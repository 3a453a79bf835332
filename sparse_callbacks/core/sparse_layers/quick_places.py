"""Places in flat tensors: of True, of what exceeds a bound, of the largest, and how many are below.

numpy does all of this several times as fast as torch, and is used where somebody has imported it: results are the same.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.ops import keep_largest

SMALL = 8192  # numbers below which a sample costs more than it saves
SIGMAS = 3.0  # half width of the bracket in standard deviations of the sampled rank


def numpy_for(tensor: Tensor) -> Any:
    """The module numpy, where it is imported and can read the tensor; else None."""
    # this package does not need numpy, which has no bfloat16
    readable = tensor.device.type == "cpu" and tensor.dtype is not torch.bfloat16
    return sys.modules.get("numpy") if readable else None


def true_places(mask: Tensor) -> Tensor:
    """The row-major places of a mask's True, ascending."""
    if (numpy := numpy_for(mask)) is not None:
        return torch.from_numpy(numpy.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().squeeze(1)


def places_above(numbers: Tensor, bound: float) -> Tensor:
    """The places of numbers above a bound, ascending; NaN is above nothing."""
    if (numpy := numpy_for(numbers)) is not None:
        return torch.from_numpy(numpy.flatnonzero(numpy.greater(numbers.numpy(), bound)))
    return (numbers > bound).nonzero().squeeze(1)


def counts_below(ascending: Tensor, wanted: Tensor) -> Tensor:
    """How many of the ascending numbers are below each of the wanted ones."""
    if (numpy := numpy_for(ascending)) is not None:
        return torch.from_numpy(numpy.searchsorted(ascending.numpy(), wanted.numpy()))
    return torch.searchsorted(ascending, wanted)


def joined_ascending(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of two ascending lists as one, and where each is in them, one behind the other; equal ones of the first
    come first."""
    both = torch.cat([first, second])
    if (numpy := numpy_for(both)) is not None:
        # timsort, which merges two ascending lists in linear time
        order = torch.from_numpy(numpy.argsort(both.numpy(), kind="stable"))
    else:
        order = both.argsort(stable=True)
    return both.index_select(0, order), order


def largest_places(scores: Tensor, count: int) -> Tensor:
    """Ascending places of the `count` largest of scores that are not negative; ties and NaN as in `keep_largest`.

    Raises:
        ValueError: `count` is negative or exceeds the scores.
    """
    size = scores.numel()
    if (numpy := numpy_for(scores)) is not None and size > SMALL and 0 < count < size:
        flat, least = scores.numpy(), _least_of_largest(scores, count, numpy)
        places = numpy.flatnonzero(flat >= least)
        surplus = len(places) - count
        if surplus > 0:
            # of equal scores the last ones are too many
            equal = numpy.flatnonzero(flat[places] == least)
            places = numpy.delete(places, equal[-surplus:])
        if surplus >= 0:
            return torch.from_numpy(places)
    # the bracket was beside the threshold, or NaN is among the largest
    return true_places(keep_largest(scores, count))


def _least_of_largest(scores: Tensor, count: int, numpy: Any) -> float:
    """The `count`-th largest score, found in a bracket around that of a sample; inf where it is not inside."""
    size, flat = scores.numel(), scores.numpy()
    sample = flat[:: round(size ** (1 / 3)) | 1].copy()
    sample.sort()
    rank = (1 - count / size) * len(sample)
    spread = SIGMAS * math.sqrt(rank * count / size) + 1
    first, last = math.floor(rank - spread), math.ceil(rank + spread)
    low = sample[first] if first >= 0 else 0.0
    high = sample[last] if last < len(sample) else math.inf
    inside = flat[numpy.flatnonzero((flat >= low) & (flat <= high))]
    need = count - int(numpy.count_nonzero(flat > high))
    if not 1 <= need <= len(inside):
        return math.inf
    return float(numpy.partition(inside, len(inside) - need)[len(inside) - need])
