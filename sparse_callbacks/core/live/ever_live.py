"""Units of an exchanged layer that have lived and do not live now, in as little memory as they need."""

import torch
from torch import Tensor

from sparse_callbacks.core.packed_bits import count_of_bits
from sparse_callbacks.core.sparse_layers.moved_places import places_of_common, places_without
from sparse_callbacks.core.sparse_layers.quick_places import merged_runs, true_places

# A key takes 64 bits and a unit in a bit field one: from this share of a layer's units on the field is smaller.
_KEYS_UP_TO = 64


def none_yet(device: torch.device) -> Tensor:
    """No unit has lived but those that live now."""
    return torch.empty(0, dtype=torch.int64, device=device)


def moved_on(former: Tensor, leaving: Tensor, coming: Tensor, units: int) -> Tensor:
    """The former units after a move.

    Args:
        former: those before: ascending keys (int64), or a field with a bit for each unit (uint8).
        leaving: ascending keys of units that lived until now.
        coming: ascending keys of units that live from now on, of which some may be among those that leave.
        units: how many units the layer could have.
    """
    if former.dtype == torch.uint8:
        field = _in_field(former.clone(), leaving, 1)
        return _in_field(field, coming.index_select(0, true_places(_has(field, coming))), -1)
    keys = merged_runs(torch.cat([former, leaving]))
    keys = keys.index_select(0, places_without(places_of_common(coming, keys)[1], keys.numel()))
    if keys.numel() * _KEYS_UP_TO <= units:
        return keys
    return _in_field(torch.zeros(-(-units // 8), dtype=torch.uint8, device=keys.device), keys, 1)


def count_of_former(former: Tensor) -> int:
    """How many units have lived and do not live now."""
    if former.dtype != torch.uint8:
        return former.numel()
    return count_of_bits(former)


def as_truths(former: Tensor, units: int) -> Tensor:
    """For each of the ``units`` of a layer whether it has lived and does not live now."""
    keys = torch.arange(units, device=former.device)
    return _has(former, keys) if former.dtype == torch.uint8 else torch.isin(keys, former)


def why_not_former(former: Tensor, keys: Tensor, units: int) -> str:
    """Why a tensor does not say which units of a layer have lived before, as the end of a sentence; empty where it may.

    Args:
        former: the tensor.
        keys: ascending keys of the units that live now.
        units: how many units the layer could have.
    """
    if former.dtype == torch.uint8:
        if former.shape != (-(-units // 8),):
            return f"has {former.numel()} bytes, and a field of {units} units has {-(-units // 8)}"
        if units % 8 and former.numel() and int(former[-1]) >> units % 8:
            return f"has units beyond the {units} of the layer"
        return "has units that live now" if bool(_has(former, keys).any()) else ""
    if former.dtype != torch.int64 or former.ndim != 1:
        return f"is of {str(former.dtype).removeprefix('torch.')} and {former.ndim} dimensions, and not a list of keys"
    if former.numel() and (bool((former.diff() <= 0).any()) or int(former[0]) < 0 or int(former[-1]) >= units):
        return f"is not of ascending keys below {units}"
    return "has units that live now" if bool(_among(former, keys).any()) else ""


def _among(some: Tensor, keys: Tensor) -> Tensor:
    """Which of ``some`` keys are among ascending ``keys``."""
    if not keys.numel():
        return torch.zeros(some.shape, dtype=torch.bool, device=some.device)
    return keys[torch.searchsorted(keys, some).clamp_(max=keys.numel() - 1)] == some


def _has(field: Tensor, keys: Tensor) -> Tensor:
    return (field.index_select(0, keys >> 3) >> (keys & 7).to(torch.uint8)).bitwise_and_(1) == 1


def _in_field(field: Tensor, keys: Tensor, sign: int) -> Tensor:
    """Set bits that are all unset, or (with -1) unset bits that are all set, in place: their sum is then what `or` gives."""
    bits = torch.ones(keys.shape, dtype=torch.uint8, device=keys.device) << (keys & 7).to(torch.uint8)
    return field.index_add_(0, keys >> 3, bits, alpha=sign)
