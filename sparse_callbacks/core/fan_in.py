"""Constant fan-in: every output unit of a layer has the same number of active weights.

A *row* holds the weights of one output unit: a row of a matrix, the kernels of one output channel of a convolution. With
ablation, rows with few salient weights lose all of theirs, and those left share them out (SRigL, Lasby et al. 2024).
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.ops import drop_count, keep_largest
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.sparse_layers.moved_places import BELOW_ZERO, NEVER, largest_ranked

_DIGITS = 9  # of a number that is rounded to a whole one: (1 - 0.9) * 20 is a little below 2


@checked
def fan_in_for(density: float, inputs: int) -> int:
    """Active weights of each output unit: floor(density * inputs), at least 1.

    Args:
        density: the share of active weights of the layer.
        inputs: the inputs of one output unit, of a convolution at all positions of its kernel.

    >>> fan_in_for(1 - 0.9, 20), fan_in_for(0.1, 27), fan_in_for(0.01, 20)
    (2, 2, 1)
    """
    return min(inputs, max(1, math.floor(round(density * inputs, _DIGITS))))


def checked_ablation(ablation: Any, pattern: Any, storage: Any = "masked") -> float | None:
    """``ablation``, where it is possible.

    Raises:
        ValueError: it is not in (0, 1], or another pattern or storage has it.
    """
    if ablation is None:
        return None
    if not isinstance(ablation, Real) or isinstance(ablation, bool) or not 0 < float(ablation) <= 1:
        raise ValueError(
            f"ablation={ablation!r} is not in (0, 1]: it is the share of its fan-in that an output unit must have in salient "
            "weights. Give for example 0.3, the published value, or None to keep all units."
        )
    if pattern != "fan_in":
        raise ValueError(
            f"ablation={ablation!r} with pattern={pattern!r}: output units go where the others share out their weights, under "
            "pattern='fan_in'. Give that, or leave ablation= out."
        )
    if storage != "masked":
        raise ValueError(
            f"ablation={ablation!r} with storage={storage!r}: units lose all of their weights, and a layer of another storage has as many "
            "in each. Give storage='masked', or leave ablation= out."
        )
    return float(ablation)


# ---------------------------------------------------------------------- rows


def as_rows(tensor: Tensor, entry: Entry) -> Tensor:
    """A tensor of a layer's shape as (outputs, inputs of one output at all positions of the kernel).

    Args:
        tensor: of the shape of one layer, as torch stores it.
        entry: the parameter that holds the layer.
    """
    outputs = entry.shape[0]
    if not entry.transposed:
        return tensor.reshape(outputs, -1)
    inputs, per_group = tensor.shape[:2]  # of a transposed convolution, whose weight has the inputs first
    groups = outputs // per_group
    return tensor.reshape(groups, inputs // groups, per_group, -1).transpose(1, 2).reshape(outputs, -1)


def from_rows(rows: Tensor, shape: torch.Size, entry: Entry) -> Tensor:
    """The inverse of :func:`as_rows`.

    Args:
        rows: (outputs, inputs).
        shape: the shape of the layer, as torch stores it.
        entry: the parameter that holds the layer.
    """
    if not entry.transposed:
        return rows.reshape(shape)
    groups = entry.shape[0] // shape[1]
    return rows.reshape(groups, shape[1], shape[0] // groups, -1).transpose(1, 2).reshape(shape)


def largest_in_rows(scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Mask of the ``count`` largest magnitudes in each row; of equal ones the lower column wins, and NaN ranks last.

    Args:
        scores: (rows, columns).
        count: positions of each row, at most the columns.
        among: bool, of the shape of ``scores``; only its True positions are taken, where a row has fewer all of them. None:
            all.
    """
    ranked = scores.detach().abs().nan_to_num(BELOW_ZERO, torch.inf)
    if among is None:
        return largest_ranked(ranked, count)
    return largest_ranked(ranked.masked_fill_(~among, NEVER), count) & among


