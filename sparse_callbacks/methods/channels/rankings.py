"""Which units stay under a capacity: by a knapsack, in a global order, or equal shares of groups."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.methods.channels import allocation
from sparse_callbacks.methods.channels.knapsack import InfeasibleError


@dataclass(frozen=True)
class Choice:
    """The units that a network keeps.

    Attributes:
        keeps: for each group the units that it keeps, bool [size].
        figures: figures of the choice for the log, by their names without the method's.
    """

    keeps: Sequence[Tensor]
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """What a choice may be made of.

    Attributes:
        network: the network to be paid for.
        options: numbers of units that each group may keep, ascending int [n] each.
        chunks: for each group the number of neighbouring units that go together.
        kept: number of units that each group keeps at present.
        capacity: the largest cost of the network, in the unit of its cost.
    """

    network: Network
    options: Sequence[Tensor]
    chunks: Sequence[int]
    kept: Sequence[int]
    capacity: float


def by_knapsack(offer: Offer, scores: Sequence[Tensor]) -> Choice:
    """The units with the largest total score whose network fits the capacity; how many of each group a knapsack decides.

    Args:
        offer: what may be chosen.
        scores: score of each unit of each group, [size] each.

    Raises:
        InfeasibleError: no choice fits; the error carries the smallest cost.
    """
    values = [allocation.values_of(*given) for given in zip(scores, offer.options, offer.chunks, strict=True)]
    found = allocation.allocate(offer.network, offer.options, values, offer.capacity, offer.kept)
    return Choice(best_of_groups(scores, found.kept, offer.chunks), {"gap": found.gap})


def best_of_groups(scores: Sequence[Tensor], counts: Sequence[int], chunks: Sequence[int]) -> list[Tensor]:
    """For each group bool [size]: its ``counts[g]`` most important units."""
    return [allocation.best_units(*given) for given in zip(scores, counts, chunks, strict=True)]


def by_global_order(offer: Offer, scores: Sequence[Tensor]) -> Choice:
    """The units that stay when the lowest scores of the whole network go first, until its real cost fits the capacity.

    A group goes from one of its options to the next smaller one, and of such steps the one goes first whose units have the
    lowest mean score; of equal ones that of the earlier group. With an option for every number of units, single units go.

    Args:
        offer: what may be chosen.
        scores: score of each unit of each group, [size] each.

    Raises:
        InfeasibleError: the smallest options do not fit either; the error carries their cost.
    """
    network, kept = offer.network, [int(o.max()) for o in offer.options]
    costs = network.by_layer(kept)
    for group, count in removals(offer.options, scores, offer.chunks):
        if allocation.fits(network.total(costs), offer.capacity):
            break
        kept[group] = count
        costs |= network.by_layer(kept, group)
    capacity, cost = offer.capacity, network.total(costs)
    if not allocation.fits(cost, capacity):
        raise InfeasibleError(capacity, cost)
    return Choice(best_of_groups(scores, kept, offer.chunks))


def removals(options: Sequence[Tensor], scores: Sequence[Tensor], chunks: Sequence[int]) -> list[tuple[int, int]]:
    """The steps in which units go, the lowest mean score first: (group, number of units that it keeps after the step).

    Args:
        options: numbers of units that each group may keep, ascending int [n] each.
        scores: score of each unit of each group, [size] each.
        chunks: for each group the number of neighbouring units that are ranked together.
    """
    steps: list[tuple[float, int, int]] = []
    for group, (own, counts, chunk) in enumerate(zip(scores, options, chunks, strict=True)):
        totals = [0.0, *allocation.values_of(own, torch.arange(1, len(own) + 1), chunk).tolist()]
        for few, many in itertools.pairwise(counts.tolist()):
            steps.append(((totals[many] - totals[few]) / (many - few), group, -few))
    # by rounding of sums a larger step may seem to come after the smaller one that it leads to, so groups are walked down
    order: dict[int, list[int]] = {g: sorted(o.tolist()[:-1], reverse=True) for g, o in enumerate(options)}
    return [(group, order[group].pop(0)) for _, group, _ in sorted(steps)]


def by_equal_shares(offer: Offer, scores: Sequence[Tensor]) -> Choice:
    """The units that stay when every group keeps the same share of its units to one step, those with the largest scores.

    Args:
        offer: what may be chosen.
        scores: score of each unit of each group, [size] each.

    Raises:
        InfeasibleError: see :func:`equal_shares`.
    """
    return Choice(best_of_groups(scores, equal_shares(offer, [len(own) for own in scores]), offer.chunks))


def equal_shares(offer: Offer, sizes: Sequence[int]) -> list[int]:
    """The number of units that each group keeps at the largest share, the same for all, whose real cost fits the capacity.

    A group keeps the option nearest to that share of its units, of two as near ones the larger. Groups take their steps at
    different shares, and at the share at which no more fit, what is left of the capacity goes to the groups that are below
    it: one option at a time, to the group that is furthest below, of equal ones to the earlier one, where its cost fits. So
    no group is further from the share than one step, and none that is below it could take another step.

    Args:
        offer: what may be chosen.
        sizes: the number of units of each group.

    Raises:
        InfeasibleError: the smallest options do not fit; the error carries their cost.
    """
    options = [sorted(o.tolist()) for o in offer.options]
    # half way between two options, as fractions, so that 8 of 16 and 16 of 32 are one share
    turns = [
        [Fraction(few + many, 2 * size) for few, many in itertools.pairwise(counts)]
        for size, counts in zip(sizes, options, strict=True)
    ]
    above, capacity, cost = Fraction(1), offer.capacity, math.inf
    for share in sorted({Fraction(0), *itertools.chain(*turns)}, reverse=True):
        kept = [counts[bisect_right(own, share)] for counts, own in zip(options, turns, strict=True)]
        cost = offer.network.realised(kept)
        if allocation.fits(cost, capacity):
            return _filled_up(offer, kept, [above * size for size in sizes], sizes)
        above = share
    raise InfeasibleError(capacity, cost)


def _filled_up(offer: Offer, kept: Sequence[int], shares: Sequence[Fraction], sizes: Sequence[int]) -> list[int]:
    """Number of units of each group, with single steps of groups below their ``shares`` while these fit."""
    network, counts = offer.network, list(kept)
    costs = network.by_layer(counts)
    while True:
        below = [g for g, now in enumerate(counts) if now < min(shares[g], Fraction(int(offer.options[g].max())))]
        for group in sorted(below, key=lambda g: Fraction(counts[g] - shares[g]) / sizes[g]):
            tried = list(counts)
            tried[group] = min(n for n in offer.options[group].tolist() if n > counts[group])
            changed = costs | network.by_layer(tried, group)
            if allocation.fits(network.total(changed), offer.capacity):
                counts, costs = tried, changed
                break
        else:
            return counts


Ranking = Callable[[Offer, Sequence[Tensor]], Choice]
RANKINGS: Mapping[str, Ranking] = {"knapsack": by_knapsack, "global": by_global_order, "layer": by_equal_shares}
"""The rankings by name."""
