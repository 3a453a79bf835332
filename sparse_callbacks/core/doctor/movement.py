"""Updates of masks that change nothing: no weight is replaced, none learns, or all that grow go."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.packed_bits import count_of_bits, packed, unpacked
from sparse_callbacks.core.sparse_layers.moved_places import Move

IN_A_ROW = 3
"""Updates in a row after which something is taken for a rule."""
POOLED = 5
"""Updates over which the fate of grown weights is measured."""
LOST = 0.87
"""Share of grown weights that are dropped by the next update from which on the interval is too short."""


class StuckMasks:
    """Counts updates in a row that were to replace weights and have replaced none.

    Those late on a falling curve are left out, where the fraction is below half of the largest so far: there little is to be
    replaced.
    """

    def __init__(self) -> None:
        self._largest, self._row = 0.0, 0

    def look(self, changed: float, figures: Mapping[str, Any]) -> str:
        """An update is over: why masks are stuck, as the beginning of a sentence; empty where they are not.

        Args:
            changed: the share of connections that it has replaced.
            figures: figures of the update, of methods that drop and grow with ``update/drop_fraction``.
        """
        fraction = float(figures.get("update/drop_fraction", 0.0))
        self._largest = max(self._largest, fraction)
        if not fraction or fraction < self._largest / 2:
            return ""
        self._row = 0 if changed else self._row + 1
        if self._row < IN_A_ROW:
            return ""
        return f"the last {self._row} updates have replaced no weight, though drop_fraction is {fraction:.3g}"


class StandingWeights:
    """Counts updates in a row that moved masks while the learning rate was 0, by the index of the optimizer."""

    def __init__(self) -> None:
        self._row: dict[int, int] = {}

    def look(self, index: int, optimizer: Optimizer, changed: float) -> str:
        """An update is over: how long weights have stood still, as the beginning of a sentence; empty where they move.

        Args:
            index: number of the optimizer.
            optimizer: the optimizer of the layers that were updated.
            changed: the share of connections that the update has replaced.
        """
        stands = all(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)  # an optimizer may have none
        if not stands:
            self._row[index] = 0
        elif changed:
            self._row[index] = self._row.get(index, 0) + 1
        if not stands or self._row.get(index, 0) < IN_A_ROW:
            return ""
        return f"the last {self._row[index]} updates moved masks while the learning rate was 0"


class GrownWeights:
    """Measures which share of the weights that an update grows is dropped by the next one.

    Grown weights start at zero, and the next update drops the smallest: with too few steps in between, those that were just
    grown are the smallest whatever they are worth, and the rest of the mask never changes. Asked about intervals alone that
    are shorter than any that this package chooses by itself: after longer ones weights may go that were of no use. Held is a
    bit for each weight under a mask, and for each unit of an exchanged layer.
    """

    def __init__(self) -> None:
        self._grown: dict[str, Tensor] = {}
        self._lost = self._there = 0
        self._shares: deque[tuple[int, int]] = deque(maxlen=POOLED)

    def masked(self, name: str, before: Tensor, after: Tensor) -> None:
        """An update has given a parameter another mask."""
        old, new = packed(before), packed(after)
        if (grown := self._grown.get(name)) is not None and grown.shape == old.shape:
            self._count(count_of_bits(grown & ~new), count_of_bits(grown))
        self._grown[name] = new & ~old

    def moved(self, name: str, move: Move) -> None:
        """An update has moved units of an exchanged layer. Its places are counted here, and nothing of it is kept."""
        born = packed(move.slots < 0)
        if (grown := self._grown.get(name)) is not None and grown.shape == born.shape:
            # of a unit that is born, slot -1, another one is read, and does not count
            stay = packed(unpacked(grown, move.slots.numel()).index_select(0, move.slots.clamp_min(0))) & ~born
            there = count_of_bits(grown)
            self._count(there - count_of_bits(stay), there)
        self._grown[name] = born

    def _count(self, lost: int, there: int) -> None:
        self._lost, self._there = self._lost + lost, self._there + there

    def look(self, fraction: float) -> str:
        """An update is over: what has become of weights that were grown before, as the beginning of a sentence; empty where
        enough of them stay.

        Args:
            fraction: the share of active weights that the update replaces; of a large one grown weights must expect to go.
        """
        lost, there, self._lost, self._there = self._lost, self._there, 0, 0
        if there:
            self._shares.append((lost, there))
        lost, there = (sum(column) for column in zip(*self._shares, strict=True)) if self._shares else (0, 0)
        if len(self._shares) < POOLED or lost < LOST * there or fraction > LOST / 2:
            return ""
        return f"of the weights that the last updates have grown, {lost / there:.0%} were dropped by the very next one"
