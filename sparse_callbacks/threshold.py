"""Exact selection of the largest magnitudes in linear time: what `ops` does its choosing with.

An evenly spaced sample brackets the threshold. Two comparisons then settle every position outside the bracket, and
histograms of 16 bits of the float at a time find the exact threshold among the few inside. A bracket beside the
threshold is noticed, and the histograms then run over everything: the sample decides the speed, never the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer type by bytes of the float type
_SMALL = 32768  # positions below which a sample costs more than it saves
_SIGMAS = 3.5  # half width of the bracket in standard deviations of the sampled rank: 1 in 2000 misses


@dataclass(frozen=True)
class Part:
    """One tensor of a selection. `flat` and `allowed` are 1-d views in memory order, so no stride is ever copied."""

    magnitude: Tensor
    flat: Tensor
    allowed: Tensor | None

    @classmethod
    def of(cls, values: Tensor, among: Tensor | None) -> Self:
        if not values.is_floating_point() or values.dtype.itemsize not in _BITS:
            raise TypeError(
                f"scores of type {values.dtype} cannot be ranked. Give float16, bfloat16, float32 or float64."
            )
        magnitude = torch.empty_like(values, requires_grad=False)
        torch.abs(values.detach(), out=magnitude)
        if among is not None and among.stride() != magnitude.stride():
            among = torch.empty_like(magnitude, dtype=torch.bool).copy_(among)
        return cls(magnitude, _in_memory_order(magnitude), None if among is None else _in_memory_order(among))

    def size(self) -> int:
        return self.flat.numel() if self.allowed is None else int(self.allowed.count_nonzero())

    def at_least(self, bound: float) -> Tensor:
        """Allowed positions with a magnitude of `bound` or more; never a NaN."""
        found = self.flat >= bound
        return found if self.allowed is None else found.logical_and_(self.allowed)

    def sample(self, stride: int) -> Tensor:
        drawn = self.flat[::stride]
        return drawn if self.allowed is None else drawn[self.allowed[::stride]]

    def first(self, index: Tensor, count: int) -> Tensor:
        """The `count` entries of `index` (ascending, in memory order) that come first in row-major order."""
        if count <= 0 or count >= index.numel():
            return index[: max(count, 0)]
        if self.magnitude.is_contiguous():
            return index[:count]
        row_major = torch.zeros_like(index)
        for size, stride, step in zip(
            self.magnitude.shape, self.magnitude.stride(), _row_major_strides(self.magnitude.shape), strict=True
        ):
            row_major += index.div(stride, rounding_mode="floor").remainder_(size).mul_(step)
        return index[row_major <= row_major.kthvalue(count).values]

    def shaped(self, flat_mask: Tensor) -> Tensor:
        return flat_mask.as_strided(self.magnitude.shape, self.magnitude.stride())


def _row_major_strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _in_memory_order(tensor: Tensor) -> Tensor:
    """1-d view of a tensor without gaps or overlaps, whatever the order of its dimensions in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def select(parts: list[Part], count: int) -> list[Tensor]:
    """Flat masks in memory order with together `count` True positions, those with the largest magnitudes.

    Raises:
        ValueError: `count` is negative or exceeds the positions available.
    """
    available = _available(parts, count)
    if count == 0:
        return [torch.zeros_like(part.flat, dtype=torch.bool) for part in parts]
    place = _locate(parts, count, available)
    if place is None:
        return _fill_with_nan(parts, count)
    need = place.need - sum(int((key > place.threshold).count_nonzero()) for key in place.keys)
    for part, mask, index, key in zip(parts, place.chosen, place.candidates, place.keys, strict=True):
        ties = part.first(index[key == place.threshold], need)
        mask.index_fill_(0, index[key > place.threshold], True).index_fill_(0, ties, True)
        need -= ties.numel()
    return place.chosen


def smallest_selected(parts: list[Part], count: int) -> float:
    """The smallest magnitude that `select` takes, NaN if it takes one; `count` is at least 1. Errors as in `select`."""
    place = _locate(parts, count, _available(parts, count))
    return math.nan if place is None else place.threshold


@dataclass(frozen=True)
class _Place:
    """Where the threshold lies: `chosen` is surely above it, and `need` more come from the `candidates`."""

    chosen: list[Tensor]
    candidates: list[Tensor]
    keys: list[Tensor]
    need: int
    threshold: float


def _available(parts: list[Part], count: int) -> int:
    available = sum(part.size() for part in parts)
    if not 0 <= count <= available:
        raise ValueError(f"count={count} positions cannot be kept: {available} are available. Give 0 to {available}.")
    return available


