"""Which units of a sparse layer stay at an update, and where the others are found after it: pure functions of keys.

A unit is one input column of a row, or of a block of rows that read the same inputs. Its key is ``block * inputs +
column``, and keys are always ascending. Results are those of masked storage (`core.ops`), ties and NaN included.
"""

import sys

import torch
from torch import Tensor

from sparse_callbacks.core.ops import keep_largest

BELOW_ZERO, NEVER = -1.0, -2.0  # what stands among magnitudes for NaN, and for what cannot be chosen
SHORT = 2**15  # numbers that int16 holds: the fewer bits, the faster their sort


def kept_units(magnitudes: Tensor, count: int, per_block: int | None = None) -> Tensor:
    """Ascending slots of the units that stay: all but the `count` with the smallest magnitude.

    Args:
        magnitudes: the score of each unit to stay, in the order of the keys.
        count: the number of units that leave; of each block where ``per_block`` is given.
        per_block: the number of units in each block, where every block loses its own.

    Raises:
        ValueError: `count` is negative or exceeds the units.
    """
    if per_block is None:
        return true_places(keep_largest(magnitudes, magnitudes.numel() - count))
    ranked = magnitudes.view(-1, per_block).nan_to_num(BELOW_ZERO, torch.inf)
    return true_places(largest_in_rows(ranked, per_block - count))


def largest_in_rows(ranked: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest numbers of each row; of equal ones the lower column wins.

    Args:
        ranked: ``[rows, columns]``, without NaN.
        count: the number of positions of each row.

    Raises:
        ValueError: `count` is negative or exceeds the columns.
    """
    if not 0 <= count <= ranked.shape[1]:
        raise ValueError(f"count={count} positions cannot be kept: a row has {ranked.shape[1]}.")
    if not count or not len(ranked):
        return torch.zeros_like(ranked, dtype=torch.bool)
    least = ranked.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = ranked > least, ranked == least
    need = count - above.sum(1, keepdim=True)
    return above.logical_or_(equal.logical_and_(equal.cumsum(1, dtype=torch.int32) <= need))


def merged(keys: Tensor, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The ascending keys after an update, and the slots that they had before it, -1 for those that are born.

    A unit that leaves and comes back in one update has its slot.

    Args:
        keys: ascending keys before the update.
        kept: ascending slots of those that stay.
        new: ascending keys that come, none of which stays.
    """
    # only what comes is searched for; what stays is counted
    before = torch.searchsorted(keys, new)
    stays = torch.zeros(keys.numel() + 1, dtype=torch.int32, device=keys.device)
    stays[1:].index_fill_(0, kept, 1)
    places = stays.cumsum_(0).index_select(0, before) + torch.arange(new.numel(), device=keys.device)
    others = places_without(places, kept.numel() + new.numel())
    joined = torch.empty(others.numel() + places.numel(), dtype=torch.int64, device=keys.device)
    slots = torch.empty_like(joined)
    joined.scatter_(0, places, new).scatter_(0, others, keys.index_select(0, kept))
    slots.scatter_(0, places, slots_at(keys, new, before)).scatter_(0, others, kept)
    return joined, slots


def slots_at(keys: Tensor, wanted: Tensor, before: Tensor) -> Tensor:
    """The slots of the wanted keys, -1 for those that are none of the ascending ``keys``.

    Args:
        keys: ascending keys.
        wanted: keys that are looked for.
        before: the number of keys below each of them.
    """
    if not keys.numel():
        return torch.full_like(wanted, -1)
    found = before.clamp(max=keys.numel() - 1)
    other = keys.index_select(0, found) != wanted
    # or with -1, all of whose bits are set: several times as fast as a fill of random places
    return found.bitwise_or_(other.to(torch.int64).neg_())


def places_without(places: Tensor, size: int) -> Tensor:
    """The numbers below ``size`` that are none of ``places``, ascending."""
    others = torch.ones(size, dtype=torch.bool, device=places.device)
    return true_places(others.index_fill_(0, places, False))


def compressed(keys: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The compressed rows of ascending keys: ``crow``, ``col`` and the row of each key, int32."""
    begins = torch.arange(outputs + 1, device=keys.device) * inputs
    crow = torch.searchsorted(keys, begins)
    lengths = crow.diff()
    col = (keys - torch.repeat_interleave(begins[:-1], lengths)).to(torch.int32)
    rows = torch.arange(outputs, dtype=torch.int32, device=keys.device)
    return crow.to(torch.int32), col, torch.repeat_interleave(rows, lengths)


def transposed(rows: Tensor, col: Tensor, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The compressed columns of a matrix in compressed rows: ``crow_t``, ``col_t`` and ``perm``, int32.

    Args:
        rows: the row of each live weight, ascending, int32.
        col: its column.
        inputs: the number of columns.
    """
    short = torch.int16 if inputs < SHORT else torch.int32
    # a radix sort, linear in the number of bits
    ordered, perm = col.to(short).sort(stable=True)
    crow_t = torch.searchsorted(ordered, torch.arange(inputs + 1, dtype=short, device=col.device), out_int32=True)
    return crow_t, rows.index_select(0, perm), perm.to(torch.int32)


def true_places(mask: Tensor) -> Tensor:
    """The row-major places of a mask's True, ascending."""
    # five times as fast as torch where somebody has imported it: this package does not need numpy
    if mask.device.type == "cpu" and (numpy := sys.modules.get("numpy")) is not None:
        return torch.from_numpy(numpy.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().squeeze(1)
