"""Scores of channels from derivatives of the loss on calibration batches: Taylor 2017 and SOSP."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.feature_maps import FeatureMap, maps_read, unit_sums
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.core.calibration import BatchLoss, requiring_grad
from sparse_callbacks.core.largest import widened
from sparse_callbacks.methods.channels.criteria import unit_scores, unit_weights


def taylor_2017(activations: Tensor, gradients: Tensor) -> Tensor:
    """Mean over samples of \\|mean over positions of activation * gradient\\|, for each channel, [channels].

    Molchanov et al. 2017; :func:`normalised` makes the scores of a layer of it.

    Args:
        activations: feature maps, [samples, channels, ...].
        gradients: derivatives of the loss by them, of the same shape.
    """
    return (activations * gradients).flatten(2).mean(2).abs().mean(0)


def normalised(scores: Tensor) -> Tensor:
    """The scores of a layer divided by their L2 norm, [channels]; zeros stay."""
    norm = scores.norm()
    return scores / torch.where(norm > 0, norm, torch.ones_like(norm))


def sosp(first: Tensor, second: Tensor) -> Tensor:
    """Saliency of structures in SOSP-H, \\|first\\| + \\|second\\| / 2, [structures] (Nonnenmacher et al. 2022).

    Args:
        first: for each structure s the product theta_s . g of its weights with their gradient.
        second: theta_s . (H theta)_s, where theta holds the weights of all structures, and 0 for every other weight.
    """
    return first.abs() + 0.5 * second.abs()


# ---------------------------------------------------------------------- for groups of channels


def taylor_2017_scores(model: nn.Module, groups: Sequence[Group], losses: Iterable[BatchLoss]) -> list[Tensor]:
    """:func:`taylor_2017` of what the consumers of each group read, normalised in each group, [size] each.

    A unit may have several channels, and its map several consumers: the products of all of them are summed before the
    absolute value of a sample is taken, as removing the unit takes it from all of them. They are divided by the entries
    of the largest map. Where layers see other numbers of samples (regions of images), each number is averaged by itself.
    The loss of a batch is taken as the mean over its samples, so that each sample counts the same in batches of any size.

    Args:
        model: the network.
        groups: the groups.
        losses: the loss of each batch, computed when it is asked for.

    Raises:
        ValueError: the loss does not depend on what a group's consumers read, or its channels cannot be told apart.
    """
    readers = dict.fromkeys(c.parameter for g in groups for c in g.consumers)
    sums: list[Tensor | None] = [None] * len(groups)
    for batch, maps in maps_read(model, readers, losses):
        read = [m for m in maps if m.values.requires_grad]
        # frozen beginnings of a network may read without a graph, and branches may not come to the loss
        gradients = torch.autograd.grad(batch.loss, [m.values for m in read], allow_unused=True) if read else ()
        products = {m: _products(m.values, g) for m, g in zip(read, gradients, strict=True) if g is not None}
        for index, group in enumerate(groups):
            found = _of_batch(group, products, batch.samples)
            if found is not None:
                # once as the mean loss divides each sample's gradient by it, and once for the mean over samples of all batches
                found = found * float(batch.samples or 1) ** 2
                before = sums[index]
                sums[index] = found if before is None else before + found
    return [normalised(_known(found, group)) for found, group in zip(sums, groups, strict=True)]


def _products(values: Tensor, gradient: Tensor) -> Tensor:
    wide = widened(values.dtype)
    return values.detach().to(wide) * gradient.to(wide)


def _of_batch(group: Group, products: Mapping[FeatureMap, Tensor], samples: int | None) -> Tensor | None:
    """The score of each unit in a batch, before it is normalised, [size]; None where nothing comes to the group."""
    sums: dict[int, Tensor] = {}  # by the number of samples, as only products of the same sample may be summed
    entries: dict[int, int] = {}
    for consumer in group.consumers:
        for seen in (m for m in products if m.parameter == consumer.parameter):
            units, count = unit_sums(products[seen], seen.spatial, consumer, group.size, samples)
            number = len(units)
            sums[number] = sums[number] + units.to(sums[number]) if number in sums else units
            entries[number] = max(count, entries.get(number, 0))
    each = [units.abs().mean(0) / entries[number] for number, units in sums.items()]
    return torch.stack([e.to(each[0]) for e in each]).sum(0) if each else None


def sosp_scores(
    model: nn.Module, groups: Sequence[Group], live: Sequence[Tensor], losses: Iterable[BatchLoss]
) -> list[Tensor]:
    """:func:`sosp` of the units of each group, [size] each.

    A unit's weights are the filters of all producers that make it, and its depthwise weights; biases, norms and the layers
    that read it have no part in theta. Gradient and product are those of the mean loss over all samples: means over the
    batches, each with the weight of its number of samples.

    Args:
        model: the network.
        groups: the groups.
        live: for each group the units that there are still, bool [size]; the weights of others are 0 in theta.
        losses: the loss of each batch, computed when it is asked for, to be differentiated twice.

    Raises:
        ValueError: the loss does not depend on a group's weights.
    """
    members = [unit_weights(model, group) for group in groups]
    theta = _live_weights(model, members, live)
    with requiring_grad(theta):
        first, second = _derivatives_along(theta, losses)
    found = []
    for group, own in zip(groups, members, strict=True):
        parts = [(m, w) for m in own if (w := model.get_parameter(m.parameter)) in first]
        sums = [
            torch.stack([_by_unit(theta[w] * of[w], m, group.size) for m, w in parts]).sum(0) if parts else None
            for of in (first, second)
        ]
        found.append(sosp(*(_known(one, group) for one in sums)))
    return found


def _derivatives_along(
    theta: Mapping[nn.Parameter, Tensor], losses: Iterable[BatchLoss]
) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor]]:
    """The gradient g of the mean loss over samples by each parameter, and H theta; of parameters that it depends on."""
    weights, samples = [*theta], 0
    first, second = dict[nn.Parameter, Tensor](), dict[nn.Parameter, Tensor]()
    for batch in losses:
        count = batch.samples or 1
        samples += count
        found = torch.autograd.grad(batch.loss * count, weights, create_graph=True, allow_unused=True)
        gradients = {w: g for w, g in zip(weights, found, strict=True) if g is not None}
        along = torch.stack(
            [(g.to(theta[w]) * theta[w]).sum().cpu() for w, g in gradients.items()] or [torch.zeros(())]
        )
        # a loss that is linear in the weights has no second derivative, and its gradient no graph
        if along.requires_grad:
            for w, h in zip(weights, torch.autograd.grad(along.sum(), weights, allow_unused=True), strict=True):
                if h is not None:
                    second[w] = second.get(w, 0) + h.to(theta[w])
        for w, g in gradients.items():
            first[w] = first.get(w, 0) + g.detach().to(theta[w])
    zeros = {w: torch.zeros_like(theta[w]) for w in first}
    return {w: g / samples for w, g in first.items()}, {w: second.get(w, zeros[w]) / samples for w in first}


def _live_weights(
    model: nn.Module, members: Iterable[Sequence[Member]], live: Iterable[Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Copies of the parameters in which only the weights of live units are not zero."""
    keep: dict[nn.Parameter, Tensor] = {}
    for own, alive in zip(members, live, strict=True):
        for member in own:
            weight = model.get_parameter(member.parameter)
            units = member.units.to(weight.device)
            mine = (units >= 0) & alive.to(weight.device)[units.clamp(min=0)]
            shape = [-1 if d == member.dim else 1 for d in range(weight.ndim)]
            # a parameter may make the channels of several groups, each in slices of its own
            keep[weight] = keep[weight] | mine.view(shape) if weight in keep else mine.view(shape)
    return {w: (w.detach() * mask).to(widened(w.dtype)) for w, mask in keep.items()}


def _by_unit(values: Tensor, member: Member, size: int) -> Tensor:
    """The sum of a parameter's entries over the slices of each unit, [size]."""
    return unit_scores(values.movedim(member.dim, 0).flatten(1).sum(1), member, size)


def _known(found: Tensor | None, group: Group) -> Tensor:
    if found is None:
        raise ValueError(
            f"the loss of the calibration batches does not depend on the channels of {group.name}, so they have no score. "
            "Leave the layer out with exclude=, or give a criterion of weights, such as 'l1'."
        )
    return found
