"""Parameters and FLOPs of a network without some of its units."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels import costs
from sparse_callbacks.channels.attention_costs import projections
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.masked_model import active_slices
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.core.units_left import UnitsLeft


def flops_network(
    model: nn.Module, example_input: Any, groups: Sequence[Group], layers: Mapping[str, costs.Layer] | None = None
) -> Network:
    """FLOPs of a forward pass for one sample, by the number of units that each group keeps.

    Args:
        model: the model; it runs, and is left as it was.
        example_input: inputs, as its forward takes them.
        groups: the groups whose units can go.
        layers: :func:`~sparse_callbacks.channels.costs.layers` of the model; None: found here.
    """
    layers = costs.layers(model, example_input) if layers is None else layers
    # nothing calls the projections of torch's attention
    layers = {**layers, **projections(model, example_input)}
    other = costs.cost_outside_layers(model, example_input, layers)
    return Network(layers, groups, costs.flops, 2 * other.multiply_adds)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of all parameters by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def without_units(
    shapes: Mapping[str, torch.Size], groups: Sequence[Group], live: Sequence[Tensor], flops: Network
) -> UnitsLeft:
    """What is left of a model with the units in ``live`` alone.

    Args:
        shapes: :func:`shapes_of` the dense model.
        groups: the groups whose units can go.
        live: for each group the units that it keeps, bool [size].
        flops: :func:`flops_network` of the groups.
    """
    kept = [int(keep.sum()) for keep in live]
    return UnitsLeft(
        parameters=parameters_left(shapes, groups, live),
        dense_parameters=sum(shape.numel() for shape in shapes.values()),
        flops=flops.realised(kept),
        dense_flops=flops.dense,
        units={g.name: (count, g.size) for g, count in zip(groups, kept, strict=True)},
    )


def parameters_left(shapes: Mapping[str, torch.Size], groups: Sequence[Group], live: Sequence[Tensor]) -> int:
    """Number of parameters that stay, biases and norms with their units.

    Args:
        shapes, groups, live: as for :func:`without_units`.
    """
    # what stays of each dimension; one that reads several groups loses the units of all
    stays: dict[str, dict[int, Tensor]] = {}
    for group, keep in zip(groups, live, strict=True):
        keep = keep.cpu()
        for member in group.members:
            for name, dim, slices in _slices(member, member.kept(keep), shapes):
                of_parameter = stays.setdefault(name, {})
                of_parameter[dim] = slices & of_parameter.get(dim, slices)
    total = 0
    for name, shape in shapes.items():
        count = shape.numel()
        for dim, slices in stays.get(name, {}).items():
            count = count // shape[dim] * int(slices.sum())
        total += count
    return total


def _slices(member: Member, kept: Tensor, shapes: Mapping[str, torch.Size]) -> list[tuple[str, int, Tensor]]:
    """What stays of a member: of its own parameter, and of the bias that goes with its outputs, by name and dimension."""
    found = [(member.parameter, member.dim, kept)] if member.parameter in shapes else []
    bias = f"{member.module}.bias"
    if member.side != "in" and bias in shapes and member.parameter == f"{member.module}.weight":
        size = shapes[bias].numel()
        # a transposed convolution in groups has the same slice for an output of each group
        if size % len(kept) == 0:
            found.append((bias, 0, kept.repeat(size // len(kept))))
    return found


def live_units(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Bool [size]: the units that something makes and something reads under ``masks``, bool by parameter name."""
    live = torch.ones(group.size, dtype=torch.bool)
    for side in (group.producers, group.consumers):
        if not any(member.parameter not in masks for member in side):
            live &= _active(side, group.size, masks)
    for member in group.followers:  # a norm whose gain is masked lets nothing through
        if member.parameter in masks:
            live &= _active([member], group.size, masks)
    return live


def _active(members: Sequence[Member], size: int, masks: Mapping[str, Tensor]) -> Tensor:
    """Bool [size]: whether some weight of some member is active for a unit."""
    found = torch.zeros(size, dtype=torch.bool)
    for member in members:
        active = active_slices(masks[member.parameter].cpu(), member.dim, len(member.units))
        units = member.units.cpu()
        found[units[(units >= 0) & active]] = True
    return found
