"""Layers alone, before a clock: which kinds a model has, with which numbers of channels, and how long a call takes."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.channels.costs import Layer
from sparse_callbacks.channels.latency.table import signature

SHORTEST = 5e-4  # seconds that one reading lasts at least
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@torch.inference_mode()
def milliseconds(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Median time of one call of each of ``calls`` over ``repeats`` readings, which last 0.5 ms or more and take turns.

    What slows the machine down for a while so slows all of them down. One reading of each warms up.
    """
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def reading(call: Callable[[], Any], times: int) -> float:
        wait()
        begun = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return time.perf_counter() - begun

    def enough(call: Callable[[], Any]) -> int:
        times = 1
        while (took := reading(call, times)) < SHORTEST and times < 1 << 14:
            times = max(2 * times, math.ceil(times * SHORTEST / max(took, 1e-9)))
        return times

    times = [enough(call) for call in calls]
    rounds = [[reading(call, n) / n for call, n in zip(calls, times, strict=True)] for _ in range(repeats)]
    return [1e3 * statistics.median(column) for column in zip(*rounds, strict=True)]


def axis(size: int, points: int, multiple: int) -> list[int]:
    """Channels to measure: ``multiple`` (the fewest there can be), and ``points`` even shares of ``size``, rounded to it.

    >>> axis(64, 4, 1)
    [1, 16, 32, 48, 64]
    """
    return sorted({multiple, *(max(1, round(size * p / points / multiple)) * multiple for p in range(1, points + 1))})


def _sizes(uses: Sequence[Layer], points: int) -> tuple[list[int], list[int]]:
    """Inputs and outputs to measure for layers of one kind; what belongs to a grouped convolution is divisible by its groups."""
    first = uses[0]
    many = 1 if first.depthwise else first.groups
    ins = sorted({n for layer in uses for n in axis(layer.inputs, points, many)})
    if first.depthwise:
        return ins, [n * (first.outputs // first.inputs) for n in ins]
    return ins, sorted({n for layer in uses for n in axis(layer.outputs, points, many)})


def probe(module: nn.Module, inputs: int, outputs: int, norm: bool) -> nn.Module:
    """A fresh layer like ``module`` with so many channels; a convolution with ``norm`` has its batch norm and ReLU behind it."""
    bias = module.bias is not None
    if not isinstance(module, _ConvNd):
        return nn.Linear(inputs, outputs, bias)
    kind = next(c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.conv")
    groups = inputs if module.groups == module.in_channels > 1 else module.groups
    named = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation, "padding_mode": module.padding_mode}
    if module.transposed:
        named["output_padding"] = module.output_padding
    made: nn.Module = kind(inputs, outputs, module.kernel_size, groups=groups, bias=bias, **named)
    return nn.Sequential(made, NORMS[len(module.kernel_size)](outputs), nn.ReLU()) if norm else made


def sample(layer: Layer, inner: Sequence[int], inputs: int, batch: int) -> Tensor:
    """Random inputs of a layer."""
    rows = batch * inner[0]
    return torch.randn(rows, inputs, *inner[1:]) if layer.kernel else torch.randn(rows, inputs)


def kinds_of(found: Iterable[Layer], points: int) -> dict[str, tuple[Layer, tuple[int, ...], list[int], list[int]]]:
    """For each kind of layer one that is of it, the size that it is used with, and the inputs and outputs to measure."""
    uses: dict[str, list[tuple[Layer, tuple[int, ...]]]] = {}
    for layer in found:
        for inner in layer.maps:
            uses.setdefault(signature(layer, inner), []).append((layer, inner))
    return {kind: (*of[0], *_sizes([layer for layer, _ in of], points)) for kind, of in uses.items()}
