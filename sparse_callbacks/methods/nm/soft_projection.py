"""The soft projection onto N:M (S-STE, Hu et al., 2024): weights shrink by their group's threshold."""

import torch
from torch import Tensor

from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.nm_masks import in_groups, out_of_groups


def shrunk(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """S(w) = sign(w) * max(\\|w\\| - t, 0), where t is the (M - N)-th smallest \\|w\\| of the group (equation 7 of the paper).

    Args:
        weight: (outputs, inputs, *kernel).
        n: the most weights of a group that are not zero afterwards; equal magnitudes may leave fewer.
        m: weights of a group; it divides the inputs.
        axis: the axis of the inputs.

    >>> shrunk(torch.tensor([[0.5, -2.0, 1.0, 3.0]]), 2, 4)
    tensor([[ 0., -1.,  0.,  2.]])
    """
    groups = in_groups(weight, m, axis)
    threshold = _thresholds(groups, n)
    return out_of_groups(groups.sign() * (groups.abs() - threshold).clamp_min(0), axis)


def scale_of(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """beta = <w, S(w)> / \\|\\|S(w)\\|\\|^2, a tensor of one number: it makes beta * S(w) the closest to w; 1 where S(w) is zero.

    Args:
        weight, n, m, axis: as in :func:`shrunk`.

    >>> float(scale_of(torch.tensor([[0.5, -2.0, 1.0, 3.0]]), 2, 4))
    1.600000023841858
    """
    # in double precision: a sum of many squares, taken once in a run
    soft, dense = shrunk(weight, n, m, axis).double(), weight.double()
    norm = soft.square().sum()
    return torch.where(norm > 0, (dense * soft).sum() / norm, 1.0).to(widened(weight.dtype))


def soft_factors(weight: Tensor, scale: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """What multiplies each weight in the soft projection: scale * (\\|w\\| - t) / \\|w\\|, 0 where \\|w\\| is at most t.

    Args:
        weight, n, m, axis: as in :func:`shrunk`.
        scale: beta, a tensor of one number.
    """
    magnitudes = in_groups(weight.abs(), m, axis).to(widened(weight.dtype))
    threshold = _thresholds(magnitudes, n)
    # the difference is exact near the threshold, where 1 - t / |w| has lost its digits; NaN where |w| is 0, which is not above it
    share = (magnitudes - threshold).div_(magnitudes).mul_(scale.to(magnitudes))
    open_to = torch.where(magnitudes > threshold, share, 0)
    factors = torch.empty_like(weight)  # in the memory order of the weight
    return factors.copy_(out_of_groups(open_to, axis))


def _thresholds(groups: Tensor, n: int) -> Tensor:
    """The (M - N)-th smallest magnitude of each group, with the last dimension kept; 0 where N is M."""
    m = groups.shape[-1]
    if n == m:
        return torch.zeros_like(groups[..., :1])
    return groups.abs().kthvalue(m - n, dim=-1, keepdim=True).values
