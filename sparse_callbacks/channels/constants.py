"""Channels that hold a constant, and how a constant goes into the biases of the layers that read it."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.module_sizes import is_layer
from sparse_callbacks.core.inspection import run, tensors_in, training, training_branches

ROUNDING_STEPS = 1e3
"""How far a constant may vary by rounding, in steps of its precision at the layer's largest input.

Below float32 that would be as much as the numbers themselves, so there only exact constants count.
"""

LARGE = 1e6
"""How many times the largest weight the random numbers are that show whether a unit depends on the weights that make it."""


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


def is_read_by_layer(member: Member, model: nn.Module) -> bool:
    """Whether a consumer is the weight of a convolution or linear layer, whose inputs are those of the module."""
    return member.parameter == f"{member.module}.weight" and is_layer(model.get_submodule(member.module))


def observed_ranges(model: nn.Module, consumers: Iterable[Member], samples: Sequence[Any]) -> dict[str, ArrivingRange]:
    """What arrives at layers, by the name of the module.

    Layers that run in train mode only are seen in a pass over the first sample in that mode. What arrives at a layer that
    never runs is NaN, which is not a constant.

    Args:
        model: the model without any cut, in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        consumers: members whose modules are looked at.
        samples: inputs that the model runs on.
    """
    members = {c.module: c for c in consumers if is_read_by_layer(c, model)}
    seen: dict[str, ArrivingRange] = {}

    def watch(name: str) -> Any:
        module = model.get_submodule(name)
        # counted from the end, as an input may have no batch
        axis = -1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)

        def look(_: nn.Module, args: Any, named: Any) -> None:
            arriving = tensors_in((args, named))
            # an empty tensor, as of a detector that finds no box, tells nothing, and complex numbers have no order
            if not arriving or not arriving[0].numel() or arriving[0].is_complex():
                return
            values = arriving[0].detach().movedim(axis, 0)
            low, high = torch.aminmax(values.reshape(len(values), -1), dim=1)  # a vector becomes one column
            before = seen.get(name)
            seen[name] = ArrivingRange(
                low if before is None else torch.minimum(low, before.low),
                high if before is None else torch.maximum(high, before.high),
            )

        return module.register_forward_pre_hook(look, with_kwargs=True)

    with ExitStack() as hooks:
        for name in members:
            hooks.enter_context(watch(name))
        for sample in samples:
            run(model, sample)
        if len(seen) < len(members):
            branches = training_branches(model, samples[0])
            with training(model.get_submodule(n) for n in branches):
                run(model, samples[0])
    found = {n: ArrivingRange(r.low.cpu(), r.high.cpu()) for n, r in seen.items()}
    for name, member in members.items():
        if name not in found:
            # NaN fails every comparison, so a channel that was never seen counts neither as a constant nor as zero
            nothing = torch.full((len(member.units) * _repetitions(model.get_submodule(name), member),), torch.nan)
            found[name] = ArrivingRange(nothing, nothing)
    return found


def arriving_ranges(
    group: Group, observed: Mapping[str, ArrivingRange], cuts: Cuts, model: nn.Module
) -> dict[str, ArrivingRange]:
    """What arrives at the consumers of ``group`` after ``cuts``, by the name of the module.

    Args:
        group: the group whose units may be constants.
        observed: from :func:`observed_ranges`.
        cuts: what was cut; channels that are gone count as zeros, and others hold what they held before.
        model: the model.
    """
    found = {}
    for member in group.consumers:
        times, whole = _repetitions(model.get_submodule(member.module), member), observed[member.module]
        everything = torch.ones(len(member.units), dtype=torch.bool)
        stays = cuts.kept.get(member.key, everything).repeat(times)
        found[member.module] = ArrivingRange(torch.where(stays, whole.low, 0), torch.where(stays, whole.high, 0))
    return found


def foldable(group: Group, arriving: Mapping[str, ArrivingRange], model: nn.Module) -> Tensor:
    """Bool [units]: where a constant arrives at every consumer that a bias can stand for, or that is 0."""
    found = torch.ones(group.size, dtype=torch.bool)
    # a unit with several slices, as behind a flattening, must be constant in each of them
    for member in group.consumers:
        module, values = model.get_submodule(member.module), arriving[member.module]
        # zero padding puts zeros beside a constant at the border, so there only a constant of 0 may go
        fits = values.constant if _keeps_constants(module) and not _depends_on_length(model, member) else values.zero
        units = member.units.repeat(_repetitions(module, member))
        found[units[(units >= 0) & ~fits]] = False
    return found


@torch.no_grad()
def made_by_nothing(group: Group, units: Tensor, model: nn.Module, sample: Any) -> Tensor:
    """Bool [units]: which of ``units`` hold what they do whatever the weights that make them are, by a trial.

    A unit may hold a constant on every sample because an activation function is 0 there, and another value elsewhere. So
    the weights that make it, where they are not zero, become large random numbers, once positive and once negative.

    Args:
        group: the group.
        units: bool [units].
        model: the model without any cut, in the state of :func:`~sparse_callbacks.core.inspection.quiet`; it is left as it
            is.
        sample: what the model runs on.
    """
    generator = torch.Generator().manual_seed(0)
    makers = {p.parameter: model.get_parameter(p.parameter) for p in group.producers}
    before = {name: maker.detach().clone() for name, maker in makers.items()}
    seen = [observed_ranges(model, group.consumers, [sample])]
    for sign in (1, -1):
        for member in group.producers:
            maker = makers[member.parameter]
            chosen = member.mask(~units, maker.ndim).logical_not().to(maker.device) & (maker != 0)
            large = sign * LARGE * maker.abs().max() * torch.rand(maker.shape, generator=generator).to(maker)
            maker.copy_(torch.where(chosen, large, maker))
        seen.append(observed_ranges(model, group.consumers, [sample]))
        for name, maker in makers.items():
            maker.copy_(before[name])
    # a single value in all three runs
    joined = {
        name: ArrivingRange(
            torch.stack([ranges[name].low for ranges in seen]).amin(0),
            torch.stack([ranges[name].high for ranges in seen]).amax(0),
        )
        for name in seen[0]
    }
    return units & foldable(group, joined, model)


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


def _depends_on_length(model: nn.Module, member: Member) -> bool:
    """Whether what arrives at a consumer may be constant for one number of keys alone: a learnt or zero key is one of them."""
    around = model.get_submodule(member.module.rpartition(".")[0])
    return isinstance(around, nn.MultiheadAttention) and (around.bias_k is not None or around.add_zero_attn)
