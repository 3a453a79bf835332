"""Moves of exchanged layers to other places, with values and optimizer state."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.optimizer_state import state_tensors
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.sparse_layers.moved_places import Move
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.weights import SparseWeights

Moves = Mapping[str, Callable[[], Move | None]]
"""By parameter name a function that finds the move of an exchanged layer; it gives None where the layer stays as it is."""


def _same_everywhere(move: Move, layer: SparseLinear) -> Move:
    """The move of rank 0 on every rank."""
    if distributed.world_size() == 1:
        return move
    # ranks may disagree on how many units are born: keys and slots are as many on each
    mine = {"": torch.stack([move.keys, move.slots.to(torch.int64)])}
    keys, slots = distributed.from_owners(mine, {"": 0})[""].unbind()
    return Move.between(layer.keys(), keys, slots.to(torch.int32))


def carry_out(
    weights: SparseWeights,
    owners: Ownership | None,
    moves: Moves,
    new_weights: Callable[[str], Tensor | None],
    note: Callable[[str, Move], object],
) -> tuple[int, int]:
    """Let other units live: values and optimizer state move along, and what is born starts afresh.

    One layer after the other: a move takes several times the memory of the live values of its layer.

    Args:
        weights: the exchanged layers, among others.
        owners: the optimizers whose state moves; None where they are started anew instead.
        moves: what lives from now on, by parameter name.
        new_weights: a function that takes a parameter's name and returns values of its shape for the born weights, or None
            where they start from zero.
        note: told of each move that was carried out.

    Returns:
        How many connections were dropped or born, and how many were active before and after.
    """
    changed = total = 0
    for name, find in moves.items():
        # in a function of its own, so that nothing of a move is left when the next one is found
        dropped, active = _carry_out(weights, owners, name, find, new_weights, note)
        changed, total = changed + 2 * dropped, total + 2 * active
    return changed, total


def _carry_out(
    weights: SparseWeights,
    owners: Ownership | None,
    name: str,
    find: Callable[[], Move | None],
    new_weights: Callable[[str], Tensor | None],
    note: Callable[[str, Move], object],
) -> tuple[int, int]:
    """How many connections of a layer were dropped, which as many were born, and how many are active."""
    if (found := find()) is None:
        return 0, 0
    layer = weights.layers_stored[name]
    move = _same_everywhere(found, layer)
    state = [] if owners is None else _state_of(owners, name, layer)
    born = layer.move_to(move.keys, state, move.slots)
    layer.values.grad = None  # it was one of other places
    note(name, move)
    if changed := int(born.count_nonzero()):
        if (values := new_weights(name)) is not None:
            weights.write_grown(name, born, values)
        if owners is not None:
            owners.clear(name, born, is_zero=True)  # after the values, which some state starts from
    return changed, layer.live


def _state_of(owners: Ownership, name: str, layer: SparseLinear) -> list[Tensor]:
    """What optimizers keep for each live value of a layer."""
    values = layer.values
    found = {
        id(tensor): tensor
        for optimizer, names in zip(owners.optimizers, owners.steps, strict=True)
        if name in names
        for _, tensor in state_tensors(optimizer, values)
        if tensor.shape == values.shape and tensor is not values
    }
    return list(found.values())
