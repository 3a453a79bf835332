"""Units of a sparse layer that stay at an update, and where all are found after it.

A unit is one input column of a row, or of a block of rows that read the same inputs. Its key is ``block * inputs +
column``, and keys are always ascending. Results are those of masked storage (`core.ops`), ties and NaN included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_callbacks.core.sparse_layers.quick_places import (
    counts_below,
    fresh,
    largest_places,
    mask_below,
    merged_runs,
    repeated,
    sorts_by_vectors,
    true_places,
)

BELOW_ZERO, NEVER = -1.0, -2.0  # what stands among magnitudes for NaN, and for what cannot be chosen
JOINED_AT_ONCE = 2**17  # units of a piece that fits a core's cache
SHORT = 2**15  # numbers that int16 holds: the fewer bits, the faster their sort
TABLE_BITS = 19  # of a table that fits a core's cache


@dataclass(frozen=True)
class Move:
    """Other units of a layer that live from now on.

    Attributes:
        keys: ascending keys of the units that live from now on, int64.
        slots: where each of these is among those that live now, -1 where it is born, int32.
        leaving: ascending keys of the units that do not stay. Some may come back at once, and keep their slots.
        coming: ascending keys of those that come.
    """

    keys: Tensor
    slots: Tensor
    leaving: Tensor
    coming: Tensor

    @classmethod
    def between(cls, before: Tensor, keys: Tensor, slots: Tensor) -> "Move":
        """The move from the units that live now.

        Args:
            before: their ascending keys.
            keys: as in `Move`.
            slots: as in `Move`.
        """
        born = mask_below(slots, 0)
        stay = slots.index_select(0, true_places(~born)).to(torch.int64)
        leaving = before.index_select(0, places_without(stay, before.numel()))
        return cls(keys, slots, leaving, keys.index_select(0, true_places(born)))


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


def surviving_by_sign(values: Tensor, fraction: float) -> Tensor:
    """Ascending slots of the units that stay where each sign loses its own: int(fraction * count) of the smallest positive
    and as large a share of the largest negative values. An exact zero, and NaN, counts as positive.

    Args:
        values: the value of each unit of one row, in the order of the keys.
        fraction: the share of the units of each sign that leaves.
    """
    negative, kept = mask_below(values, 0), []
    for sign in (true_places(negative), true_places(~negative)):
        count = int(fraction * sign.numel())  # not RigL's product in float32
        kept.append(sign.index_select(0, surviving_units(values.index_select(0, sign).abs(), count)))
    return merged_runs(torch.cat(kept))


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


def merged(keys: Tensor, kept: Tensor, new: Tensor) -> Move:
    """The move of an update. A unit that leaves and comes back in one update keeps its slot.

    Args:
        keys: ascending keys before the update.
        kept: ascending slots of those that stay.
        new: ascending keys that come, none of which stays.
    """
    size = kept.numel() + new.numel()
    joined, slots = fresh(size, torch.int64, keys.device), fresh(size, torch.int32, keys.device)
    # in pieces: what is made in between stays in the cache, and memory fresh from the system costs more than the work
    firsts = torch.arange(0, max(1, keys.numel()), JOINED_AT_ONCE, device=keys.device)
    of_kept = [*counts_below(kept, firsts).tolist(), kept.numel()]
    of_new = [0, *counts_below(new, keys[firsts[1:]]).tolist(), new.numel()]
    leaving = []
    for piece, first in enumerate(firsts.tolist()):
        stay, come = (slice(*ends[piece : piece + 2]) for ends in (of_kept, of_new))
        place = slice(stay.start + come.start, stay.stop + come.stop)
        units = keys[first : first + JOINED_AT_ONCE]
        leaving.append(merge_piece(units, first, kept[stay], new[come], joined[place], slots[place]))
    return Move(joined, slots, torch.cat(leaving), new)


def merge_piece(keys: Tensor, first: int, kept: Tensor, new: Tensor, joined: Tensor, slots: Tensor) -> Tensor:
    """Merge a piece of the keys with the new ones in it, and give the keys of the units that leave.

    Args:
        keys, kept, new: as in `merged`.
        first: the slot of the first key.
        joined: takes the ascending keys after the update.
        slots: takes their slots.
    """
    stay = kept - first
    staying = keys.index_select(0, stay)
    # the bit below each key says whether it comes
    marked = torch.cat([staying, new]).bitwise_left_shift_(1)
    marked[stay.numel() :].bitwise_or_(1)
    marked = merged_runs(marked)
    torch.bitwise_right_shift(marked, 1, out=joined)
    stayed = true_places(marked.to(torch.uint8).bitwise_and_(1) == 0)
    slots.fill_(-1).scatter_(0, stayed, kept.to(torch.int32))
    gone = places_without(stay, keys.numel())
    leaving = keys.index_select(0, gone)
    back, again = places_of_common(leaving, new)
    places = counts_below(staying, new.index_select(0, again)).add_(again)
    slots.scatter_(0, places, gone.index_select(0, back).add_(first).to(torch.int32))
    return leaving


def places_of_common(some: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the numbers that two ascending lists have in common, in both."""
    # a table of the last bits sorts out most, and a search, which is slow, looks for the rest
    last_bits = 2 ** min(TABLE_BITS, (8 * others.numel()).bit_length()) - 1
    table = torch.zeros(last_bits + 1, dtype=torch.bool, device=some.device)
    table.index_fill_(0, others & last_bits, True)
    places = true_places(table.index_select(0, some & last_bits))
    wanted = some.index_select(0, places)
    found = counts_below(others, wanted).clamp_(max=others.numel() - 1)
    same = true_places(others[found] == wanted)
    return places[same], found[same]


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
    rows = repeated(numbers, crow.diff(), keys.numel())
    # modulo 2^32, below which the columns are: products and keys of a large layer are not
    col.copy_(keys).sub_(rows, alpha=inputs)
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
    fill_by_column(col, crow_t, perm)
    torch.index_select(rows, 0, perm, out=col_t)


