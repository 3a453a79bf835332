"""Pure tensor functions that make masks: the largest magnitudes, drop and grow, counts.

Masks are bool tensors of the shape and memory format of the values they were chosen from. Selection orders positions by
magnitude, then by tensor and row-major index (the earlier wins); NaN ranks below zero, and -0.0 equals 0.0.
"""

import math
import struct
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from sparse_callbacks.core.argument_types import checked_after
from sparse_callbacks.core.largest import Part, refuse_other_shape, select_largest, smallest_selected
from sparse_callbacks.core.shards import WHOLE, count_of, layout_of, lying_as, size_of

__all__ = [
    "drop_and_grow",
    "drop_count",
    "keep_largest",
    "keep_largest_jointly",
    "kth_largest",
    "random_mask",
    "zeros_for",
]

_INDICES = 2**20  # positions that are written together


@checked_after
def zeros_for(sparsity: float, size: int) -> int:
    """Zeros in a tensor of `size` weights at `sparsity`: floor(sparsity * size) in double arithmetic.

    Args:
        sparsity: fraction of zeros, in [0, 1].
        size: number of weights.

    Raises:
        ValueError: the product is not a finite number.

    >>> zeros_for(0.9, 10), zeros_for(1 - 0.9, 10)
    (9, 0)
    """
    # no correction for rounding errors: the reference code of RigL has none either, and counts are to be the same
    zeros = sparsity * size
    if not math.isfinite(zeros):
        raise ValueError(f"sparsity={sparsity!r} of size={size!r} weights is not a number of zeros. Give 0 to 1.")
    return math.floor(zeros)


def _as_float32(value: float) -> float:
    # rounds as a tensor of one element would, without making one
    return float(struct.unpack("f", struct.pack("f", value))[0])


@checked_after
def drop_count(active: int, fraction: float) -> int:
    """Connections to drop out of `active`: the product in float32, truncated (RigL's reference code).

    Args:
        active: number of active connections.
        fraction: fraction of them that is dropped, in [0, 1].

    Raises:
        ValueError: the product is infinite, or above what float32 holds.

    >>> drop_count(100, 0.29)  # 28 in double arithmetic
    29
    """
    try:
        return int(_as_float32(_as_float32(active) * _as_float32(fraction)))
    except OverflowError:  # infinite, or above what float32 holds
        raise ValueError(
            f"fraction={fraction!r} of active={active!r} connections is too large. Give a fraction from 0 to 1."
        ) from None


