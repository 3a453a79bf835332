"""Importance of channels: of each input of a layer, and of the units of a group."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.prunable import kept_units
from sparse_callbacks.core.largest import widened
from sparse_callbacks.methods.channels.criteria import unit_scores


def input_scores(scores: Tensor, dim: int, active: Tensor | None = None) -> Tensor:
    """Importance of each slice of inputs, summed over the outputs, signed.

    Args:
        scores: a matrix as of :func:`taylor`.
        dim: the dimension of ``scores`` along which the inputs lie.
        active: bool [outputs], the outputs that are kept; None: all.
    """
    by_input = scores.movedim(dim, 0)
    # a product with zeros and ones: with a bool index the size of the result would have to be read from the device
    return by_input.sum(1) if active is None else by_input @ active.to(by_input)


def magnitude(weight: Tensor) -> Tensor:
    """The sum of absolute weights over the kernel for each pair of input and output; shaped as :func:`taylor`."""
    size = weight.to(widened(weight.dtype)).abs()
    return size if size.ndim == 2 else size.flatten(2).sum(2)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of the loss when a pair of input and output is removed, for each pair.

    It is the sum of -weight * gradient over the kernel. The result is a matrix of the weight's first two dimensions, in
    float32 at least.
    """
    wide, wide_gradient = weight.to(widened(weight.dtype)), gradient.to(widened(gradient.dtype))
    if weight.ndim == 2:
        return -wide * wide_gradient
    # einsum makes no tensor of all products, which would be as large as the weight
    return -torch.einsum("abk,abk->ab", wide.flatten(2), wide_gradient.flatten(2))


def kept_importance(
    reader: str, groups: Sequence[Group], scores: Sequence[Tensor], masks: Mapping[str, Tensor]
) -> float:
    """Share of the kept units in the importance of all units that a weight takes in; 1 where nothing is important.

    Args:
        reader: parameter name of the weight.
        groups: all groups.
        scores: score of each unit of each group.
        masks: masks by parameter name.
    """
    read = [
        (own, kept_units(group, masks))
        for group, own in zip(groups, scores, strict=True)
        if reader in {consumer.parameter for consumer in group.consumers}
    ]
    # several groups where the weight reads a concatenation: its norm has one gain for each output, so one factor
    total = sum(float(own.sum()) for own, _ in read)
    if not total:
        return 1.0
    return sum(float(own[keep].sum()) for own, keep in read) / total


def active_outputs(groups: Sequence[Group], keeps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs that are kept (bool [outputs]) by consumer's parameter name, where outputs are channels of some group.

    Args:
        groups: all groups.
        keeps: bool [size], the units that each group keeps.
    """
    # by parameter: an attention may have several weights in one module
    readers = {c.parameter for g in groups for c in g.consumers}
    active: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for producer in (p for p in group.producers if p.parameter in readers):
            name, kept = producer.parameter, producer.kept(keep)
            # outputs may be channels of several groups (before a split); each group leaves those of the others alone
            active[name] = kept & active.get(name, torch.ones_like(kept))
    return active


def reader_scores(
    groups: Sequence[Group],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor] | None,
    active: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Importance of each input of every consumer in ``weights``, by parameter name.

    It is summed over active outputs and the kernel, and has a sign.

    Args:
        groups: the groups whose consumers are scored.
        weights: dense weights by parameter name.
        gradients: gradients by parameter name, for Taylor importance; consumers without a gradient are left out. None:
            importance by magnitude.
        active: outputs that are kept, see :func:`active_outputs`.
    """
    # by parameter: one that several groups read (a concatenation) is scored once, and unit_scores picks from it
    dims = {c.parameter: c.dim for g in groups for c in g.consumers}
    if gradients is None:
        return {n: input_scores(magnitude(weights[n]), dim, active.get(n)) for n, dim in dims.items() if n in weights}
    with_gradient = {n: dim for n, dim in dims.items() if n in weights and n in gradients}
    return {n: input_scores(taylor(weights[n], gradients[n]), dim, active.get(n)) for n, dim in with_gradient.items()}


def group_scores(group: Group, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """|importance summed over a group's consumers| of each unit, [size]; None where no consumer has scores.

    Args:
        group: the group of the units.
        inputs: scores of the inputs of consumers, see :func:`reader_scores`.
    """
    found = [unit_scores(inputs[c.parameter], c, group.size) for c in group.consumers if c.parameter in inputs]
    if not found:
        return None
    # signs are kept up to here: what helps one consumer and harms another cancels out
    return torch.stack([f.to(found[0]) for f in found]).sum(0).abs()
