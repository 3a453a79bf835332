"""Padding over channels in a trace, as in residual networks whose shortcut grows by zeros: torch-pruning takes it for an elementwise
operation, so how an index moves through it, and how many channels leave it, is told here."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Padding(NamedTuple):
    """A padding along dimension 1: ``front`` constant channels, ``inside`` that were there before, ``end`` constants; negative: a crop."""

    front: int
    inside: int
    end: int

    @property
    def channels(self) -> int:
        return self.front + self.inside + self.end

    @property
    def crops(self) -> bool:
        return min(self.front, self.end) < 0

    def holds(self, channel: int) -> bool:
        """Whether an output channel is a constant, and no channel of the input."""
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
        node: of torch-pruning's graph.
    """
    function = node.grad_fn
    if not hasattr(function, "_saved_pad") or not function.name().startswith("ConstantPadNd"):
        return None
    shape, pads = function._input_metadata[0].shape, function._saved_pad  # of the output; pairs from the last dimension on
    at = 2 * (len(shape) - 2)
    front, end = (p - 2**64 if p >= 2**63 else p for p in (*pads[at : at + 2], 0, 0)[:2])  # torch gives negative ones without their sign
    return Padding(front, shape[1] - front - end, end) if front or end else None


def map_through(nodes: Iterable[Any]) -> None:
    """Give the dependencies into and out of every padding over channels its mapping of indices."""
    for node in nodes:
        if (padding := channel_padding(node)) is None:
            continue
        for source in node.inputs:
            for dependency in (d for d in source.dependencies if d.target is node):
                dependency.index_mapping = [*dependency.index_mapping, padding.forward]
            for dependency in (d for d in node.dependencies if d.target is source):
                dependency.index_mapping = [padding.back, *dependency.index_mapping]
