"""Exchange of options after a solve: what is left of a budget buys some, and groups trade others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_callbacks.channels.network_cost import Network

TRIALS = 6000  # networks whose cost one search computes: a fraction of a second
GAIN = 1e-9  # relative; a smaller gain in value is rounding
# stands for the price of a step that costs nothing or less, so that it is taken first and nothing is divided by 0
ALMOST_FREE = 1e-300


@dataclass(frozen=True)
class Improved:
    """Number of units that each group keeps, their total value, and the cost of the network."""

    kept: tuple[int, ...]
    value: float
    cost: float


@dataclass(frozen=True)
class _Choice:
    """One option of each group, by its index, with its total value and the costs of the network that results.

    Costs are kept by layer: when one group changes, the layers that it has no part in are not computed again.
    """

    at: tuple[int, ...]
    value: float
    costs: dict[str, float]
    cost: float


class _Search:
    """Local search over choices within a capacity, for a bounded number of trials."""

    def __init__(self, network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float) -> None:
        self.network, self.capacity = network, capacity
        self.trials_left = TRIALS
        self.sizes = [o.tolist() for o in options]
        self.values = [v.tolist() for v in values]

    def kept(self, at: Sequence[int]) -> tuple[int, ...]:
        """Number of units that each group keeps with the options ``at``."""
        return tuple(sizes[i] for sizes, i in zip(self.sizes, at, strict=True))

    def start(self, kept: Sequence[int], value: float) -> _Choice:
        """The choice that keeps ``kept`` units of the groups, and has this ``value``."""
        at = tuple(sizes.index(k) for sizes, k in zip(self.sizes, kept, strict=True))
        costs = self.network.by_layer(self.kept(at))
        return _Choice(at, value, costs, self.network.total(costs))

    def with_option(self, choice: _Choice, group: int, option: int) -> _Choice:
        """``choice`` with another option of one group."""
        self.trials_left -= 1
        at = (*choice.at[:group], option, *choice.at[group + 1 :])
        costs = choice.costs | self.network.by_layer(self.kept(at), group)
        value = choice.value + self.values[group][option] - self.values[group][choice.at[group]]
        # unlike the value, the cost is summed anew over all layers: it decides whether the network fits the budget
        return _Choice(at, value, costs, self.network.total(costs))

    def steps(self, choice: _Choice, by: int, fixed: int = -1) -> Iterator[_Choice]:
        """``choice`` with the next larger (``by`` = 1) or smaller (-1) option of each group but the ``fixed`` one."""
        for group, option in enumerate(choice.at):
            if group != fixed and 0 <= option + by < len(self.sizes[group]) and self.trials_left > 0:
                yield self.with_option(choice, group, option + by)

    def spend(self, choice: _Choice) -> _Choice:
        """``choice`` with what is left of the capacity spent on larger options, the most value for its cost first."""
        while True:
            # priced anew after each step: a larger option of one group makes the outputs of others dearer
            offers = [c for c in self.steps(choice, 1) if c.cost <= self.capacity and c.value > choice.value]
            if not offers:
                return choice
            last = choice
            choice = max(offers, key=lambda c: (c.value - last.value) / max(c.cost - last.cost, ALMOST_FREE))

    def made_to_fit(self, choice: _Choice, fixed: int) -> _Choice | None:
        """``choice`` with smaller options of the groups but the ``fixed`` one, the least value for its cost first.

        The steps end as soon as the choice fits. None where the other groups have nothing left to give.
        """
        while choice.cost > self.capacity:
            last = choice
            # only steps that make the network cheaper: a latency may rise where channels go
            offers = [c for c in self.steps(choice, -1, fixed) if c.cost < choice.cost]
            if not offers:
                return None
            choice = min(offers, key=lambda c: (last.value - c.value) / (last.cost - c.cost))
        return choice

    def exchanges(self, choice: _Choice) -> Iterator[_Choice]:
        """What comes of every other option of every group, the near options first.

        The other groups pay for the option, or use what it frees.
        """
        # near options first: most gains are there, and the trials may run out
        most_options = max(len(sizes) for sizes in self.sizes)
        for distance in range(1, most_options):
            for group, option in enumerate(choice.at):
                for other in (option - distance, option + distance):
                    if not 0 <= other < len(self.sizes[group]):
                        continue
                    if self.trials_left <= 0:
                        return
                    fitting = self.made_to_fit(self.with_option(choice, group, other), group)
                    if fitting is not None:
                        yield self.spend(fitting)


def improve(
    network: Network,
    options: Sequence[Tensor],
    values: Sequence[Tensor],
    capacity: float,
    kept: Sequence[int],
    value: float,
) -> Improved:
    """A choice of options at least as valuable as a given one, found by exchanges in a bounded time.

    Args:
        network: the network to be paid for.
        options: numbers of units that each group may keep, ascending int [n] each.
        values: values of these options, [n] each.
        capacity: the largest cost of the network.
        kept: number of units of each group in the given choice, which fits.
        value: total value of the given choice.
    """
    search = _Search(network, options, values, capacity)
    best = search.spend(search.start(kept, value))
    while True:
        # the first gain is taken, not the largest: a new round of exchanges starts from there
        least = best.value + GAIN * abs(best.value)
        better = next((c for c in search.exchanges(best) if c.value > least), None)
        if better is None:
            return Improved(search.kept(best.at), best.value, best.cost)
        best = better
