"""Pure functions on whole output channels (filters) of weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_callbacks.core.ops import keep_largest


def norms(weight: Tensor, outputs: int, transposed: bool = False) -> Tensor:
    """L2 norm [outputs] of every output channel.

    Args:
        weight: (outputs, inputs, *kernel); of a transposed convolution (inputs, outputs / groups, *kernel).
        outputs: number of output channels.
        transposed: the weight is one of a transposed convolution.

    >>> norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), outputs=2)
    tensor([5., 2.])
    """
    found: Tensor = torch.linalg.vector_norm(_channels(weight, outputs, transposed), dim=(1, 3))
    return found.flatten()


def spread(kept: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """Mask of the shape of ``weight`` from the ``kept`` output channels (bool, [outputs]); arguments as in :func:`norms`."""
    channels = _channels(weight, kept.numel(), transposed)
    return kept.view(channels.shape[0], 1, channels.shape[2], 1).expand_as(channels).reshape(weight.shape)


def _channels(weight: Tensor, outputs: int, transposed: bool) -> Tensor:
    """View (groups, inputs, outputs, kernel) of a weight; an ordinary one is one group without an input dimension of its own."""
    if not transposed:
        return weight.reshape(1, 1, outputs, -1)
    groups = outputs // weight.shape[1]
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def keep_filters_jointly(scores: Sequence[Tensor], sizes: Sequence[int], zeros: int) -> list[Tensor]:
    """Masks of the filters that stay when the weakest of all layers go one by one, as long as no more than ``zeros`` weights go.

    Of equal scores the later filter goes first. The strongest filter of each layer stays.

    Args:
        scores: one tensor [filters] for each layer.
        sizes: weights in one filter of each layer.
        zeros: weights that may go.

    >>> keep_filters_jointly([torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.5])], sizes=[4, 10], zeros=15)
    [tensor([False,  True]), tensor([ True, False])]
    """
    strongest = [keep_largest(s, 1) for s in scores]
    joint = torch.cat([s.float().masked_fill(best, float("inf")) for s, best in zip(scores, strongest, strict=True)])
    weights = torch.cat([torch.full(s.shape, size, device=s.device) for s, size in zip(scores, sizes, strict=True)])
    # the weakest first, and of equals the later first
    order = joint.flip(0).argsort(stable=True).neg().add(joint.numel() - 1)
    gone = (weights[order].cumsum(0) <= zeros) & joint[order].isfinite()
    kept = torch.ones_like(gone).scatter_(0, order, ~gone)
    return list(torch.split(kept, [s.numel() for s in scores]))
