"""Allocation of a budget to groups of channels: ranking, options, the ramp, and the choice that fits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.methods.channels import exchange
from sparse_callbacks.methods.channels.knapsack import ROUNDING, InfeasibleError, solve

CURVES = ("exp", "linear", "exp2")
RAMP_RATE = 2.8  # published: 0.05 an epoch over a ramp of 55 epochs and one more
ROUNDS = 8  # largest number of solves, each with the outputs that the last one left
HALVINGS = 12  # of the capacity, where no solve fits: the capacity found is right to 1 part in 4096


def fits(cost: float, capacity: float) -> bool:
    """Whether a network may cost ``cost``, with room for the rounding of two sums."""
    return cost <= capacity * (1 + 2 * ROUNDING)


def ranking(scores: Tensor, chunk: int = 1) -> Tensor:
    """Indices of units, the most important first; of equal ones the lower index.

    Args:
        scores: score of each unit, [size].
        chunk: number of neighbours that are ranked together, by the sum of their scores.

    Raises:
        ValueError: the units are not a whole number of chunks.
    """
    if chunk < 1 or len(scores) % chunk:
        raise ValueError(
            f"{len(scores)} units cannot be ranked in chunks of {chunk}. Give a chunk that divides them, such as 1."
        )
    order = scores.view(-1, chunk).sum(1).argsort(descending=True, stable=True)
    return (order[:, None] * chunk + torch.arange(chunk, device=scores.device)).flatten()


def options_of(size: int, round_to: int, chunk: int = 1) -> Tensor:
    """Numbers of units that a group of ``size`` may keep.

    They are multiples of ``round_to`` where ``size`` is one, otherwise any number from 1 on; always whole chunks.

    >>> options_of(16, 8).tolist(), options_of(3, 8).tolist()
    ([8, 16], [1, 2, 3])
    """
    step = math.lcm(round_to, chunk) if size % round_to == 0 else chunk
    # a size that is not a whole number of chunks stays as it is here; budget.refuse_budget names such groups
    return torch.arange(step, size + 1, step) if size % step == 0 else torch.tensor([size])


def in_units(channels: int, group: Group) -> int:
    """The fewest units of ``group`` that make a multiple of so many channels in each of its layers.

    A unit is one channel as a rule, and the channels of a whole head in attention: of heads with 16 channels any number
    makes a multiple of 8 channels.

    Args:
        channels: number of channels.
        group: the group.
    """
    # a layer that reads a flattened image has several inputs for each channel, so the fewest slices are what counts
    slices = [int((m.units >= 0).sum()) // group.size for m in (*group.producers, *group.consumers)]
    return channels // math.gcd(channels, min(slices))


def values_of(scores: Tensor, options: Tensor, chunk: int = 1) -> Tensor:
    """Total score of the best ``options[i]`` units, float64 on the CPU."""
    # in float64 before anything is summed, as the knapsack computes in it too
    scores = scores.detach().to("cpu", torch.float64)
    return scores[ranking(scores, chunk)].cumsum(0)[options - 1]


def best_units(scores: Tensor, count: int, chunk: int = 1) -> Tensor:
    """Bool [size]: the ``count`` most important units."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[ranking(scores, chunk)[:count]] = True
    return keep


def cost_reduction(curve: str, final: float, progress: float, rate: float = RAMP_RATE) -> float:
    """Share of the cost that has to be saved at ``progress`` (0 to 1) of the ramp.

    ``"exp"``: final (1 - e^(-rate progress)) / (1 - e^-rate)
    ``"linear"``: final progress
    ``"exp2"``: 1 - (1 - final)^progress

    Raises:
        ValueError: another curve.
    """
    if curve not in CURVES:
        raise ValueError(f"curve={curve!r} is not known. Give 'exp', 'linear' or 'exp2'.")
    x = min(1.0, max(0.0, progress))
    if x in (0.0, 1.0):  # exact at the ends, where the curves below may be wrong by a rounding
        return final * x
    if curve == "exp":
        return final * (1.0 - math.exp(-rate * x)) / (1.0 - math.exp(-rate))
    return final * x if curve == "linear" else 1.0 - (1.0 - final) ** x


