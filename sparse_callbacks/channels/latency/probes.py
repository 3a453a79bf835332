"""The layers that are measured alone: which kinds a model has, and with which numbers of channels."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.channels.costs import Layer
from sparse_callbacks.channels.latency.table import signature

BATCH_NORM_OF = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""The batch norm for convolutions by their number of spatial dimensions."""


def kinds_of(found: Iterable[Layer], points: int) -> dict[str, tuple[Layer, tuple[int, ...], list[int], list[int]]]:
    """The kinds of layers that are measured, by their signature.

    Args:
        found: the layers of a model.
        points: numbers of channels on each side of a layer, beside the smallest.

    Returns:
        for each kind one of its layers, the size of the map that it is used with, and the numbers of inputs and of
        outputs to measure.
    """
    # layers of one kind share a grid, whose sizes cover all of them
    uses: dict[str, list[tuple[Layer, tuple[int, ...]]]] = {}
    for layer in found:
        for map_size in layer.maps:
            uses.setdefault(signature(layer, map_size), []).append((layer, map_size))
    return {kind: (*of[0], *_sizes([layer for layer, _ in of], points)) for kind, of in uses.items()}


def _sizes(same_kind: Sequence[Layer], points: int) -> tuple[list[int], list[int]]:
    """Numbers of inputs and outputs to measure for layers of one kind."""
    first = same_kind[0]
    # a grouped convolution exists only with channels that its groups divide
    multiple = 1 if first.depthwise else first.groups
    ins = sorted({n for layer in same_kind for n in axis(layer.inputs, points, multiple)})
    if first.depthwise:
        # each input makes the same number of outputs, so these are not free
        return ins, [n * (first.outputs // first.inputs) for n in ins]
    return ins, sorted({n for layer in same_kind for n in axis(layer.outputs, points, multiple)})


def axis(size: int, points: int, multiple: int) -> list[int]:
    """Numbers of channels to measure: ``multiple``, the fewest there can be, and ``points`` even shares of ``size``.

    All are multiples of ``multiple``.

    >>> axis(64, 4, 1)
    [1, 16, 32, 48, 64]
    """
    shares = (max(1, round(size * p / points / multiple)) * multiple for p in range(1, points + 1))
    # with the fewest: a table refuses numbers outside of what was measured
    return sorted({multiple, *shares})


def probe(module: nn.Module, inputs: int, outputs: int, norm: bool) -> nn.Module:
    """A fresh layer like ``module`` with other numbers of channels.

    Args:
        module: a convolution or linear layer.
        inputs, outputs: numbers of channels of the fresh layer.
        norm: whether a convolution is followed by a batch norm and ReLU, whose time then counts with it.
    """
    bias = module.bias is not None
    if not isinstance(module, _ConvNd):
        return nn.Linear(inputs, outputs, bias)
    # torch's own class, as a class derived from it may take other arguments
    kind = next(c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.conv")
    depthwise = module.groups == module.in_channels > 1
    options = {
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "padding_mode": module.padding_mode,
    }
    if module.transposed:
        options["output_padding"] = module.output_padding
    groups = inputs if depthwise else module.groups
    made: nn.Module = kind(inputs, outputs, module.kernel_size, groups=groups, bias=bias, **options)
    if not norm:
        return made
    return nn.Sequential(made, BATCH_NORM_OF[len(module.kernel_size)](outputs), nn.ReLU())


def random_input(layer: Layer, map_size: Sequence[int], inputs: int, batch: int) -> Tensor:
    """A random input of ``layer`` with ``inputs`` channels, as it has in a model that runs on ``batch`` samples."""
    rows = batch * map_size[0]
    return torch.randn(rows, inputs, *map_size[1:]) if layer.kernel else torch.randn(rows, inputs)
