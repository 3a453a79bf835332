"""Rescaling of fresh weights, so that a signal keeps its variance where only some inputs are left."""

from collections.abc import Container, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_callbacks.core.selection import Entry, is_norm
from sparse_callbacks.core.shards import count_of, layout_of, size_of
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.weights import SparseWeights

Rescale = Literal["layer", "fan_in"]
"""By what active weights are multiplied when a run begins."""
RESCALES = ("layer", "fan_in")
# Measured on an MLP 300-300-300 without norms, 30 epochs of Isolet: with 16 inputs left for each unit it gets 10 % of a
# test right, and 91 % where it was rescaled; with 2 and 4 it stays at chance, 4 % (docs/results.md).
FEW_INPUTS = 16
# Of a signal that fades to a tenth optimizers recover: the same network at 90 % zeros learns, though slower.
FADED = 0.1


def factors(mask: Tensor, entry: Entry, rescale: Rescale) -> Tensor:
    """What the weights of a parameter are multiplied with, so that it broadcasts against them, in float64.

    ``"layer"``: sqrt(size / active) of each layer. ``"fan_in"``: sqrt(inputs / inputs kept) of each output unit, where
    an input of a convolution is a channel of its group at a position of the kernel; a unit without inputs keeps 1. With
    independent inputs and a random mask the second keeps the variance of every unit's output, the first their mean.

    Args:
        mask: the mask of the parameter.
        entry: the layers in it.
        rescale: ``"layer"`` or ``"fan_in"``.
    """
    each = [_of_layer(part) if rescale == "layer" else _of_units(part, entry) for part in entry.split(mask)]
    return torch.cat(each)


def factors_of_live(layer: SparseLinear, rescale: Rescale) -> Tensor:
    """:func:`factors` of an exchanged layer, so that they broadcast against its live values."""
    places, values = layer.places, layer.values
    if rescale == "layer":
        return _root(places.outputs * places.inputs, torch.tensor(layer.live, device=values.device))
    rows = torch.div(layer.keys(), places.inputs, rounding_mode="floor")  # of a grouped layer blocks of rows
    kept = torch.bincount(rows, minlength=places.blocks)
    return places.of_units(_root(places.inputs, kept)[rows])


def _root(whole: int, kept: Tensor) -> Tensor:
    return torch.where(kept == 0, 1.0, (whole / kept.clamp(min=1).double()).sqrt())


def _of_layer(mask: Tensor) -> Tensor:
    layout = layout_of(mask)
    kept = torch.tensor(layout.total(int(mask.count_nonzero())), device=mask.device)
    return _root(layout.whole_shape(mask).numel(), kept).expand(mask.shape[0], *[1] * (mask.ndim - 1))


