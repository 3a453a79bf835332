"""Units of a sparse layer that stay at an update, and where all are found after it.

A unit is one input column of a row, or of a block of rows that read the same inputs. Its key is ``block * inputs +
column``, and keys are always ascending. Results are those of masked storage (`core.ops`), ties and NaN included.
"""

import torch
from torch import Tensor

from sparse_callbacks.core.sparse_layers.quick_places import joined_ascending, largest_places, true_places

BELOW_ZERO, NEVER = -1.0, -2.0  # what stands among magnitudes for NaN, and for what cannot be chosen
JOINED_AT_ONCE = 2**17  # units of a piece that fits a core's cache
SHORT = 2**15  # numbers that int16 holds: the fewer bits, the faster their sort


def surviving_units(magnitudes: Tensor, count: int, per_block: int | None = None) -> Tensor:
    """Ascending slots of the units that stay: all but the `count` with the smallest magnitude.

    Args:
        magnitudes: the score of each unit to stay, in the order of the keys.
        count: the number of units that leave; of each block where ``per_block`` is given.
        per_block: the number of units in each block, where every block loses its own.

    Raises:
        ValueError: `count` is negative or exceeds the units.
    """
    if per_block is None:
        return largest_places(magnitudes, magnitudes.numel() - count)
    ranked = magnitudes.view(-1, per_block).nan_to_num(BELOW_ZERO, torch.inf)
    return true_places(largest_ranked(ranked, per_block - count))


def largest_ranked(ranked: Tensor, count: int) -> Tensor:
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
    joined = torch.empty(kept.numel() + new.numel(), dtype=torch.int64, device=keys.device)
    slots = torch.empty_like(joined)
    # in pieces: what is made in between stays in the cache, and memory fresh from the system costs more than the work
    firsts = torch.arange(0, max(1, keys.numel()), JOINED_AT_ONCE, device=keys.device)
    of_kept = [*torch.searchsorted(kept, firsts).tolist(), kept.numel()]
    of_new = [0, *torch.searchsorted(new, keys[firsts[1:]]).tolist(), new.numel()]
    for piece, first in enumerate(firsts.tolist()):
        stay, come = (slice(*ends[piece : piece + 2]) for ends in (of_kept, of_new))
        place = slice(stay.start + come.start, stay.stop + come.stop)
        merge_piece(keys[first : first + JOINED_AT_ONCE], first, kept[stay], new[come], joined[place], slots[place])
    return joined, slots


def merge_piece(keys: Tensor, first: int, kept: Tensor, new: Tensor, joined: Tensor, slots: Tensor) -> None:
    """Write the joined keys and their slots of a piece of the keys, of which ``first`` is the slot of the first."""
    stay = kept - first
    ascending, order = joined_ascending(keys.index_select(0, stay), new)
    joined.copy_(ascending)
    torch.index_select(torch.cat([kept, slots_of_new(keys, first, stay, new)]), 0, order, out=slots)


def slots_of_new(keys: Tensor, first: int, stay: Tensor, new: Tensor) -> Tensor:
    """The slots of new keys that come back in the update in which they leave, -1 for the others.

    Args:
        keys: ascending keys before the update.
        first: the slot of the first of them.
        stay: ascending places of those that stay.
        new: ascending keys that come, none of which stays.
    """
    gone = places_without(stay, keys.numel())
    ascending, order = joined_ascending(keys.index_select(0, gone), new)
    back = true_places(ascending[1:] == ascending[:-1])
    slots = torch.full_like(new, -1)
    slots[order[back + 1] - gone.numel()] = gone[order[back]] + first
    return slots


def slots_at(keys: Tensor, first: int, wanted: Tensor, before: Tensor) -> Tensor:
    """The slots of the wanted keys, -1 for those that are none of the ascending ``keys``.

    Args:
        keys: ascending keys.
        first: the slot of the first of them.
        wanted: keys that are looked for.
        before: the number of keys below each of them.
    """
    if not keys.numel():
        return torch.full_like(wanted, -1)
    found = before.clamp(max=keys.numel() - 1)
    other = keys.index_select(0, found) != wanted
    # or with -1, all of whose bits are set: several times as fast as a fill of random places
    return found.add_(first).bitwise_or_(other.to(torch.int64).neg_())


def places_without(places: Tensor, size: int) -> Tensor:
    """The numbers below ``size`` that are none of ``places``, ascending."""
    others = torch.ones(size, dtype=torch.bool, device=places.device)
    return true_places(others.index_fill_(0, places, False))


def fill_rows(keys: Tensor, inputs: int, crow: Tensor, col: Tensor) -> Tensor:
    """Write the compressed rows of ascending keys, and give the row of each key, int32.

    Args:
        keys: ascending keys.
        inputs: the number of columns.
        crow: takes the number of keys before each row, int32.
        col: takes their columns, int32.
    """
    begins = torch.arange(crow.numel(), device=keys.device) * inputs
    torch.searchsorted(keys, begins, out_int32=True, out=crow)
    numbers = torch.arange(crow.numel() - 1, dtype=torch.int32, device=keys.device)
    rows = torch.repeat_interleave(numbers, crow.diff(), output_size=keys.numel())
    # modulo 2^32, below which the columns are: products and keys of a large layer are not
    torch.mul(rows, inputs, out=col).neg_().add_(keys.to(torch.int32))
    return rows


def fill_columns(rows: Tensor, col: Tensor, crow_t: Tensor, col_t: Tensor, perm: Tensor) -> None:
    """Write the compressed columns of a matrix in compressed rows.

    Args:
        rows: the row of each live weight, ascending, int32.
        col: its column.
        crow_t: takes the number of weights before each column, int32.
        col_t: takes the row of each weight, by column, int32.
        perm: takes its slot in the compressed rows, int32.
    """
    slots = by_column(col, crow_t)
    torch.index_select(rows, 0, slots, out=col_t)
    perm.copy_(slots)


def by_column(col: Tensor, crow_t: Tensor) -> Tensor:
    """The places of columns in ascending order, equal ones in the order of their places; and where each begins, in ``crow_t``."""
    short = torch.int16 if crow_t.numel() <= SHORT else torch.int32
    # a radix sort, linear in the number of bits
    ordered, places = col.to(short).sort(stable=True)
    columns = torch.arange(crow_t.numel(), dtype=short, device=col.device)
    torch.searchsorted(ordered, columns, out_int32=True, out=crow_t)
    return places
