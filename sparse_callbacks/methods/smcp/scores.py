"""Importance of channels: of each input of a layer, and of the units of a group.

**Behind a norm** the Taylor score of an input depends on how many other inputs are kept, unless that is undone. Let
y_o = sum_i w_oi m_i x_i be an output of a layer and s_o its standard deviation, by which a norm divides it. The loss then
depends on w_o through y_o / s_o alone, so its gradient has the factor 1 / s_o, and a gain that was scaled by
``norm_scaling`` is another factor f. Where few inputs are kept, s_o is small, so every input of the layer, kept or pruned,
seems more important, by about sqrt(all / kept). The next solve gives the whole group back, s_o grows, the scores fall,
and the solve after that prunes it again.

What counts is how the loss changes when an input goes from the layer in one and the same unit for every mask: the
standard deviation S_o with all inputs. So the score of a pair of output and input is multiplied by s_o / (S_o f). The
variance of a sum of uncorrelated inputs with equal variances v is v ||w_o||^2, so

    s_o / S_o = ||m w_o|| / ||w_o||

for the dense weights w, where w_o takes in the kernel. Where a norm divides several outputs by one number (layer norms,
group norms), both squares are summed over these outputs. No data is needed, and nothing changes while nothing is pruned.

It is so where every path from the output to the loss runs through norms, and up to them through functions that give c times
as much for c times the output and keep channels apart (:func:`~sparse_callbacks.channels.normalized.normalized_outputs`). All
other layers have factor 1: where a norm takes a sum of the output and something else, scores still rise with what is
pruned, between not at all and by sqrt(all / kept). The factor is as good as its assumption: correlated inputs, biases and
means (of a ReLU between layer and norm, and where a norm is RMS) make it inexact.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.prunable import kept_units
from sparse_callbacks.core.kept_tensors import KeptTensors
from sparse_callbacks.core.largest import widened
from sparse_callbacks.methods.channels.criteria import unit_scores


def input_scores(scores: Tensor, dim: int, outputs: Tensor | None = None) -> Tensor:
    """Importance of each slice of inputs, summed over the outputs, signed.

    Args:
        scores: a matrix as of :func:`taylor`.
        dim: the dimension of ``scores`` along which the inputs lie.
        outputs: [outputs], the factor of each output; bool where it says which of them are kept; or shaped as ``scores``,
            that of each pair. None: 1 for all.
    """
    by_input = scores.movedim(dim, 0)
    if outputs is not None and outputs.ndim == 2:
        return (scores * outputs.to(scores)).sum(1 - dim)
    # a product with zeros and ones: with a bool index the size of the result would have to be read from the device
    return by_input.sum(1) if outputs is None else by_input @ outputs.to(by_input)


def deviation_left(weight: Tensor, dim: int, kept: Tensor, together: int = 1, groups: int = 1) -> Tensor:
    """Standard deviation of each output of a layer with the kept inputs alone, as a share of that with all of them.

    The inputs are taken as uncorrelated and of equal variance; see the module's first lines. The result is [outputs], or
    [inputs, outputs / groups] for a weight whose inputs lie along dimension 0 in several groups (a grouped transposed
    convolution); in float32 at least, and 1 for an output without weights.

    Args:
        weight: the dense weight.
        dim: the dimension along which the inputs lie, 0 or 1.
        kept: bool, which inputs are kept, of the weight's size along ``dim``.
        together: number of neighbouring outputs that a norm divides by one number.
        groups: the layer's number of groups.
    """
    wide = weight.to(widened(weight.dtype)).unsqueeze(-1).flatten(2)
    squares = torch.einsum("abk,abk->ab", wide, wide)
    # [outputs, inputs] of one group or of all; along dimension 1 the outputs of all groups lie one after another already
    by_group = groups if dim == 0 else 1
    parts = squares.movedim(dim, 1) if by_group == 1 else squares.view(groups, -1, squares.shape[1]).mT.flatten(0, 1)
    held = kept.to(squares).view(by_group, 1, -1).expand(-1, parts.shape[0] // by_group, -1).flatten(0, 1)
    every, left = parts.sum(1), (parts * held).sum(1)
    if together > 1:
        every, left = (v.view(-1, together).sum(1).repeat_interleave(together) for v in (every, left))
    share = torch.where(every > 0, left / every, 1).sqrt()
    return share if by_group == 1 else share.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)


def deviation_under_mask(layer: nn.Module, weight: Tensor, mask: Tensor, dim: int, together: int = 1) -> Tensor:
    """:func:`deviation_left` of a layer whose whole inputs are masked.

    Args:
        layer: the layer.
        weight, dim, together: see :func:`deviation_left`.
        mask: the weight's mask.
    """
    # the first output's say which inputs are kept
    kept = mask.select(1 - dim, 0).reshape(weight.shape[dim], -1)[:, 0]
    return deviation_left(weight, dim, kept, together, getattr(layer, "groups", 1))


def magnitude(weight: Tensor) -> Tensor:
    """The sum of absolute weights over the kernel for each pair of input and output; shaped as :func:`taylor`."""
    size = weight.to(widened(weight.dtype)).abs()
    return size if size.ndim == 2 else size.flatten(2).sum(2)


def taylor(weight: Tensor, gradient: Tensor, kept: KeptTensors | None = None) -> Tensor:
    """First-order change of the loss when a pair of input and output is removed, for each pair.

    It is the sum of -weight * gradient over the kernel. The result is a matrix of the weight's first two dimensions, in
    float32 at least.

    Args:
        weight, gradient: the weight and the gradient of the loss by it.
        kept: memory for the result of a matrix, which the next call writes over; None for fresh memory.
    """
    wide, wide_gradient = weight.to(widened(weight.dtype)), gradient.to(widened(gradient.dtype))
    if weight.ndim == 2:
        return torch.mul(wide, wide_gradient, out=None if kept is None else kept.like("taylor", wide)).neg_()
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
    outputs: Mapping[str, Tensor],
    kept: KeptTensors | None = None,
) -> dict[str, Tensor]:
    """Importance of each input of every consumer in ``weights``, by parameter name.

    It is summed over active outputs and the kernel, and has a sign.

    Args:
        groups: the groups whose consumers are scored.
        weights: dense weights by parameter name.
        gradients: gradients by parameter name, for Taylor importance; consumers without a gradient are left out. None:
            importance by magnitude.
        outputs: which outputs are kept, see :func:`active_outputs`, or the factor of each; by parameter name.
        kept: memory to compute in; None for fresh memory.
    """
    # by parameter: one that several groups read (a concatenation) is scored once, and unit_scores picks from it
    dims = {c.parameter: c.dim for g in groups for c in g.consumers}
    if gradients is None:
        return {n: input_scores(magnitude(weights[n]), dim, outputs.get(n)) for n, dim in dims.items() if n in weights}
    with_gradient = {n: dim for n, dim in dims.items() if n in weights and n in gradients}
    return {
        n: input_scores(taylor(weights[n], gradients[n], kept), dim, outputs.get(n)) for n, dim in with_gradient.items()
    }


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
