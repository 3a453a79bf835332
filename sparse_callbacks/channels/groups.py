"""Channel groups: weights, norms and depthwise layers that can only lose channels together."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.attention_heads import shares_keys, why_heads_stay
from sparse_callbacks.channels.axes import AnyAxis, Concatenation, MisfitError, Run, resolved, runs_in
from sparse_callbacks.channels.met_axes import units
from sparse_callbacks.channels.module_sizes import BATCH_NORMS, depthwise_groups, goes_by_input, is_layer, output_dim
from sparse_callbacks.channels.obstacles import (
    layer_of,
    refuse_uncuttable,
    refuse_unmatched_globs,
    uncalled_layers,
    why_excluded,
    why_layers_stay,
)
from sparse_callbacks.channels.operations.products import SHARED
from sparse_callbacks.channels.trace import Trace
from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.inspection import copied, quiet, training_branches
from sparse_callbacks.core.storages.exchange import to_dense


@dataclass(frozen=True)
class Member:
    """The part of a group that lies in one module: the slices of a parameter that belong to its units.

    Attributes:
        module: name of the module.
        parameter: name of the parameter or buffer.
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
        """Bool [slices]: what stays of the member when some units stay.

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
    of its groups, the parts of a ``chunk`` the same channels, and attention whole heads.

    Attributes:
        name: name of the first producer.
        size: number of units.
        producers: layers that have the channels as outputs.
        consumers: layers that have them as inputs.
        followers: norms, depthwise convolutions, and single parameters and buffers that have one entry for each channel.
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
        """Input masks of the consumers, by parameter name.

        Args:
            model: the network that the group is of.
            keep: bool [size], the units that stay.
        """
        found: dict[str, Tensor] = {}
        for member in self.consumers:  # a bilinear layer may read the same channels along two dimensions
            mask = member.mask(keep, model.get_parameter(member.parameter).ndim)
            found[member.parameter] = found[member.parameter] & mask if member.parameter in found else mask
        return found


@checked
def channel_groups(
    model: nn.Module, example_input: Any, exclude: str | Sequence[str] | None = None, seconds: float = 60.0
) -> list[Group]:
    """Groups of channels of every convolution and linear layer, in the model's order.

    A copy of the model runs in eval mode, without gradients; the model and random generators are left as they are. Where
    layers run in train mode only, such as auxiliary heads, a pass in that mode is traced too.

    Channels are followed through residual sums, concatenations, paddings of channels, depthwise and grouped
    convolutions, squeeze-excite, flattening into linear layers, and the operations in
    :mod:`sparse_callbacks.channels.operations`. Anything else gives the group a ``reason``: a LayerNorm or GroupNorm over
    the channels, the network's input, its outputs. A trace cannot see everything, such as sizes that the model's code
    fixes. Whether removal changes the outputs is found by
    :func:`sparse_callbacks.channels.slim.slimmable_groups` and :func:`sparse_callbacks.channels.slim.slim`.

    Args:
        model: the network.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments: one sample of any size
            that the model takes.
        exclude: globs of module or parameter names; the groups of these layers' inputs and outputs stay.
        seconds: time limit of the search.

    Returns:
        The groups; one that cannot lose channels has a ``reason``.

    Raises:
        TimeoutError: the time limit is exceeded.
        ValueError: the model cannot be copied or traced, is scripted or has layers without sizes, a glob matches nothing, or
            ``seconds`` is not positive.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sparse_callbacks import channel_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [(g.name, g.size, g.reason) for g in channel_groups(net, torch.zeros(1, 3, 8, 8))]
        [('0', 8, ''), ('3', 4, 'these are outputs of the network')]
    """
    refuse_uncuttable(model)
    return groups_of_copy(to_dense(copied(model)), example_input, exclude, seconds)


def groups_of_copy(
    model: nn.Module, example_input: Any, exclude: str | Sequence[str] | None, seconds: float
) -> list[Group]:
    """:func:`channel_groups` of a dense model that is a copy already. A copy of a copy is more than some objects that models
    hold can give, such as the optimizers of Fabric."""
    if not seconds > 0:
        raise ValueError(f"seconds={seconds!r} leaves no time for the search. Give more than 0, e.g. seconds=60.")
    globs = [exclude] if isinstance(exclude, str) else list(exclude or ())
    refuse_unmatched_globs(globs, model)
    reasons = why_layers_stay(model, globs)
    # a caller may be in inference mode, whose tensors nothing else may use; leaving it switches gradients on
    with quiet(model), torch.inference_mode(False), torch.no_grad():
        trace = _traced(model, example_input, seconds)
        found = _Search(model, trace, reasons).groups()
    named = {g.name for g in found}
    uncalled = uncalled_layers(model, trace.called, reasons)
    return found + [Group(n, size, (), (), (), why) for n, (size, why) in uncalled.items() if n not in named]


def _traced(model: nn.Module, example_input: Any, seconds: float) -> Trace:
    """A trace, together with the branches of train mode if there are any and they can be traced."""

    def branches(trace: Trace) -> Sequence[str]:
        # it takes passes of its own, so it is asked only if the first one lacks layers
        layers = [n for n, m in model.named_modules() if is_layer(m)]
        return () if all(trace.is_called(n) for n in layers) else training_branches(model, example_input)

    begin = time.monotonic()
    try:
        return Trace(model, example_input, seconds, branches)
    except ValueError:
        # slimming will compare the outputs in train mode; a model that cannot be traced at all fails here again
        return Trace(model, example_input, seconds - (time.monotonic() - begin))


class _Search:
    """The groups of a traced model.

    Args:
        model: the model.
        trace: its trace.
        reasons: modules and parameters that must not be cut.
    """

    def __init__(self, model: nn.Module, trace: Trace, reasons: Mapping[str, str]) -> None:
        self._model, self._trace, self._reasons = model, trace, reasons
        self._uses = trace.uses()
        self._sides = cache(trace.sides)  # a slice of thousands asks for those of the whole axis
        self._depthwise = depthwise_groups(model)
        self._saved = model.state_dict().keys()
        self._seen: set[int] = set()
        self._named: Counter[str] = Counter()
        self._parts: dict[tuple[str, int], dict[int, list[tuple[int, AnyAxis]]]] = {}

    def groups(self) -> list[Group]:
        """Every group once, by its first producer, in the model's order."""
        found: list[Group] = []
        for name, axes in self._trace.axes.items():
            for dim, axis in enumerate(axes):
                if self._makes_channels(name, dim):
                    found += self._made_by(name, axis)
        return found

    def _makes_channels(self, name: str, dim: int) -> bool:
        if "out" in self._sides(name, dim):
            return True
        # a layer whose weight went into an operation that nothing is known of
        module, _, local = name.rpartition(".")
        layer = self._model.get_submodule(module)
        is_output = local == "weight" and is_layer(layer) and dim == output_dim(layer)
        return is_output and name in self._trace.called and module not in self._depthwise

    def _made_by(self, name: str, axis: AnyAxis) -> list[Group]:
        """The groups of the channels that a parameter makes, of those that were not seen before."""
        now = resolved(axis)
        found: list[Group] = []
        staying: list[Run] = []
        size = 0
        for part in now.parts if isinstance(now, Concatenation) else [now]:
            runs = [*runs_in(part)]
            open_ones = [r for r in runs if not r.reason and r.size > 1]
            if not open_ones and any(id(r) not in self._seen for r in runs):
                staying, size = [*staying, *runs], size + part.size
            found += [self._group(name, [r], r.size) for r in open_ones if id(r) not in self._seen]
            self._seen |= {id(r) for r in runs}
        if staying:
            found.append(self._group(name, staying, size))
        return [replace(g, name=self._free_name(layer_of(name))) for g in found]

    def _free_name(self, layer: str) -> str:
        """A name for another group that a layer makes."""
        self._named[layer] += 1
        return layer if self._named[layer] == 1 else f"{layer}, part {self._named[layer]}"

    def _group(self, name: str, runs: Sequence[Run], size: int) -> Group:
        self._trace.check_time()
        members: dict[tuple[str, int], Member] = {}
        reason = min(((r.since, r.reason) for r in runs if r.reason), default=(0, ""))[1]
        for run in runs:
            for parameter, dim in self._uses[id(run)]:
                member, why = self._member(parameter, dim, run, len(runs) == 1)
                if member is not None:
                    members.setdefault(member.key, member)
                reason = reason or why
        sides = {side: tuple(m for m in members.values() if m.side == side) for side in ("out", "in", "both")}
        group = Group(name, size, sides["out"], sides["in"], sides["both"])
        excluded = why_excluded([n for m in group.members for n in (m.module, m.parameter)], self._reasons)
        return replace(group, reason=excluded or reason or self._why_nothing_is_left(group, runs))

    def _why_nothing_is_left(self, group: Group, runs: Sequence[Run]) -> str:
        """Why a group whose channels nothing mixes has to stay; empty where it can go."""
        names = {m.parameter: None for m in group.members}
        if not group.producers:
            return f"only weights, and no activations, are multiplied here: one is computed from {', '.join(names)}"
        if group.size == 1 and all((m.units >= 0).sum() == 1 for m in group.producers):
            return "a single channel, and a layer keeps one at least"
        if not group.consumers:
            computed = list(dict.fromkeys(n for r in runs for n in self._trace.sources_of_readers(r)))
            reasons = (self._reasons.get(n) or self._reasons.get(n.rpartition(".")[0]) for n in computed)
            if computed:
                return next(
                    filter(None, reasons),
                    f"the weight that reads these channels is computed from {', '.join(computed)}",
                )
            return "no layer takes these channels as its inputs"
        if group.size < 2:
            return "a single unit: grouped convolutions or chunks tie all the channels"
        if shares_keys(self._model, names):
            return SHARED
        return ""

    def _member(self, parameter: str, dim: int, run: Run, is_whole: bool) -> tuple[Member | None, str]:
        """The part of a group that lies in a parameter, and why it must stay; None where it goes by another one."""
        name, _, local = parameter.rpartition(".")
        module = self._model.get_submodule(name)
        if local == "bias" and is_layer(module):
            return None, ""
        axis = self._trace.axes[parameter][dim]
        try:
            entries = self._entries(parameter, dim, run) if is_whole else torch.full((axis.size,), -1)
        except MisfitError as error:
            return None, f"{parameter}: {error}"
        if isinstance(module, BATCH_NORMS):  # its statistics go by its gain
            return Member(name, f"{name}.weight", 0, "both", entries), ""
        sides = self._sides(parameter, dim)
        if parameter not in self._saved:
            return None, f"{parameter} is a buffer that no checkpoint holds (persistent=False)"
        why = f"{parameter} makes these channels and reads them" if len(sides) == 2 else ""
        if "in" in sides and local in module._buffers:
            why = why or f"{parameter} reads these channels, a buffer: only parameters have masks"
        if "in" in sides and (filled := self._trace.filled.get(parameter)):
            why = why or f"the weight is {filled} of {parameter}, so it is not zero where a mask makes {parameter} zero"
        if "out" in sides and not isinstance(resolved(axis), Run):  # heads are factors of an axis
            around = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
            why = why or next(filter(None, (why_heads_stay(self._model.get_submodule(n)) for n in around)), "")
        if local == "weight" and name in self._depthwise and dim == 0 and goes_by_input(entries, self._depthwise[name]):
            sides = set()
        return Member(name, parameter, dim, min(sides, default="both"), entries), why

    def _entries(self, parameter: str, dim: int, run: Run) -> Tensor:
        """The channel of ``run`` that each entry of an axis belongs to, int64; -1 for none."""
        if (parameter, dim) not in self._parts:
            # once for each axis: that behind many concatenations has many parts, and each run is in few of them
            now = resolved(self._trace.axes[parameter][dim])
            found: dict[int, list[tuple[int, AnyAxis]]] = {}
            begin = 0
            for part in now.parts if isinstance(now, Concatenation) else [now]:
                for inner in {id(r) for r in runs_in(part)}:
                    found.setdefault(inner, []).append((begin, part))
                begin += part.size
            self._parts[parameter, dim] = found
        entries = torch.full((self._trace.axes[parameter][dim].size,), -1)
        for begin, part in self._parts[parameter, dim].get(id(run), []):
            entries[begin : begin + part.size] = torch.tensor(units(part, run))
        return entries