def why_not_constant(rows: Tensor, ablated: bool) -> str:
    """Why a mask is not one of constant fan-in, as a clause that follows its name; empty where it is.

    Args:
        rows: the mask, bool (outputs, inputs).
        ablated: whether rows may be empty.
    """
    counts = sorted(set(rows.sum(1).tolist()))
    if ablated:
        counts = [n for n in counts if n] or [0]
    if len(counts) > 1:
        return f"has output units of {counts[0]} to {counts[-1]} active weights"
    return "has no active weight" if counts == [0] and rows.numel() else ""


def empty_rows(rows: Tensor) -> int:
    """The number of output units without any active weight."""
    return int((~rows.any(1)).count_nonzero())


# ---------------------------------------------------------------------- one update


@dataclass(frozen=True)
class FanInUpdate:
    """One update of a layer's mask, as :func:`moved_fan_in` makes it.

    Attributes:
        mask: bool (outputs, inputs), the active weights after it.
        ablated: bool (outputs,), units that have no weight.
        fan_in: active weights of each of the others.
    """

    mask: Tensor
    ablated: Tensor
    fan_in: int


def moved_fan_in(
    mask: Tensor, weight: Tensor, grow: Tensor, planned: int, fraction: float, ablation: float | None = None
) -> FanInUpdate:
    """The mask of a layer after an update that keeps its fan-in constant (SRigL, Lasby et al. 2024, section 3).

    With K = int(fraction * planned)::

        keep     the active weights with the largest |w| of the whole layer, all but K
        salient  those, and the K largest scores among all others
        ablate   rows with fewer than max(1, ablation * planned / rows) salient weights
        fan-in   k = floor(planned / rows left), at most the inputs; a row with more loses its smallest |w|
        grow     in each row left its largest scores among what it did not keep, up to k

    What does not divide is lost until the next update, which begins with ``planned`` again. An ablated row may return.

    Args:
        mask: bool (outputs, inputs), the active weights.
        weight: the weights, of the shape of ``mask``.
        grow: score to come, by magnitude, of the shape of ``mask``.
        planned: planned active weights of the layer.
        fraction: the share of ``planned`` that the update replaces.
        ablation: the share of the planned fan-in that a row must have in salient weights; None: no row is ablated.
    """
    moved = drop_count(planned, fraction)
    kept = keep_largest(weight, min(int(mask.count_nonzero()), planned - moved), among=mask)
    ablated = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    if ablation is not None:
        salient = salient_weights(kept, grow, moved)
        ablated = salient < needed_weights(planned, len(mask), ablation)
    left = len(mask) - int(ablated.count_nonzero())
    fan_in = min(mask.shape[1], planned // left)
    return FanInUpdate(_regrown(kept, weight, grow, fan_in) & ~ablated[:, None], ablated, fan_in)


def salient_weights(kept: Tensor, grow: Tensor, count: int) -> Tensor:
    """Salient weights of each row: those that are kept, and the ``count`` largest scores of the layer among all others.

    Args:
        kept: bool (outputs, inputs).
        grow: score to come, by magnitude, of the shape of ``kept``.
        count: further positions of the layer.

    Returns:
        Whole numbers (outputs,).
    """
    return (kept | keep_largest(grow, count, among=~kept)).sum(1)


def needed_weights(planned: int, rows: int, ablation: float) -> int:
    """Salient weights below which a row is ablated: ablation * planned / rows, rounded up, at least 1.

    >>> needed_weights(30, 6, 0.5), needed_weights(24, 6, 0.6), needed_weights(6, 6, 0.3)
    (3, 3, 1)
    """
    return max(1, math.ceil(round(ablation * planned / rows, _DIGITS)))


def _regrown(kept: Tensor, weight: Tensor, grow: Tensor, fan_in: int) -> Tensor:
    """Mask of ``fan_in`` positions in each row: what is kept, the largest |w| first, then the largest scores."""
    stays = largest_in_rows(weight, fan_in, kept)
    scores = grow.detach().abs()
    # what stays comes before any score, also before one that has overflowed
    scores = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill_(stays, torch.inf)
    return largest_in_rows(scores, fan_in)
