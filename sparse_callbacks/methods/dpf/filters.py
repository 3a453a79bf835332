"""Filters: norms and masks of whole output channels of a weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_callbacks.core.ops import keep_largest


def norms(weight: Tensor, outputs: int, transposed: bool = False) -> Tensor:
    """L2 norm [outputs] of every output channel.

    Args:
        weight: (outputs, inputs, *kernel); of a transposed convolution (inputs, outputs / groups, *kernel).
        outputs: number of output channels.
        transposed: whether the weight is that of a transposed convolution.

    >>> norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), outputs=2)
    tensor([5., 2.])
    """
    found: Tensor = torch.linalg.vector_norm(_channels(weight, outputs, transposed), dim=(1, 3))
    return found.flatten()


def mask_of(kept: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """Mask of the shape of ``weight`` in which whole output channels are active.

    Args:
        kept: bool [outputs], the output channels that stay.
        weight, transposed: as in :func:`norms`.
    """
    channels = _channels(weight, kept.numel(), transposed)
    return kept.view(channels.shape[0], 1, channels.shape[2], 1).expand_as(channels).reshape(weight.shape)


def _channels(weight: Tensor, outputs: int, transposed: bool) -> Tensor:
    """View (groups, inputs, outputs, kernel) of a weight.

    An ordinary weight is one group, and its inputs are part of the last dimension: each filter is contiguous.
    """
    if not transposed:
        return weight.reshape(1, 1, outputs, -1)
    groups = outputs // weight.shape[1]
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def keep_filters_jointly(scores: Sequence[Tensor], sizes: Sequence[int], zeros: int) -> list[Tensor]:
    """Masks of the filters that stay when the weakest of all layers go one by one, at most ``zeros`` weights in all.

    Of equal scores the later filter goes first. The strongest filter of each layer stays.

    Args:
        scores: the scores of each layer's filters, [filters] each.
        sizes: number of weights in one filter of each layer.
        zeros: number of weights that may go.

    >>> keep_filters_jointly([torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.5])], sizes=[4, 10], zeros=15)
    [tensor([False,  True]), tensor([ True, False])]
    """
    # an infinite score protects the strongest filter of a layer: it comes last in the order, and is never gone
    strongest = [keep_largest(s, 1) for s in scores]
    joint = torch.cat([s.float().masked_fill(best, float("inf")) for s, best in zip(scores, strongest, strict=True)])
    weights = torch.cat([torch.full(s.shape, size, device=s.device) for s, size in zip(scores, sizes, strict=True)])
    # the weakest first, and of equals the later first: a stable sort of the reversed scores, its indices reversed too
    order = joint.flip(0).argsort(stable=True).neg().add(joint.numel() - 1)
    # sums of sizes along the order show how far the budget of zeros reaches
    gone = (weights[order].cumsum(0) <= zeros) & joint[order].isfinite()
    kept = torch.ones_like(gone).scatter_(0, order, ~gone)
    return list(torch.split(kept, [s.numel() for s in scores]))
