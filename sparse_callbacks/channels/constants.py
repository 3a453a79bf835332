"""Channels that hold a constant: what arrives at the layers that read them, and what that adds to their biases."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.core.inspection import run, tensors_in, training, training_branches

STILL = 1e3
"""Times the precision of its numbers, relative to the layer's largest input, a constant may vary by rounding. Of numbers below float32
that would be as much as the numbers themselves, so there only exact constants count."""


@dataclass(frozen=True)
class Arrival:
    """Smallest and largest value that arrived at each input channel of a layer ([channels], of the layer's original ones)."""

    low: Tensor
    high: Tensor

    @property
    def constant(self) -> Tensor:
        return self.high - self.low <= self._rounding

    @property
    def zero(self) -> Tensor:
        return self.constant & (self.high.abs() <= self._rounding)

    @property
    def _rounding(self) -> Tensor:
        if torch.finfo(self.low.dtype).eps > torch.finfo(torch.float32).eps:
            return torch.zeros((), dtype=self.low.dtype)
        return torch.maximum(self.low.abs().max(), self.high.abs().max()) * STILL * torch.finfo(self.low.dtype).eps


def arrivals(group: Group, surgery: Surgery, cuts: Cuts, samples: Sequence[Any]) -> dict[str, Arrival]:
    """What arrives at the consumers of ``group`` when the model, as ``cuts`` leave it, runs on ``samples``; by module name.

    At those that run in train mode only, what arrives in such a pass over the first sample; NaN, which is no constant, where nothing does.
    """
    seen: dict[str, list[Tensor]] = {c.module: [] for c in group.consumers}

    def watch(name: str) -> Any:
        module = surgery.model.get_submodule(name)
        axis = -1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)

        def look(_: nn.Module, args: Any, named: Any) -> None:
            values = tensors_in((args, named))[0].detach().movedim(axis, 0)
            seen[name].append(values.reshape(len(values), -1))  # which may be a single one

        return module.register_forward_pre_hook(look, with_kwargs=True)

    with ExitStack() as hooks:
        for name in seen:
            hooks.enter_context(watch(name))
        for sample in samples:
            run(surgery.model, sample)
        if not all(seen.values()):
            with training(surgery.model.get_submodule(n) for n in training_branches(surgery.model, samples[0])):
                run(surgery.model, samples[0])
    return {c.module: _arrival(seen[c.module], c, surgery.model, cuts) for c in group.consumers}


def _arrival(seen: Sequence[Tensor], member: Member, model: nn.Module, cuts: Cuts) -> Arrival:
    """Extremes of what was ``seen`` ([channels that are left, samples] each), put where the channels were at first; channels that are gone
    count as zeros."""
    times = _times(model.get_submodule(member.module), member)
    stays = cuts.kept.get(member.key, torch.ones(len(member.units), dtype=torch.bool)).repeat(times)
    if not seen:
        nothing = torch.full((len(stays),), torch.nan)
        return Arrival(nothing, nothing)
    values = torch.cat([*seen], 1).cpu()
    low, high = torch.zeros(len(stays), dtype=values.dtype), torch.zeros(len(stays), dtype=values.dtype)
    low[stays], high[stays] = values.amin(1), values.amax(1)
    return Arrival(low, high)


def foldable(group: Group, arriving: Mapping[str, Arrival], model: nn.Module) -> Tensor:
    """Bool [units]: a constant at every consumer, zero or one that a bias can stand for."""
    found = torch.ones(group.size, dtype=torch.bool)
    for member in group.consumers:
        module, arrival = model.get_submodule(member.module), arriving[member.module]
        fits = arrival.constant if _is_uniform(module) else arrival.zero
        units = member.units.repeat(_times(module, member))
        found[units[(units >= 0) & ~fits]] = False
    return found


def shifts(group: Group, gone: Tensor, arriving: Mapping[str, Arrival], surgery: Surgery) -> dict[str, Tensor]:
    """What the constants of the units in ``gone`` (bool [units]) add to each output of the consumers, where that is not zero."""
    found = {}
    for member in group.consumers if gone.any() else ():
        module, weight = surgery.model.get_submodule(member.module), surgery.tensors[member.parameter].detach()
        times = _times(module, member)
        units = member.units.repeat(times)
        value = torch.where((units >= 0) & gone[units.clamp(min=0)], arriving[member.module].high, 0.0).to(weight)
        if _is_uniform(module) and value.any():
            summed = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            found[member.module] = torch.einsum("goi,gi->go", summed.view(times, -1, summed.shape[1]), value.view(times, -1)).flatten()
    return found


def _times(module: nn.Module, member: Member) -> int:
    """How often the slices of a consumer's weight repeat in its inputs: once for each group of a convolution that is not transposed."""
    return int(module.groups) if isinstance(module, _ConvNd) and member.dim == 1 else 1


def _is_uniform(module: nn.Module) -> bool:
    """A constant input gives a constant output."""
    if not isinstance(module, _ConvNd):
        return True
    padded = module.padding != "valid" and any(p != 0 for p in module.padding)
    return not isinstance(module, _ConvTransposeNd) and (not padded or module.padding_mode != "zeros")
