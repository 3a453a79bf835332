"""Multiple-choice knapsack with float costs: one option of every group, the most value in a capacity."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12  # relative; sums of the same costs in another order differ by less
CLOSE = 1e-9  # a relative gap that is not worth another search
# Largest number of states kept in a search, and in a second one where the first had to leave some out: the first mostly
# finds the optimum, and its value lets the second drop more states as hopeless
BEAMS = (1 << 8, 1 << 10)
TINY = 1e-300  # keeps a tolerance above 0 where all values are 0


class InfeasibleError(ValueError):
    """No choice fits the capacity; ``minimum`` is the smallest total cost of any."""

    def __init__(self, capacity: float, minimum: float) -> None:
        super().__init__(
            f"no choice of one option in every group costs at most {capacity:.10g}: the cheapest costs {minimum:.10g}. "
            "Give a larger budget, or allow smaller options."
        )
        self.capacity, self.minimum = capacity, minimum

    def __reduce__(self) -> tuple[type["InfeasibleError"], tuple[float, float]]:
        return type(self), (self.capacity, self.minimum)


@dataclass(frozen=True)
class Solution:
    """One option of each group.

    Attributes:
        choice: index of the option taken in each group.
        value: total value of these options.
        cost: total cost of these options.
        gap: no choice is better by more than this; 0 where the choice is optimal.
    """

    choice: tuple[int, ...]
    value: float
    cost: float
    gap: float


@dataclass(frozen=True)
class _States:
    """Undominated partial choices, ascending in cost and in value.

    Attributes:
        values, costs: value and cost of each partial choice, 1-d tensors.
        back: for every group so far, the state that each was made from, and the option that was added.
        is_cut: whether states were left out because there were too many.
    """

    values: Tensor
    costs: Tensor
    back: tuple[tuple[Tensor, Tensor], ...] = ()
    is_cut: bool = False

    def trace(self, index: int) -> list[int]:
        """Options that lead to a state, in the order of the groups."""
        found = []
        for parent, option in reversed(self.back):
            found.append(int(option[index]))
            index = int(parent[index])
        return found[::-1]


def undominated(values: Tensor, costs: Tensor, capacity: float = math.inf) -> Tensor:
    """Indices of the options (1-d tensors) within the capacity for which no other is as good and as cheap.

    Their costs and their values ascend.

    >>> undominated(torch.tensor([0.0, 3, 5, 5]), torch.tensor([0.0, 2, 3, 4]), 10).tolist()
    [0, 1, 2]
    """
    # by cost, and of equal costs the most valuable first: two stable sorts, the less important key first
    order = values.argsort(descending=True, stable=True)
    order = order[costs[order].argsort(stable=True)]
    order = order[costs[order] <= capacity]
    best = values[order].cummax(0).values if len(order) else values[order]
    # an option stays if it is more valuable than everything that is as cheap
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = best[1:] > best[:-1]
    return order[new]


def solve(values: Sequence[Tensor], costs: Sequence[Tensor], capacity: float) -> Solution:
    """The choice of one option in every group with the largest total value whose total cost is at most ``capacity``.

    Exact: a linear relaxation leaves of every group the options that may belong to an optimum; the choices of two
    halves of the groups are merged pairwise, keeping only undominated ones that can still beat the best choice known,
    and meet in the middle (the scheme of SMCP's released solver, with bounds). Where costs are so contrived that more
    than 1024 partial choices remain, the best choice found is returned with its ``gap``.

    Args:
        values, costs: one 1-d tensor for each group, of the same length; computed in float64. The result does not
            depend on devices.
        capacity: largest total cost, in the unit of the costs; it is kept up to a relative rounding of 1e-12.

    Raises:
        ValueError: no groups, an empty one, lengths that differ, or a number that is not finite.
        InfeasibleError: no choice fits; the error carries the smallest total cost of any choice.

    >>> values = [torch.tensor([3.0, 5, 6]), torch.tensor([2.0, 7, 8])]
    >>> costs = [torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 3, 4])]
    >>> solve(values, costs, 5).choice
    (1, 1)
    """
    vs, cs = ([t.detach().to("cpu", torch.float64) for t in side] for side in (values, costs))
    _check(vs, cs, capacity)
    minimum = math.fsum(float(c.min()) for c in cs)
    limit = capacity + ROUNDING * abs(capacity)
    if minimum > limit:
        raise InfeasibleError(capacity, minimum)
    kept = [undominated(v, c) for v, c in zip(vs, cs, strict=True)]
    vs, cs = [v[k] for v, k in zip(vs, kept, strict=True)], [c[k] for c, k in zip(cs, kept, strict=True)]
    choice, price = _relaxed(vs, cs, limit)
    bound = math.fsum(float((v - price * c).max()) for v, c in zip(vs, cs, strict=True)) + price * limit
    # ``bound`` is the value of the relaxation: no choice is better. The greedy choice often reaches it, up to rounding
    slack = ROUNDING * max(TINY, math.fsum(float(v.abs().max()) for v in vs))
    value = _total(vs, choice)
    for width in BEAMS:
        if bound - value <= slack:
            return _solution(kept, vs, cs, choice, 0.0)
        found, is_cut = _search(vs, cs, limit, price, bound - value + slack, width)
        if found is not None and _total(vs, found) > value:
            choice, value = found, _total(vs, found)
        if not is_cut:
            return _solution(kept, vs, cs, choice, 0.0)
        if bound - value <= CLOSE * abs(value):
            break
    return _solution(kept, vs, cs, choice, bound - value)


def _check(values: Sequence[Tensor], costs: Sequence[Tensor], capacity: float) -> None:
    same_shapes = [v.shape for v in values] == [c.shape for c in costs]
    if not values or not same_shapes or any(v.dim() != 1 or not len(v) for v in values):
        raise ValueError(
            f"values of shapes {[tuple(v.shape) for v in values]} and costs of shapes "
            f"{[tuple(c.shape) for c in costs]} are not groups of options. Give one 1-d tensor of each for every "
            "group, equally long and not empty."
        )
    if not math.isfinite(capacity) or not all(bool(t.isfinite().all()) for t in (*values, *costs)):
        raise ValueError(
            "a value, a cost or the capacity is inf or NaN. Give finite numbers, and leave impossible options out."
        )


def _total(numbers: Sequence[Tensor], choice: Sequence[int]) -> float:
    return math.fsum(float(n[i]) for n, i in zip(numbers, choice, strict=True))


def _solution(
    kept: Sequence[Tensor], values: Sequence[Tensor], costs: Sequence[Tensor], choice: Sequence[int], gap: float
) -> Solution:
    chosen = tuple(int(k[i]) for k, i in zip(kept, choice, strict=True))
    return Solution(chosen, _total(values, choice), _total(costs, choice), gap)


def _hull(values: Tensor, costs: Tensor) -> list[int]:
    """Corners of the concave hull of undominated options, ascending in cost."""
    v, c = values.tolist(), costs.tolist()
    corners: list[int] = []
    for i in range(len(v)):
        while len(corners) > 1 and _slope(v, c, corners[-2], corners[-1]) <= _slope(v, c, corners[-1], i):
            corners.pop()
        corners.append(i)
    return corners


def _slope(values: Sequence[float], costs: Sequence[float], a: int, b: int) -> float:
    return (values[b] - values[a]) / (costs[b] - costs[a])


def _relaxed(values: Sequence[Tensor], costs: Sequence[Tensor], limit: float) -> tuple[list[int], float]:
    """A greedy choice, and the price of cost (value for one unit) at which the linear relaxation fills the capacity."""
    choice = [0] * len(values)
    used = math.fsum(float(c[0]) for c in costs)
    # a step goes from a corner of a group's hull to the next, and its slope is what it earns for a unit of cost
    steps = []
    for group, (value, cost) in enumerate(zip(values, costs, strict=True)):
        corners = _hull(value, cost)
        v, c = value.tolist(), cost.tolist()
        steps += [(-_slope(v, c, a, b), group, b, c[b] - c[a]) for a, b in itertools.pairwise(corners)]
    price, full = 0.0, set[int]()
    for slope, group, option, more in sorted(steps):
        if group in full:
            continue
        if used + more > limit:
            price = price or -slope  # the first step that does not fit is the one that the relaxation takes in part
            full.add(group)  # what follows in this group costs even more
        else:
            used += more
            choice[group] = option
    return choice, price


def _search(
    values: Sequence[Tensor], costs: Sequence[Tensor], limit: float, price: float, gap: float, width: int
) -> tuple[list[int] | None, bool]:
    """The best choice that loses at most ``gap`` against the relaxation, and whether states above ``width`` were cut.

    The choice is None where none fits.
    """
    # with cost paid at its price, an option loses against the best of its group; one that loses more than ``gap`` alone
    # can be in no choice that beats the best one known
    profits = [v - price * c for v, c in zip(values, costs, strict=True)]
    alive = [(p >= p.max() - gap).nonzero()[:, 0] for p in profits]
    # groups with few options first, and in turn to either half, so that both halves have about as many states
    order = sorted(range(len(values)), key=lambda g: len(alive[g]))
    halves = order[::2], order[1::2]
    least = [float(costs[g][alive[g]].min()) for g in range(len(values))]
    sides = []
    for half in halves:
        other = math.fsum(least[g] for g in order if g not in half)
        sides.append(_merge(half, values, costs, alive, least, limit - other, price, gap, width))
    left, right = sides
    is_cut = left.is_cut or right.is_cut
    if not len(left.costs) or not len(right.costs):
        return None, is_cut
    # values ascend with costs, so the best partner of a state on the left is the dearest on the right that still fits
    partner = torch.searchsorted(right.costs, limit - left.costs, right=True) - 1
    total = torch.where(partner >= 0, left.values + right.values[partner.clamp(min=0)], -math.inf)
    best = int(total.argmax())
    if int(partner[best]) < 0:
        return None, is_cut
    found = dict(zip((*halves[0], *halves[1]), (*left.trace(best), *right.trace(int(partner[best]))), strict=True))
    return [found[g] for g in range(len(values))], is_cut


def _merge(
    half: Sequence[int],
    values: Sequence[Tensor],
    costs: Sequence[Tensor],
    alive: Sequence[Tensor],
    least: Sequence[float],
    limit: float,
    price: float,
    gap: float,
    width: int,
) -> _States:
    """All undominated choices of a half of the groups that cost at most ``limit`` and lose at most ``gap``."""
    states = _States(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    rest = math.fsum(least[g] for g in half)
    best = 0.0
    for g in half:
        rest -= least[g]
        best += float((values[g] - price * costs[g]).max())
        value = (states.values[:, None] + values[g][alive[g]]).flatten()
        cost = (states.costs[:, None] + costs[g][alive[g]]).flatten()
        fits = ((value - price * cost >= best - gap) & (cost <= limit - rest + ROUNDING * abs(limit))).nonzero()[:, 0]
        keep = fits[undominated(value[fits], cost[fits])]
        is_cut = len(keep) > width
        if is_cut:
            # half of the states are those that lose least; the others are spread over all costs, as losses may be equal
            losses = (best - value + price * cost)[keep]
            grid = torch.linspace(float(cost[keep[0]]), float(cost[keep[-1]]), width // 2, dtype=torch.float64)
            spread = torch.searchsorted(cost[keep], grid).clamp(max=len(keep) - 1)
            chosen = torch.zeros_like(keep, dtype=torch.bool)
            chosen[losses.argsort(stable=True)[: width - width // 2]] = True
            chosen[spread] = True
            keep = keep[chosen]
        # the rows of the flattened table are the states before, its columns the options
        count = len(alive[g])
        back = keep // count, alive[g][keep % count]
        states = _States(value[keep], cost[keep], (*states.back, back), states.is_cut or is_cut)
    return states
