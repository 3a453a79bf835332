"""Channel groups: weights, norms and depthwise layers that can only lose channels together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.obstacles import refuse_unmatched_globs, why_layers_stay
from sparse_callbacks.channels.trace import Place, Trace
from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.inspection import copied, traceable, training_branches
from sparse_callbacks.core.storages.exchange import to_dense


@dataclass(frozen=True)
class Member:
    """The part of a group that lies in one module: the slices of a parameter that belong to its units.

    Attributes:
        module: name of the module.
        parameter: name of the parameter.
        dim: dimension of the parameter that the slices lie along.
        side: ``"out"`` of a producer, ``"in"`` of a consumer, ``"both"`` of a follower.
        units: the unit of each slice, int [slices]; -1 where a slice belongs to no unit of the group. A linear layer
            that reads a flattened image has several slices of one unit, one that reads a concatenation has slices of
            other groups.
    """

    module: str
    parameter: str
    dim: int
    side: str
    units: Tensor

    @property
    def key(self) -> tuple[str, int]:
        """Parameter and dimension, which a cut goes by; the name of the weight also for a norm that has none."""
        return self.parameter, self.dim

    def kept(self, keep: Tensor) -> Tensor:
        """Bool [slices]: what stays of the member when the units in ``keep`` (bool [units]) stay.

        Slices of other groups all stay.
        """
        units = self.units.to(keep.device)
        return torch.where(units < 0, torch.ones_like(units, dtype=torch.bool), keep[units.clamp(min=0)])

    def mask(self, keep: Tensor, ndim: int) -> Tensor:
        """:meth:`kept` as a mask for a weight of ``ndim`` dimensions: [1, C, 1, 1] for the inputs of a convolution."""
        return self.kept(keep).view([-1 if d == self.dim else 1 for d in range(ndim)])


@dataclass(frozen=True)
class Group:
    """Channels that layers share, in units that can be removed one by one.

    A unit is one channel, or several that have to go together: a grouped convolution must lose the same inputs in each
    of its groups, and the parts of a ``chunk`` the same channels.

    Attributes:
        name: name of the first producer.
        size: number of units.
        producers: layers that have the channels as outputs.
        consumers: layers that have them as inputs.
        followers: norms, depthwise convolutions and single parameters that have one entry for each channel.
        reason: why the channels have to stay; empty where they can go.
    """

    name: str
    size: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    followers: tuple[Member, ...]
    reason: str = ""

    @property
    def members(self) -> tuple[Member, ...]:
        """Every member: producers, consumers and followers."""
        return self.producers + self.consumers + self.followers

    def masks(self, model: nn.Module, keep: Tensor) -> dict[str, Tensor]:
        """Input masks of the consumers for the units in ``keep`` (bool [size]), by parameter name."""
        return {c.parameter: c.mask(keep, model.get_parameter(c.parameter).ndim) for c in self.consumers}


@checked
def channel_groups(
    model: nn.Module, example_input: Any, exclude: str | Sequence[str] | None = None, seconds: float = 60.0
) -> list[Group]:
    """Groups of channels of every convolution and linear layer, in the model's order.

    A copy of the model runs in eval mode, with autograd; the model and random generators are left as they are. Where
    layers run in train mode only, such as auxiliary heads, a pass in that mode is traced too.

    Channels are followed through residual sums, concatenations, paddings of channels, depthwise and grouped
    convolutions, squeeze-excite, flattening into linear layers, and the operations in
    :data:`sparse_callbacks.channels.obstacles.KEEPS_CHANNELS`. Anything else gives the group a ``reason``: a LayerNorm,
    GroupNorm or attention over the channels, the network's input, its outputs. A trace cannot see everything; a channel
    shuffle looks like a flattening. Whether removal changes the outputs is found by
    :func:`sparse_callbacks.channels.slim.slimmable_groups` and :func:`sparse_callbacks.channels.slim.slim`.

    Args:
        model: the network.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments: one sample of any size
            that the model takes.
        exclude: globs of module or parameter names; the groups of these layers' inputs and outputs stay.
        seconds: time limit.

    Raises:
        ImportError: torch-pruning (extra ``channels``) is missing.
        TimeoutError: the time limit is exceeded.
        ValueError: the model cannot be copied or traced, a glob matches nothing, or ``seconds`` is not positive.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [(g.name, g.size, g.reason) for g in channel_groups(net, torch.zeros(1, 3, 8, 8))]
        [('0', 8, ''), ('3', 4, 'these are outputs of the network')]
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds!r} leaves no time for the search. Give more than 0, e.g. seconds=60.")
    globs = [exclude] if isinstance(exclude, str) else list(exclude or ())
    refuse_unmatched_globs(globs, model)
    model = to_dense(
        copied(model)
    )  # a trace leaves hooks where it fails, and its graph where a forward pass stores tensors
    reasons = why_layers_stay(model, globs)
    groups = []
    with traceable(model):
        trace = _traced(model, example_input, seconds)
        covered: set[tuple[str, int]] = set()
        for layer in trace.layers():
            # a layer's outputs may belong to several groups, and a walk from another layer may have found them all
            channels = [c for c in range(trace.outputs_of(layer)) if (layer, c) not in covered]
            if not channels:
                continue
            walk = trace.walk(layer, channels)
            covered |= {(layer, c) for c in channels}
            covered |= {(p.name, c) for p in walk.places if p.side == "out" for c in p.roots}
            group = _group(layer, channels, walk.places, model)
            # in this order: the members of a group whose shape was misread say nothing about the weights
            reason = walk.reason or _why_misread(group, model) or _why_group_stays(group, reasons)
            groups.append(replace(group, reason=reason))
    return groups + _untraced(model, trace, groups)


