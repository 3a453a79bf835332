"""The product of a layer with other weights than its own, and its inputs as rows of a matrix."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.core.curvature import CONVOLUTIONS

UNFOLDED = 2**23
"""Entries of unfolded inputs that are made at once: 64 MB in float64."""


def samples_of(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input with one dimension of samples in front: rows of a linear layer, images of a convolution."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    convolution: Any = layer
    return x if x.ndim == len(convolution.kernel_size) + 2 else x[None]


def output_of(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer would compute with other parameters.

    Args:
        layer: a linear layer, or a convolution of any kind.
        x: its input, as :func:`samples_of` gives it.
        weight, bias: the parameters, of the shapes of its own.
    """
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    convolution: Any = layer
    common = {"stride": convolution.stride, "groups": convolution.groups, "dilation": convolution.dilation}
    convolve = CONVOLUTIONS[convolution.transposed, len(convolution.kernel_size)]
    if convolution.transposed:
        edges = {"padding": convolution.padding, "output_padding": convolution.output_padding}
        return convolve(x, weight, bias, **edges, **common)
    return convolve(_padded(convolution, x), weight, bias, **common)


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs that single outputs read, unfolded, in pieces ``[groups, rows, inputs]``.

    A row is a position of a sample, and its numbers have the order of a flattened filter, (inputs, *kernel*).

    Args:
        layer: a linear layer, or a convolution that is not transposed.
        x: its input, as :func:`samples_of` gives it.
    """
    if isinstance(layer, nn.Linear):
        yield x[None]
        return
    convolution: Any = layer
    unfolded_size = x[:1].numel() * convolution.weight[0, 0].numel()
    for part in torch.split(x, max(1, UNFOLDED // max(1, unfolded_size))):
        yield _unfolded(convolution, _padded(convolution, part))


def _padded(convolution: Any, x: Tensor) -> Tensor:
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    return functional.pad(x, convolution._reversed_padding_repeated_twice, mode)


def _unfolded(convolution: Any, x: Tensor) -> Tensor:
    axes = list(zip(x.shape[2:], convolution.kernel_size, convolution.stride, convolution.dilation, strict=True))
    lengths = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in axes]
    steps = list(zip(lengths, convolution.stride, convolution.dilation, strict=True))
    taps = []
    for tap in product(*map(range, convolution.kernel_size)):
        seen = tuple(_seen(at, *step) for at, step in zip(tap, steps, strict=True))
        taps.append(x[(slice(None), slice(None), *seen)])
    unfolded = torch.stack(taps, 2).flatten(3)  # samples, channels, taps, positions
    return unfolded.reshape(len(x), convolution.groups, -1, unfolded.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)


def _seen(tap: int, length: int, stride: int, dilation: int) -> slice:
    """The entries of an axis that one tap of a kernel reads, one for each position of the output."""
    begin = tap * dilation
    return slice(begin, begin + (length - 1) * stride + 1, stride)
