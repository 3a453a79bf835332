"""Channels that hold a constant, and how a constant goes into the biases of the layers that read it."""

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

ROUNDING_STEPS = 1e3
"""How far a constant may vary by rounding, in steps of its precision at the layer's largest input.

Below float32 that would be as much as the numbers themselves, so there only exact constants count.
"""


@dataclass(frozen=True)
class ArrivingRange:
    """Smallest and largest value that arrived at each input channel of a layer, [channels] of the original layer."""

    low: Tensor
    high: Tensor

    @property
    def constant(self) -> Tensor:
        """Bool [channels]: where a single value arrived."""
        return self.high - self.low <= self._rounding

    @property
    def zero(self) -> Tensor:
        """Bool [channels]: where that value is 0."""
        return self.constant & (self.high.abs() <= self._rounding)

    @property
    def _rounding(self) -> Tensor:
        precision = torch.finfo(self.low.dtype).eps
        if precision > torch.finfo(torch.float32).eps:
            return torch.zeros((), dtype=self.low.dtype)
        largest = torch.maximum(self.low.abs().max(), self.high.abs().max())
        return largest * ROUNDING_STEPS * precision


def arriving_ranges(group: Group, surgery: Surgery, cuts: Cuts, samples: Sequence[Any]) -> dict[str, ArrivingRange]:
    """What arrives at the consumers of ``group``, by the name of the module.

    Consumers that run in train mode only are seen in a pass over the first sample in that mode. What arrives at a
    consumer that never runs is NaN, which is not a constant.

    Args:
        group: the group whose units may be constants.
        surgery: holds the model, as ``cuts`` leave it.
        cuts: what was cut before.
        samples: inputs that the model runs on.
    """
    seen: dict[str, list[Tensor]] = {c.module: [] for c in group.consumers}

    def watch(name: str) -> Any:
        module = surgery.model.get_submodule(name)
        # counted from the end, as an input may have no batch
        axis = -1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)

        def look(_: nn.Module, args: Any, named: Any) -> None:
            values = tensors_in((args, named))[0].detach().movedim(axis, 0)
            seen[name].append(values.reshape(len(values), -1))  # a vector becomes one column

        return module.register_forward_pre_hook(look, with_kwargs=True)

    with ExitStack() as hooks:
        for name in seen:
            hooks.enter_context(watch(name))
        for sample in samples:
            run(surgery.model, sample)
        if not all(seen.values()):
            branches = training_branches(surgery.model, samples[0])
            with training(surgery.model.get_submodule(n) for n in branches):
                run(surgery.model, samples[0])
    return {c.module: _range(seen[c.module], c, surgery.model, cuts) for c in group.consumers}


def _range(seen: Sequence[Tensor], member: Member, model: nn.Module, cuts: Cuts) -> ArrivingRange:
    """Extremes of what was seen, at the positions that the channels have in the original layer.

    Args:
        seen: inputs of the layer, [channels that are left, values] each.
        member: the layer's member of the group.
        model: the model.
        cuts: what was cut before; channels that are gone count as zeros.
    """
    times = _repetitions(model.get_submodule(member.module), member)
    everything = torch.ones(len(member.units), dtype=torch.bool)
    stays = cuts.kept.get(member.key, everything).repeat(times)
    if not seen:
        # NaN fails every comparison, so a channel that was never seen counts neither as a constant nor as zero
        nothing = torch.full((len(stays),), torch.nan)
        return ArrivingRange(nothing, nothing)
    values = torch.cat([*seen], 1).cpu()
    low, high = torch.zeros(len(stays), dtype=values.dtype), torch.zeros(len(stays), dtype=values.dtype)
    low[stays], high[stays] = values.amin(1), values.amax(1)
    return ArrivingRange(low, high)


def foldable(group: Group, arriving: Mapping[str, ArrivingRange], model: nn.Module) -> Tensor:
    """Bool [units]: where a constant arrives at every consumer that a bias can stand for, or that is 0."""
    found = torch.ones(group.size, dtype=torch.bool)
    # a unit with several slices, as behind a flattening, must be constant in each of them
    for member in group.consumers:
        module, values = model.get_submodule(member.module), arriving[member.module]
        # zero padding puts zeros beside a constant at the border, so there only a constant of 0 may go
        fits = values.constant if _keeps_constants(module) else values.zero
        units = member.units.repeat(_repetitions(module, member))
        found[units[(units >= 0) & ~fits]] = False
    return found


def bias_shifts(
    group: Group, gone: Tensor, arriving: Mapping[str, ArrivingRange], surgery: Surgery
) -> dict[str, Tensor]:
    """What the constants of removed units add to each output of the consumers, by the name of the module.

    Args:
        group: the group that is cut.
        gone: the units that are removed as constants, bool [units].
        arriving: from :func:`arriving_ranges`.
        surgery: holds the model.

    Returns:
        shifts of the outputs; none for layers where they are 0.
    """
    found: dict[str, Tensor] = {}
    if not gone.any():
        return found
    for member in group.consumers:
        module, weight = surgery.model.get_submodule(member.module), surgery.tensors[member.parameter].detach()
        times = _repetitions(module, member)
        units = member.units.repeat(times)
        is_gone = (units >= 0) & gone[units.clamp(min=0)]
        # high and low agree up to rounding, so either would do
        value = torch.where(is_gone, arriving[member.module].high, 0.0).to(weight)
        if _keeps_constants(module) and value.any():
            # a constant image times a kernel is the constant times the kernel's sum, for each group of the convolution
            summed = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            by_group = summed.view(times, -1, summed.shape[1]), value.view(times, -1)
            found[member.module] = torch.einsum("goi,gi->go", *by_group).flatten()
    return found


def _repetitions(module: nn.Module, member: Member) -> int:
    """How many inputs share a slice of a consumer's weight: one for each group of an ordinary convolution."""
    return int(module.groups) if isinstance(module, _ConvNd) and member.dim == 1 else 1


def _keeps_constants(module: nn.Module) -> bool:
    """Whether a constant input gives a constant output: not through padding with zeros, nor between strides."""
    if not isinstance(module, _ConvNd):
        return True
    padded = module.padding != "valid" and any(p != 0 for p in module.padding)
    # an output of a transposed convolution meets only some weights of the kernel, which ones depends on its place
    return not isinstance(module, _ConvTransposeNd) and (not padded or module.padding_mode != "zeros")