def _traced(model: nn.Module, example_input: Any, seconds: float) -> Trace:
    """A trace, together with the branches of train mode if there are any and they can be traced."""
    trace = Trace(model, example_input, seconds)
    # a second trace takes as long again, so it is made only if the first one lacks layers
    if all(n in trace.nodes for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)):
        return trace
    try:
        branches = training_branches(model, example_input)
        return Trace(model, example_input, seconds, branches, trace.begin) if branches else trace
    except ValueError:  # slimming will compare the outputs in train mode
        return trace


def _group(name: str, channels: Sequence[int], places: Sequence[Place], model: nn.Module) -> Group:
    """The group of ``channels`` of layer ``name``: channels that meet anywhere become one unit.

    Args:
        name: name of the layer.
        channels: its outputs in the group.
        places: where a walk from them arrived.
        model: the model.
    """
    leader = {c: c for c in channels}  # union-find: channels with the same last leader are one unit

    def find(c: int) -> int:
        while leader[c] != c:
            leader[c] = c = leader[leader[c]]  # and shorten the way for the next search
        return c

    folded = [(p, _by_slice(p, model)) for p in places if not _is_shared(p, model)]
    for _, slices in folded:
        for first, *others in slices.values():
            for other in others:
                leader[find(other)] = find(first)
    numbers: dict[int, int] = {}  # units are numbered in the order of their first channels
    unit = {c: numbers.setdefault(find(c), len(numbers)) for c in channels}
    members = [_member(p, slices, unit, model) for p, slices in folded if p.name]
    sides = {side: tuple(m for m in members if m.side == side) for side in ("out", "in", "both")}
    return Group(name, len(numbers), sides["out"], sides["in"], sides["both"])


def _is_shared(place: Place, model: nn.Module) -> bool:
    """Whether a place is a PReLU with one slope for all channels, of which nothing is cut."""
    return place.kind == "PRELU" and getattr(model.get_submodule(place.name), "num_parameters", 0) == 1


