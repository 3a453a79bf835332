"""Units of an exchanged layer that an update grows: those with the largest gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_callbacks.core import distributed, grown_places
from sparse_callbacks.core.sparse_linear import SparseLinear


def largest_in_layer(layer: SparseLinear, kept: Tensor, count: int) -> Tensor:
    """Ascending keys of the units with the largest gradients that the layer has recorded, over all ranks.

    Args:
        layer: an exchanged layer in the window of an update.
        kept: ascending keys of the units that are not to be among them.
        count: how many; of a grouped layer in each block of rows.
    """
    return grown_places.largest_units(
        layer.records or [],
        (layer.out_features, layer.in_features),
        layer.group,
        kept,
        count,
        dtype=layer.values.dtype,
        per_block=layer.storage == "grouped",
        reduce=_over_ranks(),
    )


def largest_of_candidates(
    layer: SparseLinear, kept: Tensor, count: int, candidates: int, source: torch.Generator
) -> Tensor:
    """:func:`largest_in_layer` among so many ``candidates`` that are drawn from ``source``."""
    return grown_places.candidate_units(
        layer.records or [],
        (layer.out_features, layer.in_features),
        layer.group,
        kept,
        count,
        candidates,
        source,
        dtype=layer.values.dtype,
        per_block=layer.storage == "grouped",
        reduce=_over_ranks(),
    )


def _over_ranks() -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over ranks; None for one process."""

    def summed(tensor: Tensor) -> Tensor:
        distributed.total([tensor])
        return tensor

    return summed if distributed.world_size() > 1 else None
