"""Tickets of a run: networks that are merged, and the merged weights until they are the network."""

from collections.abc import Mapping, MutableMapping

from torch import Tensor, nn

from sparse_callbacks.core.weights import SparseWeights
from sparse_callbacks.methods.sup_tickets.cycles import merge, within_budget

MERGED = "merged/"
"""In the method's ``aux``, where the merged value of each parameter lies until it is the network's."""


def take_ticket(aux: MutableMapping[str, Tensor], model: nn.Module, weights: SparseWeights, factor: float) -> None:
    """The network as it is now is a ticket: merge it, or keep it where it is the first one.

    Args:
        aux: tensors of the method, in which the merged values lie.
        model: the network.
        weights: its masks and sparse parameters.
        factor: the share of the ticket in the merged values.
    """
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    before = merged_values(aux, trained)
    if not before:
        aux.update({MERGED + name: value.clone() for name, value in trained.items()})
        return
    merged = {n: merge(value, trained[n], factor) for n, value in before.items()}
    pruned = {n: merged[n].masked_fill(~mask, 0) for n, mask in merged_masks(weights, merged).items()}
    aux.update({MERGED + name: value for name, value in {**merged, **pruned}.items()})


def install(aux: Mapping[str, Tensor], model: nn.Module, weights: SparseWeights) -> None:
    """The merged values take the place of the network's, with masks of their own."""
    params = dict(model.named_parameters())
    merged = merged_values(aux, params)
    # equal magnitudes, as of zeros, fall the same way once more
    weights.set_masks(merged_masks(weights, merged))
    weights.write_values(merged, params)


def merged_values(aux: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merged values of parameters, each on the device of the parameter in ``like``."""
    return {n: aux[MERGED + n].to(p.device) for n, p in like.items() if MERGED + n in aux}


def merged_masks(weights: SparseWeights, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the largest merged values, as many as are active in the network, over all layers that have zeros.

    Args:
        weights: masks and sparse parameters of the network.
        merged: merged values by parameter name.
    """
    counts = weights.active_counts
    sparse = [n for n in weights.params if n in merged and counts[n] < weights.size(n)]
    layers = {x: t for n in sparse for x, (t,) in weights.layers(n, merged[n])}
    found = within_budget(list(layers.values()), sum(counts[n] for n in sparse)) if sparse else []
    masks = dict(zip(layers, found, strict=True))
    return {n: weights.by_layer(n, lambda layer, _: masks[layer], merged[n]) for n in sparse}
