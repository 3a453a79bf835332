"""The levels that cost at most a budget with the least error, and the search for SPDY's coefficients."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_callbacks.methods.channels.knapsack import InfeasibleError, solve
from sparse_callbacks.methods.spdy.levels import LayerCosts

DRAWS, MISSES, RESAMPLED = 100, 100, 0.1  # published


def best_levels(costs: LayerCosts, errors: Mapping[str, Sequence[float]], budget: float) -> dict[str, int]:
    """Index of each layer's level: the least total error of all choices whose cost is at most ``budget`` of the dense one.

    Exact; see :func:`~sparse_callbacks.methods.channels.knapsack.solve`.

    Args:
        costs: costs of the layers.
        errors: error of each layer at each of its levels.
        budget: share of the dense cost.

    Raises:
        ValueError: no choice costs so little; it says the smallest budget that can be met.

    >>> costs = LayerCosts({"a": (0.0, 0.5), "b": (0.0, 0.5)}, {"a": (4, 2), "b": (2, 1)}, 0, "FLOPs")
    >>> best_levels(costs, {"a": [0, 0.2], "b": [0, 0.1]}, budget=0.7)
    {'a': 1, 'b': 0}
    """
    layers = list(costs.costs)
    values = [-torch.tensor(errors[layer], dtype=torch.float64) for layer in layers]
    prices = [torch.tensor(costs.costs[layer], dtype=torch.float64) for layer in layers]
    try:
        found = solve(values, prices, budget * costs.dense - costs.others)
    except InfeasibleError:
        # rounded up, so that the budget that is advised can be met
        least = math.ceil(1e4 * costs.least / costs.dense) / 1e4
        advice = f"The smallest that can is budget={least:g}" if least < 1 else "No budget below 1 can"
        raise ValueError(
            f"budget={budget:g} of the {costs.what} cannot be met: with every layer at its cheapest level the network costs "
            f"{costs.least:.6g} of {costs.dense:.6g}. {advice}; what exclude= and keep_dense= leave out costs what it does."
        ) from None
    return dict(zip(layers, found.choice, strict=True))


def searched(count: int, judge: Callable[[Sequence[float]], float], source: torch.Generator) -> list[float]:
    """Coefficients in [0, 1] with the smallest loss that SPDY's search finds: random draws, then local search.

    Of 100 draws the best is changed in a tenth of its coordinates, drawn anew, and each change that lowers the loss is
    kept; after 100 in a row that do not, one coordinate fewer is drawn, down to one.

    Args:
        count: number of coefficients.
        judge: the loss with given coefficients; one that is not finite loses against every other.
        source: the generator of all draws.

    Raises:
        ValueError: no draw has a finite loss.
    """
    best, least = [0.0] * count, math.inf
    for _ in range(DRAWS):
        drawn = _uniform(count, source).tolist()
        if (loss := judge(drawn)) < least:
            best, least = drawn, loss
    if not math.isfinite(least):
        raise ValueError(
            'error="calibration": the loss of the pruned network is not finite for any of '
            f"{DRAWS} draws. Give batches that training could begin with, or error='magnitude'."
        )
    for changed in range(max(1, round(RESAMPLED * count)), 0, -1):
        misses = 0
        while misses < MISSES:
            trial = list(best)
            places = torch.randperm(count, generator=source)[:changed].tolist()
            for place, value in zip(places, _uniform(changed, source).tolist(), strict=True):
                trial[place] = value
            if (loss := judge(trial)) < least:
                best, least, misses = trial, loss, 0
            else:
                misses += 1
    return best


def _uniform(count: int, source: torch.Generator) -> Tensor:
    return torch.rand(count, generator=source, dtype=torch.float64)
