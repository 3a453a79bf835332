"""Choices of entries by numbers and masks, and tables that are looked up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_callbacks.channels.axes import Run
from sparse_callbacks.channels.operations.table import Axes, outputs, rule
from sparse_callbacks.channels.recorded_call import Call


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _indexed_dims(indices: Sequence[Tensor | None]) -> tuple[list[int], int]:
    """The dimensions that are chosen in, and the place of what is chosen among the others."""
    found: list[int] = []
    dim = 0
    for index in indices:
        # a mask of several dimensions chooses in as many
        count = index.ndim if index is not None and _is_mask(index) else 1
        if index is not None:
            found += range(dim, dim + count)
        dim += count
    adjoining = found == [*range(found[0], found[-1] + 1)]
    return found, found[0] if adjoining else 0


def _block_indexed(call: Call, dims: Sequence[int]) -> None:
    axes = call.axes_of(call.named["self"])
    call.block([axes[d] for d in dims], f"{call.mixes.partition(',')[0]}, which picks them by numbers")
    for index in (i for i in call.named["indices"] if i is not None):
        call.block(call.axes_of(index))


@rule("index")
def _indexed(call: Call) -> list[Axes]:
    dims, before = _indexed_dims(call.named["indices"])
    _block_indexed(call, dims)
    others = [a for d, a in enumerate(call.axes_of(call.named["self"])) if d not in dims]
    count = call.output.ndim - len(others)
    made: Axes = [Run(s) for s in call.output.shape[before : before + count]]
    return [[*others[:before], *made, *others[before:]]]


@rule("index_put", "_index_put_impl")
def _put(call: Call) -> list[Axes]:
    x, values, indices = call.named["self"], call.named["values"], call.named["indices"]
    axes, of_values = call.axes_of(x), call.axes_of(values)
    dims, before = _indexed_dims(indices)
    given = [i for i in indices if i is not None]
    if len(given) == 1 and _is_mask(given[0]) and values.numel() == 1:
        # the same value wherever the mask is set
        for dim, other in zip(dims, call.axes_of(given[0]), strict=True):
            call.join(axes[dim], other)
        return [list(axes)]
    _block_indexed(call, dims)
    others = [a for d, a in enumerate(axes) if d not in dims]
    count = max(1 if _is_mask(i) else i.ndim for i in given)
    places = [*others[:before], *(None for _ in range(count)), *others[before:]]
    for axis, place in zip(of_values[::-1], places[::-1], strict=False):
        if place is None:
            call.block([axis])
        elif axis.size == place.size != 1:
            call.join(place, axis)
    return [list(axes)]


@rule("select_scatter", "slice_scatter")
def _put_along(call: Call) -> list[Axes]:
    axes, source = call.axes_of(call.named["self"]), call.axes_of(call.named["src"])
    dim = call.axis(call.named["dim"])
    call.block([axes[dim]])
    if call.name == "aten.slice_scatter":
        call.block([source[dim]])
        source = [a for d, a in enumerate(source) if d != dim]
    for axis, other in zip([a for d, a in enumerate(axes) if d != dim], source, strict=True):
        call.join(axis, other)
    return [list(axes)]


@rule("bucketize", "searchsorted", "isin")
def _found_among(call: Call) -> list[Axes]:
    """The place of each entry among sorted ones, which are the same for all; or whether it is one of them."""
    names = ("self", "elements")
    entries = next((call.named[n] for n in names if isinstance(call.named.get(n), Tensor)), None)
    table = call.named.get("boundaries", call.named.get("sorted_sequence", call.named.get("test_elements")))
    for tensor in call.tensors():
        if tensor is not entries:
            call.block(call.axes_of(tensor))
    if entries is None:
        return [[Run(s) for s in t.shape] for t in outputs(call)]
    axes = call.axes_of(entries)
    if call.name == "aten.searchsorted" and isinstance(table, Tensor) and table.ndim > 1:  # a table for each row
        call.block(axes)
    return [list(axes)]


@rule("embedding")
def _embedded(call: Call) -> list[Axes]:
    weight = call.axes_of(call.named["weight"])
    call.block(weight[:1])
    call.note_product(call.named["weight"], [], weight[1:])
    return [[*call.axes_of(call.named["indices"]), *weight[1:]]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedded_in_bags(call: Call) -> list[Axes]:
    weight = call.axes_of(call.named["weight"])
    call.block(weight[:1])
    for tensor in call.tensors():
        if tensor is not call.named["weight"]:
            call.block(call.axes_of(tensor))
    call.note_product(call.named["weight"], [], weight[1:])
    made, *more = outputs(call)
    size = weight[1].size
    # of a maximum also the number of the row that each entry comes from
    numbers: list[Axes] = [
        [*(Run(s) for s in t.shape[:-1]), weight[1]]
        if t.ndim == 2 and t.shape[-1] == size
        else [Run(s) for s in t.shape]
        for t in more
    ]
    return [[Run(made.shape[0]), weight[1]], *numbers]
