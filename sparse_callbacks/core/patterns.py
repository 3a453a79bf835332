"""Patterns of masks; in ``fan_in/G`` every G consecutive rows of a layer read the same inputs.

Here G is the *group*, G consecutive rows are a *block*, and a *column* is one input of one block: all G weights of it are
active, or none is. Every block of a layer has as many active columns. Layers under N:M are in
:mod:`~sparse_callbacks.core.nm_layers`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from sparse_callbacks.core.attachment import Choice
from sparse_callbacks.core.fan_in_layers import (
    fan_in_remarks,
    fan_in_zeros,
    has_fan_in,
    shared_group,
    why_no_shared_rows,
    why_other_rows,
)
from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.nm_layers import nm_of, nm_remarks, nm_targets, why_other_groups
from sparse_callbacks.core.pattern_names import asked_nm
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.sparse_layers.live_places import why_not_grouped
from sparse_callbacks.core.sparse_layers.moved_places import BELOW_ZERO, NEVER, largest_ranked


def columns_for(density: float, inputs: int) -> int:
    """Active columns of each block at ``density`` (the share of active weights): rounded as Python does, at least 1.

    >>> columns_for(0.1, 784), columns_for(0.01, 20)
    (78, 1)
    """
    return min(inputs, max(1, round(density * inputs)))


# ---------------------------------------------------------------------- which layers have the pattern


def group_of(method: object, entry: Entry) -> int | None:
    """The group of the pattern in which the masks of a parameter are; None where they have no pattern.

    Args:
        method: the method of the run.
        entry: the parameter.
    """
    if (choice := _choices(method).get(entry.name)) is not None and choice.storage == "grouped":
        return choice.group
    group = shared_group(method)
    return None if group is None or why_no_shared_rows(entry, group) else group


def _choices(method: object) -> Mapping[str, Choice]:
    """The storage of each parameter, as far as it was chosen."""
    attachment = getattr(method, "attachment", None)
    return {} if attachment is None else attachment.choices


def live_zeros(method: object, entries: Iterable[Entry]) -> dict[str, list[int]]:
    """The zeros of each layer in the parameters that are exchanged already, and keep the number of their live weights.

    Args:
        method: the method of the run.
        entries: the parameters.
    """
    kept = {name: choice.live for name, choice in _choices(method).items() if choice.live is not None}
    return {e.name: [e.size - kept[e.name]] for e in entries if e.name in kept}


def pattern_remarks(method: object, entries: Sequence[Entry], zeros: Mapping[str, int]) -> dict[str, str]:
    """What a plan says of the pattern of each sparse parameter, by its name.

    Args:
        method: the method that plans.
        entries: all parameters.
        zeros: planned zeros of the sparse parameters.
    """
    found = nm_remarks(method, entries, zeros)
    if has_fan_in(method):
        found = fan_in_remarks(method, entries, zeros)
    for entry in entries:
        if entry.reason or not zeros.get(entry.name):
            continue
        if not has_fan_in(method) and (group := group_of(method, entry)) is not None:
            rows, inputs = entry.shape
            active = inputs - zeros[entry.name] // rows
            found[entry.name] = f"fan_in/{group}: {active} of {inputs} inputs"
    return found


def reached_targets(method: object, targets: Mapping[str, float], entries: Sequence[Entry]) -> dict[str, float]:
    """``targets`` by layer, with the sparsity that whole columns reach in the layers that have the pattern, and that exchanged
    layers have. Under N:M every layer has that of the pattern.

    Args:
        method: the method that plans.
        targets: target sparsity by layer.
        entries: all parameters; those without a reason have a target.
    """
    if (asked := asked_nm(method)) is not None:
        sizes = {layer: e.size // e.parts for e in entries for layer in e.layers}
        return {layer: share_of(zeros, sizes[layer]) for layer, zeros in nm_targets(entries, asked).items()}
    found, kept = dict(targets), live_zeros(method, entries)
    if has_fan_in(method):
        sizes = {layer: e.size // e.parts for e in entries for layer in e.layers}
        found |= {layer: share_of(zeros, sizes[layer]) for layer, zeros in fan_in_zeros(entries, targets).items()}
    for entry in entries:
        if entry.name in kept and not entry.reason:
            found[entry.name] = share_of(kept[entry.name][0], entry.size)
        elif not entry.reason and not has_fan_in(method) and group_of(method, entry) is not None:
            rows, inputs = entry.shape
            zeros = (inputs - columns_for(1 - targets[entry.name], inputs)) * rows
            found[entry.name] = share_of(zeros, entry.size)
    return found


def share_of(zeros: int, size: int) -> float:
    """The sparsity of which :func:`~sparse_callbacks.core.ops.zeros_for` makes exactly ``zeros`` in a layer of ``size``
    weights."""
    share = zeros / size if size else 0.0
    return share if math.floor(share * size) == zeros else math.nextafter(share, 1.0)


def why_other_pattern(method: object, masks: Mapping[str, Tensor], entries: Iterable[Entry]) -> str:
    """The name of the first parameter whose mask is not of the pattern that it should have, and why it is not; empty where
    there is none.

    Args:
        method: the method of the run.
        masks: bool masks by parameter name.
        entries: the parameters.
    """
    for entry in entries:
        if entry.name in masks and (why := _why_other(method, masks[entry.name], entry)):
            return f"{entry.name} {why}"
    return ""


def _why_other(method: object, mask: Tensor, entry: Entry) -> str:
    if getattr(method, "arrives_at_stop", False):
        return ""  # a method that starts dense and arrives at a pattern has other masks on the way
    if (pattern := nm_of(method, entry)) is not None:
        return why_other_groups(mask, entry, pattern)
    if has_fan_in(method):
        return why_other_rows(method, mask, entry)
    group = group_of(method, entry)
    return "" if group is None else why_not_grouped(mask, group)


# ---------------------------------------------------------------------- columns


def largest_among(scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Mask of the ``count`` largest numbers in each row; of equal numbers the lower column wins, and NaN ranks last.

    Args:
        scores: numbers that are not negative, in rows.
        count: numbers to take in each row; there are as many.
        among: bool, of the shape of ``scores``; only its True positions are taken. None: all.
    """
    # below zero, which is the least that a number can be, and above what must not be taken
    ranked = torch.where(scores.isnan(), BELOW_ZERO, scores)
    return largest_ranked(ranked if among is None else ranked.masked_fill_(~among, NEVER), count)


