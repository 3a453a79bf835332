"""Products of truly sparse matrices with batches, and their gradients, without a dense matrix.

Activations are feature-major inside, ``[features, batch]``, so that a live weight reads and writes whole rows. The
Functions return fresh tensors and views are made outside of them: torch refuses to write into a view that a Function made.
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse_callbacks.core.live_places import Groups, Rows

WIDTH = 128  # columns of a piece of the batch: its rows of 512 bytes stay in the nearest cache
ENTRIES = 2**20  # that the sampled product without MKL makes at a time
Records = list[tuple[Tensor, Tensor]] | None


@functools.cache
def has_sampled_product() -> bool:
    """Whether torch has the sampled product of compressed rows on this CPU; it comes with MKL."""
    crow, col = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    one = torch.ones(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that its compressed rows are in beta
        try:
            pattern = torch.sparse_csr_tensor(crow, col, torch.zeros(1), (1, 1), check_invariants=False)
            return bool(torch.sparse.sampled_addmm(pattern, one, one).values() == 1)
        except RuntimeError:
            return False


def rows_product(crow: Tensor, col: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """The product of a matrix in compressed rows with ``x [inputs, batch]``: ``[outputs, batch]``."""
    if not x.numel() or not values.numel():
        return x.new_zeros(crow.numel() - 1, x.shape[1])
    return functional.embedding_bag(col, x, crow, mode="sum", per_sample_weights=values, include_last_offset=True)


def add_sampled(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor, into: Tensor) -> None:
    """Add the entries of ``dy x'`` at the live places to ``into``.

    Args:
        crow: Where each row begins in ``col``.
        col: Columns of the live places.
        dy: ``[outputs, batch]``.
        x: ``[inputs, batch]``.
        into: The live entries so far, ``[live]``.
    """
    if not into.numel() or not x.numel():
        return
    if into.dtype in (torch.float32, torch.float64) and has_sampled_product():
        # both tensors are views of `into`: neither pattern nor gradient is copied
        pattern = torch.sparse_csr_tensor(crow, col, into, (dy.shape[0], x.shape[0]), check_invariants=False)
        torch.sparse.sampled_addmm(pattern, dy, x.t(), beta=1.0, out=pattern)
        return
    step = max(1, ENTRIES // x.shape[1])
    for start in range(0, col.numel(), step):
        some = col[start : start + step]
        places = torch.arange(start, start + some.numel(), dtype=torch.int32, device=col.device)
        rows = torch.searchsorted(crow, places, right=True).sub_(1)
        into[start : start + step] += (dy.index_select(0, rows) * x.index_select(0, some)).sum(1)


@torch.library.custom_op("sparse_callbacks::sampled", mutates_args=())
def sampled_in_graph(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """The entries of ``dy x'`` at the live places, as one operation for compiled graphs; it costs too much elsewhere."""
    into = torch.zeros(col.numel(), dtype=dy.dtype, device=dy.device)
    add_sampled(crow, col, dy.contiguous(), x.contiguous(), into)
    return into


