"""i-SpaSP: the units of a layer that keep the output of the next one closest to what it was."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 20  # published


@dataclass(frozen=True)
class Contributions:
    """What the units of a hidden layer contribute to the outputs of the next one, in sums over samples and outputs.

    With hidden activations H [units, samples] and weights W [outputs, units], and a residual V = W_R H_R that the units R
    leave when they are removed, the sum over samples of (W^T V)_i is ``pull[i, R].sum()``, and the squares of V sum up to
    ``products[R, R].sum()``. So an iteration needs neither samples nor outputs.

    Attributes:
        products: for each pair of units the product of their contributions to the outputs, [units, units].
        pull: (W^T W)_ij * sum over samples of H_j, [units, units].
        activity: sum of \\|H\\| over samples, [units].
    """

    products: Tensor
    pull: Tensor
    activity: Tensor

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> "Contributions":
        """Those of ``hidden`` [units, samples] through ``weight`` [outputs, units]."""
        pairs = weight.T @ weight
        return cls(pairs * (hidden @ hidden.T), pairs * hidden.sum(1), hidden.abs().sum(1))


@dataclass(frozen=True)
class Exchange:
    """One iteration.

    Attributes:
        importance: sum over samples of W^T V, signed, of the residual V before it, [units].
        candidates: twice as many units as are kept, with the largest importance, ascending.
        selected: the most active of them and of those that were kept before: these are kept now, ascending.
        residual: half the squared residual with them.
    """

    importance: Tensor
    candidates: Tensor
    selected: Tensor
    residual: float


def exchanges(units: Contributions, keep: int, iterations: int = ITERATIONS) -> Iterator[Exchange]:
    """The iterations of i-SpaSP from no unit on, until a set of units comes a second time.

    Args:
        units: what they contribute.
        keep: the number of units to keep.
        iterations: the largest number of iterations.
    """
    selected = torch.zeros(len(units.activity), dtype=torch.bool, device=units.activity.device)
    seen = list[Tensor]()
    for _ in range(iterations):
        importance = units.pull[:, ~selected].sum(1)
        candidates = _largest(importance, 2 * keep)
        merged = selected.index_fill(0, candidates, True)
        selected = torch.zeros_like(selected)
        # activity is not negative, so that others come last
        selected[_largest(torch.where(merged, units.activity, -1.0), keep)] = True
        residual = half_residual(units, selected)
        yield Exchange(importance, candidates.sort().values, selected.nonzero()[:, 0], residual)
        if any(torch.equal(selected, other) for other in seen):
            return
        seen.append(selected)


def half_residual(units: Contributions, kept: Tensor) -> float:
    """Half the squared change of the outputs when only ``kept`` (bool [units]) stay."""
    return 0.5 * float(units.products[~kept][:, ~kept].sum())


def ispasp(units: Contributions, keep: int, iterations: int = ITERATIONS) -> Tensor:
    """The units to keep, ascending: the set with the smallest residual among those seen, the earliest of equals.

    Wolfe and Kyrillidis 2022. The residual may grow from one iteration to the next, and the paper returns the last set.

    Args:
        units: what they contribute.
        keep: the number of units to keep, at least 1.
        iterations: the largest number of iterations.
    """
    return min(exchanges(units, keep, iterations), key=lambda e: e.residual).selected


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest values, of equals the first."""
    return torch.sort(values, descending=True, stable=True).indices[:count]
