"""Which units of a sparse layer stay at an update, and where the others are found after it: pure functions of keys.

A unit is one input column of a row, or of a block of rows that read the same inputs. Its key is ``block * inputs +
column``, and keys are always ascending. Results are those of masked storage (`core.ops`), ties and NaN included.
"""

import torch
from torch import Tensor

from sparse_callbacks.core.ops import keep_largest


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
        return keep_largest(magnitudes, magnitudes.numel() - count).nonzero().squeeze(1)
    stay = largest_in_rows(magnitudes.view(-1, per_block), per_block - count)
    return stay.view(-1).nonzero().squeeze(1)


def largest_in_rows(scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Mask of the `count` largest magnitudes of each row; of equal ones the lower column wins, NaN ranks below zero.

    Args:
        scores: ``[rows, columns]``.
        count: the number of positions of each row.
        among: bool, of the shape of the scores; only its True positions can be chosen.

    Raises:
        ValueError: `count` is negative, or exceeds the positions of a row.
    """
    available = scores.shape[1] if among is None else int(among.sum(1).min()) if len(scores) else count
    if not 0 <= count <= available:
        raise ValueError(f"count={count} of a row cannot be chosen from {available}. Give 0 to {available}.")
    ranked = scores.abs().nan_to_num_(-1.0, torch.inf)
    if among is not None:
        ranked.masked_fill_(~among, -2.0)
    # a stable sort leaves equal magnitudes in the order of their columns
    order = ranked.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def merged(keys: Tensor, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The ascending keys after an update, and the slots that they had before it, -1 for those that are born.

    A unit that leaves and comes back in one update has its slot.

    Args:
        keys: ascending keys before the update.
        kept: ascending slots of those that stay.
        new: ascending keys that come, none of which stays.
    """
    before = torch.searchsorted(keys, new)
    found = before.clamp(max=max(keys.numel() - 1, 0))
    back = found.masked_fill(keys[found] != new, -1) if keys.numel() else torch.full_like(new, -1)
    # the number of kept units below each new one, from the number of all units below it
    stays = torch.zeros(keys.numel() + 1, dtype=torch.int64, device=keys.device)
    stays[kept + 1] = 1
    place = stays.cumsum_(0)[before].add_(torch.arange(new.numel(), device=keys.device))
    is_new = torch.zeros(kept.numel() + new.numel(), dtype=torch.bool, device=keys.device)
    is_new[place] = True
    slots = torch.empty(is_new.shape, dtype=torch.int64, device=keys.device)
    slots[place] = back
    slots.masked_scatter_(~is_new, kept)
    joined = torch.empty_like(slots)
    joined[place] = new
    joined.masked_scatter_(~is_new, keys[kept])
    return joined, slots


def transposed(rows: Tensor, col: Tensor, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The compressed columns of a matrix in compressed rows: ``crow_t``, ``col_t`` and ``perm``, int32.

    Args:
        rows: the row of each live weight, ascending.
        col: its column.
        inputs: the number of columns.
    """
    perm = torch.argsort(col, stable=True)
    counts = torch.zeros(inputs + 1, dtype=torch.int32, device=col.device)
    if col.numel():
        counts[1:] = torch.bincount(col, minlength=inputs)
    return counts.cumsum(0, dtype=torch.int32), rows[perm].to(torch.int32), perm.to(torch.int32)
