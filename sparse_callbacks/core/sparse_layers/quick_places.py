"""Places in flat tensors: of True, of the largest; sorted, merged and repeated numbers.

numpy does all of this several times as fast as torch, and is used where somebody has imported it: results are the same. Large
results of numpy also come in huge pages of the system where it has them, which are there in a tenth of the time.
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


def others_above(numbers: Tensor, bound: int, left_out: Tensor, first: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The places, ascending, and the values of numbers above a bound, without those that are left out.

    Args:
        numbers: a piece of all numbers: integers below 2^53 and not negative, int64.
        bound: at least -1.
        left_out: ascending places that do not count.
        first: the place of the first number of the piece.
        mask: as many bools, which are overwritten: to fill fresh memory for each piece costs more than the rest.
    """
    if (numpy := numpy_for(numbers)) is not None:
        flat, above = numbers.numpy(), mask.numpy()
        if bound >= 2**52:
            # floats with the same bits have the same order and are compared twice as fast. Below the bound they may be
            # denormal, and compare as 0 where the processor is told to flush them; the bound itself is not.
            numpy.greater(flat.view(numpy.float64), numpy.int64(bound).view(numpy.float64), out=above)
        else:
            numpy.greater(flat, bound, out=above)
        above[left_out.numpy() - first] = False
        places = above.nonzero()[0]
        values = torch.from_numpy(flat[places])
        places += first
        return torch.from_numpy(places), values
    found = torch.gt(numbers, bound, out=mask).index_fill_(0, left_out - first, False).nonzero().squeeze(1)
    return found + first, numbers.index_select(0, found)


def mask_below(numbers: Tensor, bound: float) -> Tensor:
    """Which numbers are below a bound."""
    if (numpy := numpy_for(numbers)) is not None:
        return torch.from_numpy(numpy.less(numbers.numpy(), bound))
    return numbers < bound


def counts_below(ascending: Tensor, wanted: Tensor) -> Tensor:
    """How many of the ascending numbers are below each of the wanted ones."""
    if (numpy := numpy_for(ascending)) is not None:
        return torch.from_numpy(numpy.searchsorted(ascending.numpy(), wanted.numpy()))
    return torch.searchsorted(ascending, wanted)


def fresh(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for so many numbers, which are not set."""
    empty = torch.empty(0, dtype=dtype, device=device)
    if (numpy := numpy_for(empty)) is not None:
        return torch.from_numpy(numpy.empty(size, empty.numpy().dtype))
    return empty.new_empty(size)


def repeated(numbers: Tensor, times: Tensor, size: int) -> Tensor:
    """Each number as often as ``times`` says, one behind the other, ``size`` in all."""
    if (numpy := numpy_for(numbers)) is not None:
        return torch.from_numpy(numpy.repeat(numbers.numpy(), times.numpy()))
    return torch.repeat_interleave(numbers, times, output_size=size)


def merged_runs(numbers: Tensor) -> Tensor:
    """Numbers that are two ascending lists, one behind the other, in ascending order; written in place where it is quicker."""
    if numpy_for(numbers) is not None:
        numbers.numpy().sort(kind="stable")  # timsort, which merges two ascending lists in linear time
        return numbers
    return numbers.sort().values


def sorts_by_vectors(numbers: Tensor) -> bool:
    """Whether numpy sorts these integers several at a time."""
    numpy = numpy_for(numbers)
    return numpy is not None and int(numpy.__version__.partition(".")[0]) >= 2


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
