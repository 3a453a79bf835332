"""Padding over channels in a trace: how an index moves through it, and how many channels leave it.

Residual networks pad channels where a shortcut grows by zeros. torch-pruning takes such a padding for an elementwise
operation, under which channels keep their indices, so it has to be corrected.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Padding(NamedTuple):
    """A padding along dimension 1; a negative width is a crop.

    Attributes:
        front: constant channels in front.
        inside: channels of the input.
        end: constant channels at the end.
    """

    front: int
    inside: int
    end: int

    @property
    def channels(self) -> int:
        """Number of channels that leave the padding."""
        return self.front + self.inside + self.end

    @property
    def crops(self) -> bool:
        """Whether channels of the input are dropped."""
        return min(self.front, self.end) < 0

    def holds(self, channel: int) -> bool:
        """Whether an output channel is a constant rather than a channel of the input."""
        return not self.front <= channel < self.front + self.inside

    def forward(self, indices: list[Any]) -> list[Any]:
        """From channels of the input to those of the output."""
        return [i._replace(idx=i.idx + self.front) for i in indices]

    def back(self, indices: list[Any]) -> list[Any]:
        """From channels of the output to those of the input; constants have none."""
        return [i._replace(idx=i.idx - self.front) for i in indices if not self.holds(i.idx)]


def channel_padding(node: Any) -> Padding | None:
    """The padding along dimension 1 that a node of the trace does; None for any other node.

    Args:
        node: a node of torch-pruning's graph.
    """
    function = node.grad_fn
    if not hasattr(function, "_saved_pad") or not function.name().startswith("ConstantPadNd"):
        return None
    shape = function._input_metadata[0].shape  # the inputs of a backward node are the outputs of the operation
    pads = function._saved_pad  # pairs of widths, from the last dimension on
    position = 2 * (len(shape) - 2)
    widths = (*pads[position : position + 2], 0, 0)[:2]  # zeros where the padding ends before dimension 1
    front, end = (_signed(width) for width in widths)
    return Padding(front, shape[1] - front - end, end) if front or end else None


def _signed(width: int) -> int:
    """A width with its sign: torch gives negative ones as unsigned numbers of 64 bits."""
    return width - 2**64 if width >= 2**63 else width


def map_through(nodes: Iterable[Any]) -> None:
    """Give the dependencies into and out of every padding over channels its mapping of indices."""
    for node in nodes:
        padding = channel_padding(node)
        if padding is None:
            continue
        for source in node.inputs:
            for dependency in (d for d in source.dependencies if d.target is node):
                dependency.index_mapping = [*dependency.index_mapping, padding.forward]
            for dependency in (d for d in node.dependencies if d.target is source):
                dependency.index_mapping = [padding.back, *dependency.index_mapping]
