"""Gradients of single units of a sparse layer, which no product of a batch gives."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnitGradients:
    """Gradients of some units; those of all others are 0.

    Attributes:
        keys: ascending keys of the units.
        gradients: ``[units, group]``, of each row of a unit.
        inputs: the number of columns of the matrix.
    """

    keys: Tensor
    gradients: Tensor
    inputs: int

    def add_to(self, rows: Tensor, first: int) -> None:
        """Add them to some rows of the dense gradient.

        Args:
            rows: ``[rows, inputs]``, whole blocks of rows, contiguous.
            first: the number of the first row.
        """
        group = self.gradients.shape[1]
        begin, end = first // group * self.inputs, (first + len(rows)) // group * self.inputs
        bounds = torch.tensor([begin, end], device=self.keys.device)
        some = slice(*torch.searchsorted(self.keys, bounds).tolist())
        blocks, columns = (
            (self.keys[some] - begin).div(self.inputs, rounding_mode="floor"),
            self.keys[some] % self.inputs,
        )
        rows.view(-1, group, self.inputs)[blocks, :, columns] += self.gradients[some].to(rows.dtype)

    def at(self, keys: Tensor) -> Tensor:
        """The gradients of the units with these keys: ``[keys, group]``."""
        if not self.keys.numel():
            return self.gradients.new_zeros(keys.numel(), self.gradients.shape[1])
        found = torch.searchsorted(self.keys, keys).clamp_(max=self.keys.numel() - 1)
        known = self.keys.index_select(0, found) == keys
        return self.gradients.index_select(0, found).where(known[:, None], 0)