def fill_by_column(col: Tensor, begins: Tensor, places: Tensor) -> None:
    """Sort columns.

    Args:
        col: the columns, int32.
        begins: takes the number of columns below each one, and of all, int32.
        places: takes the places of the columns in ascending order, equal ones in the order of their places, int32.
    """
    width = begins.numel() - 1
    if sorts_by_vectors(col):
        bits = max(1, col.numel() - 1).bit_length()
        ordered = pairs_of_columns(col, width, bits)
        ordered.numpy().sort()
        torch.bitwise_and(ordered, 2**bits - 1, out=places)
    else:
        # a radix sort, linear in the number of bits
        bits = 0
        ordered, slots = col.to(torch.int16 if width < SHORT else torch.int32).sort(stable=True)
        places.copy_(slots)
    columns = torch.arange(width, dtype=ordered.dtype, device=col.device).bitwise_left_shift_(bits)
    torch.searchsorted(ordered, columns, out_int32=True, out=begins[:-1])
    begins[-1] = col.numel()


def pairs_of_columns(col: Tensor, width: int, bits: int) -> Tensor:
    """Each column with its place in the last ``bits`` as one number, of 32 bits where they fit."""
    pairs = fresh(col.numel(), torch.int32 if width << bits <= 2**31 else torch.int64, col.device)
    numbers = torch.arange(min(col.numel(), JOINED_AT_ONCE), dtype=pairs.dtype, device=col.device)
    for first in range(0, col.numel(), JOINED_AT_ONCE):
        piece = pairs[first : first + JOINED_AT_ONCE].copy_(col[first : first + JOINED_AT_ONCE])
        piece.bitwise_left_shift_(bits).add_(numbers[: piece.numel()]).add_(first)
    return pairs
