"""Absorbed means: the weights of a layer under a new mask, before they are fitted."""

import torch
from torch import Tensor

from sparse_callbacks.core.nm_masks import in_groups, out_of_groups


def absorb_mean(weight: Tensor, mask: Tensor, m: int, axis: int = 1) -> Tensor:
    """The masked weights, each with its share of what its group has lost, so that the sum of a group stays.

    For a kept weight of a group with K kept ones::

        w_i + (sum of the group's removed weights) / K

    That is what a layer needs whose inputs have one common value; with centred inputs it may be worse than the masked weights.

    Args:
        weight: the weights, (outputs, inputs, *kernel*).
        mask: bool, of the same shape, True where a weight is kept.
        m: weights of a group; it divides the inputs.
        axis: the axis of the inputs.

    References:
        Hubara et al. 2021, "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks",
        section 5 (AdaPrune).

    >>> absorb_mean(torch.tensor([[1.0, -0.2, 0.6, 0.1]]), torch.tensor([[True, False, True, False]]), 4)
    tensor([[0.9500, 0.0000, 0.5500, 0.0000]])
    """
    groups, kept = in_groups(weight, m, axis), in_groups(mask, m, axis)
    removed = groups.masked_fill(kept, 0).sum(-1, keepdim=True)
    share = removed / kept.sum(-1, keepdim=True).clamp_min(1)
    return out_of_groups(torch.where(kept, groups + share, torch.zeros_like(groups)), axis)
