"""Inputs of other sizes, on which code that goes by sizes shows."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.inspection import map_tensors, tensors_in


def other_sizes(sample: Any) -> Iterator[list[Any]]:
    """Inputs like ``sample`` with one other size, alternatives in a list: first the batch, then each other.

    A size becomes larger, by one or twice as large, then half as large, and 1. It is changed in every dimension that has it;
    more entries repeat those that there are, fewer are the first of them.
    """
    shapes_in = [t.shape for t in tensors_in(sample) if t.ndim]
    batches = sorted({s[0] for s in shapes_in})
    others = sorted({size for s in shapes_in for size in s[1:]}, reverse=True)
    for chosen, size in [*((_is_first, b) for b in batches), *((_is_behind, s) for s in others)]:
        smaller = [[n] for n in dict.fromkeys((size // 2, 1)) if 0 < n < size]
        for alternatives in ([*dict.fromkeys((size + 1, 2 * size))], *smaller):
            yield [map_tensors(partial(_resized, chosen=chosen, size=size, new=n), sample) for n in alternatives]


def _is_first(dim: int) -> bool:
    return dim == 0


def _is_behind(dim: int) -> bool:
    return dim > 0


def _resized(tensor: Tensor, chosen: Callable[[int], bool], size: int, new: int) -> Tensor:
    if not size:
        return tensor
    for dim in (d for d in range(tensor.ndim) if chosen(d) and tensor.shape[d] == size):
        tensor = tensor.index_select(dim, torch.arange(new, device=tensor.device) % size)
    return tensor
