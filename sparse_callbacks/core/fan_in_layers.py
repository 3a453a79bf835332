"""Layers of constant fan-in: their zeros and masks, what a plan says, and masks that are not of it."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_callbacks.core.fan_in import (
    as_rows,
    empty_rows,
    fan_in_for,
    from_rows,
    largest_in_rows,
    why_not_constant,
)
from sparse_callbacks.core.pattern_names import FanIn, asked_pattern
from sparse_callbacks.core.selection import Entry


def has_fan_in(method: object) -> bool:
    """Whether every output unit of a method's layers has as many inputs of its own: every layer can have that."""
    asked = asked_pattern(method)
    return isinstance(asked, FanIn) and asked.group is None


def shared_group(method: object) -> int | None:
    """How many consecutive rows share their inputs in the ``fan_in/G`` of a method; None for another pattern, or none."""
    asked = asked_pattern(method)
    return asked.group if isinstance(asked, FanIn) else None


def why_no_shared_rows(entry: Entry, group: int) -> str:
    """Why the rows of a parameter cannot share their inputs, as a clause; empty where they can.

    Args:
        entry: the parameter.
        group: consecutive rows that would share their inputs.
    """
    if not entry.linear:
        return "a convolution" if len(entry.shape) > 2 else "not the weight of a linear layer"
    rows = entry.shape[0]
    return f"{rows} rows do not divide into groups of {group}" if rows % group else ""


def ablation_of(method: object) -> float | None:
    """The share of its fan-in that an output unit needs in salient weights; None where all units stay."""
    return getattr(method, "ablation", None)


def inputs_of(entry: Entry) -> int:
    """Inputs of one output unit, of a convolution at all positions of its kernel."""
    return math.prod(entry.shape[1:])


def fan_in_zeros(entries: Iterable[Entry], targets: Mapping[str, float]) -> dict[str, int]:
    """Zeros of each layer in the parameters without a reason, at the constant fan-in next to its target.

    Args:
        entries: all parameters.
        targets: target sparsity by layer.
    """
    return {
        layer: (inputs_of(e) - fan_in_for(1 - targets[layer], inputs_of(e))) * e.shape[0]
        for e in entries
        if not e.reason
        for layer in e.layers
    }


def rows_of_largest(scores: Tensor, active: int, entry: Entry, among: Tensor | None = None) -> Tensor:
    """Mask of a layer with as many of the largest magnitudes in each row.

    Args:
        scores: of the shape of the layer, whose memory format the mask has.
        active: active weights of the layer.
        entry: the parameter that holds the layer.
        among: bool, of the shape of ``scores``; only its True positions are taken. None: all.
    """
    allowed = None if among is None else as_rows(among, entry)
    rows = largest_in_rows(as_rows(scores, entry), active // entry.shape[0], allowed)
    return torch.empty_like(scores, dtype=torch.bool).copy_(from_rows(rows, scores.shape, entry))


def fan_in_remarks(method: object, entries: Sequence[Entry], zeros: Mapping[str, int]) -> dict[str, str]:
    """What a plan says of the fan-in of each sparse parameter, by its name, and of the units that its run has ablated.

    Args:
        method: the method that plans.
        entries: all parameters.
        zeros: planned zeros of the sparse parameters.
    """
    found: dict[str, str] = {}
    masks = _masks_of(method, entries)
    for entry in entries:
        if entry.reason or not zeros.get(entry.name):
            continue
        inputs = inputs_of(entry)
        active = inputs - zeros[entry.name] // (entry.shape[0] * entry.parts)
        found[entry.name] = f"fan_in: {active} of {inputs} inputs"
        if entry.name in masks:
            found[entry.name] += f"; {_left(masks[entry.name], entry)}"
    return found


def _masks_of(method: object, entries: Sequence[Entry]) -> Mapping[str, Tensor]:
    """The masks of a method's run, where it ablates units and its own parameters are planned; empty otherwise."""
    weights = getattr(method, "weights", None)
    if weights is None or entries is not getattr(method, "entries", None) or ablation_of(method) is None:
        return {}
    masks: Mapping[str, Tensor] = weights.masks
    return masks


def _left(mask: Tensor, entry: Entry) -> str:
    """How many units of a parameter are ablated, and what the others have."""
    rows = torch.cat([as_rows(part, entry) for part in entry.split(mask)])
    gone, most = empty_rows(rows), int(rows.sum(1).amax())
    return f"{gone} of {len(rows)} units ablated, and {most} of {rows.shape[1]} inputs in others"


def ablated_units(masks: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> int:
    """The number of output units without any active weight.

    Args:
        masks: bool masks by parameter name.
        entries: the parameters by name.
    """
    return sum(empty_rows(as_rows(p, entries[n])) for n, mask in masks.items() for p in entries[n].split(mask))


def why_other_rows(method: object, mask: Tensor, entry: Entry) -> str:
    """Why a mask is not of constant fan-in, as a clause that follows its name; empty where it is.

    Args:
        method: the method of the run, which may ablate units.
        mask: bool, of the shape of the parameter.
        entry: the parameter.
    """
    ablated = ablation_of(method) is not None
    reasons = (why_not_constant(as_rows(part, entry), ablated) for part in entry.split(mask))
    return next(filter(None, reasons), "")
