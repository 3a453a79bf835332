"""After a solve: what is left of a budget buys options, and groups exchange them while the total value grows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_callbacks.channels.network_cost import Network

TRIALS = 6000  # costs of networks that one search looks at: a fraction of a second
GAIN = 1e-9  # relative, below which a gain is rounding


@dataclass(frozen=True)
class _Choice:
    """One option of each group, its total value, and the cost of every layer of the network that results."""

    at: tuple[int, ...]
    value: float
    costs: dict[str, float]
    cost: float


class _Search:
    def __init__(self, network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float) -> None:
        self.network, self.capacity, self.left = network, capacity, TRIALS
        self.sizes, self.worth = [o.tolist() for o in options], [v.tolist() for v in values]

    def kept(self, at: Sequence[int]) -> tuple[int, ...]:
        return tuple(sizes[i] for sizes, i in zip(self.sizes, at, strict=True))

    def start(self, at: tuple[int, ...], value: float) -> _Choice:
        costs = self.network.by_layer(self.kept(at))
        return _Choice(at, value, costs, self.network.total(costs))

    def moved(self, choice: _Choice, group: int, option: int) -> _Choice:
        """``choice`` with another option of one group."""
        self.left -= 1
        at = (*choice.at[:group], option, *choice.at[group + 1 :])
        costs = choice.costs | self.network.by_layer(self.kept(at), group)
        value = choice.value + self.worth[group][option] - self.worth[group][choice.at[group]]
        return _Choice(at, value, costs, self.network.total(costs))

    def steps(self, choice: _Choice, by: int, but: int = -1) -> Iterator[_Choice]:
        """``choice`` with the next larger or smaller option of each group but one."""
        for group, option in enumerate(choice.at):
            if group != but and 0 <= option + by < len(self.sizes[group]) and self.left > 0:
                yield self.moved(choice, group, option + by)

    def filled(self, choice: _Choice) -> _Choice:
        """What is left of the capacity spent on steps, the one with the most value for its cost first."""
        while offers := [c for c in self.steps(choice, 1) if c.cost <= self.capacity and c.value > choice.value]:
            last = choice
            choice = max(offers, key=lambda c: (c.value - last.value) / max(c.cost - last.cost, 1e-300))
        return choice

    def paid(self, choice: _Choice, but: int) -> _Choice | None:
        """``choice`` made to fit by steps of the other groups, the one that loses the least value for its cost first."""
        while choice.cost > self.capacity:
            last, offers = choice, [c for c in self.steps(choice, -1, but) if c.cost < choice.cost]
            if not offers:
                return None
            choice = min(offers, key=lambda c: (last.value - c.value) / (last.cost - c.cost))
        return choice

    def exchanges(self, choice: _Choice) -> Iterator[_Choice]:
        """What comes of every other option of every group, the near ones first; others pay for it, or use what it frees."""
        far = max(len(sizes) for sizes in self.sizes)
        for distance in range(1, far):
            for group, option in enumerate(choice.at):
                for other in (option - distance, option + distance):
                    if not 0 <= other < len(self.sizes[group]):
                        continue
                    if self.left <= 0:
                        return
                    if (fitting := self.paid(self.moved(choice, group, other), group)) is not None:
                        yield self.filled(fitting)


def improved(
    network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float, kept: Sequence[int], value: float
) -> tuple[tuple[int, ...], float, float]:
    """A choice of options at least as valuable as a given one, found by exchanges in a bounded time.

    Args:
        network: to be paid for.
        options: units that each group may keep, ascending int [n] each.
        values: of the options, [n] each.
        capacity: that the network may cost.
        kept: units of each group, which fit.
        value: of them.

    Returns:
        units of each group, their value, and the cost of the network.
    """
    search = _Search(network, options, values, capacity)
    best = search.filled(search.start(tuple(sizes.index(k) for sizes, k in zip(search.sizes, kept, strict=True)), value))
    while better := next((c for c in search.exchanges(best) if c.value > best.value + GAIN * abs(best.value)), None):
        best = better
    return search.kept(best.at), best.value, best.cost
