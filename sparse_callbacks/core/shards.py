"""How a parameter lies over the processes of a run: the one place to teach about shards."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How one parameter lies over the processes of a run. The tensors of a process are its own part of the parameter.

    Without sharding that part is the whole, and everything here gives back what it is given. Three places ask: the
    selection of the largest magnitudes and the counts of :class:`~sparse_callbacks.core.weights.SparseWeights` add up
    over processes, and random draws are made for the whole and cut to this process's part, so that every process draws
    the same. Elementwise work needs no layout.
    """

    def total(self, count: int) -> int:
        """The sum over processes of a count of this process's positions."""
        return count

    def whole_shape(self, part: Tensor) -> torch.Size:
        """The shape of the whole parameter of which this process holds ``part``."""
        return part.shape

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor that has the shape of the whole parameter."""
        return whole


WHOLE = Layout()


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a parameter, or of a tensor that lies as its parameter does."""
    return WHOLE
