"""Channels that hold a constant, and how a constant goes into the biases of the layers that read it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.constant_propagation.propagation import ArrivingConstants
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.module_sizes import is_layer


def is_read_by_layer(member: Member, model: nn.Module) -> bool:
    """Whether a consumer is the weight of a convolution or linear layer, whose inputs are those of the module."""
    return member.parameter == f"{member.module}.weight" and is_layer(model.get_submodule(member.module))


def constants_after_cuts(
    group: Group, arriving: Mapping[str, ArrivingConstants], cuts: Cuts, model: nn.Module
) -> dict[str, ArrivingConstants]:
    """What arrives at the consumers of ``group`` after ``cuts``, by the name of the module.

    Args:
        group: the group whose units may be constants.
        arriving: what arrives without cuts, by the name of the parameter. At a layer that no pass has run nothing is one.
        cuts: what was cut; channels that are gone count as zeros, and others hold what they held before.
        model: the model.
    """
    found = {}
    for member in group.consumers:
        times = _repetitions(model.get_submodule(member.module), member)
        everything = torch.ones(len(member.units), dtype=torch.bool)
        gone = ~cuts.kept.get(member.key, everything).repeat(times)
        whole = arriving.get(member.parameter)
        if whole is None or len(whole.proved) != len(gone):
            whole = ArrivingConstants(torch.zeros_like(gone), torch.zeros(len(gone)))
        found[member.module] = ArrivingConstants(whole.proved | gone, torch.where(gone, 0, whole.value), whole.reason)
    return found


def foldable(group: Group, arriving: Mapping[str, ArrivingConstants], model: nn.Module) -> Tensor:
    """Bool [units]: where a constant arrives at every consumer that a bias can stand for, or that is 0."""
    found = torch.ones(group.size, dtype=torch.bool)
    # a unit with several slices, as behind a flattening, must be constant in each of them
    for member in group.consumers:
        units = member.units.repeat(_repetitions(model.get_submodule(member.module), member))
        found[units[(units >= 0) & ~arriving[member.module].proved]] = False
    return found


def bias_shifts(
    group: Group, gone: Tensor, arriving: Mapping[str, ArrivingConstants], surgery: Surgery
) -> dict[str, Tensor]:
    """What the constants of removed units add to each output of the consumers, by the name of the module.

    Args:
        group: the group that is cut.
        gone: the units that are removed as constants, bool [units].
        arriving: from :func:`constants_after_cuts`.
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
        value = torch.where(is_gone, arriving[member.module].value, 0.0).to(weight)
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