@checked_after
def keep_largest(values: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Mask of exactly `count` positions with the largest magnitude.

    Of equal magnitudes the lower row-major index wins, whatever the strides. Linear in the size, never a sort.

    Args:
        values: scores of any shape, strides and float type; their sign does not matter.
        count: positions to keep.
        among: bool, of the shape of `values`; only its True positions can be kept, also where their value is 0.

    Raises:
        ValueError: `count` is negative or exceeds the positions available, or `among` is of another shape.
        TypeError: `values` are not floats.

    >>> keep_largest(torch.tensor([0.5, -2.0, 0.5, 0.0]), 2)
    tensor([ True,  True, False, False])
    """
    return _keep(Part.of(values, among), count)


def _keep(part: Part, count: int) -> Tensor:
    return lying_as(part.shaped(select_largest([part], count)[0]), part.layout)


@checked_after
def keep_largest_jointly(
    values: Sequence[Tensor], count: int, least: int = 0, among: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Masks of together exactly `count` positions, under one threshold over all tensors and without joining them.

    Of equal magnitudes the earlier tensor, then the lower row-major index wins. Each tensor keeps its `least` largest
    whatever the threshold, or all that it has. Errors as in `keep_largest`.

    Args:
        values: scores of any shape, strides and float type; their sign does not matter.
        count: positions to keep in all of them together.
        least: positions that each tensor keeps at least.
        among: bool, one for each of `values` and of its shape; only their True positions can be kept. None: all.

    Returns:
        A mask for each of `values`, in their order.

    Raises:
        ValueError: `count` is negative, exceeds the positions available or leaves a tensor without its `least`, or `among` has
            another number of tensors or other shapes than `values`.
        TypeError: `values` are not floats.

    >>> keep_largest_jointly([torch.tensor([3.0, 2.0]), torch.tensor([0.1, 0.2])], 2, least=1)
    [tensor([ True, False]), tensor([False,  True])]
    """
    if among is not None and len(among) != len(values):
        raise ValueError(f"among= has {len(among)} tensors, and values= has {len(values)}. Give one for each.")
    allowed: Sequence[Tensor | None] = [None] * len(values) if among is None else among
    masks = _jointly(values, count, allowed)
    if not least:
        return masks
    floors = [min(least, size_of(v) if a is None else count_of(a)) for v, a in zip(values, allowed, strict=True)]
    short = {i for i, mask in enumerate(masks) if count_of(mask) < floors[i]}
    if not short:
        return masks
    # These tensors get their least and leave the competition. The others then share fewer positions, which may leave
    # one of them short in turn, so all is repeated among them.
    own = {i: keep_largest(values[i], floors[i], allowed[i]) for i in short}
    others = [i for i in range(len(values)) if i not in short]
    left = count - sum(floors[i] for i in short)
    rest = iter(
        keep_largest_jointly(
            [values[i] for i in others], left, least, None if among is None else [among[i] for i in others]
        )
    )
    return [own[i] if i in short else next(rest) for i in range(len(values))]


def _jointly(values: Sequence[Tensor], count: int, allowed: Sequence[Tensor | None]) -> list[Tensor]:
    # bits compare only within one type; widening is exact. `reduce` needs a first type also where there are no tensors.
    common = reduce(
        torch.promote_types, (tensor.dtype for tensor in values), torch.float16 if not values else values[0].dtype
    )
    parts = [
        Part.of(lying_as(tensor.to(common), layout_of(tensor)), among)
        for tensor, among in zip(values, allowed, strict=True)
    ]
    return [
        lying_as(part.shaped(mask), part.layout) for part, mask in zip(parts, select_largest(parts, count), strict=True)
    ]


@checked_after
def kth_largest(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest magnitude (from 1), exact, 0-d; NaN where only NaN is left at that rank.

    Args:
        values: numbers of any shape, strides and float type; their sign does not matter.
        count: the rank, 1 for the largest.

    Raises:
        ValueError: `count` is not between 1 and the size of `values`.
    """
    if count < 1:
        raise ValueError(f"count={count} has no magnitude: ranks start at 1, the largest. Give 1 to {values.numel()}.")
    return values.new_tensor(smallest_selected([Part.of(values, None)], count))


@checked_after
def drop_and_grow(mask: Tensor, drop: Tensor, grow: Tensor, count: int) -> Tensor:
    """New mask with as many active positions: `count` of them leave and `count` come (RigL, Evci et al. 2020, alg. 1).

    Kept are the active positions with the largest |drop|; grown those with the largest |grow| among all that were not
    kept, so what was just dropped can come straight back.

    Args:
        mask: bool, the active positions.
        drop: scores by which active positions are kept, such as the weights, of the shape of `mask`. The result has their memory
            format.
        grow: scores by which positions are grown, such as the dense gradient, of the shape of `mask`.
        count: positions to move, at most the active ones.

    Raises:
        ValueError: `count` is negative or exceeds the active positions, or a score has another shape than the mask.
    """
    for name, score in (("drop", drop), ("grow", grow)):
        refuse_other_shape(name, score, mask)
    # counted once: `available` below spares a pass over each mask, and on a GPU a wait for its result
    here = int(mask.count_nonzero())
    layout = layout_of(drop)
    active = layout.total(here)
    if not 0 <= count <= active:
        raise ValueError(f"count={count} connections cannot move: the mask has {active} active. Give 0 to {active}.")
    kept = _keep(Part.of(drop, mask, available=here), active - count)
    # among ~kept and not ~mask, so that what was dropped can come back; in place, because nobody else holds `kept`
    free = mask.numel() - (active - count) if layout is WHOLE else None
    return kept.logical_or_(_keep(Part.of(grow, ~kept, available=free), count))


@checked_after
def random_mask(shape: Sequence[int], count: int, generator: torch.Generator | None = None) -> Tensor:
    """Mask of `shape` with exactly `count` True, every choice equally likely; on the generator's device.

    Args:
        shape: shape of the mask.
        count: number of positions that are True.
        generator: source of the random numbers; None: torch's own on the CPU.

    Raises:
        ValueError: `count` is negative or exceeds the size.
    """
    size = math.prod(shape)
    if not 0 <= count <= size:
        raise ValueError(f"count={count} positions cannot be drawn from {size}. Give 0 to {size}.")
    device = "cpu" if generator is None else generator.device
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    # on a CPU permutations of both types are the same numbers, and the shorter type takes half the memory
    short = torch.device(device).type == "cpu" and size < 2**31
    # a permutation: random numbers under a threshold would not give an exact count
    order = torch.randperm(size, generator=generator, device=device, dtype=torch.int32 if short else torch.int64)
    for chosen in torch.split(order[:count], _INDICES):  # torch makes int64 of what it takes for an index
        mask[chosen] = True
    return mask.reshape(tuple(shape))
