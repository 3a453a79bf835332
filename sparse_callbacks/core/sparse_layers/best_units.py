"""The units with the largest scores, of scores that come in blocks."""

import torch
from torch import Tensor

from sparse_callbacks.core.sparse_layers.moved_places import BELOW_ZERO, NEVER, largest_ranked
from sparse_callbacks.core.sparse_layers.quick_places import largest_places, places_above, true_places

HELD = 4  # times as many units as are wanted, at which all but the largest are let go


class Best:
    """The units with the largest scores so far, held in memory of a few times their number.

    Args:
        count: the number of units.
        bound: scores above it are looked at; all are where it is None.
    """

    def __init__(self, count: int, bound: float | None) -> None:
        self.count, self.bound, self.held = count, bound, 0
        self.found: list[tuple[Tensor, Tensor]] = []

    @property
    def enough(self) -> bool:
        """Whether so many units were found."""
        return self.held >= self.count

    def add(self, scores: Tensor, kept: Tensor, first: int) -> None:
        """Look at further units, whose keys follow those of the last.

        Args:
            scores: not negative; written to.
            kept: places in the scores that cannot grow.
            first: the key of the first score.
        """
        flat = scores.view(-1)
        if self.bound is None:
            free = torch.ones(flat.shape, dtype=torch.bool, device=flat.device)
            places = true_places(free.index_fill_(0, kept, False))
        else:
            # an equal score further on loses against those that are held; NaN is above nothing
            places = places_above(flat.index_fill_(0, kept, NEVER), self.bound)
        self.found.append((places + first, flat.index_select(0, places)))
        self.held += places.numel()
        if self.held > HELD * self.count:
            self.shrink()

    def shrink(self) -> None:
        """Leave all but the largest, and look at no smaller ones any more."""
        keys, scores = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        largest = largest_places(scores, self.count)
        keys, scores = keys.index_select(0, largest), scores.index_select(0, largest)
        self.found, self.held = [(keys, scores)], self.count
        self.bound = float(scores.nan_to_num(BELOW_ZERO, torch.inf).min())

    def keys(self) -> Tensor:
        """Their ascending keys."""
        self.shrink()
        return self.found[0][0]


class BestOfBlocks:
    """The same for blocks that choose by themselves.

    Args:
        count: the number of units of each block.
        full: whether ``count`` are those that each block has in the end, with what it keeps.
    """

    def __init__(self, count: int, full: bool = False) -> None:
        self.count, self.full, self.enough = count, full, True
        self.found: list[Tensor] = []

    def add(self, scores: Tensor, kept: Tensor, first: int) -> None:
        """Look at whole blocks; as in `Best`."""
        # what is kept comes before any score, or is none to choose
        ranked = scores.nan_to_num_(BELOW_ZERO, torch.finfo(scores.dtype).max if self.full else torch.inf)
        ranked.view(-1).index_fill_(0, kept, torch.inf if self.full else NEVER)
        taken = largest_ranked(ranked, self.count)
        self.found.append(true_places(taken.view(-1).index_fill_(0, kept, False)).add_(first))

    def keys(self) -> Tensor:
        """Their ascending keys."""
        return torch.cat(self.found)