def _of_units(mask: Tensor, entry: Entry) -> Tensor:
    kernel = [1] * (mask.ndim - 2)
    if not entry.transposed:
        kept = mask.flatten(1).sum(1)
        return _root(mask[0].numel(), kept).view(-1, 1, *kernel)
    # stored as (inputs, outputs of a group, *kernel): the inputs of a group follow each other
    groups = entry.shape[0] // mask.shape[1]
    by_group = mask.view(groups, mask.shape[0] // groups, mask.shape[1], -1)
    found = _root(by_group[0, :, 0].numel(), by_group.sum((1, 3)))
    return found.repeat_interleave(by_group.shape[1], 0).view(*mask.shape[:2], *kernel)


def rescale_weights(weights: SparseWeights, rescale: Rescale, given: Container[str] = ()) -> None:
    """Multiply all active weights, which no step has trained yet, with their :func:`factors`.

    Args:
        weights: the weights.
        rescale: by what.
        given: names of those that were made for the inputs that they have, and stay.
    """
    for name, p in weights.params.items():
        if name in given:
            continue
        if (layer := weights.layers_stored.get(name)) is not None:
            factor = factors_of_live(layer, rescale)
        else:
            factor = factors(weights.masks[name], weights.entries[name], rescale)
        # half precision would round the factor as well
        wide = torch.promote_types(p.dtype, torch.float32)
        weights.write_values({name: p.detach().to(wide) * factor.to(wide)})


# ---------------------------------------------------------------------- weights that are not fresh


def counted_norm(model: nn.Module, names: Iterable[str]) -> str:
    """The name of a norm that has counted batches in training, in a module that holds some of the parameters ``names``;
    empty where none has."""
    # a frozen backbone says nothing of the fresh layers behind it
    holders = {""} | {".".join(parts[:i]) for parts in (n.split(".") for n in names) for i in range(1, len(parts))}
    for name, module in model.named_modules():
        counted = getattr(module, "num_batches_tracked", None)
        if name.rpartition(".")[0] in holders and isinstance(counted, Tensor) and is_norm(module) and int(counted):
            return str(name)
    return ""


def zeros_among(model: nn.Module, params: Mapping[str, Tensor]) -> float:
    """The share of zeros in those of ``params`` that have some and are not zero altogether; 0 where there are no more
    than fresh weights may have by chance."""
    padding = {  # rows of embeddings that torch itself keeps at zero
        id(m.weight): m.weight.shape[1]
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.padding_idx is not None
    }
    zeros = size = by_chance = 0.0
    for p in params.values():
        found = int((p == 0).sum()) - padding.get(id(p), 0)
        if found < p.numel():
            zeros, size = zeros + max(0, found), size + p.numel()
            # uniform numbers are multiples of about eps / 2: in bfloat16 one of 256 is zero
            by_chance += 2 * torch.finfo(p.dtype).eps * p.numel()
    # and of a large layer that was drawn in float32 a weight or two, which is nobody's pruning
    return zeros / size if zeros > max(by_chance, size / 1000) else 0.0


def why_not_fresh(model: nn.Module, params: Mapping[str, Tensor], zeros_are_meant: bool) -> str:
    """Why the weights are known to be trained, as the end of a sentence; empty where nobody knows.

    Args:
        model: the model.
        params: the parameters that become sparse.
        zeros_are_meant: zeros say nothing, since they are the mask that was asked for.
    """
    if norm := counted_norm(model, params):
        return f"{norm} has counted batches"
    if not zeros_are_meant and (share := zeros_among(model, params)):
        return f"{share:.1%} of them are zero, as a pruned network has them"
    return ""


# ---------------------------------------------------------------------- layers that want it


def starved_layers(model: nn.Module, weights: SparseWeights, given: Container[str] = ()) -> dict[str, float]:
    """Inputs that an output keeps on average, of the layers that keep few; none where little of the signal is lost in the
    layers between two norms, each of which gives the next layer a signal of variance 1 again.

    Args:
        model: the model.
        weights: its sparse weights.
        given: names of those that were made for the inputs that they have.
    """
    starved: dict[str, float] = {}
    for names in _between_norms(model, weights):
        found, left = {}, 1.0
        for name in names:
            if name in given:
                continue
            entry = weights.entries[name]
            for layer, share in _densities(weights, name).items():
                inputs = share * torch.Size(entry.shape[1:]).numel()
                if 0 < inputs <= FEW_INPUTS:
                    found[layer], left = inputs, left * share**0.5
        starved |= found if left < FADED else {}
    return starved


def _densities(weights: SparseWeights, name: str) -> dict[str, float]:
    """The share of active weights in each layer of a parameter."""
    if name in weights.layers_stored:
        return {name: weights.active_counts[name] / weights.size(name)}
    return {layer: count_of(part) / size_of(part) for layer, (part,) in weights.layers(name, weights.held_masks[name])}


def _between_norms(model: nn.Module, weights: SparseWeights) -> list[list[str]]:
    """Names of the sparse parameters, in the order of registration, cut where a norm comes between them."""
    runs: list[list[str]] = [[]]
    for prefix, module in model.named_modules():
        if is_norm(module):
            runs.append([])
        names = [f"{prefix}.{local}" if prefix else local for local, _ in module.named_parameters(recurse=False)]
        runs[-1] += [name for name in names if name in weights.masks]
    return runs
