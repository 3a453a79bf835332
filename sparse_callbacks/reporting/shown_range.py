"""The part of a metric's axis that a figure shows where a few settings have collapsed."""

from collections.abc import Sequence

CUT_AT_MOST = 1 / 3
"""Share of the points that may lie off the axis."""
REACH = 1.5
"""How far the axis goes on beyond the points that are not among the worst third, in spans of these."""
WORTH = 3.0
"""How many times as long the axis must be with all points before some of them are left out."""


def worst_shown(scores: Sequence[float]) -> float | None:
    """The worst score that a figure shows; None where it shows all of them.

    The scores from the best down to the one with a third of all below it span the part that is to be told apart. The axis
    ends 1.5 of these spans below them, but only where it would be three times as long with every score.

    Args:
        scores: of which more is better; of a loss its negative.

    Example:
        >>> worst_shown([0.98, 0.97, 0.96, 0.95, 0.94, 0.41]), worst_shown([0.98, 0.9, 0.8, 0.7, 0.5, 0.4])
        (0.905, None)
    """
    ordered = sorted(scores)
    if len(ordered) < 3:
        return None
    best, near = ordered[-1], ordered[int(CUT_AT_MOST * len(ordered))]
    span = best - near
    limit = round(near - REACH * span, 12)  # without the dust of the subtraction
    return limit if span > 0 and ordered[0] < limit and best - ordered[0] > WORTH * (best - limit) else None
