"""The cost of a whole network, by the number of units that each of its channel groups keeps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_callbacks.channels.costs import Layer, LayerCost
from sparse_callbacks.channels.groups import Group, Member


@dataclass(frozen=True)
class _Side:
    """The inputs, or the outputs, of one layer.

    A weight may store one slice for several channels: in a grouped convolution a slice of inputs stands for one channel
    of every group.

    Attributes:
        channels: channels for each slice.
        slices: number of slices of the weight in this direction.
        owned: number of slices that belong to a group, by the index of the group.
    """

    channels: float
    slices: int
    owned: Mapping[int, int]

    def of_group(self, group: int, kept: int, size: int) -> float:
        """Channels of one group when ``kept`` of its ``size`` units are left."""
        return self.channels * self.owned[group] * kept / size

    def total(self, kept: Sequence[int], sizes: Sequence[int], without: int | None = None) -> float:
        """Channels of the whole side when ``kept[g]`` of the ``sizes[g]`` units of every group are left.

        Args:
            kept, sizes: for each group.
            without: index of a group that counts nothing.
        """
        # a list, without calls: a search asks for this hundreds of thousands of times
        of_groups = [self.channels * n * kept[g] / sizes[g] for g, n in self.owned.items() if g != without]
        return self._in_no_group + sum(of_groups)

    @cached_property
    def _in_no_group(self) -> float:
        """Channels that always stay: the colours of an image, or those of a group that has to stay."""
        return self.channels * (self.slices - sum(self.owned.values()))


class Network:
    """The cost of a network as a function of the number of units that each of its groups keeps.

    Args:
        layers: the layers, from :func:`~sparse_callbacks.channels.costs.layers`. Layers that are in no group cost the
            same whatever is kept.
        groups: the groups whose units can be removed.
        cost: the cost of one layer.
        constant: the cost of everything that is not a layer.
    """

    def __init__(
        self, layers: Mapping[str, Layer], groups: Sequence[Group], cost: LayerCost, constant: float = 0.0
    ) -> None:
        self.layers, self.cost, self.constant = dict(layers), cost, constant
        self.sizes = [g.size for g in groups]
        placed = [(g, _layer_of(m, layers), m) for g, group in enumerate(groups) for m in group.members]
        members = [(g, name, m) for g, name, m in placed if name is not None]
        # a depthwise convolution has the same channels on both sides, so its member counts for both
        readers = [(g, name, m) for g, name, m in members if m.side != "out"]
        makers = [(g, name, m) for g, name, m in members if m.side != "in"]
        self._inputs = {name: _side(name, layer.inputs, readers) for name, layer in layers.items()}
        self._outputs = {name: _side(name, layer.outputs, makers) for name, layer in layers.items()}
        # looked up once: a search prices thousands of networks that differ in one group
        indices = range(len(groups))
        self._readers = [[n for n, side in self._inputs.items() if g in side.owned] for g in indices]
        self._layers_of_group = [
            [n for n in layers if g in self._inputs[n].owned or g in self._outputs[n].owned] for g in indices
        ]

    @property
    def dense(self) -> float:
        """Cost with every unit kept."""
        return self.realised(self.sizes)

    def realised(self, kept: Sequence[int]) -> float:
        """Cost of the network that keeps ``kept[g]`` units of every group, as outputs and as inputs of its layers."""
        return self.total(self.by_layer(kept))

    def by_layer(self, kept: Sequence[int], group: int | None = None) -> dict[str, float]:
        """Cost of each layer when ``kept[g]`` units of every group are left.

        Args:
            kept: number of units that each group keeps.
            group: index of a group; only the layers that have channels of this group are computed. None: all layers.
        """
        names = self.layers if group is None else self._layers_of_group[group]
        return {n: self._cost(n, self._inputs[n].total(kept, self.sizes), self._outputs_of(n, kept)) for n in names}

    def total(self, costs: Mapping[str, float]) -> float:
        """Cost of the network whose layers have these ``costs``."""
        # fsum: the total must not depend on the order of the layers, as searches compare totals
        return self.constant + math.fsum(costs.values())

    def _outputs_of(self, name: str, kept: Sequence[int]) -> float:
        """Outputs of a layer when ``kept[g]`` units of every group are left."""
        return self._outputs[name].total(kept, self.sizes)

    def _cost(self, name: str, inputs: float, outputs: float) -> float:
        """Cost of a layer with so many inputs and outputs."""
        layer = self.layers[name]
        if layer.depthwise:  # its outputs go with its inputs, also where it makes several for each
            outputs = inputs * layer.outputs / layer.inputs
        # whole numbers, as a latency table is asked for; units with unequal numbers of channels make fractions
        return self.cost(layer, round(inputs), round(outputs))

    def tables(self, options: Sequence[Tensor], kept: Sequence[int]) -> tuple[list[Tensor], float]:
        """Cost of each option of each group, and the cost of the remaining network.

        The cost of an option is the cost of the layers that read the group's channels, and of its depthwise
        convolutions, with that number of inputs. All outputs, and the inputs that these layers have from other groups,
        are those of ``kept``: this is SMCP's model, which makes the costs of the groups independent of each other. A
        layer that reads several groups is shared out over them in proportion to its inputs.

        Args:
            options: for each group the numbers of units that it may keep, int [options].
            kept: number of units that each group keeps at present.
        """
        tables = [
            torch.tensor(self._costs_of_group(g, counts.tolist(), kept), dtype=torch.float64)
            for g, counts in enumerate(options)
        ]
        in_groups = math.fsum(self._costs_of_group(g, [count], kept)[0] for g, count in enumerate(kept))
        # what no option changes: layers that read no group, and the shares of inputs that are in no group
        return tables, self.realised(kept) - in_groups

    def _costs_of_group(self, group: int, counts: Sequence[int], kept: Sequence[int]) -> list[float]:
        """The group's share of the layers that read it, when it keeps each of these numbers of units."""
        shares: list[list[float]] = [[] for _ in counts]
        for name in self._readers[group]:
            side = self._inputs[name]
            of_others, outputs = side.total(kept, self.sizes, without=group), self._outputs_of(name, kept)
            for count, own in zip(counts, shares, strict=True):
                inputs_of_group = side.of_group(group, count, self.sizes[group])
                inputs = of_others + inputs_of_group
                own.append(self._cost(name, inputs, outputs) * inputs_of_group / inputs)
        return [math.fsum(own) for own in shares]


def _layer_of(member: Member, layers: Mapping[str, Layer]) -> str | None:
    """Name of the layer whose weight a member lies in; None where it lies in another parameter."""
    # a layer may hold further parameters with one entry for each channel, such as the gain of a convolution
    names = [member.module, member.parameter] if member.parameter.rpartition(".")[2] == "weight" else [member.parameter]
    return next((name for name in names if name in layers), None)


def _side(name: str, channels: int, members: Sequence[tuple[int, str, Member]]) -> _Side:
    """The inputs or outputs of layer ``name``, which has ``channels`` of them.

    Args:
        name: name of the layer.
        channels: number of its inputs or outputs.
        members: the index of a group, the name of a layer, and the member of that group in the layer's weight.
    """
    units_by_group = [(g, m.units) for g, layer, m in members if layer == name]
    # a layer without a member is in no group, and one slice can stand for all its channels
    slices = max([len(units) for _, units in units_by_group], default=1)
    return _Side(channels / slices, slices, {g: int((units >= 0).sum()) for g, units in units_by_group})
