"""Units of an exchanged layer that an update grows: those with the largest gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.live.live_records import WindowRecords
from sparse_callbacks.core.sparse_layers.grown_places import candidate_units, largest_units
from sparse_callbacks.core.sparse_layers.product_records import Records
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.sparse_layers.unit_gradients import UnitGradients


def largest_in_layer(
    layer: SparseLinear,
    gradient: Tensor,
    kept: Tensor,
    count: int,
    candidates: int | None,
    source: torch.Generator | None,
    full: bool = False,
) -> Tensor | None:
    """See :meth:`~sparse_callbacks.core.step.Step.largest_units`; of the passes that the layer has recorded.

    Args:
        layer: the layer.
        gradient: the gradient of its values.
        kept, count, candidates, source, full: as there.
    """
    if isinstance(layer.records, WindowRecords):
        layer.records.find_pass_of(gradient)
    records, direct = layer.records or [], _direct_of(layer)
    recorded = torch.tensor([float(len(records) + (direct is not None))], device=layer.values.device)
    distributed.total([recorded])  # one rank may have seen no batch of the layer, and takes part in sums over ranks
    if not recorded:
        return None
    shape, per_block = (layer.out_features, layer.in_features), layer.storage == "grouped"
    more: Any = {"dtype": layer.values.dtype, "per_block": per_block, "reduce": _over_ranks(), "direct": direct}
    if candidates is None:
        return largest_units(records, shape, layer.group, kept, count, full=full, **more)
    assert source is not None  # candidates are drawn
    return candidate_units(records, shape, layer.group, kept, count, candidates, source, **more)


def _direct_of(layer: SparseLinear) -> UnitGradients | None:
    """What the gradient of live units has beyond the records, as that of a penalty; None where there is nothing."""
    records = layer.records
    if not isinstance(records, Records) or records.direct is None:
        return None
    by_unit = layer.places.by_unit(records.direct).view(-1, layer.group)
    return UnitGradients(layer.keys(), by_unit, layer.in_features)


def _over_ranks() -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over ranks; None for one process."""

    def summed(tensor: Tensor) -> Tensor:
        distributed.total([tensor])
        return tensor

    return summed if distributed.world_size() > 1 else None