def _by_slice(place: Place, model: nn.Module) -> dict[int, list[int]]:
    """The roots that arrive at each slice of a weight.

    A grouped convolution stores the inputs of one group only, and its groups of outputs must stay equally large. So
    what has the same place in any of its groups goes together.
    """
    module = model.get_submodule(place.name) if place.kind == "CONV" else None
    span = 0
    if isinstance(module, _ConvNd) and module.groups > 1:
        span = (module.out_channels if place.side == "out" else module.in_channels) // module.groups
    slices: dict[int, list[int]] = {}
    for local, roots in sorted(place.roots.items()):
        slices.setdefault(local % span if span else local, []).extend(sorted(roots))
    return slices


def _member(place: Place, slices: Mapping[int, Sequence[int]], unit: Mapping[int, int], model: nn.Module) -> Member:
    """The member of a group at one place.

    Args:
        place: the place.
        slices: the roots that arrive at each slice of the weight.
        unit: the unit of each root.
        model: the model.
    """
    if place.kind == "PARAMETER":
        shape = model.get_parameter(place.name).shape
        dim = max((d for d, size in enumerate(shape) if size > 1), default=0)  # the dimension that torch-pruning takes
        return Member(place.name.rpartition(".")[0], place.name, dim, place.side, _units(slices, unit, shape[dim]))
    module = model.get_submodule(place.name)
    # layers store outputs in dimension 0 and inputs in 1, transposed convolutions the other way round
    is_input, is_transposed = place.side == "in", isinstance(module, _ConvTransposeNd)
    dim = 1 if place.side != "both" and is_input != is_transposed else 0
    units = _units(slices, unit, _slices(module, dim))
    if place.kind == "CONV" and isinstance(module, _ConvNd) and dim == 0:
        # slices were folded onto one group of the convolution, and dimension 0 holds those of every group
        units = units[: len(units) // module.groups].repeat(module.groups)
    return Member(place.name, f"{place.name}.weight", dim, place.side, units)


def _units(slices: Mapping[int, Sequence[int]], unit: Mapping[int, int], size: int) -> Tensor:
    """The unit of each of ``size`` slices, -1 for none; longer where the trace finds more slices than there are."""
    units = torch.full((max([size, *(s + 1 for s in slices)]),), -1, dtype=torch.int64)
    for position, roots in slices.items():
        units[position] = unit[roots[0]]
    return units


def _slices(module: nn.Module, dim: int) -> int:
    """Number of slices along ``dim`` of a layer's weight; the number of channels of a norm without a weight."""
    weight = getattr(module, "weight", None)
    return weight.shape[dim] if isinstance(weight, Tensor) else int(module.num_features)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what has to stay


def _why_group_stays(group: Group, reasons: Mapping[str, str]) -> str:
    """Why a group that the walk may cut has to stay; empty where it can go.

    Args:
        group: the group.
        reasons: modules and parameters that must not be cut.
    """
    for name in [m.module for m in group.members] + [f.parameter for f in group.followers]:
        if name in reasons:
            return reasons[name]
    if not group.consumers:
        return "no layer takes these channels as its inputs"
    if group.size < 2:
        return "a single unit: grouped convolutions or chunks tie all the channels"
    return ""


def _why_misread(group: Group, model: nn.Module) -> str:
    """Where the trace finds another number of channels than there are; empty where it misread no shape."""
    parameters = dict(model.named_parameters())
    for member in group.members:
        weight = parameters.get(member.parameter)
        if weight is not None and weight.shape[member.dim] != len(member.units):
            slices = weight.shape[member.dim]
            return f"{member.parameter} has {slices} slices, and the trace finds {len(member.units)}"
    return ""


def _untraced(model: nn.Module, trace: Trace, groups: Sequence[Group]) -> list[Group]:
    """The layers that the trace's outputs do not depend on, as groups that have to stay."""
    reason = "not found in the trace: never called there, or without gradients"
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    known = {m.module for g in groups for m in (*g.producers, *g.followers)} | set(trace.nodes)
    sizes = {n: int(m.out_features if isinstance(m, nn.Linear) else m.out_channels) for n, m in layers}
    return [Group(n, sizes[n], (), (), (), reason) for n, _ in layers if n not in known]
