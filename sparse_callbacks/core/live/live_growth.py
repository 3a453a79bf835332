"""Units of an exchanged layer that an update grows: those with the largest gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.sparse_layers.grown_places import candidate_units, largest_units
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear


def largest_in_layer(
    layer: SparseLinear, kept: Tensor, count: int, candidates: int | None, source: torch.Generator | None
) -> Tensor:
    """See :meth:`~sparse_callbacks.core.step.Step.largest_units`; of the passes that the layer has recorded."""
    shape, per_block = (layer.out_features, layer.in_features), layer.storage == "grouped"
    records, dtype, reduce = layer.records or [], layer.values.dtype, _over_ranks()
    if candidates is None:
        return largest_units(records, shape, layer.group, kept, count, dtype=dtype, per_block=per_block, reduce=reduce)
    assert source is not None  # candidates are drawn
    return candidate_units(
        records, shape, layer.group, kept, count, candidates, source, dtype=dtype, per_block=per_block, reduce=reduce
    )


def _over_ranks() -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over ranks; None for one process."""

    def summed(tensor: Tensor) -> Tensor:
        distributed.total([tensor])
        return tensor

    return summed if distributed.world_size() > 1 else None
