"""Channel groups: which weights, norms and depthwise layers share a channel, so that it can only be removed from all of them at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.obstacles import check_globs, forbidden
from sparse_callbacks.channels.trace import Place, Trace
from sparse_callbacks.core.inspection import copied, traceable, training_branches


@dataclass(frozen=True)
class Member:
    """What a group holds of one module: the slices of dimension ``dim`` of ``parameter`` that belong to its units.

    ``units[i]`` is the unit of slice ``i``, -1 where the slice belongs to no unit of the group. A linear layer behind a flattened
    image has several slices of one unit, one behind a concatenation has slices of other groups.
    """

    module: str
    parameter: str
    dim: int
    side: str
    """``"out"`` of a producer, ``"in"`` of a consumer, ``"both"`` of a follower."""
    units: Tensor

    @property
    def key(self) -> tuple[str, int]:
        """What a cut goes by: parameter and dimension. A norm without a weight goes by the name that its weight would have."""
        return self.parameter, self.dim

    def kept(self, keep: Tensor) -> Tensor:
        """Bool [slices]: what remains of the member when the units in ``keep`` (bool [units]) do; slices of other groups all do."""
        units = self.units.to(keep.device)
        return torch.where(units < 0, torch.ones_like(units, dtype=torch.bool), keep[units.clamp(min=0)])

    def mask(self, keep: Tensor, ndim: int) -> Tensor:
        """Mask that broadcasts against a weight of ``ndim`` dimensions, such as bool [1, C, 1, 1] for the inputs of a convolution."""
        return self.kept(keep).view([-1 if d == self.dim else 1 for d in range(ndim)])


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together, as ``size`` units.

    A unit is one channel, or several where a grouped convolution ties them: of each of its groups the same input must go. Likewise
    the parts of a ``chunk`` lose the same channels.

    Attributes:
        name: of the first producer.
        size: number of units.
        producers: layers whose outputs the channels are.
        consumers: layers whose inputs they are.
        followers: norms, depthwise convolutions and parameters of their own that have one entry for each channel.
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
        return self.producers + self.consumers + self.followers

    def masks(self, model: nn.Module, keep: Tensor) -> dict[str, Tensor]:
        """Input masks of the consumers for the units in ``keep`` (bool [size]), by parameter name."""
        return {c.parameter: c.mask(keep, model.get_parameter(c.parameter).ndim) for c in self.consumers}


def channel_groups(model: nn.Module, example_input: Any, exclude: str | Sequence[str] | None = None, seconds: float = 60.0) -> list[Group]:
    """Groups of channels of every convolution and linear layer, in the model's order; those that have to stay carry the reason.

    A copy of the model runs in eval mode, with autograd; the model and random generators stay as they are. Where layers run in train
    mode only, such as auxiliary heads, a pass in that mode is traced too.
    Followed are residual sums, concatenations, paddings of channels, depthwise and grouped convolutions, squeeze-excite, flattening
    into linear layers, and the operations in :data:`sparse_callbacks.channels.obstacles.KEEPS_CHANNELS`. Anything else gives the group a
    ``reason``, also a LayerNorm, GroupNorm or attention over the channels, the network's input and its outputs. A trace cannot see
    everything (a channel shuffle looks like a flattening): whether removal changes the outputs is for
    :func:`sparse_callbacks.channels.slim.slimmable_groups` and :func:`sparse_callbacks.channels.slim.slim` to find.

    Args:
        model: to be looked at.
        example_input: a tensor, a tuple of positional or a mapping of named arguments; one sample of any size that the model takes.
        exclude: globs of module or parameter names; the groups of these layers' inputs and outputs stay.
        seconds: time limit.

    Raises:
        ImportError: torch-pruning (extra ``channels``) is missing.
        TimeoutError: the limit is exceeded.
        ValueError: the model cannot be copied or traced, or a glob matches nothing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [(g.name, g.size, g.reason) for g in channel_groups(net, torch.zeros(1, 3, 8, 8))]
        [('0', 8, ''), ('3', 4, 'these are outputs of the network')]
    """
    globs = [exclude] if isinstance(exclude, str) else list(exclude or ())
    check_globs(globs, model)
    model = copied(model)  # a trace leaves hooks where it fails, and its graph where a forward pass stores tensors
    untouchable = forbidden(model, globs)
    groups = []
    with traceable(model):
        trace = _traced(model, example_input, seconds)
        covered: set[tuple[str, int]] = set()
        for layer in trace.layers():
            channels = [c for c in range(trace.outputs_of(layer)) if (layer, c) not in covered]
            if not channels:
                continue
            walk = trace.walk(layer, channels)
            covered |= {(p.name, c) for p in walk.places if p.side == "out" for c in p.roots} | {(layer, c) for c in channels}
            group = _group(layer, channels, walk.places, model)
            groups.append(_judged(replace(group, reason=walk.obstacle or _misfit(group, model)), untouchable))
    return groups + _untraced(model, trace, groups)


def _traced(model: nn.Module, example_input: Any, seconds: float) -> Trace:
    """A trace, with the branches of train mode where there are any and they can be traced."""
    trace = Trace(model, example_input, seconds)
    if all(n in trace.nodes for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)):
        return trace
    try:
        branches = training_branches(model, example_input)
        return Trace(model, example_input, seconds, branches, trace.begin) if branches else trace
    except ValueError:  # slimming will compare the outputs in train mode
        return trace


def _group(name: str, channels: Sequence[int], places: Sequence[Place], model: nn.Module) -> Group:
    """The group of ``channels`` of layer ``name``: roots that meet anywhere become one unit."""
    leader = {c: c for c in channels}

    def find(c: int) -> int:
        while leader[c] != c:
            leader[c] = c = leader[leader[c]]
        return c

    folded = [(p, _by_slice(p, model)) for p in places if not _is_shared(p, model)]
    for _, slices in folded:
        for first, *others in slices.values():
            for other in others:
                leader[find(other)] = find(first)
    numbers: dict[int, int] = {}
    unit = {c: numbers.setdefault(find(c), len(numbers)) for c in channels}
    members = [_member(p, slices, unit, model) for p, slices in folded if p.name]
    sides = {side: tuple(m for m in members if m.side == side) for side in ("out", "in", "both")}
    return Group(name, len(numbers), sides["out"], sides["in"], sides["both"])


def _is_shared(place: Place, model: nn.Module) -> bool:
    """A PReLU with one slope for all channels."""
    return place.kind == "PRELU" and getattr(model.get_submodule(place.name), "num_parameters", 0) == 1


def _by_slice(place: Place, model: nn.Module) -> dict[int, list[int]]:
    """Roots by the slice of the weight that they arrive at: a grouped convolution stores one group's inputs, and must keep its groups
    of outputs equally large, so what has the same place in any of its groups goes together."""
    module = model.get_submodule(place.name) if place.kind == "CONV" else None
    span = 0
    if isinstance(module, _ConvNd) and module.groups > 1:
        span = (module.out_channels if place.side == "out" else module.in_channels) // module.groups
    slices: dict[int, list[int]] = {}
    for local, roots in sorted(place.roots.items()):
        slices.setdefault(local % span if span else local, []).extend(sorted(roots))
    return slices


def _member(place: Place, slices: Mapping[int, Sequence[int]], unit: Mapping[int, int], model: nn.Module) -> Member:
    if place.kind == "PARAMETER":
        shape = model.get_parameter(place.name).shape
        dim = max((d for d, size in enumerate(shape) if size > 1), default=0)  # the dimension that torch-pruning takes
        return Member(place.name.rpartition(".")[0], place.name, dim, place.side, _units(slices, unit, shape[dim]))
    module = model.get_submodule(place.name)
    dim = int((place.side == "in") != isinstance(module, _ConvTransposeNd)) if place.side != "both" else 0
    units = _units(slices, unit, _slices(module, dim))
    if place.kind == "CONV" and isinstance(module, _ConvNd) and dim == 0:  # which holds the slices of every conv group
        units = units[: len(units) // module.groups].repeat(module.groups)
    return Member(place.name, f"{place.name}.weight", dim, place.side, units)


def _units(slices: Mapping[int, Sequence[int]], unit: Mapping[int, int], size: int) -> Tensor:
    units = torch.full((max([size, *(s + 1 for s in slices)]),), -1, dtype=torch.int64)
    for position, roots in slices.items():
        units[position] = unit[roots[0]]
    return units


def _slices(module: nn.Module, dim: int) -> int:
    """Slices along ``dim`` of a layer's weight; of a norm its channels."""
    weight = getattr(module, "weight", None)
    return weight.shape[dim] if isinstance(weight, Tensor) else int(module.num_features)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what has to stay


