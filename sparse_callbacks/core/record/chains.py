"""Paths through a chain of sparse layers: their number, and the units and connections that lie on one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from sparse_callbacks.core.record.fans import connections, groups_of
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.sparse_layers.quick_places import true_places
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.weights import SparseWeights


@dataclass(frozen=True)
class Links:
    """The connections between the units on the two sides of a layer.

    Attributes:
        read, written: the input of each connection and its output, int64; of an exchanged layer of groups of rows its block
            of outputs.
        inputs, outputs: numbers of units on the two sides.
        group: outputs in a block, which read the same inputs.
    """

    read: Tensor
    written: Tensor
    inputs: int
    outputs: int
    group: int = 1

    def forward(self, numbers: Tensor) -> Tensor:
        """For each output the sum of ``numbers`` (float64) over the inputs that it reads."""
        sums = numbers.new_zeros(self.outputs // self.group).index_add_(0, self.written, numbers[self.read])
        return sums.repeat_interleave(self.group)

    def backward(self, numbers: Tensor) -> Tensor:
        """For each input the sum of ``numbers`` over the outputs that read it."""
        by_block = numbers.view(-1, self.group).sum(1)
        return numbers.new_zeros(self.inputs).index_add_(0, self.read, by_block[self.written])

    def edges(self) -> tuple[Tensor, Tensor]:
        """The input and the output of each connection, one by one."""
        within = torch.arange(self.group, device=self.read.device)
        outputs = self.written[:, None] * self.group + within
        return self.read.repeat_interleave(self.group), outputs.flatten()


@dataclass(frozen=True)
class Paths:
    """What lies on a path from an input of a chain to an output. Hidden units are those between two of its layers.

    Attributes:
        paths: number of paths; float, as deep networks have many, and exact up to 2^53.
        connections: connections that lie on one.
        off_path: for the outputs of each layer but the last, which of them lie on none.
        without_input, without_output: the same for those that read nothing, and for those that nothing reads.
    """

    paths: float
    connections: int
    off_path: list[Tensor]
    without_input: list[Tensor]
    without_output: list[Tensor]

    @property
    def dead_units(self) -> int:
        """Hidden units without an input or without an output."""
        pairs = zip(self.without_input, self.without_output, strict=True)
        return sum(int((unfed | unread).sum()) for unfed, unread in pairs)


def paths_of(chain: Sequence[Links]) -> Paths:
    """Follow the connections of a chain from its inputs to its outputs and back: each connection is looked at four times."""
    device = chain[0].read.device
    reached = [torch.ones(chain[0].inputs, dtype=torch.float64, device=device)]
    for links in chain:
        reached.append(links.forward(reached[-1]))
    reaches = [torch.ones(chain[-1].outputs, dtype=torch.float64, device=device)]
    for links in reversed(chain):
        reaches.append(links.backward(reaches[-1]))
    reaches.reverse()
    on_path = 0
    for links, before, after in zip(chain, reached, reaches[1:], strict=False):
        writes = (after > 0).view(-1, links.group).sum(1)  # outputs of a block that reach the end
        on_path += int((writes[links.written] * (before[links.read] > 0)).sum())
    hidden = range(1, len(chain))
    return Paths(
        paths=float(reached[-1].sum()),
        connections=on_path,
        off_path=[(reached[i] == 0) | (reaches[i] == 0) for i in hidden],
        without_input=[chain[i - 1].forward(torch.ones_like(reached[i - 1])) == 0 for i in hidden],
        without_output=[chain[i].backward(torch.ones_like(reaches[i + 1])) == 0 for i in hidden],
    )


def component_sizes(chain: Sequence[Links]) -> list[int]:
    """Units in each part of a chain that hangs together, whichever way its connections lead; the largest first."""
    firsts = list(accumulate((links.inputs for links in chain), initial=0))
    units = firsts[-1] + chain[-1].outputs
    ends = [links.edges() for links in chain]
    one = torch.cat([read + first for (read, _), first in zip(ends, firsts, strict=False)])
    other = torch.cat([written + first for (_, written), first in zip(ends, firsts[1:], strict=True)])
    labels = torch.arange(units, device=one.device)
    while True:  # the smaller label spreads along every connection; pointers are then followed to their ends
        lower = torch.minimum(labels[one], labels[other])
        spread = labels.scatter_reduce(0, labels[one], lower, "amin").scatter_reduce(0, labels[other], lower, "amin")
        while not torch.equal(spread, spread[spread]):
            spread = spread[spread]
        if torch.equal(spread, labels):
            return sorted(filter(None, torch.bincount(labels).tolist()), reverse=True)
        labels = spread


# ---------------------------------------------------------------------- the connections of a model's layers


def links_of(names: Sequence[str], weights: Sequence[SparseWeights], model: nn.Module) -> list[Links]:
    """The connections of the layers of a chain, as its masks are now.

    Args:
        names: names of the layers' weights, from input to output.
        weights: those of all methods of the run.
        model: the model, which knows the groups of convolutions.
    """
    chain: list[Links] = []
    groups = groups_of(model, names)
    for name in names:
        mine = next(w for w in weights if name in w.params)
        layer = mine.layers_stored.get(name)
        units = chain[-1].outputs if chain else None
        if layer is not None:
            chain.append(links_of_layer(layer, units))
        else:
            chain.append(links_of_mask(mine.held_masks[name], mine.entries[name], groups[name], units))
    return chain


def links_of_mask(mask: Tensor, entry: Entry, groups: int = 1, units: int | None = None) -> Links:
    """The connections of a layer under a mask.

    Args:
        mask: bool, of the parameter's shape.
        entry: the parameter.
        groups: groups of a convolution.
        units: outputs of the layer before; each is a block of inputs where an image was flattened in between.
    """
    linked = connections(mask)
    # the channels of a group lie one after the other along the first dimension, and along the second there is one group
    places = true_places(linked)
    first, second = places.div(linked.shape[1], rounding_mode="floor"), places % linked.shape[1]
    second += first.div(linked.shape[0] // groups, rounding_mode="floor") * linked.shape[1]
    outputs, inputs = linked.shape[0], linked.shape[1] * groups
    if entry.transposed:
        return Links(first, second, outputs, inputs)
    read, written, inputs = _in_blocks(second, first, inputs, units)
    return Links(read, written, inputs, outputs)


def links_of_layer(layer: SparseLinear, units: int | None = None) -> Links:
    """The connections of an exchanged layer, without its mask."""
    keys = layer.keys()
    read, written, inputs = _in_blocks(keys % layer.in_features, keys // layer.in_features, layer.in_features, units)
    return Links(read, written, inputs, layer.out_features, layer.group)


def _in_blocks(read: Tensor, written: Tensor, inputs: int, units: int | None) -> tuple[Tensor, Tensor, int]:
    """Connections of inputs of which several are one unit: such a unit is connected where one of its inputs is."""
    if units is None or units == inputs:
        return read, written, inputs
    pairs = torch.unique(written * units + read.div(inputs // units, rounding_mode="floor"))
    return pairs % units, pairs.div(units, rounding_mode="floor"), units


def chain_figures(
    names: Sequence[str], weights: Sequence[SparseWeights], model: nn.Module
) -> tuple[dict[str, float], Mapping[str, dict[str, int]]]:
    """Figures of the paths through a chain, by their full names, and for each layer of it.

    Args:
        names: see :func:`links_of`.
        weights: see :func:`links_of`.
        model: see :func:`links_of`.

    Returns:
        ``topology/paths``, ``topology/connections_on_path`` and ``topology/dead_units`` (hidden units without an input or
        without an output); and by layer ``on_no_path``, how many of its outputs lie on no path.
    """
    found = paths_of(links_of(names, weights, model))
    figures = {
        "topology/paths": found.paths,
        "topology/connections_on_path": found.connections,
        "topology/dead_units": found.dead_units,
    }
    off = {name: {"on_no_path": int(units.sum())} for name, units in zip(names, found.off_path, strict=False)}
    return figures, off
