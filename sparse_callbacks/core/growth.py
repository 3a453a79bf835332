"""One update of a layer's mask: small weights leave, and others come, from all or from candidates."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_callbacks.core.nm_masks import NMPattern
from sparse_callbacks.core.nm_selection import regrown_in_groups
from sparse_callbacks.core.ops import drop_and_grow, drop_count, keep_largest
from sparse_callbacks.core.patterns import as_mask, column_numbers, column_sums, group_of, largest_among
from sparse_callbacks.core.randomness import uniform_like
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import count_of, layout_of, lying_as, size_of
from sparse_callbacks.core.sparse_layers.drawn_places import numbers_of_live

if TYPE_CHECKING:
    from sparse_callbacks.core.method import Method


def moved_count(method: object, entry: Entry, active: int, fraction: float) -> int:
    """Weights that an update replaces in a layer, or columns that it replaces in each block under a pattern.

    Args:
        method: the method of the run.
        entry: the parameter that holds the layer.
        active: active weights of the layer.
        fraction: the share of them that an update replaces.
    """
    # under a pattern every row has as many active weights as its block has columns
    return drop_count(active if group_of(method, entry) is None else active // entry.shape[0], fraction)


def checked_candidates(candidates: float | None) -> float | None:
    """``candidates``, where it is possible.

    Raises:
        ValueError: it is not a number above 0, or None.
    """
    number = isinstance(candidates, Real) and not isinstance(candidates, bool) and math.isfinite(candidates)
    if candidates is not None and not (number and candidates > 0):
        raise ValueError(
            f"candidates={candidates!r} is not a number above 0: it is how many candidates for growth are drawn for each "
            "active weight. Give for example 2.0, or None to let all positions compete."
        )
    return None if candidates is None else float(candidates)


def candidate_count(candidates: float, active: int, moved: int, free: int) -> int:
    """Positions that growth may choose from: ``candidates`` times the active ones, truncated as in the released code; as
    many as come at least, and all that are free at most.

    Args:
        candidates: candidates for each active position.
        active: active positions before the update.
        moved: positions that come.
        free: positions that were not kept.

    >>> candidate_count(2.0, 10, 3, 93), candidate_count(2.0, 10, 3, 15), candidate_count(0.1, 10, 3, 93)
    (20, 15, 3)
    """
    return min(free, max(moved, int(candidates * active)))


def uniform_numbers(method: "Method", name: str, number: int) -> Tensor:
    """A uniform number for each position of a parameter, or under a pattern for each column of each block.

    They derive from (seed, number, name): every rank and every resumed run draws the same without a state to save. The
    largest of independent uniform numbers are a uniform draw without replacement.

    Args:
        method: the method of the run.
        name: the name of the parameter.
        number: the number of the step.
    """
    parameter, entry = method.params[name], method.weights.entries[name]
    source = method.generator(name, number)
    if (group := group_of(method, entry)) is None:
        return uniform_like(parameter, source)
    rows, inputs = entry.shape
    return column_numbers(rows // group, inputs, source).to(parameter.device)


def growth_bound(shape: Sequence[int]) -> float:
    """b of U(-b, b) for new weights of a layer (out, in, *kernel): sqrt(6 / n_in), with n_in = in * kernel positions.

    It is He's uniform initialisation of the dense layer (He et al. 2015), as the released codes of SET and CTRE draw.

    >>> round(growth_bound((10, 600)), 6)
    0.1
    """
    # all dimensions but the outputs: each offset of a kernel is an input neuron of its own
    return math.sqrt(6 / math.prod(shape[1:]))


def fresh_values(method: "Method", name: str, number: int) -> Tensor:
    """Values for born weights of a parameter, in its shape: uniform in plus or minus :func:`growth_bound` of its layers.

    They derive from (seed, number, name), and an exchanged layer draws the values that masked storage draws for its places
    (in one of more than 2^26 units, others from the same distribution).

    Args:
        method: the method of the run.
        name: the name of the parameter.
        number: the number of the step.
    """
    # a purpose of its own: the numbers that choose positions would give weights that depend on where they are
    source, layer = method.generator(f"{name}/new weights", number), method.weights.layers_stored.get(name)
    drawn = uniform_like(method.params[name], source) if layer is None else numbers_of_live(layer.places, source)
    return (2 * drawn - 1) * growth_bound(method.weights.entries[name].shape)


def moved_mask(
    mask: Tensor,
    weight: Tensor,
    grow: Tensor,
    fraction: float,
    group: int | None = None,
    candidates: float | None = None,
    chances: Tensor | None = None,
) -> Tensor:
    """The mask of a layer after an update: the smallest weights leave, and as many come among all that were not kept, so
    that what has just left can come straight back.

    Args:
        mask: bool, the active positions; it has as many after the update.
        weight: the weights, of the shape of ``mask``.
        grow: score to come, by magnitude: of each position, or under a pattern of each column of each block.
        fraction: the share of the active weights, or of the active columns of each block, that the update replaces.
        group: the group of the mask's pattern; None for a mask without a pattern.
        candidates: candidates for each active position or column, from which the largest scores come; None: all that were
            not kept.
        chances: uniform numbers of the shape of positions or columns, which draw the candidates.
    """
    if group is not None:
        return _moved_columns(mask, weight, grow, fraction, group, candidates, chances)
    # counted in the mask and not planned: whatever a layer has, it has as many after the update
    active = count_of(mask)
    moved = drop_count(active, fraction)
    if candidates is None or chances is None:
        return drop_and_grow(mask, weight, grow, moved)
    kept = keep_largest(weight, active - moved, among=mask)
    many = candidate_count(candidates, active, moved, size_of(weight) - active + moved)
    return kept | keep_largest(grow, moved, among=keep_largest(chances, many, among=~kept))


def moved_by_sign(mask: Tensor, weight: Tensor, grow: Tensor, fraction: float) -> Tensor:
    """The mask of a layer after an update in which the smallest positive and the largest negative weights leave, each sign
    its own share (Mocanu et al. 2018, algorithm 1); as many come among all that were not kept.

    Args:
        mask: bool, the active positions; it has as many after the update.
        weight: the weights, of the shape of ``mask``. An exact zero, and NaN, counts as positive.
        grow: score to come, by magnitude.
        fraction: the share of the active weights of each sign that leaves: int(fraction * count) of it.
    """
    kept, moved = _kept_by_sign(mask, weight, fraction)
    return kept | keep_largest(grow, moved, among=~kept)


def _kept_by_sign(mask: Tensor, weight: Tensor, fraction: float) -> tuple[Tensor, int]:
    """The weights that stay where each sign loses its share, and how many leave."""
    layout = layout_of(weight)
    negative = lying_as(mask & (weight < 0), layout)
    kept, moved = torch.zeros_like(mask), 0
    for sign in (negative, lying_as(mask & ~negative, layout)):
        active = count_of(sign)
        leaving = int(fraction * active)  # as published, where drop_count() takes RigL's product in float32
        kept, moved = kept | keep_largest(weight, active - leaving, among=sign), moved + leaving
    return kept, moved


def moved_in_groups(
    mask: Tensor,
    weight: Tensor,
    grow: Tensor,
    fraction: float,
    pattern: NMPattern,
    axis: int = 1,
    by_sign: bool = False,
) -> Tensor:
    """The mask of a layer under N:M after an update: the smallest weights of the layer leave, and each group grows as many as it
    has lost; see :func:`~sparse_callbacks.core.nm_selection.regrown_in_groups`.

    Args:
        mask: bool, the active positions; each group, or tile, has as many after the update.
        weight: the weights, of the shape of ``mask``.
        grow: score to come, by magnitude.
        fraction: the share of the active weights of the layer that leaves.
        pattern: the pattern of the mask.
        axis: the axis of the inputs.
        by_sign: whether each sign loses its own share, as in :func:`moved_by_sign`.
    """
    if by_sign:
        kept, _ = _kept_by_sign(mask, weight, fraction)
    else:
        active = count_of(mask)
        kept = keep_largest(weight, active - drop_count(active, fraction), among=mask)
    return regrown_in_groups(mask, kept, grow, pattern, axis)


def _moved_columns(
    mask: Tensor,
    weight: Tensor,
    grow: Tensor,
    fraction: float,
    group: int,
    candidates: float | None,
    chances: Tensor | None,
) -> Tensor:
    columns = mask[::group]
    active, inputs = int(columns[0].count_nonzero()), columns.shape[1]
    moved = drop_count(active, fraction)
    kept = largest_among(column_sums(weight, group), active - moved, columns)
    among = ~kept
    if candidates is not None and chances is not None:
        many = candidate_count(candidates, active, moved, inputs - active + moved)
        among = largest_among(chances, many, among)
    # in groups of one row the scores of positions are those of columns, but for their sign
    scores = column_sums(grow, group) if len(grow) == len(mask) else grow
    return as_mask(kept | largest_among(scores, moved, among), group)