def _judged(group: Group, forbidden: Mapping[str, str]) -> Group:
    """``group`` with the reason why it has to stay, if there is one besides its own."""
    reasons = [forbidden[m.module] for m in group.members if m.module in forbidden]
    reasons += [forbidden[m.parameter] for m in group.followers if m.parameter in forbidden]
    if not group.consumers:
        reasons.append("no layer takes these channels as its inputs")
    if group.size < 2:
        reasons.append("a single unit: grouped convolutions or chunks tie all the channels")
    return group if group.reason else replace(group, reason=next(iter(reasons), ""))


def _misfit(group: Group, model: nn.Module) -> str:
    """Whether more channels arrive somewhere than there are; a shape that the trace misread."""
    for member in group.members:
        weight = dict(model.named_parameters()).get(member.parameter)
        if weight is not None and weight.shape[member.dim] != len(member.units):
            return f"{member.parameter} has {weight.shape[member.dim]} slices, and the trace finds {len(member.units)}"
    return ""


def _untraced(model: nn.Module, trace: Trace, groups: Sequence[Group]) -> list[Group]:
    """Layers that the outputs do not depend on in the trace, as groups that have to stay."""
    why = "not found in the trace: never called there, or without gradients"
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    known = {p.module for g in groups for p in g.producers} | {f.module for g in groups for f in g.followers} | set(trace.nodes)
    sizes = {n: int(m.out_features if isinstance(m, nn.Linear) else m.out_channels) for n, m in layers}
    return [Group(n, sizes[n], (), (), (), why) for n, _ in layers if n not in known]