def drawn_columns(blocks: int, inputs: int, count: int, source: torch.Generator) -> Tensor:
    """Mask of ``count`` columns in each block, every choice equally likely: the first columns of a layer.

    Args:
        blocks: the number of blocks.
        inputs: the number of columns of each block.
        count: columns to draw in each block.
        source: a generator of the CPU.
    """
    return largest_among(column_numbers(blocks, inputs, source), count)


def column_numbers(blocks: int, inputs: int, source: torch.Generator) -> Tensor:
    """A uniform number for each column of each block, of which the largest are a uniform draw; in float64, see
    :func:`~sparse_callbacks.core.randomness.uniform_like`."""
    return torch.rand(blocks, inputs, dtype=torch.float64, generator=source)


def block_sums(blocks: Tensor) -> Tensor:
    """Sum of magnitudes over the rows of each block, as numbers of at least 32 bits: (blocks, group, n) becomes (blocks, n).

    Row is added to row in their order, so that a column has the same sum bit by bit whatever lies beside it.
    """
    rows = blocks.detach().to(widened(blocks.dtype)).abs().unbind(1)
    return reduce(torch.add, rows)


def column_sums(matrix: Tensor, group: int) -> Tensor:
    """:func:`block_sums` of a matrix of outputs by inputs."""
    return block_sums(in_blocks(matrix, group))


def in_blocks(matrix: Tensor, group: int) -> Tensor:
    """A matrix of outputs by inputs as (blocks, group, inputs)."""
    return matrix.reshape(-1, group, matrix.shape[1])


def as_mask(columns: Tensor, group: int) -> Tensor:
    """The mask of a layer, outputs by inputs, in which every block has its ``columns`` (bool, blocks by inputs)."""
    return columns.repeat_interleave(group, 0)


def largest_columns(weight: Tensor, count: int, group: int, among: Tensor | None = None) -> Tensor:
    """The mask of the ``count`` columns of each block with the largest sums of magnitudes.

    Args:
        weight: outputs by inputs.
        count: columns of each block.
        group: rows of a block.
        among: bool, of the shape of ``weight``; only columns are taken all of whose weights are True there, and each block
            has that many. None: all.
    """
    whole = None if among is None else in_blocks(among, group).all(1)
    return as_mask(largest_among(column_sums(weight, group), count, whole), group)
