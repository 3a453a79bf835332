"""Importance of channels: of each input of a layer, and of the units of a group."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.prunable import kept_units
from sparse_callbacks.core.largest import widened


def input_scores(scores: Tensor, dim: int, active: Tensor | None = None) -> Tensor:
    """Importance of each slice of inputs, summed over the outputs, signed.

    Args:
        scores: a matrix as of :func:`taylor`.
        dim: its dimension of the inputs.
        active: bool [outputs], those that are kept; None: all.
    """
    by_input = scores.movedim(dim, 0)
    return by_input.sum(1) if active is None else by_input @ active.to(by_input)


def magnitude(weight: Tensor) -> Tensor:
    """The sum of absolute weights over the kernel, as in :func:`taylor`."""
    size = weight.to(widened(weight.dtype)).abs()
    return size if size.ndim == 2 else size.flatten(2).sum(2)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """What the loss loses in first order with each pair of input and output: the sum of -weight * gradient over the kernel.

    Gives a matrix of the weight's first two dimensions, in float32 at least.
    """
    if weight.ndim == 2:
        return -weight.to(widened(weight.dtype)) * gradient.to(widened(gradient.dtype))
    return -torch.einsum("abk,abk->ab", weight.to(widened(weight.dtype)).flatten(2), gradient.to(widened(gradient.dtype)).flatten(2))


def unit_scores(inputs: Tensor, member: Member, size: int) -> Tensor:
    """Importance of each unit of a group in one of its consumers, [size], signed.

    The importance of the group is the sum over its consumers, and its absolute value comes last.

    Args:
        inputs: see :func:`input_scores`.
        member: the consumer.
        size: units of the group.
    """
    units = member.units.to(inputs.device)
    owned = units >= 0
    return torch.zeros(size, dtype=inputs.dtype, device=inputs.device).index_add(0, units[owned], inputs[owned])


def kept_importance(reader: str, groups: Sequence[Group], scores: Sequence[Tensor], masks: Mapping[str, Tensor]) -> float:
    """Share of what is kept in the importance of all units that the weight ``reader`` takes in; 1 where nothing is important."""
    mine = [(s, kept_units(g, masks)) for g, s in zip(groups, scores, strict=True) if reader in {c.parameter for c in g.consumers}]
    total = sum(float(s.sum()) for s, _ in mine)
    return sum(float(s[keep].sum()) for s, keep in mine) / total if total else 1.0


def active_outputs(groups: Sequence[Group], keeps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Bool [outputs] of every consumer whose own outputs are channels of some group: those that are kept."""
    readers = {c.module: c.parameter for g in groups for c in g.consumers}
    active: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for producer in (p for p in group.producers if p.module in readers):
            name, kept = readers[producer.module], producer.kept(keep)
            active[name] = kept & active.get(name, torch.ones_like(kept))
    return active


def reader_scores(
    groups: Sequence[Group], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None, active: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Importance of each input of every consumer in ``weights``, summed over active outputs and kernel, signed; by parameter name.

    Args:
        groups: whose consumers.
        weights: dense weights by parameter name.
        gradients: with them Taylor importance of the consumers that have one; without, magnitude.
        active: see :func:`active_outputs`.
    """
    dims = {c.parameter: c.dim for g in groups for c in g.consumers}
    if gradients is None:
        return {n: input_scores(magnitude(weights[n]), dim, active.get(n)) for n, dim in dims.items() if n in weights}
    at_hand = {n: dim for n, dim in dims.items() if n in weights and n in gradients}
    return {n: input_scores(taylor(weights[n], gradients[n]), dim, active.get(n)) for n, dim in at_hand.items()}


def group_scores(group: Group, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """|importance summed over a group's consumers| of each unit, [size]; None where none of them is there.

    Args:
        group: whose units.
        inputs: see :func:`reader_scores`.
    """
    found = [unit_scores(inputs[c.parameter], c, group.size) for c in group.consumers if c.parameter in inputs]
    return torch.stack([f.to(found[0]) for f in found]).sum(0).abs() if found else None
