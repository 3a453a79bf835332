"""Moves of exchanged layers to other places, with values and optimizer state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.optimizer_state import state_tensors
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.sparse_layers.quick_places import true_places
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.weights import SparseWeights


@dataclass(frozen=True)
class Move:
    """Other units of an exchanged layer that live from now on.

    Attributes:
        before: ascending keys of the units that live now.
        keys: ascending keys of those that live from now on, as many.
        slots: where each of these is among those of now, -1 where it is born.
    """

    before: Tensor
    keys: Tensor
    slots: Tensor

    @cached_property
    def born(self) -> Tensor:
        """Keys of the units that are born."""
        return self.keys.index_select(0, true_places(self.slots < 0))

    @cached_property
    def dropped(self) -> Tensor:
        """Keys of the units that are dropped, as many as are born."""
        # the slot -1 is that of the element after the last one
        gone = torch.ones(self.before.numel() + 1, dtype=torch.bool, device=self.before.device)
        return self.before.index_select(0, true_places(gone.index_fill_(0, self.slots, False)[:-1]))


Moves = Mapping[str, Callable[[], Move | None]]
"""By parameter name a function that finds the move of an exchanged layer; it gives None where the layer stays as it is."""


def _same_everywhere(move: Move) -> Move:
    """The move of rank 0 on every rank."""
    if distributed.world_size() == 1:
        return move
    mine = {"": torch.stack([move.keys, move.slots])}
    return Move(move.before, *distributed.from_owners(mine, {"": 0})[""].unbind())


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
    layer, move = weights.layers_stored[name], _same_everywhere(found)
    state = [] if owners is None else _state_of(owners, name, layer)
    born = layer.move_to(move.keys, state, move.slots)
    layer.values.grad = None  # it was one of other places
    note(name, move)
    if move.born.numel():
        if (values := new_weights(name)) is not None:
            weights.write_grown(name, born, values)
        if owners is not None:
            owners.clear(name, born, is_zero=True)  # after the values, which some state starts from
    return layer.group * move.born.numel(), layer.live


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
