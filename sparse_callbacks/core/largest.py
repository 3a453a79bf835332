"""Exact selection of the largest magnitudes in linear time.

An evenly spaced sample brackets the threshold. One pass in pieces that stay in cache counts what is above the bracket
and collects the few magnitudes inside it; the exact threshold is found among these. A bracket beside the threshold is
noticed, and everything is then collected: the sample decides the speed, never the result.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sparse_callbacks.core import sharded_selection
from sparse_callbacks.core.shards import Layout, Shards, layout_of

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_SMALL = 8192  # positions below which a sample costs more than it saves
_SIGMAS = 3.0  # half width of the bracket in standard deviations of the sampled rank: 1 in 400 misses
_CACHED = 1 << 18  # positions of a piece: three float buffers of it fit a core's cache
_COUNTABLE = 1 << 24  # positions of a piece elsewhere: float32 counts exactly up to here
_FEW = 1 << 16  # numbers up to which a selection beats histograms
_ROW = 16  # positions that are skipped together where none of them is inside the bracket


@dataclass(frozen=True)
class Part:
    """One tensor of a selection. `flat` and `allowed` are 1-d views in memory order, of the layout `like`."""

    flat: Tensor
    allowed: Tensor | None
    size: int
    like: Tensor
    layout: Layout

    @classmethod
    def of(cls, values: Tensor, among: Tensor | None, available: int | None = None) -> Self:
        """`available`: the True positions in `among`, where they are known."""
        if not values.is_floating_point() or values.dtype.itemsize < 2:
            raise TypeError(
                f"scores of type {values.dtype} cannot be ranked. Give float16, bfloat16, float32 or float64."
            )
        like = torch.empty_like(values, dtype=torch.bool, requires_grad=False, device="meta")
        flat = _in_memory_order(values.detach(), like)
        if among is None:
            return cls(flat, None, flat.numel(), like, layout_of(values))
        refuse_other_shape("among", among, values)
        size = int(among.count_nonzero()) if available is None else available
        return cls(flat, _in_memory_order(among, like), size, like, layout_of(values))

    def buffer(self) -> Tensor:
        """Room for a piece and a row, in the type of the magnitudes."""
        return self.flat.new_empty(min(_piece(self.flat), self.flat.numel()) + _ROW, dtype=widened(self.flat.dtype))

    def pieces(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Each piece, its size, and a buffer that begins with its magnitudes until the next piece."""
        buffer = self.buffer()
        for start in range(0, self.flat.numel(), _piece(self.flat)):
            values = self.flat[start : start + _piece(self.flat)].to(buffer.dtype)
            torch.abs(values, out=buffer[: values.numel()])
            yield slice(start, start + values.numel()), values.numel(), buffer

    def compare(self, relation: Callable[..., Tensor], bound: float) -> Tensor:
        """Allowed positions whose magnitude is in `relation` (torch.ge, torch.eq) to `bound`."""
        found = torch.empty_like(self.flat, dtype=torch.bool)
        flags = self.buffer()
        for piece, size, magnitude in self.pieces():
            # a comparison that writes floats, turned to bools, is twice as fast as one that writes bools
            found[piece] = relation(magnitude[:size], bound, out=flags[:size])
        return found if self.allowed is None else found.logical_and_(self.allowed)

    def sample(self, stride: int) -> Tensor:
        """Every `stride`-th allowed magnitude; NaN as -1, since it ranks below zero."""
        drawn = self.flat[::stride].abs().to(widened(self.flat.dtype)).nan_to_num_(-1.0, math.inf)
        return drawn if self.allowed is None else drawn[self.allowed[::stride]]

    def first(self, index: Tensor, count: int) -> Tensor:
        """The `count` entries of `index` (ascending, in memory order) that come first in row-major order."""
        if count <= 0 or count >= index.numel():
            return index[: max(count, 0)]
        if self.like.is_contiguous():
            return index[:count]
        row_major = torch.zeros_like(index)
        for dim, (size, stride) in enumerate(zip(self.like.shape, self.like.stride(), strict=True)):
            row_major += (
                index.div(stride, rounding_mode="floor").remainder_(size).mul_(math.prod(self.like.shape[dim + 1 :]))
            )
        return index[row_major <= row_major.topk(count, largest=False, sorted=False).values.max()]

    def keys(self) -> Tensor:
        """See :func:`~sparse_callbacks.core.sharded_selection.ranked`."""
        allowed = None if self.allowed is None else self.shaped(self.allowed)
        return sharded_selection.ranked(self.shaped(self.flat), allowed)

    def in_memory_order(self, row_major: Tensor) -> Tensor:
        """A flat mask in row-major order, in the order of this tensor's memory."""
        return _in_memory_order(row_major.view(self.like.shape), self.like)

    def shaped(self, flat_mask: Tensor) -> Tensor:
        return flat_mask.as_strided(self.like.shape, self.like.stride())


