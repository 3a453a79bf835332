"""Fan-in and fan-out: the connections of each output and of each input of a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

Spread = tuple[float, float, float]
"""The smallest, the middle and the largest of some numbers."""


class Fans:
    """How many inputs each output of a layer reads, and how many outputs read each of its inputs.

    Of a convolution units are channels, and a connection is the slice of the kernel between an input and an output
    channel, if any of its weights is active.

    Args:
        fan_in: connections of each output, ``[outputs]``.
        fan_out: connections of each input, ``[inputs]``.
    """

    def __init__(self, fan_in: Tensor, fan_out: Tensor) -> None:
        self.fan_in, self.fan_out = fan_in, fan_out

    def figures(self) -> dict[str, float | Spread]:
        """Spreads of both, and the numbers of outputs without an input and of inputs without an output."""
        return {
            "fan_in": spread(self.fan_in),
            "fan_out": spread(self.fan_out),
            "dead_in": int((self.fan_in == 0).sum()),
            "dead_out": int((self.fan_out == 0).sum()),
        }


def spread(numbers: Tensor) -> Spread:
    """The smallest number, the median (the mean of the middle two of an even count) and the largest; zeros of none.

    >>> spread(torch.tensor([4, 1, 2, 9]))
    (1, 3.0, 9)
    """
    ordered = numbers.sort().values.tolist()
    if not ordered:
        return 0, 0, 0
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return ordered[0], median, ordered[-1]


def connections(mask: Tensor) -> Tensor:
    """Which pairs of channels a mask connects: the mask of a matrix, and of a convolution its slices with an active
    weight."""
    return mask if mask.ndim == 2 else mask.flatten(2).any(2)


def fans_of_mask(mask: Tensor, entry: Entry, groups: int = 1) -> Fans:
    """The fans of a layer under a mask.

    Args:
        mask: bool, of the parameter's shape.
        entry: the parameter. Several matrices that are stacked in it are taken for one with the outputs of all.
        groups: groups of a convolution, whose channels are connected within a group alone.
    """
    linked = connections(mask).view(torch.uint8)  # bytes are summed several times as fast as truth values are counted
    rows = linked.sum(1, dtype=torch.int32)
    # torch stores the first channels of both groups one after the other along the first dimension, the second side once
    columns = linked.view(groups, linked.shape[0] // groups, linked.shape[1]).sum(1, dtype=torch.int32).flatten()
    return Fans(columns, rows) if entry.transposed else Fans(rows, columns)


def fans_of_layer(layer: SparseLinear) -> Fans:
    """The fans of an exchanged layer, without its mask."""
    keys = layer.keys()
    rows = torch.bincount(keys // layer.in_features, minlength=layer.block_rows)
    columns = torch.bincount(keys % layer.in_features, minlength=layer.in_features)
    return Fans(rows.repeat_interleave(layer.group), columns * layer.group)


def groups_of(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """The groups of the layers that hold parameters: 1 but in grouped convolutions."""
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return {name: int(getattr(module, "groups", 1)) for name, module in modules.items()}
