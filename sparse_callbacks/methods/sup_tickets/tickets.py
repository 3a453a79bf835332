"""Tickets of a run: networks that are merged, and the merged weights until they are the network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_callbacks.core.allocations.by_weight import is_by_weight, least_of
from sparse_callbacks.core.allocations.sees_model import SeesModel
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.ops import keep_largest
from sparse_callbacks.methods.sup_tickets.cycles import merge, within_budget

MERGED = "merged/"
"""In the method's ``aux``, where the merged value of each parameter lies until it is the network's."""


def take_ticket(method: Method, factor: float) -> None:
    """The network as it is now is a ticket: merge it, or keep it where it is the first one.

    Args:
        method: the method of the run, in whose ``aux`` the merged values lie.
        factor: the share of the ticket in the merged values.
    """
    params = dict(method.model.named_parameters())
    before = merged_values(method.aux, params)
    # a layer that is trained since a later ticket begins with that one
    new = {n: p.detach() for n, p in params.items() if p.requires_grad and p.is_floating_point() and n not in before}
    # sums of halves would lose what a ticket among several adds
    wide = {n: value.to(torch.promote_types(value.dtype, torch.float32), copy=True) for n, value in new.items()}
    method.aux.update({MERGED + name: value for name, value in wide.items()})
    if not before:
        return
    merged = wide | {n: merge(value, params[n].detach(), factor) for n, value in before.items()}
    pruned = {n: merged[n].masked_fill(~mask, 0) for n, mask in merged_masks(method, merged).items()}
    method.aux.update({MERGED + name: value for name, value in {**merged, **pruned}.items()})


def install(method: Method) -> None:
    """The merged values take the place of the network's, with masks of their own."""
    params = dict(method.model.named_parameters())
    merged = merged_values(method.aux, params)
    # equal magnitudes, as of zeros, fall the same way once more
    method.weights.set_masks(merged_masks(method, merged))
    method.weights.write_values(merged, params)


def keeps_shares(method: Method) -> bool:
    """Whether layers keep their shares in the merged network: those of a distribution that looks at the model, as under a
    budget of cost, which other shares of the same total may exceed."""
    return isinstance(method.distribution, SeesModel)


def merged_values(aux: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merged values of parameters, each on the device of the parameter in ``like``."""
    return {n: aux[MERGED + n].to(p.device) for n, p in like.items() if MERGED + n in aux}


def merged_masks(method: Method, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the largest merged values, as many as are active in the network, over all layers that have zeros; or as many
    as are active in each of them.

    Args:
        method: the method of the run.
        merged: merged values by parameter name.
    """
    weights = method.weights
    counts = weights.active_counts
    sparse = [n for n in weights.params if n in merged and counts[n] < weights.size(n)]
    if keeps_shares(method):
        return {n: weights.by_layer(n, _largest, weights.masks[n], merged[n]) for n in sparse}
    layers = {x: t for n in sparse for x, (t,) in weights.layers(n, merged[n])}
    rule = method.distribution
    least = least_of(rule) if isinstance(rule, str) and is_by_weight(rule) else 1
    found = within_budget(list(layers.values()), sum(counts[n] for n in sparse), least) if sparse else []
    masks = dict(zip(layers, found, strict=True))
    return {n: weights.by_layer(n, lambda layer, _: masks[layer], merged[n]) for n in sparse}


def _largest(_: str, mask: Tensor, values: Tensor) -> Tensor:
    return keep_largest(values, int(mask.count_nonzero()))
