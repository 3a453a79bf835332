"""Exchanged layers in a run: which methods and optimizers they can have, and whose places they hold."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.optimizers import is_elementwise, parameter_ids
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.weights import SparseWeights


def layers_of_run(
    method: object, model: nn.Module, entries: Iterable[Entry], optimizers: Sequence[Optimizer]
) -> dict[str, SparseLinear]:
    """The exchanged layers of a run, by the name of their weight.

    Args:
        method: the method of the run.
        model: the model.
        entries: all parameters; those without a reason are sparse.
        optimizers: the optimizers of the run.

    Raises:
        ValueError: one of them cannot be trained by the method, or with these optimizers.
    """
    found = exchanged_layers(model)
    if not found:
        return {}
    reasons = {e.name: e.reason for e in entries}
    layers = {name: layer for name, layer in found.items() if not reasons[name]}
    trained = parameter_ids(*optimizers)
    for name, layer in found.items():
        values = layer.values
        # what a glob or keep_dense= leaves out is trained as it is, or not
        untrained = "frozen" if not values.requires_grad else "" if id(values) in trained else "in no optimizer"
        if untrained and (name in layers or untrained in reasons[name]):
            raise ValueError(
                f"{name} is of a SparseLinear and {untrained}: an exchanged layer is trained from the start. Give its weight "
                f"to an optimizer, or leave it out with exclude=[{name!r}]."
            )
    if layers and (why := why_no_exchange(method)):
        raise ValueError(
            f"{', '.join(layers)} have sparse storage, and {type(method).__name__} {why}. Use RigL, SET or Static, or "
            "to_dense(module) for storage='masked'."
        )
    refuse_matrix_optimizers(optimizers, layers)
    return layers


def zeros_of_live(model: nn.Module | None, entries: Iterable[Entry], saved: SavedRun | None) -> dict[str, list[int]]:
    """The zeros in each exchanged layer, by the name of its weight: of the saved run where one goes on.

    Args:
        model: the model; None where nobody knows it.
        entries: the parameters of interest.
        saved: the run that goes on; None for a new one.
    """
    layers = {} if model is None else exchanged_layers(model)
    patterns = {} if saved is None else saved.patterns
    return {
        e.name: [saved.zeros(e.name, e.full_shape) if saved and e.name in patterns else e.size - layers[e.name].live]
        for e in entries
        if e.name in patterns or e.name in layers
    }


def refuse_matrix_optimizers(optimizers: Iterable[Optimizer], layers: Mapping[str, SparseLinear]) -> None:
    """Refuse optimizers for which live values are not weights as any others.

    Raises:
        ValueError: an optimizer that steps an exchanged layer is not one of torch's elementwise ones.
    """
    for optimizer in optimizers:
        mine = parameter_ids(optimizer)
        if not is_elementwise(optimizer) and any(id(layer.values) in mine for layer in layers.values()):
            raise ValueError(
                f"{type(optimizer).__name__} looks at a weight as a matrix, or may do so, and sparse storage has a list of live "
                "weights. Use SGD, AdamW or another of torch's elementwise optimizers, or storage='masked'."
            )


def same_places(layer: SparseLinear, other: SparseLinear) -> bool:
    """Whether the same weights live in two layers."""
    return layer is other or (
        (layer.storage, layer.group) == (other.storage, other.group)
        and torch.equal(layer.keys(), other.keys().to(layer.values.device))
    )


def checksum(keys: Tensor) -> int:
    """A number by which another pattern of a layer is known."""
    factors = torch.arange(1, keys.numel() + 1, device=keys.device) * 40503 % 65521
    return int((keys * factors).sum())


def note_places(weights: SparseWeights) -> None:
    """A run is over: remember which places it has left in exchanged layers."""
    weights.last_places = {name: checksum(layer.keys()) for name, layer in weights.layers_stored.items()}


def refuse_foreign_places(weights: SparseWeights, names: Collection[str]) -> None:
    """Refuse to go on with exchanged layers, or to speak of them, whose places are others than the last run left.

    Args:
        weights: the weights of the last run.
        names: names of exchanged layers.

    Raises:
        ValueError: another pattern was loaded.
    """
    left = {n: weights.last_places[n] for n in names if n in weights.last_places}
    if foreign := [n for n, number in left.items() if checksum(weights.layers_stored[n].keys()) != number]:
        raise ValueError(
            f"{', '.join(foreign)} have other live weights than the last fit left: another pattern was loaded since, for "
            "example by load_state_dict. Resume with ckpt_path= to get the counters that belong to it, or test with "
            "ckpt_path=, or use a new callback or fresh_start=True."
        )
