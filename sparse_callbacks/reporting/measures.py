"""Measures by which sparse networks are compared: compression, speed-up, top-k, fronts, spread, ranks."""

import math
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor


def compression_ratio(total: Mapping[str, int], left: Mapping[str, int]) -> float:
    """How many times fewer parameters are left: all of them, biases and norms included, over those that are not masked.

    ``sum(total) / sum(left)`` (Blalock et al. 2020). Counts come from masks: a weight that happens to be zero is still one.

    Args:
        total: number of values of each parameter of the model, by name.
        left: number of them that no mask removes.

    Raises:
        ValueError: the names differ, or nothing is left.

    Example:
        >>> compression_ratio({"weight": 90, "bias": 10}, {"weight": 15, "bias": 10})
        4.0
    """
    if total.keys() != left.keys():
        odd = ", ".join(sorted(total.keys() ^ left.keys()))
        raise ValueError(
            f"total and left must count the same parameters, and only one of them has {odd}. Give both counts."
        )
    return ratio(sum(total.values()), sum(left.values()), "parameters")


def theoretical_speedup(dense: float, left: float) -> float:
    """How many times fewer multiply-adds the sparse network needs for one sample: ``dense / left`` (Blalock et al. 2020).

    It is a count and not a time: what a machine makes of it is measured (docs/real_speed.md).

    Args:
        dense: multiply-adds, or FLOPs, of one sample through the dense network.
        left: the same, of the weights that no mask removes.

    Raises:
        ValueError: nothing is left, or more than the dense network has.
    """
    return ratio(dense, left, "multiply-adds")


def ratio(dense: float, left: float, what: str) -> float:
    """``dense / left``.

    Raises:
        ValueError: ``left`` is not above 0, or is above ``dense``.
    """
    if not 0 < left <= dense:
        raise ValueError(
            f"{left:g} of {dense:g} {what} left give no ratio: something must be left, and no more than the dense network has. "
            "Leave this run out of the comparison."
        )
    return dense / left


def share_to_keep(total: int, prunable: int, compression: float) -> float:
    """The share of the prunable parameters that reaches a compression ratio over **all** parameters.

    ``(total / compression - (total - prunable)) / prunable``; one minus it is the sparsity to ask a method for.

    Args:
        total: number of parameters of the model.
        prunable: number of those that masks may remove.
        compression: the compression ratio over all parameters, from 1.

    Raises:
        ValueError: no share reaches it: the parameters that cannot be pruned are too many, or the ratio is below 1.

    Example:
        >>> round(share_to_keep(1000, 900, 4), 4)
        0.1667

    Reference:
        Blalock, Gonzalez Ortiz, Frankle, Guttag: What is the State of Neural Network Pruning? MLSys 2020.
    """
    if not 0 < prunable <= total:
        raise ValueError(
            f"{prunable} prunable of {total} parameters: there must be some, and no more than all. Give both counts."
        )
    fixed = total - prunable
    if not 1 <= compression < math.inf:
        raise ValueError(f"compression={compression:g} is not a compression ratio. Give a number from 1 on, such as 4.")
    if total <= compression * fixed:
        raise ValueError(
            f"compression={compression:g} leaves {total / compression:g} of {total} parameters, and {fixed} of them cannot be "
            f"pruned. Give a ratio below {total / fixed:g}, or let more layers be pruned."
        )
    return (total / compression - fixed) / prunable


def top_k_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label of each sample is among its k largest logits; of equal logits the lower class comes first.

    A network that has collapsed gives all classes one logit: without an order it would hit or miss by chance. A logit that
    is not a number is no hit, and comes before every other.

    Args:
        logits: one row for each sample, one column for each class.
        labels: the class of each sample.
        k: how many classes may be named.

    Returns:
        bool, one for each sample.
    """
    own = logits.gather(1, labels[:, None])
    before = labels.new_ones(logits.shape).cumsum(1) <= labels[:, None]  # classes below the label
    ahead = ~(logits <= own) | ((logits == own) & before)
    return ahead.sum(1) < k


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats; larger is better in both numbers.

    A point is beaten by one that is at least as good in both numbers and better in one, so equal points stay together.
    Give costs with a minus sign.

    Example:
        >>> pareto_front([(2, 0.91), (4, 0.92), (8, 0.88), (6, 0.85)])
        [1, 2]
    """
    return [
        index
        for index, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (with n - 1 below the line); the latter is None for a single value.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("there are no values to take the mean of. Give at least one.")
    # fsum: statistics.fmean of three equal values is that value
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from the smallest, which has 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's correlation of the ranks, equal values at their mean rank.

    Args:
        first, second: the two values of each setting.

    Returns:
        From -1 to 1; None where it is undefined: fewer than two settings, or one side has the same value everywhere.

    Raises:
        ValueError: the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(
            f"ranks of {len(first)} and {len(second)} values cannot be compared: both need one value for each setting."
        )
    try:
        return statistics.correlation(ranks(first), ranks(second))
    except statistics.StatisticsError:
        return None
