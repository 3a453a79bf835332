"""Which channels a budget pays for: importance, ranking, options, and the choice that fits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.methods.smcp import exchange
from sparse_callbacks.methods.smcp.knapsack import InfeasibleError, solve

CURVES = ("exp", "linear", "exp2")
RATE = 2.8  # published: 0.05 an epoch over a ramp of 55 epochs and one more
ROUNDS = 8  # solves, each with the outputs that the last one left
HALVINGS = 12
ROUNDING = 1e-12  # relative, of sums in another order


def ranked(scores: Tensor, chunk: int = 1) -> Tensor:
    """Indices of units, the most important first; of equal ones the lower index.

    Args:
        scores: [size].
        chunk: so many neighbours are ranked together, by the sum of their scores.

    Raises:
        ValueError: the units are no whole number of chunks.
    """
    if chunk < 1 or len(scores) % chunk:
        raise ValueError(f"{len(scores)} units cannot be ranked in chunks of {chunk}. Give a chunk that divides them, such as 1.")
    order = scores.view(-1, chunk).sum(1).argsort(descending=True, stable=True)
    return (order[:, None] * chunk + torch.arange(chunk, device=scores.device)).flatten()


def options_of(size: int, round_to: int, chunk: int = 1) -> Tensor:
    """Numbers of units that a group of ``size`` may keep: multiples of ``round_to`` where ``size`` is one, otherwise any from 1 on.

    >>> options_of(16, 8).tolist(), options_of(3, 8).tolist()
    ([8, 16], [1, 2, 3])
    """
    unit = math.lcm(round_to, chunk) if size % round_to == 0 else chunk
    return torch.arange(unit, size + 1, unit) if size % unit == 0 else torch.tensor([size])


def values_of(scores: Tensor, options: Tensor, chunk: int = 1) -> Tensor:
    """Total score of the best ``options[i]`` units, float64 on the CPU."""
    scores = scores.detach().to("cpu", torch.float64)
    return scores[ranked(scores, chunk)].cumsum(0)[options - 1]


def best_units(scores: Tensor, count: int, chunk: int = 1) -> Tensor:
    """Bool [size]: the ``count`` most important units."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[ranked(scores, chunk)[:count]] = True
    return keep


def reduction(curve: str, final: float, progress: float, rate: float = RATE) -> float:
    """Share of the cost that has to be gone at ``progress`` (0 to 1) of the ramp.

    ``"exp"``: final (1 - e^(-rate progress)) / (1 - e^-rate); ``"linear"``: final progress; ``"exp2"``: 1 - (1 - final)^progress.

    Raises:
        ValueError: another curve.
    """
    if curve not in CURVES:
        raise ValueError(f"curve={curve!r} is not known. Give 'exp', 'linear' or 'exp2'.")
    x = min(1.0, max(0.0, progress))
    if x in (0.0, 1.0):
        return final * x
    if curve == "exp":
        return final * (1.0 - math.exp(-rate * x)) / (1.0 - math.exp(-rate))
    return final * x if curve == "linear" else 1.0 - (1.0 - final) ** x


@dataclass(frozen=True)
class Allocation:
    """Units of each group, their value, the cost of the network that results, and of the solve its ``estimate`` and gap."""

    kept: tuple[int, ...]
    value: float
    cost: float
    estimate: float
    gap: float


def smallest(network: Network, options: Sequence[Tensor]) -> float:
    """The smallest cost that any choice of options comes to."""
    return network.realised([int(o.min()) for o in options])


def estimated(network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float, kept: Sequence[int]) -> Allocation:
    """One solve of SMCP's: the most valuable choice whose cost, with the outputs of ``kept``, is at most ``capacity``.

    Raises:
        InfeasibleError: there is none; it carries the smallest cost of that kind.
    """
    tables, rest = network.tables(options, kept)
    try:
        found = solve(values, tables, capacity * (1 + ROUNDING) - rest)
    except InfeasibleError as error:
        raise InfeasibleError(capacity, error.minimum + rest) from None
    chosen = tuple(int(o[i]) for o, i in zip(options, found.choice, strict=True))
    return Allocation(chosen, found.value, network.realised(chosen), found.cost + rest, found.gap)


def allocate(network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float, kept: Sequence[int]) -> Allocation:
    """The most valuable choice found whose network really costs at most ``capacity``.

    SMCP's solve counts a layer with the outputs that it has at present. Where its choice brings channels back, the network costs more
    than solved; where it removes some, less, and budget is left. So the solve is repeated with outputs half way to those that it
    leaves, and of the choices whose network fits, the most valuable is taken. If none fits, the capacity of the solve is lowered.
    What is left of the budget then buys single options, and groups exchange options while that pays
    (:mod:`~sparse_callbacks.methods.smcp.exchange`).

    Args:
        network: to be paid for.
        options: units that each group may keep, int [n] each.
        values: of the options, [n] each.
        capacity: in the unit of the network's cost.
        kept: units of each group at present.

    Raises:
        InfeasibleError: even the smallest options cost more; it carries what they cost.
    """
    minimum = smallest(network, options)
    if minimum > capacity * (1 + 2 * ROUNDING):
        raise InfeasibleError(capacity, minimum)
    least = [int(o.min()) for o in options]
    found: list[Allocation] = []
    now = list(kept)
    for _ in range(ROUNDS):
        try:
            found.append(estimated(network, options, values, capacity, now))
        except InfeasibleError:
            now = [(j + few) // 2 for j, few in zip(now, least, strict=True)]
            continue
        last = now
        now = [(j + k + 1) // 2 for j, k in zip(now, found[-1].kept, strict=True)]
        if now == last:
            break
    fitting = [a for a in found if a.cost <= capacity * (1 + 2 * ROUNDING)]
    best = max(fitting, key=lambda a: a.value) if fitting else _lowered(network, options, values, capacity, now)
    kept, value, cost = exchange.improved(network, options, values, capacity * (1 + 2 * ROUNDING), best.kept, best.value)
    return replace(best, kept=kept, value=value, cost=cost)


def _lowered(network: Network, options: Sequence[Tensor], values: Sequence[Tensor], capacity: float, now: Sequence[int]) -> Allocation:
    """The choice at the highest capacity, found by halving, whose network fits the real one."""
    least = tuple(int(o.min()) for o in options)
    first = [int(o.argmin()) for o in options]
    cost = network.realised(least)
    best = Allocation(least, math.fsum(float(v[i]) for v, i in zip(values, first, strict=True)), cost, cost, 0.0)
    low, high = 0.0, capacity
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            tried = estimated(network, options, values, middle, now)
        except InfeasibleError:
            low = middle
            continue
        if tried.cost <= capacity * (1 + 2 * ROUNDING):
            low, best = middle, max(best, tried, key=lambda a: a.value)
        else:
            high = middle
    return best
