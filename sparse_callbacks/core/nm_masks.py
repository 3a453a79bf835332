"""Masks of N:M: of every M consecutive inputs of an output at most N are active.

Groups run along the inputs, the axis over which a product sums: of a matrix (outputs, inputs) along a row, of a
convolution along the input channels at a fixed position of the kernel.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_callbacks.core.sparse_layers.moved_places import BELOW_ZERO, NEVER, largest_ranked

_FEW = 16
_NM = re.compile(r"(transposable )?([1-9][0-9]*):([1-9][0-9]*)")


@dataclass(frozen=True)
class NMPattern:
    """N of M.

    Args:
        n: the most active weights in a group.
        m: the weights of a group.
        transposable: whether every M outputs of an input have at most N active weights too.
    """

    n: int
    m: int
    transposable: bool = False

    def __str__(self) -> str:
        return f"{'transposable ' if self.transposable else ''}{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The fraction of zeros of full groups."""
        return 1 - self.n / self.m


def nm_pattern(text: object) -> NMPattern | None:
    """The pattern that a text names; None where it names no N:M with N below M.

    >>> nm_pattern("2:4"), nm_pattern("4:2")
    (NMPattern(n=2, m=4, transposable=False), None)
    """
    found = _NM.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[2]) >= int(found[3]):
        return None
    return NMPattern(int(found[2]), int(found[3]), found[1] is not None)


def why_not_nm(shape: tuple[int, ...], pattern: NMPattern, axis: int = 1, groups: int = 1) -> str:
    """Why a weight cannot have the pattern, as a clause; empty where it can.

    Args:
        shape: the shape of the weight: (outputs, inputs, *kernel), of a grouped convolution the inputs of one group.
        pattern: the pattern.
        axis: the axis of the inputs: 0 of a transposed convolution.
        groups: of a convolution, the groups that its outputs are in; no tile may lie in two of them.

    >>> why_not_nm((8, 6), NMPattern(2, 4))
    '6 inputs do not divide into groups of 4'
    """
    counts = {"input": shape[axis]} | ({"output": shape[1 - axis] // groups} if pattern.transposable else {})
    for what, count in counts.items():
        if count % pattern.m:
            does = f"{what} does" if count == 1 else f"{what}s do"
            return f"{count} {does} not divide into groups of {pattern.m}"
    return ""


def in_groups(tensor: Tensor, m: int, axis: int = 1) -> Tensor:
    """A weight's numbers with the M of a group in the last dimension."""
    inputs_last = tensor.movedim(axis, -1)
    return inputs_last.reshape(*inputs_last.shape[:-1], -1, m)


def out_of_groups(groups: Tensor, axis: int = 1) -> Tensor:
    """The inverse of :func:`in_groups`."""
    return groups.flatten(-2).movedim(-1, axis)


def nm_mask(scores: Tensor, n: int | Tensor, m: int, axis: int = 1, among: Tensor | None = None) -> Tensor:
    """Bool mask of the N largest scores of each group; of equal ones the lower input wins, and NaN ranks last.

    Args:
        scores: numbers that are not negative, of the shape of the weight: (outputs, inputs, *kernel).
        n: active weights of each group, at most ``m``: a number, or one for each group of :func:`in_groups`.
        m: weights of a group; it divides the inputs.
        axis: the axis of the inputs.
        among: bool, of the shape of ``scores``; only its True positions are taken, where a group has fewer than ``n`` all of
            them. None: all.

    >>> import torch
    >>> nm_mask(torch.tensor([[0.1, 0.9, 0.4, 0.3, 0.5, 0.5, 0.5, 0.1]]), 2, 4).int()
    tensor([[0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    groups = in_groups(scores, m, axis)
    ranked = torch.where(groups.isnan(), BELOW_ZERO, groups)
    if among is not None:
        ranked = ranked.masked_fill(~in_groups(among, m, axis), NEVER)
    taken = out_of_groups(_largest(ranked, n), axis)
    return taken if among is None else taken & among


def _largest(ranked: Tensor, n: int | Tensor) -> Tensor:
    """Mask of the ``n`` largest of the last dimension; of equal ones the lower place wins."""
    m = ranked.shape[-1]
    if m > _FEW and isinstance(n, Tensor):
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(m, device=ranked.device) < n.unsqueeze(-1)
        return torch.zeros_like(first).scatter_(-1, order, first)
    if m > _FEW:
        return largest_ranked(ranked.reshape(-1, m), int(n)).view(ranked.shape)
    # in rows this short counting who is ahead takes less time than a selection
    places = [place.contiguous() for place in ranked.unbind(-1)]
    taken = torch.empty(ranked.shape, dtype=torch.bool, device=ranked.device)
    for i, own in enumerate(places):
        ahead = torch.zeros(own.shape, dtype=torch.uint8, device=own.device)
        for j, other in enumerate(places):
            if j != i:
                ahead += (other >= own) if j < i else (other > own)
        torch.lt(ahead, n, out=taken[..., i])
    return taken
