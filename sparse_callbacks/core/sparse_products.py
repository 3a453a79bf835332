"""Products of truly sparse matrices with batches, and their gradients, without a dense matrix.

Activations are feature-major inside, ``[features, batch]``, so that a live weight reads and writes whole rows. The
Functions return fresh tensors and views are made outside of them: torch refuses to write into a view that a Function made.
"""

import functools
import warnings
from collections.abc import Sequence
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
def sampled(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """The entries of ``dy x'`` at the live places, as one operation for compiled graphs; it costs too much elsewhere."""
    into = torch.zeros(col.numel(), dtype=dy.dtype, device=dy.device)
    add_sampled(crow, col, dy.contiguous(), x.contiguous(), into)
    return into


@sampled.register_fake
def _(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    return dy.new_empty(col.shape)


def feature_major_pieces(batch: Tensor) -> tuple[Tensor, ...]:
    """``[batch, features]`` as contiguous ``[features, up to WIDTH]``; a narrow transposed view is not copied."""
    if batch.shape[0] <= WIDTH or torch.compiler.is_compiling():
        return (batch.t().contiguous(),)
    return tuple(piece.t().contiguous() for piece in batch.split(WIDTH))


def products(values: Tensor, bias: Tensor | None, rows: Rows, pieces: Sequence[Tensor]) -> Tensor:
    """``W x + b``: ``[outputs, batch]`` of one piece, ``[batch, outputs]`` of several."""
    flat = values.view(-1)
    column = None if bias is None else bias.view(-1, 1)
    if len(pieces) == 1:
        y = rows_product(rows.crow, rows.col, flat, pieces[0])
        return y if column is None else y.add_(column)
    y = values.new_empty(sum(piece.shape[1] for piece in pieces), rows.crow.numel() - 1)
    for part, piece in zip(y.split(WIDTH), pieces, strict=True):
        product = rows_product(rows.crow, rows.col, flat, piece)
        part.copy_((product if column is None else product.add_(column)).t())
    return y


class RowsProduct(torch.autograd.Function):
    """`products` of a batch in pieces, W in compressed rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, rows: Rows, records: Records, *pieces: Tensor) -> Tensor:
        ctx.rows, ctx.records, ctx.count = rows, records, len(pieces)
        kept = pieces if ctx.needs_input_grad[0] or records is not None else ()
        ctx.save_for_backward(values, *kept)
        return products(values, bias, rows, pieces)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, *pieces = ctx.saved_tensors
        rows, needs = ctx.rows, ctx.needs_input_grad
        dys = (grad.contiguous(),) if ctx.count == 1 else feature_major_pieces(grad)
        if ctx.records is not None:
            ctx.records.extend((x.detach(), dy.detach()) for x, dy in zip(pieces, dys, strict=True))
        d_values = d_bias = None
        d_pieces: Any = (None,) * ctx.count
        if needs[1]:
            d_bias = grad.sum(1 if ctx.count == 1 else 0)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # gradients of these gradients are asked for
            if needs[0]:
                d_values = SampledProduct.apply(rows, *pieces, *dys)
            if any(needs[4:]):
                turned, back = values.index_select(1, rows.perm), rows.transposed()
                d_pieces = [RowsProduct.apply(turned, None, back, None, dy) for dy in dys]
            return d_values, d_bias, None, None, *d_pieces
        if needs[0]:
            d_values = sampled_sum(rows, pieces, dys).view(1, -1)
        if any(needs[4:]):
            turned = values.view(-1).index_select(0, rows.perm)
            d_pieces = [rows_product(rows.crow_t, rows.col_t, turned, dy) for dy in dys]
        return d_values, d_bias, None, None, *d_pieces


def sampled_sum(rows: Rows, xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    """Entries of ``dY x'`` at the live places, summed over the pieces of a batch: ``[live]``."""
    if torch.compiler.is_compiling():
        return sampled(rows.crow, rows.col, dys[0], xs[0])
    into = torch.zeros(rows.col.numel(), dtype=xs[0].dtype, device=xs[0].device)
    for x, dy in zip(xs, dys, strict=True):
        add_sampled(rows.crow, rows.col, dy, x, into)
    return into


class SampledProduct(torch.autograd.Function):
    """`sampled_sum` with gradients, of pieces of x and then as many of dY: ``[1, live]``."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, *pieces: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(*pieces)
        half = len(pieces) // 2
        return sampled_sum(rows, pieces[:half], pieces[half:]).view(1, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        half = len(ctx.saved_tensors) // 2
        xs, dys = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        d_xs: Any = (None,) * half
        d_dys: Any = (None,) * half
        if any(ctx.needs_input_grad[1 : 1 + half]):
            turned, back = grad.index_select(1, ctx.rows.perm), ctx.rows.transposed()
            d_xs = [RowsProduct.apply(turned, None, back, None, dy) for dy in dys]
        if any(ctx.needs_input_grad[1 + half :]):
            d_dys = [RowsProduct.apply(grad.contiguous(), None, ctx.rows, None, x) for x in xs]
        return None, *d_xs, *d_dys


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
    pieces = feature_major_pieces(x)
    y = RowsProduct.apply(values, bias, rows, records, *pieces)
    return y.t() if len(pieces) == 1 else y


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