@dataclass(frozen=True)
class Allocation:
    """How many units each group keeps, and what that brings and costs.

    Attributes:
        kept: number of units that each group keeps.
        value: total score of the units kept.
        cost: cost of the network that results.
        estimate: cost by the solve, which counts outputs as they were before.
        gap: no choice is better by more than this, by the solve.
    """

    kept: tuple[int, ...]
    value: float
    cost: float
    estimate: float
    gap: float


def smallest_cost(network: Network, options: Sequence[Tensor]) -> float:
    """The smallest cost of the network with any choice of options."""
    return network.realised([int(o.min()) for o in options])


def solve_once(
    network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float, kept: Sequence[int]
) -> Allocation:
    """One solve as SMCP has it: the most valuable choice that costs at most ``capacity`` with the outputs of ``kept``.

    Args:
        network, options, values, capacity: as in :func:`allocate`.
        kept: number of units of each group that the outputs of layers are counted with.

    Raises:
        InfeasibleError: there is no such choice; the error carries the smallest cost by this count.
    """
    tables, outside_groups = network.tables(options, kept)
    try:
        found = solve(values, tables, capacity * (1 + ROUNDING) - outside_groups)
    except InfeasibleError as error:
        # the knapsack knows the groups alone: the user's numbers are of the whole network
        raise InfeasibleError(capacity, error.minimum + outside_groups) from None
    chosen = tuple(int(o[i]) for o, i in zip(options, found.choice, strict=True))
    return Allocation(chosen, found.value, network.realised(chosen), found.cost + outside_groups, found.gap)


def allocate(
    network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float, kept: Sequence[int]
) -> Allocation:
    """The most valuable choice found whose network really costs at most ``capacity``.

    SMCP's solve counts a layer with the outputs that it has at present. Where its choice brings channels back, the
    network costs more than the solve has counted; where it removes some, less, and budget is left. So the solve is
    repeated with outputs half way to those that it leaves, and of the choices whose network fits, the most valuable is
    taken. If none fits, the capacity of the solve is lowered. What is left of the budget then buys single options, and
    groups exchange options while that pays (:mod:`~sparse_callbacks.methods.channels.exchange`).

    Args:
        network: the network to be paid for.
        options: numbers of units that each group may keep, int [n] each.
        values: values of these options, [n] each.
        capacity: the largest cost allowed, in the unit of the network's cost.
        kept: number of units that each group keeps at present.

    Raises:
        InfeasibleError: even the smallest options cost more; the error carries their cost.
    """
    minimum = smallest_cost(network, options)
    if not fits(minimum, capacity):
        raise InfeasibleError(capacity, minimum)
    fewest = [int(o.min()) for o in options]
    found: list[Allocation] = []
    counted = list(kept)
    for _ in range(ROUNDS):
        try:
            found.append(solve_once(network, options, values, capacity, counted))
        except InfeasibleError:
            # outputs of many units make even few inputs dear: count fewer of them
            counted = [(now + few) // 2 for now, few in zip(counted, fewest, strict=True)]
            continue
        last = counted
        # half way and not all the way, or solves may swing between two choices: fewer outputs make inputs cheaper, so
        # that the next solve buys more of them
        counted = [(now + chosen + 1) // 2 for now, chosen in zip(counted, found[-1].kept, strict=True)]
        if counted == last:
            break
    fitting = [a for a in found if fits(a.cost, capacity)]
    if not fitting:
        fitting = [_at_lowered_capacity(network, options, values, capacity, counted)]
    best = max(fitting, key=lambda a: a.value)
    improved = exchange.improve(network, options, values, capacity * (1 + 2 * ROUNDING), best.kept, best.value)
    return replace(best, kept=improved.kept, value=improved.value, cost=improved.cost)


def _at_lowered_capacity(
    network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float, counted: Sequence[int]
) -> Allocation:
    """The choice of a solve with the highest capacity, found by halving, whose network fits the real one."""
    fewest = tuple(int(o.min()) for o in options)
    cost = network.realised(fewest)
    # the smallest options fit in any case, and stay where no solve does better
    first = [int(o.argmin()) for o in options]
    value = math.fsum(float(v[i]) for v, i in zip(values, first, strict=True))
    best = Allocation(fewest, value, cost, cost, 0.0)
    low, high = 0.0, capacity
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            tried = solve_once(network, options, values, middle, counted)
        except InfeasibleError:
            low = middle
            continue
        if fits(tried.cost, capacity):
            low = middle
            best = max(best, tried, key=lambda a: a.value)
        else:
            high = middle
    return best
