"""Patterns of exchanged layers as a state holds them: which weights live, in some bytes a live weight."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_callbacks.core.live.live_layout import STORAGE_OF_KEYS, units_in
from sparse_callbacks.core.sparse_layers.live_places import GroupPlaces, LivePlaces, RowPlaces
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

Pattern = Mapping[str, Tensor]
"""``{"crow", "col"}`` of compressed rows, or ``{"idx"}`` of groups of rows."""


def pattern_of(layer: SparseLinear) -> dict[str, Tensor]:
    """The pattern of a layer, as copies."""
    return {key: tensor.clone() for key, tensor in layer.places.saved().items()}


def storage_of(pattern: Pattern) -> str:
    """The storage of the layer that a pattern was saved of."""
    return STORAGE_OF_KEYS[frozenset(pattern)]


def keys_of(pattern: Pattern, layer: SparseLinear) -> Tensor:
    """The ascending keys of the units that live in a saved pattern, on the device of a layer.

    Raises:
        ValueError: it is not a pattern of this layer.
    """
    if storage_of(pattern) != layer.storage:
        raise ValueError(f"it is of storage={storage_of(pattern)!r}, and the layer is of storage={layer.storage!r}")
    return _keys(pattern, layer.places)


def mask_of(pattern: Pattern, shape: tuple[int, ...]) -> Tensor:
    """The mask of a saved pattern, for a layer that holds its dense matrix.

    Args:
        pattern: the pattern.
        shape: the shape of the matrix.

    Raises:
        ValueError: it is not a pattern of such a layer.
    """
    keys, units, group = units_of(pattern, shape)
    return matrix_of_units(torch.zeros(units, dtype=torch.bool).index_fill_(0, keys, True), shape, group)


def matrix_of(pattern: Pattern, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense matrix of live values.

    Args:
        pattern: where they are.
        values: the values, in the shape that a layer holds them in.
        shape: the shape of the matrix.

    Raises:
        ValueError: they are not of a pattern of such a layer.
    """
    places = places_in(pattern, shape)
    if values.numel() != (live := places.units * places.group):
        raise ValueError(f"there are {values.numel()} values in a pattern of {live}")
    return places.dense(values.view(places.values_shape))


def matrix_of_units(units: Tensor, shape: tuple[int, ...], group: int) -> Tensor:
    """What each unit of a layer has, for each weight.

    Args:
        units: a tensor ``[units]``, in the order of the keys.
        shape: the shape of the layer's matrix.
        group: the rows in a unit.
    """
    return units.view(shape[0] // group, shape[1]).repeat_interleave(group, 0)


def units_of(pattern: Pattern, shape: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """What a saved pattern says, as keys alone: those of the units that live, ascending, how many units the layer has, live or
    not, and the rows in a unit. For comparisons of sets of units; nothing is made that a product needs.

    Args:
        pattern: the pattern.
        shape: the shape of the layer's matrix.

    Raises:
        ValueError: it is not a pattern of such a layer.
    """
    places = _empty_places(pattern, shape)
    return _keys(pattern, places), places.blocks * places.inputs, places.group


def live_in(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many weights live in a saved pattern.

    Args:
        pattern: the pattern.
        shape: the shape of the matrix.
    """
    rows = 1 if storage_of(pattern) == "sparse" else shape[0] // max(1, pattern["idx"].shape[0])
    return units_in(pattern) * rows


def places_in(pattern: Pattern, shape: tuple[int, ...]) -> LivePlaces:
    """What a saved pattern says, as the places of a layer: with them values become a matrix (:func:`units_of` gives the keys
    alone). They lie on the CPU.

    Args:
        pattern: the pattern.
        shape: the shape of the layer's matrix.

    Raises:
        ValueError: it is not a pattern of such a layer.
    """
    places = _empty_places(pattern, shape)
    places.set_keys(_keys(pattern, places))
    return places


def _empty_places(pattern: Pattern, shape: tuple[int, ...]) -> LivePlaces:
    if len(shape) != 2:
        raise ValueError(f"they are of a matrix, and the parameter has {len(shape)} dimensions")
    outputs, inputs = shape
    none = torch.empty(0, dtype=torch.int64)
    if storage_of(pattern) == "sparse":
        return RowPlaces(outputs, inputs, none)
    blocks = pattern["idx"].shape[0]
    if not blocks or outputs % blocks:
        raise ValueError(f"its {blocks} groups do not divide the {outputs} rows of the layer")
    return GroupPlaces(outputs, inputs, outputs // blocks, none)


def _keys(pattern: Pattern, places: LivePlaces) -> Tensor:
    return places.keys_of_saved({key: tensor.to(places.device) for key, tensor in pattern.items()})
