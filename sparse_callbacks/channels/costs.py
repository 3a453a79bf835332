"""What layers cost, as a function of their inputs and outputs, and what it costs to keep so many channels of a group."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.core.inspection import quiet, run, tensors_in


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, by what its cost depends on.

    Attributes:
        name: of the module.
        inputs, outputs: channels or features, all of them.
        kernel: size of the kernel; empty for a linear layer.
        groups: of the convolution; with ``depthwise`` they are as many as there are inputs, and go with them.
        settings: stride, padding, dilation and output padding, as text that tells one layer's latency from another's.
        maps: for each use in one forward pass the rows that one sample of the network has become, and the size of each without
            channels; of a linear layer all its rows.
        positions: for each use the places of a sample at which every weight is multiplied.
    """

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    settings: str = ""
    maps: tuple[tuple[int, ...], ...] = ((1,),)
    positions: tuple[int, ...] = (1,)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.inputs > 1

    def weights(self, inputs: int, outputs: int) -> float:
        """Number of weights with so many inputs and outputs."""
        each = 1 if self.depthwise else inputs / self.groups
        return each * outputs * math.prod(self.kernel)


Cost = Callable[[Layer, int, int], float]
"""``(layer, inputs, outputs)`` to the cost of the layer with so many of each."""


def parameters(layer: Layer, inputs: int, outputs: int) -> float:
    """Weights, without biases.

    >>> parameters(Layer("conv", 64, 128, (3, 3)), 32, 128)
    36864.0
    """
    return float(layer.weights(inputs, outputs))


def flops(layer: Layer, inputs: int, outputs: int) -> float:
    """Multiply-adds of one sample, without biases."""
    return float(layer.weights(inputs, outputs) * sum(layer.positions))


def layers(model: nn.Module, example_input: Any) -> dict[str, Layer]:
    """Every convolution and linear layer that a forward pass uses, by module name.

    The model runs once, in eval mode; modes and random generators stay as they are.

    Args:
        model: to be looked at.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.
    """
    found: dict[str, Layer] = {}
    samples = tensors_in(example_input)[0].shape[0]
    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | _ConvNd):
                hooks.enter_context(module.register_forward_hook(_recorder(name, found, samples), with_kwargs=True))
        run(model, example_input)
    return {n: found[n] for n, _ in model.named_modules() if n in found}


def stem(layers: Mapping[str, Layer]) -> str | None:
    """Name of the first of :func:`layers`, if it is a convolution."""
    name = next(iter(layers), None)
    return name if name is not None and layers[name].kernel else None


def _recorder(name: str, found: dict[str, Layer], samples: int) -> Callable[..., None]:
    def record(module: nn.Module, arguments: Any, named: Any, output: Tensor) -> None:
        use = layer_of(name, module, tensors_in((arguments, named))[0].shape, output.shape, samples)
        if (seen := found.get(name)) is not None:
            use = replace(seen, maps=seen.maps + use.maps, positions=seen.positions + use.positions)
        found[name] = use

    return record


def layer_of(name: str, module: nn.Module, given: Sequence[int], gives: Sequence[int], samples: int) -> Layer:
    """One use of ``module`` with an input and an output of these shapes, for so many samples of the network."""
    if not isinstance(module, _ConvNd):
        rows = math.prod(given[:-1]) // samples
        return Layer(name, given[-1], gives[-1], maps=((rows,),), positions=(rows,))
    space = len(module.kernel_size)
    rows = math.prod(given[: -space - 1]) // samples
    inner, outer = tuple(given[-space:]), tuple(gives[-space:])
    transposed = isinstance(module, _ConvTransposeNd)
    settings = f"stride {_by(module.stride)} padding {_by(module.padding)} dilation {_by(module.dilation)}"
    settings += f" transposed {_by(module.output_padding)}" if transposed else ""
    places = rows * math.prod(inner if transposed else outer)
    kernel = tuple(module.kernel_size)
    return Layer(name, module.in_channels, module.out_channels, kernel, module.groups, settings, ((rows, *inner),), (places,))


def _by(numbers: str | Sequence[int]) -> str:
    return numbers if isinstance(numbers, str) else "x".join(map(str, numbers))


# ---------------------------------------------------------------------- channels of groups