def _locate(parts: list[Part], count: int, available: int) -> _Place | None:
    """The threshold for `count` (at least 1) positions; None if there are fewer than that without the NaNs."""
    bracket = _bracket(parts, count, available)
    found = _split(parts, *bracket) if bracket else None
    if found is None or not 0 < count - _total(found[0]) <= sum(index.numel() for index in found[1]):
        # no bracket, or one that the sample put beside the threshold: everything but NaN is a candidate
        found = _split(parts, 0.0, None)
    chosen, candidates = found
    need = count - _total(chosen)
    if need > sum(index.numel() for index in candidates):
        return None
    keys = [part.flat.take(index) for part, index in zip(parts, candidates, strict=True)]
    return _Place(chosen, candidates, keys, need, _radix_threshold(keys, need))


def _indices(mask: Tensor) -> Tensor:
    """Indices of the True positions of a 1-d mask, ascending; quick where they are few."""
    if mask.numel() % 8:
        return mask.nonzero().squeeze(1)
    # eight bools are read as one integer: most of these words are 0, and only the others are looked into
    words = mask.view(torch.int64).nonzero().squeeze(1)
    inside = mask.view(-1, 8).index_select(0, words).view(-1).nonzero().squeeze(1)
    return words.index_select(0, inside >> 3).mul_(8).add_(inside & 7)


def _total(masks: list[Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks)


def _bracket(parts: list[Part], count: int, available: int) -> tuple[float, float] | None:
    """Bounds that very likely enclose the threshold, from an evenly spaced sample; None where the parts are small."""
    total = sum(part.flat.numel() for part in parts)
    if total < _SMALL:
        return None
    # a sample of total^(2/3) balances its own cost with the width of the bracket, total / sqrt(sample);
    # the stride is odd, so that it does not stay in one column of a matrix whose width is a power of 2
    sample = torch.cat([part.sample(round(total ** (1 / 3)) | 1) for part in parts])
    size = sample.numel()
    rank = count / available * size
    spread = _SIGMAS * math.sqrt(rank * max(1 - rank / max(size, 1), 0.0)) + 1
    above, below = math.floor(rank - spread), math.ceil(rank + spread)
    high = float(sample.kthvalue(size - above + 1).values) if above >= 1 else math.inf
    low = float(sample.kthvalue(size - below + 1).values) if below <= size else 0.0
    return low, high


def _split(parts: list[Part], low: float, high: float | None) -> tuple[list[Tensor], list[Tensor]]:
    """Masks of the positions at or above `high` (None: no position), indices of those from `low` up to `high`."""
    reached = [part.at_least(low) for part in parts]
    if high is None:
        return [torch.zeros_like(mask) for mask in reached], [_indices(mask) for mask in reached]
    chosen = [part.at_least(high) for part in parts]
    return chosen, [_indices(low_mask.logical_xor_(mask)) for low_mask, mask in zip(reached, chosen, strict=True)]


def _radix_threshold(keys: list[Tensor], rank: int) -> float:
    """The `rank`-th largest (from 1) of non-negative `keys`, by histograms of 16 bits at a time, the highest first.

    The bits of non-negative floats, read as integers, are in the order of the floats.
    """
    bytes_per_key = keys[0].dtype.itemsize
    bits = [key.view(_BITS[bytes_per_key]) for key in keys]
    found = 0
    for shift in range(8 * bytes_per_key - 16, -1, -16):
        # the sign bit is 0, so the highest digit needs no mask (which int16 could not hold)
        digits = [b >> shift if found == 0 and shift == 8 * bytes_per_key - 16 else (b >> shift) & 0xFFFF for b in bits]
        histogram = reduce(Tensor.add_, (torch.bincount(digit, minlength=1 << 16) for digit in digits))
        # first the high 8 bits of the digit, then the low ones: two short running sums in place of a long one
        high, rank = _bucket(histogram.view(256, 256).sum(1), rank)
        low, rank = _bucket(histogram[256 * high : 256 * (high + 1)], rank)
        digit_found = 256 * high + low
        bits = [b[digit == digit_found] for b, digit in zip(bits, digits, strict=True)]
        found = found << 16 | digit_found
    return float(torch.tensor(found, dtype=_BITS[bytes_per_key]).view(keys[0].dtype))


def _bucket(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Bucket of the `rank`-th largest (from 1), and its rank inside this bucket."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    return len(histogram) - 1 - place, rank - int(from_top[place] - histogram[-1 - place])


def _fill_with_nan(parts: list[Part], count: int) -> list[Tensor]:
    """Flat masks of everything but NaN, and of the first NaNs up to `count`."""
    chosen = [part.at_least(0.0) for part in parts]
    need = count - _total(chosen)
    for part, mask in zip(parts, chosen, strict=True):
        left = mask.logical_not() if part.allowed is None else part.allowed & ~mask
        index = part.first(left.nonzero().squeeze(1), need)
        mask.index_fill_(0, index, True)
        need -= index.numel()
    return chosen