def refuse_other_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    """Refuse an argument whose shape is not that of ``like``."""
    if tensor.shape != like.shape:
        shape, other = list(tensor.shape), list(like.shape)
        raise ValueError(f"{name}=<tensor {shape}> has another shape than {other}. Give one for every position.")


def _in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """1-d view of `tensor` in the order of `like`, whose memory has no gaps; of a copy where the strides differ."""
    if tensor.stride() != like.stride():
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32 or float64 for a floating-point type: types of 16 bits, which float32 holds exactly, are slower and too
    coarse for sums."""
    return torch.promote_types(dtype, torch.float32)


def _piece(tensor: Tensor) -> int:
    return _CACHED if tensor.device.type == "cpu" else _COUNTABLE


def select_largest(parts: list[Part], count: int) -> list[Tensor]:
    """Flat masks in memory order with together `count` True positions, those with the largest magnitudes.

    Raises:
        ValueError: `count` is negative or exceeds the positions available.
    """
    if layouts := _shards_of(parts):
        masks = sharded_selection.largest_in_shards([part.keys() for part in parts], layouts, count)
        return [part.in_memory_order(mask) for part, mask in zip(parts, masks, strict=True)]
    available = _available(parts, count)
    if count == 0:
        return [torch.zeros_like(part.flat, dtype=torch.bool) for part in parts]
    place = _locate(parts, count, available)
    if place is None:
        return _fill_with_nan(parts, count)
    masks = [part.compare(torch.ge, place.threshold) for part in parts]
    if place.surplus:
        ties = [part.compare(torch.eq, place.threshold).nonzero().squeeze(1) for part in parts]
        need = sum(index.numel() for index in ties) - place.surplus
        for part, mask, index in zip(parts, masks, ties, strict=True):
            kept = part.first(index, need)
            mask.index_fill_(0, index, False).index_fill_(0, kept, True)
            need -= kept.numel()
    return masks


def smallest_selected(parts: list[Part], count: int) -> float:
    """The smallest magnitude that `select_largest` takes, NaN if it takes one; `count` is at least 1. Errors as in
    `select_largest`."""
    if layouts := _shards_of(parts):
        found = sharded_selection.locate([part.keys() for part in parts], layouts, count)
        return math.nan if found is None else sharded_selection.magnitude(found, parts[0].flat.dtype)
    place = _locate(parts, count, _available(parts, count))
    return math.nan if place is None else place.threshold


@dataclass(frozen=True)
class _Place:
    """The exact threshold, and by how much the positions at or above it exceed the count: that many ties must go."""

    threshold: float
    surplus: int


def _shards_of(parts: list[Part]) -> list[Shards]:
    """How the tensors lie over processes; none where they are whole."""
    return [part.layout for part in parts if isinstance(part.layout, Shards)]


def _available(parts: list[Part], count: int) -> int:
    available = sum(part.size for part in parts)
    sharded_selection.refuse_count(count, available)
    return available


def _locate(parts: list[Part], count: int, available: int) -> _Place | None:
    """The threshold for `count` (at least 1) positions; None if there are fewer than that without the NaNs."""
    low, high = _bracket(parts, count, available)
    above, inside = _scan(parts, low, high)
    if not 0 < count - above <= inside.numel():
        # the sample put the bracket beside the threshold: look at everything on that side
        above, inside = _scan(parts, high, math.inf) if count <= above else _scan(parts, 0.0, low)
    need = count - above
    if need > inside.numel():
        return None
    threshold = _kth_largest(inside, need)
    return _Place(threshold, int((inside >= threshold).count_nonzero()) - need)


def _bracket(parts: list[Part], count: int, available: int) -> tuple[float, float]:
    """Bounds that very likely enclose the threshold, from an evenly spaced sample; (0, inf) where the parts are
    small."""
    total = sum(part.flat.numel() for part in parts)
    if total < _SMALL:
        return 0.0, math.inf
    # a sample in proportion to total^(2/3) balances its own cost with the width of the bracket, total / sqrt(sample);
    # the stride is odd, so that it does not stay in one column of a matrix whose width is a power of 2
    sample = torch.cat([part.sample(round(total ** (1 / 3) / 2) | 1) for part in parts])
    size = sample.numel()
    rank = count / available * size
    spread = _SIGMAS * math.sqrt(rank * max(1 - rank / max(size, 1), 0.0)) + 1
    above, below = math.floor(rank - spread), math.ceil(rank + spread)
    largest = sample.topk(min(below, size), sorted=False).values
    high = float(largest.topk(above, sorted=False).values.min()) if above >= 1 else math.inf
    return float(largest.min()) if below <= size else 0.0, high


def _scan(parts: list[Part], low: float, high: float) -> tuple[int, Tensor]:
    """How many allowed magnitudes are above `high`, and those from `low` to `high`, both included, as one tensor."""
    above, inside = 0, [parts[0].buffer()[:0]]
    for part in parts:
        reached, beyond, factor = part.buffer(), part.buffer(), part.buffer()
        ones = reached.new_ones(_ROW)
        for piece, size, magnitude in part.pieces():
            torch.ge(magnitude[:size], low, out=reached[:size])
            torch.gt(magnitude[:size], high, out=beyond[:size])
            reached[:size].sub_(beyond[:size])
            if part.allowed is not None:
                # bytes turn to floats seven times as fast as bools do
                beyond[:size].mul_(factor[:size].copy_(part.allowed[piece].view(torch.uint8)))
            above += int(beyond[:size].sum())
            # only rows with a magnitude inside are looked into; the last one is filled up with zeros
            flags, values, factors = (_rows(buffer, size) for buffer in (reached, magnitude, factor))
            rows = flags.mv(ones).nonzero().squeeze(1)
            found = flags.index_select(0, rows)
            if part.allowed is not None:
                found.mul_(factors.index_select(0, rows))
            inside.append(values.index_select(0, rows)[found.bool()])
    return above, torch.cat(inside)


def _rows(buffer: Tensor, size: int) -> Tensor:
    """The first `size` positions in rows, after them zeros."""
    filled = -(-size // _ROW) * _ROW
    buffer[size:filled] = 0
    return buffer[:filled].view(-1, _ROW)


def _kth_largest(keys: Tensor, rank: int) -> float:
    """The `rank`-th largest (from 1) of non-negative `keys`."""
    if keys.numel() <= _FEW:
        return float(keys.topk(rank, sorted=False).values.min())  # kthvalue refuses to be deterministic on a GPU
    return _radix_kth_largest(keys, rank)


def _radix_kth_largest(keys: Tensor, rank: int) -> float:
    """The same, by histograms of 16 bits at a time from the highest: the bits of such floats, as integers, are in their
    order."""
    width = 8 * keys.dtype.itemsize
    bits = keys.view(_BITS[keys.dtype])
    found = 0
    for shift in range(width - 16, -1, -16):
        # the sign bit is 0, so the highest digit needs no mask
        digits = bits >> shift if shift == width - 16 else (bits >> shift) & 0xFFFF
        histogram = torch.bincount(digits, minlength=1 << 16)
        # first the high 8 bits of the digit, then the low ones: two short running sums in place of a long one
        high, rank = _bucket(histogram.view(256, 256).sum(1), rank)
        low, rank = _bucket(histogram[256 * high : 256 * (high + 1)], rank)
        digit = 256 * high + low
        bits = bits[digits == digit]
        found = found << 16 | digit
    return float(torch.tensor(found, dtype=bits.dtype).view(keys.dtype))


def _bucket(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Bucket of the `rank`-th largest (from 1), and its rank inside this bucket."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    return len(histogram) - 1 - place, rank - int(from_top[place] - histogram[-1 - place])


def _fill_with_nan(parts: list[Part], count: int) -> list[Tensor]:
    """Flat masks of everything but NaN, and of the first NaNs up to `count`."""
    masks = [part.compare(torch.ge, 0.0) for part in parts]
    need = count - sum(int(mask.count_nonzero()) for mask in masks)
    for part, mask in zip(parts, masks, strict=True):
        left = mask.logical_not() if part.allowed is None else part.allowed & ~mask
        index = part.first(left.nonzero().squeeze(1), need)
        mask.index_fill_(0, index, True)
        need -= index.numel()
    return masks