@sampled_in_graph.register_fake
def _(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    return dy.new_empty(col.shape)


class RowsProduct(torch.autograd.Function):
    """``W x + b`` for ``x [inputs, batch]``, W in compressed rows: ``[outputs, batch]``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, rows: Rows, records: Records, x: Tensor) -> Tensor:
        ctx.rows, ctx.records = rows, records
        ctx.save_for_backward(values, x if ctx.needs_input_grad[0] or records is not None else None)
        return plus(rows_product(rows.crow, rows.col, values.view(-1), x), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, x = ctx.saved_tensors
        rows, needs, dy = ctx.rows, ctx.needs_input_grad, grad.contiguous()
        if ctx.records is not None:
            ctx.records.append((x.detach(), dy.detach()))
        d_bias = dy.sum(1) if needs[1] else None
        d_values = d_x = None
        if asks_for_graph():
            if needs[0]:
                d_values = SampledProduct.apply(rows, x, dy)
            if needs[4]:
                d_x = RowsProduct.apply(values.index_select(1, rows.perm), None, rows.transposed(), None, dy)
            return d_values, d_bias, None, None, d_x
        if needs[4]:
            d_x = rows_product(rows.crow_t, rows.col_t, values.view(-1).index_select(0, rows.perm), dy)
        if needs[0]:
            d_values = sampled(rows, x, dy)
        return d_values, d_bias, None, None, d_x


class SampledProduct(torch.autograd.Function):
    """Entries of ``dY x'`` at the live places, ``[1, live]``."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, x: Tensor, dy: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, dy)
        return sampled(rows, x, dy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, dy = ctx.saved_tensors
        rows, d_x, d_dy = ctx.rows, None, None
        if ctx.needs_input_grad[1]:
            d_x = RowsProduct.apply(grad.index_select(1, rows.perm), None, rows.transposed(), None, dy)
        if ctx.needs_input_grad[2]:
            d_dy = RowsProduct.apply(grad.contiguous(), None, rows, None, x)
        return None, d_x, d_dy


class WideProduct(torch.autograd.Function):
    """``x W' + b`` for ``x [batch, inputs]`` of many rows, W in compressed rows: ``[batch, outputs]``.

    Pieces of `WIDTH` rows are turned feature-major one after another in the same memory: to fill fresh memory costs as much
    as to turn them, so they are turned again in backward, and x itself is kept.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, rows: Rows, records: Records, x: Tensor) -> Tensor:
        ctx.rows, ctx.records = rows, records
        ctx.save_for_backward(values, x if ctx.needs_input_grad[0] or records is not None else None)
        y = x.new_empty(x.shape[0], rows.crow.numel() - 1)
        for part, piece in zip(y.split(WIDTH), feature_major(x), strict=True):
            part.copy_(plus(rows_product(rows.crow, rows.col, values.view(-1), piece), bias).t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, x = ctx.saved_tensors
        rows, needs, records = ctx.rows, ctx.needs_input_grad, ctx.records
        if asks_for_graph():
            return gradients_with_graph(rows, needs, values, x, grad)
        d_values = values.new_zeros(values.shape[1]) if needs[0] else None
        d_bias = values.new_zeros(grad.shape[1]) if needs[1] else None
        d_x = grad.new_empty(grad.shape[0], rows.crow_t.numel() - 1) if needs[4] else None
        turned = values.view(-1).index_select(0, rows.perm) if needs[4] else None
        keep = records is not None
        xs = feature_major(x, keep) if needs[0] or keep else repeat(None)
        parts = repeat(None) if d_x is None else d_x.split(WIDTH)
        for dy, piece, part in zip(feature_major(grad, keep), xs, parts, strict=False):
            if records is not None:
                records.append((piece, dy))
            if d_bias is not None:
                d_bias += dy.sum(1)
            if turned is not None:
                part.copy_(rows_product(rows.crow_t, rows.col_t, turned, dy).t())
            if d_values is not None:
                add_sampled(rows.crow, rows.col, dy, piece, d_values)
        return None if d_values is None else d_values.view(1, -1), d_bias, None, None, d_x


def plus(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y [outputs, batch]`` with the bias added in place."""
    return y if bias is None else y.add_(bias.view(-1, 1))


def asks_for_graph() -> bool:
    """Whether a backward pass is to be differentiated itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def sampled(rows: Rows, x: Tensor, dy: Tensor) -> Tensor:
    """The entries of ``dy x'`` at the live places, ``[1, live]``."""
    if torch.compiler.is_compiling():
        return sampled_in_graph(rows.crow, rows.col, dy, x).view(1, -1)
    into = dy.new_zeros(1, rows.col.numel())
    add_sampled(rows.crow, rows.col, dy, x, into.view(-1))
    return into


def feature_major(batch: Tensor, keep: bool = False) -> Iterator[Tensor]:
    """Pieces of a batch ``[batch, features]``, one after another, each ``[features, up to WIDTH]`` and contiguous.

    Args:
        batch: The batch.
        keep: Whether each piece has memory of its own. Otherwise it is overwritten by the next.
    """
    memory = None
    for part in batch.split(WIDTH):
        memory = batch.new_empty(batch.shape[1] * WIDTH) if memory is None or keep else memory
        yield memory[: part.numel()].view(part.shape[1], part.shape[0]).copy_(part.t())


def gradients_with_graph(rows: Rows, needs: Sequence[bool], values: Tensor, x: Tensor, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of `WideProduct`, by operations that have gradients themselves."""
    d_values = d_x = None
    dys = [dy.t().contiguous() for dy in grad.split(WIDTH)]
    if needs[0]:
        pieces = [
            SampledProduct.apply(rows, part.t().contiguous(), dy) for part, dy in zip(x.split(WIDTH), dys, strict=True)
        ]
        d_values = torch.stack(pieces).sum(0)
    if needs[4]:
        turned, back = values.index_select(1, rows.perm), rows.transposed()
        d_x = torch.cat([RowsProduct.apply(turned, None, back, None, dy).t() for dy in dys])
    return d_values, grad.sum(0) if needs[1] else None, None, None, d_x


def linear_by_rows(values: Tensor, bias: Tensor | None, rows: Rows, x: Tensor, records: Records) -> Tensor:
    """``x W' + b``, W in compressed rows.

    Args:
        values: Live values ``[1, live]``.
        bias: The bias ``[outputs]``.
        rows: The pattern.
        x: The batch ``[batch, inputs]``. It is not copied where it is a transposed view of at most `WIDTH` rows.
        records: A list to which backward appends pieces of x and dY, feature-major.

    Returns:
        ``[batch, outputs]``: a transposed view up to `WIDTH` rows.
    """
    if x.shape[0] > WIDTH and not torch.compiler.is_compiling():
        return WideProduct.apply(values, bias, rows, records, x)
    return RowsProduct.apply(values, bias, rows, records, x.t().contiguous()).t()


class GroupsProduct(torch.autograd.Function):
    """``W x + b`` for ``x [inputs, batch]``, W in groups of rows that read the same inputs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, groups: Groups, records: Records, x: Tensor) -> Tensor:
        ctx.groups, ctx.records = groups, records
        ctx.inputs = x.shape[0]
        ctx.save_for_backward(values, x if ctx.needs_input_grad[0] or records is not None else None)
        y = torch.bmm(values, gathered(x, groups.idx)).flatten(0, 1)
        return y if bias is None else y.add_(bias.view(-1, 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, x = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.records is not None:
            ctx.records.append((x.detach(), grad.detach()))
        dy = grad.view(values.shape[0], values.shape[1], grad.shape[1])
        d_values = d_bias = d_x = None
        if ctx.needs_input_grad[0]:
            # gathered again: to keep it would cost more memory than the values
            d_values = torch.bmm(dy, gathered(x, ctx.groups.idx).transpose(1, 2))
        if ctx.needs_input_grad[1]:
            d_bias = grad.sum(1)
        if ctx.needs_input_grad[4]:
            d_x = summed_by_input(torch.bmm(values.transpose(1, 2), dy).flatten(0, 1), ctx.groups, ctx.inputs)
        return d_values, d_bias, None, None, d_x


def gathered(x: Tensor, idx: Tensor) -> Tensor:
    """The inputs that each group reads: ``[blocks, k, batch]``."""
    return x.index_select(0, idx.view(-1)).view(idx.shape[0], idx.shape[1], x.shape[1])


def summed_by_input(h: Tensor, groups: Groups, inputs: int) -> Tensor:
    """Rows of ``h [blocks k, batch]`` summed by the input that each belongs to: ``[inputs, batch]``."""
    fast = h.dtype is torch.float32 and h.device.type == "cpu" and h.numel() > 0
    if fast and not (torch.is_grad_enabled() and h.requires_grad):
        return functional.embedding_bag(groups.places, h, groups.offsets, mode="sum", include_last_offset=True)
    return h.new_zeros(inputs, h.shape[1]).index_add(0, groups.idx.view(-1), h)


def linear_by_groups(values: Tensor, bias: Tensor | None, groups: Groups, x: Tensor, records: Records) -> Tensor:
    """``x W' + b``, W in groups of rows that read the same inputs.

    Args:
        values: Live values ``[blocks, group, k]``.
        bias: The bias ``[outputs]``.
        groups: The pattern.
        x: The batch ``[batch, inputs]``. It is not copied where it is a transposed view.
        records: A list to which backward appends x and dY, feature-major.

    Returns:
        ``[batch, outputs]``, a transposed view.
    """
    return GroupsProduct.apply(values, bias, groups, records, x.t().contiguous()).t()