@dataclass(frozen=True)
class _Side:
    """Inputs or outputs of a layer: ``channels`` for each of ``slices``, of which some belong to groups (index: slices)."""

    channels: float
    slices: int
    owned: Mapping[int, int]

    def of_group(self, group: int, kept: int, size: int) -> float:
        """Channels of the group when so many of its units are kept."""
        return self.channels * self.owned[group] * kept / size

    def total(self, kept: Sequence[int], sizes: Sequence[int]) -> float:
        """Channels that remain when so many units of every group are kept."""
        rest = self.slices - sum(self.owned.values())
        return self.channels * rest + sum(self.of_group(g, kept[g], sizes[g]) for g in self.owned)


class Network:
    """The cost of a network as a function of the units that are kept in each of its groups.

    Args:
        layers: see :func:`layers`; those in no group cost what they do.
        groups: whose units can go.
        cost: of a layer.
        constant: cost of everything else.
    """

    def __init__(self, layers: Mapping[str, Layer], groups: Sequence[Group], cost: Cost, constant: float = 0.0) -> None:
        self.layers, self.cost, self.constant = dict(layers), cost, constant
        self.sizes = [g.size for g in groups]
        members = [(g, m) for g, group in enumerate(groups) for m in group.members if m.module in layers]
        self._inputs = {n: _side(n, layer.inputs, [(g, m) for g, m in members if m.side != "out"]) for n, layer in layers.items()}
        self._readers = [[n for n, side in self._inputs.items() if g in side.owned] for g in range(len(groups))]
        self._outputs = {n: _side(n, layer.outputs, [(g, m) for g, m in members if m.side != "in"]) for n, layer in layers.items()}
        both = [(self._inputs[n].owned, self._outputs[n].owned, n) for n in layers]
        self._parts = [[n for ins, outs, n in both if g in ins or g in outs] for g in range(len(groups))]

    @property
    def dense(self) -> float:
        """Cost with everything kept."""
        return self.realised(self.sizes)

    def realised(self, kept: Sequence[int]) -> float:
        """Cost of the network with so many units of each group left, in inputs and outputs."""
        return self.total(self.by_layer(kept))

    def by_layer(self, kept: Sequence[int], group: int | None = None) -> dict[str, float]:
        """Cost of each layer with so many units of each group left; of those alone that a ``group`` has a part in."""
        names = self.layers if group is None else self._parts[group]
        return {n: self._cost(n, self._inputs[n].total(kept, self.sizes), kept) for n in names}

    def total(self, costs: Mapping[str, float]) -> float:
        """Cost of the network whose layers cost so much."""
        return self.constant + math.fsum(costs.values())

    def _cost(self, name: str, inputs: float, kept: Sequence[int]) -> float:
        layer = self.layers[name]
        outputs = inputs * layer.outputs / layer.inputs if layer.depthwise else self._outputs[name].total(kept, self.sizes)
        return self.cost(layer, round(inputs), round(outputs))

    def tables(self, options: Sequence[Tensor], kept: Sequence[int]) -> tuple[list[Tensor], float]:
        """Cost of each option of each group, and what the rest of the network costs.

        The cost of an option is that of the layers that read the group's channels with so many inputs, and of its depthwise
        convolutions, while all outputs, and the inputs that layers have from other groups, are those of ``kept`` (SMCP's model).
        Of a layer that reads several groups each has its share.

        Args:
            options: units to keep, int [n] for each group.
            kept: units at present.
        """
        tables = [torch.tensor([self._of_group(g, int(j), kept) for j in o], dtype=torch.float64) for g, o in enumerate(options)]
        rest = self.realised(kept) - math.fsum(self._of_group(g, j, kept) for g, j in enumerate(kept))
        return tables, rest

    def _of_group(self, group: int, count: int, kept: Sequence[int]) -> float:
        found = []
        changed = [count if g == group else j for g, j in enumerate(kept)]
        for name in self._readers[group]:
            side = self._inputs[name]
            inputs = side.total(changed, self.sizes)
            found.append(self._cost(name, inputs, kept) * side.of_group(group, count, self.sizes[group]) / inputs)
        return math.fsum(found)


def _side(name: str, channels: int, members: Sequence[tuple[int, Member]]) -> _Side:
    mine = [(g, m.units) for g, m in members if m.module == name]
    slices = max([len(units) for _, units in mine], default=1)
    return _Side(channels / slices, slices, {g: int((units >= 0).sum()) for g, units in mine})
