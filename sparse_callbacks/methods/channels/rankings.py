"""Which units each group keeps under a capacity: by a knapsack of their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.methods.channels import allocation


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
