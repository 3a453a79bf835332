"""Updates of exchanged layers by methods that drop and grow, without a dense tensor."""

from functools import singledispatch

from torch import Tensor

from sparse_callbacks.core.fan_in_layers import has_fan_in
from sparse_callbacks.core.ops import drop_count
from sparse_callbacks.core.sparse_layers.moved_places import Move, merged, surviving_by_sign, surviving_units
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.step import Step


@singledispatch
def grown_units(method: object, step: Step, name: str, kept: Tensor, count: int) -> Tensor | None:
    """Ascending keys of the units that an update grows in an exchanged layer; None: leave the layer alone. A method that
    can have such layers registers a function of its own.

    Args:
        method: the method of the run.
        step: the step that the update follows or replaces.
        name: the name of the layer's weight.
        kept: ascending keys of the units that stay.
        count: how many grow; of a grouped layer in each block of rows. Where :func:`fills_rows`, how many each row has then.
    """
    raise NotImplementedError


def active_units(layer: SparseLinear) -> int:
    """Units that live in an exchanged layer; in a grouped one those of each block of rows, which chooses by itself."""
    return layer.values.shape[-1]


def free_units(layer: SparseLinear, kept: Tensor) -> int:
    """Units that may grow in an exchanged layer; of a grouped one in each block of rows.

    Args:
        layer: the layer.
        kept: keys of the units that stay.
    """
    blocks = max(1, layer.block_rows) if layer.storage == "grouped" else 1
    return (layer.block_rows * layer.in_features - kept.numel()) // blocks


def fills_rows(method: object, layer: SparseLinear) -> bool:
    """Whether a layer loses its smallest weights as a whole, and each row grows as many as it has lost: it is grouped, one row
    in each block, and the method keeps a constant fan-in."""
    return has_fan_in(method) and layer.storage == "grouped" and layer.group == 1


def units_to_move(method: object, layer: SparseLinear, fraction: float) -> int:
    """How many units an update replaces in an exchanged layer; of a grouped one in each block of rows, unless it
    :func:`fills_rows`.

    Args:
        method: the method of the run.
        layer: the layer.
        fraction: the share of active weights that the update replaces.
    """
    return drop_count(layer.live if fills_rows(method, layer) else active_units(layer), fraction)


def moved_units(
    method: object, step: Step, name: str, layer: SparseLinear, fraction: float, by_sign: bool = False
) -> Move | None:
    """The units that live after an update; None: leave the layer alone.

    Args:
        method: the method of the run.
        step: the step that the update follows or replaces.
        name: the name of the layer's weight.
        layer: the layer.
        fraction: the share of active weights that the update replaces.
        by_sign: whether positive and negative weights leave separately, each sign its share; the layer is not grouped then.
    """
    count, keys = units_to_move(method, layer, fraction), layer.keys()
    if fills_rows(method, layer):
        stay, count = surviving_units(layer.unit_magnitudes(), count), active_units(layer)
    elif by_sign:
        stay = surviving_by_sign(layer.places.sums(layer.values.detach()), fraction)
        count = keys.numel() - stay.numel()
    else:
        per_block = active_units(layer) if layer.storage == "grouped" else None
        stay = surviving_units(layer.unit_magnitudes(), count, per_block)
    new = grown_units(method, step, name, keys.index_select(0, stay), count)
    return None if new is None else merged(keys, stay, new)
