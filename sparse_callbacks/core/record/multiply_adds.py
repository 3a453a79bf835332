"""Multiply-adds of training and inference, from active weights and the positions they are used at.

A multiply-add is two FLOPs. Of a weight that is used at ``p`` positions of a sample (1 in a linear layer, the area of the
output in a convolution) the forward pass makes ``p`` multiply-adds, the gradient by the layer's input ``p``, and the gradient
by the weight ``p``. So a step of a dense layer costs three times its forward pass; padding counts as if it were data, the
input gradient of the first layer is counted, and biases, norms, optimizers and the choice of masks are not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

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
    return 2 * multiply_adds(counts.forward, positions) + multiply_adds(
        {**counts.forward, **counts.gradient}, positions
    )
