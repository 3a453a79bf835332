"""Multiply-adds of training and inference, from the weights that are active and the positions that each is used at.

A multiply-add is two FLOPs. Of a weight that is used at ``p`` positions of a sample (1 in a linear layer, the area of the
output in a convolution) the forward pass makes ``p`` multiply-adds, the gradient by the layer's input ``p``, and the gradient
by the weight ``p``. So a step of a dense layer costs three times its forward pass; padding counts as if it were data, the
input gradient of the first layer is counted, and biases, norms, optimizers and the choice of masks are not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

if TYPE_CHECKING:  # a method's hooks give the counts that are defined here
    from sparse_callbacks.core.method import Method
    from sparse_callbacks.core.step import Step

Counts = Mapping[str, int]
"""Numbers of weights by parameter name."""


class WeightsInStep(NamedTuple):
    """How many weights a step needs, by parameter name.

    Attributes:
        forward: weights that the forward pass and the gradient by the inputs multiply: the active ones.
        gradient: weights whose own gradient the method needs; where a name is missing, those of ``forward``.
    """

    forward: Counts
    gradient: Counts


class StepCost(NamedTuple):
    """Multiply-adds of one optimizer step for one sample; times two they are FLOPs.

    Attributes:
        sparse: of the sparse layers.
        sparse_dense: of the same layers in a dense run.
        whole: of the whole model.
        whole_dense: of the whole model in a dense run.
    """

    sparse: int
    sparse_dense: int
    whole: int
    whole_dense: int


def positions_in_use(module: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int], samples: int) -> int:
    """At how many positions of one sample each weight of a layer is multiplied in one call.

    Args:
        module: a layer. A convolution uses a weight at every place of its output (a transposed one, of its input); any
            other layer once for each row of its input.
        input_shape, output_shape: shapes of the tensors that the layer takes and gives.
        samples: samples of the batch. A model may put parts of an image, or the time steps of a video, into the batch.

    >>> positions_in_use(nn.Conv2d(3, 8, 3), (16, 3, 32, 32), (16, 8, 30, 30), samples=16)
    900
    >>> positions_in_use(nn.Linear(64, 10), (16, 50, 64), (16, 50, 10), samples=16)
    50
    """
    if not isinstance(module, _ConvNd):
        return math.prod(input_shape[:-1]) // samples
    dimensions = len(module.kernel_size)
    rows = math.prod(input_shape[: -dimensions - 1]) // samples
    shape = input_shape if isinstance(module, _ConvTransposeNd) else output_shape
    return rows * math.prod(shape[-dimensions:])


def multiply_adds(counts: Counts, positions: Counts) -> int:
    """Multiply-adds of one forward pass for one sample.

    Args:
        counts: weights of each parameter that are multiplied.
        positions: positions of a sample that each of them is used at; a parameter that is missing is not used.

    >>> multiply_adds({"conv.weight": 4, "fc.weight": 21}, {"conv.weight": 64, "fc.weight": 1})
    277
    """
    return sum(count * positions.get(name, 0) for name, count in counts.items())


def step_multiply_adds(counts: WeightsInStep, positions: Counts) -> int:
    """Multiply-adds of one gradient step for one sample: forward, gradient by the inputs, gradient by the weights.

    >>> ordinary = WeightsInStep(forward={"fc.weight": 10}, gradient={})
    >>> dense_gradient = WeightsInStep(forward={"fc.weight": 10}, gradient={"fc.weight": 100})
    >>> step_multiply_adds(ordinary, {"fc.weight": 1}), step_multiply_adds(dense_gradient, {"fc.weight": 1})
    (30, 120)
    """
    return 2 * multiply_adds(counts.forward, positions) + multiply_adds(counts.forward | counts.gradient, positions)


class StepCosts:
    """What the steps of a run cost, as multiply-adds for one sample.

    Masks move seldom, so a step of a kind that was seen since they did costs a look into a dictionary. The sparse layers
    cost what the method's :meth:`~sparse_callbacks.core.hooks.Hooks.weights_in_step` says; everything else in the model
    costs three times its forward pass in a step. Where a run has several optimizers, each step is charged with the sparse
    layers that its optimizer steps, and the rest of the model with the first optimizer.

    Args:
        method: the method of the run.
        positions: positions of one sample at which each sparse parameter is used, by name.
        other: multiply-adds of one forward pass, for one sample, of everything besides the sparse layers.
    """

    def __init__(self, method: "Method", positions: Counts, other: int = 0) -> None:
        self._method, self._positions, self._other = method, dict(positions), other
        self._found: dict[tuple[int, bool], StepCost] = {}
        self._forward: int | None = None
        self._follow()

    def _follow(self) -> None:
        """Forget what was computed under other masks, or for other layers."""
        weights = self._method.weights
        self._weights, self._changes = weights, weights.changes
        self._found, self._forward = {}, None

    @property
    def _are_old(self) -> bool:
        weights = self._method.weights
        return weights is not self._weights or weights.changes != self._changes

    def of(self, step: "Step") -> StepCost:
        """The cost of a step, under the masks that it is taken with: ask before an update takes others."""
        if self._are_old:
            self._follow()
        kind = step.index, step.replaced
        if (cost := self._found.get(kind)) is None:
            cost = self._found[kind] = self._cost(step)
        return cost

    def _cost(self, step: "Step") -> StepCost:
        mine = {n: self._positions[n] for n in self._method.owners.steps[step.index] if n in self._positions}
        counts = self._method.weights_in_step(step)
        counts = WeightsInStep(
            {n: counts.forward[n] for n in mine}, {n: counts.gradient[n] for n in mine if n in counts.gradient}
        )
        sparse, dense = step_multiply_adds(counts, mine), 3 * self._dense(mine)
        first = next((i for i, names in enumerate(self._method.owners.steps) if names), 0)
        other = 3 * self._other if step.index == first else 0
        return StepCost(sparse, dense, sparse + other, dense + other)

    def _dense(self, names: Counts) -> int:
        return multiply_adds({n: self._method.weights.size(n) for n in names}, self._positions)

    def forward(self) -> StepCost:
        """One forward pass under the current masks, as inference needs it."""
        if self._are_old:
            self._follow()
        if self._forward is None:
            counts = self._method.weights.active_counts
            self._forward = multiply_adds({n: counts[n] for n in counts}, self._positions)
        dense = self._dense(self._positions)
        return StepCost(self._forward, dense, self._forward + self._other, dense + self._other)

    def similarities(self) -> int:
        """Products of all pairs of an input and an output of each sparse layer, for one sample: CTRE's similarities."""
        return self._dense(self._positions)
