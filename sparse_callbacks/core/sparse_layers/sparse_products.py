"""Products of truly sparse matrices with batches, and their gradients, without a dense matrix.

Activations are feature-major inside, ``[features, batch]``, so that a live weight reads and writes whole rows. The
Functions return fresh tensors and views are made outside of them: torch refuses to write into a view that a Function made.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse_callbacks.core.sparse_layers.place_units import GroupPattern, RowPattern
from sparse_callbacks.core.sparse_layers.product_records import Use, of_gradient
from sparse_callbacks.core.sparse_layers.sparse_kernels import add_sampled, rows_product, sampled

NARROW = 128  # rows of a batch that may stay whole
PIECE = 64  # rows of a piece of any other
CACHE = 2**18  # numbers of x or y that the second cache of a core holds


class RowsProduct(torch.autograd.Function):
    """``W x + b`` for ``x [inputs, batch]``, W in compressed rows: ``[outputs, batch]``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, rows: RowPattern, use: Use | None, x: Tensor) -> Tensor:
        ctx.rows, ctx.use = rows, use
        ctx.save_for_backward(values, x if ctx.needs_input_grad[0] else None)
        return plus(rows_product(rows.crow, rows.col, values.view(-1), x), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, x = ctx.saved_tensors
        rows, needs, dy = ctx.rows, ctx.needs_input_grad, grad.contiguous()
        if ctx.use is not None and needs[0]:
            ctx.use.take([(x, dy)])
        d_bias = dy.sum(1) if needs[1] else None
        d_values = d_x = None
        if asks_for_graph():
            if needs[0]:
                d_values = SampledProduct.apply(rows, x, dy)
            if needs[4]:
                d_x = turned_product(values, rows, ctx.use, dy)
            return d_values, d_bias, None, None, d_x
        if needs[4]:
            d_x = rows_product(rows.crow_t, rows.col_t, values.view(-1).index_select(0, rows.perm), dy)
        if needs[0]:
            d_values = sampled(rows, x, dy)
        return d_values, d_bias, None, None, d_x


class SampledProduct(torch.autograd.Function):
    """Entries of ``dY x'`` at the live places, ``[1, live]``."""

    @staticmethod
    def forward(ctx: Any, rows: RowPattern, x: Tensor, dy: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, dy)
        return sampled(rows, x, dy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, dy = ctx.saved_tensors
        d_x = turned_product(grad, ctx.rows, None, dy) if ctx.needs_input_grad[1] else None
        d_dy = RowsProduct.apply(grad.contiguous(), None, ctx.rows, None, x) if ctx.needs_input_grad[2] else None
        return None, d_x, d_dy


class WideProduct(torch.autograd.Function):
    """``x W' + b`` for ``x [batch, inputs]`` of many rows, W in compressed rows: ``[batch, outputs]``.

    Pieces of `PIECE` rows are turned feature-major one after another in the same memory: to fill fresh memory costs as much
    as to turn them. So they are turned again in backward, and x itself is kept.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, rows: RowPattern, use: Use | None, x: Tensor) -> Tensor:
        ctx.rows, ctx.use = rows, use
        ctx.save_for_backward(values, x if ctx.needs_input_grad[0] else None)
        y = x.new_empty(x.shape[0], rows.crow.numel() - 1)
        for part, piece in zip(torch.split(y, PIECE), feature_major(x), strict=True):
            part.copy_(plus(rows_product(rows.crow, rows.col, values.view(-1), piece), bias).t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, x = ctx.saved_tensors
        rows, needs = ctx.rows, ctx.needs_input_grad
        use = ctx.use if needs[0] else None
        if asks_for_graph():
            return gradients_with_graph(rows, needs, use, values, x, grad)
        d_values = values.new_zeros(1, values.shape[1]) if needs[0] else None
        d_bias = values.new_zeros(grad.shape[1]) if needs[1] else None
        d_x = grad.new_empty(grad.shape[0], rows.crow_t.numel() - 1) if needs[4] else None
        turned = values.view(-1).index_select(0, rows.perm) if needs[4] else None
        xs = feature_major(x, keep=use is not None) if needs[0] else None
        pairs = []
        for start, dy in zip(count(0, PIECE), feature_major(grad, keep=use is not None), strict=False):
            if d_bias is not None:
                d_bias += dy.sum(1)
            if d_x is not None and turned is not None:
                d_x[start : start + PIECE] = rows_product(rows.crow_t, rows.col_t, turned, dy).t()
            if d_values is not None and xs is not None:
                pairs.append((next(xs), dy))
                add_sampled(rows.crow, rows.col, dy, pairs[-1][0], d_values.view(-1))
        if use is not None:
            use.take(pairs)
        return d_values, d_bias, None, None, d_x


def turned_product(values: Tensor, rows: RowPattern, use: Use | None, dy: Tensor) -> Tensor:
    """``W' dY``, differentiable: a product with the transposed matrix, whose rows are the columns of W."""
    d_x: Tensor = RowsProduct.apply(values.index_select(1, rows.perm), None, rows.transposed(), of_gradient(use), dy)
    return d_x


def plus(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y [outputs, batch]`` with the bias added in place."""
    return y if bias is None else y.add_(bias.view(-1, 1))


def asks_for_graph() -> bool:
    """Whether a backward pass is to be differentiated itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def feature_major(batch: Tensor, keep: bool = False) -> Iterator[Tensor]:
    """Pieces of a batch ``[batch, features]``, one after another, each ``[features, up to PIECE]`` and contiguous.

    Args:
        batch: The batch.
        keep: Whether each piece has memory of its own. Otherwise it is overwritten by the next.
    """
    memory = None
    for part in torch.split(batch, PIECE):
        memory = batch.new_empty(batch.shape[1] * PIECE) if memory is None or keep else memory
        yield memory[: part.numel()].view(part.shape[1], part.shape[0]).copy_(part.t())


def gradients_with_graph(
    rows: RowPattern, needs: Sequence[bool], use: Use | None, values: Tensor, x: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `WideProduct`, by operations that have gradients themselves."""
    d_values = d_x = None
    dys = [dy.t().contiguous() for dy in torch.split(grad, PIECE)]
    if needs[0]:
        xs = [part.t().contiguous() for part in torch.split(x, PIECE)]
        if use is not None:
            use.take(list(zip(xs, dys, strict=True)))
        d_values = torch.cat([SampledProduct.apply(rows, *pair) for pair in zip(xs, dys, strict=True)]).sum(
            0, keepdim=True
        )
    if needs[4]:
        d_x = torch.cat([turned_product(values, rows, use, dy).t() for dy in dys])
    return d_values, grad.sum(0) if needs[1] else None, None, None, d_x


def is_narrow(rows: int, features: int) -> bool:
    """Whether a batch is multiplied whole. Of wider ones each live weight would read rows that no near cache holds.

    Args:
        rows: The number of rows.
        features: The number of inputs or outputs, whichever are more.
    """
    return rows <= PIECE or (rows <= NARROW and rows * features <= CACHE)


def linear_by_rows(values: Tensor, bias: Tensor | None, rows: RowPattern, x: Tensor, use: Use | None = None) -> Tensor:
    """``x W' + b``, W in compressed rows.

    Args:
        values: Live values ``[1, live]``.
        bias: The bias ``[outputs]``.
        rows: The pattern.
        x: The batch ``[batch, inputs]``. It is not copied where it is a transposed view and `is_narrow`.
        use: Where backward records x and dY; None where it does not.

    Returns:
        ``[batch, outputs]``: a transposed view where the batch `is_narrow`.
    """
    if not (is_narrow(x.shape[0], max(x.shape[1], rows.crow.numel() - 1)) or torch.compiler.is_compiling()):
        wide: Tensor = WideProduct.apply(values, bias, rows, use, x)
        return wide
    y: Tensor = RowsProduct.apply(values, bias, rows, use, x.t().contiguous())
    return y.t()


class GroupsProduct(torch.autograd.Function):
    """``W x + b`` for ``x [inputs, batch]``, W in groups of rows that read the same inputs: ``[blocks, group, batch]``."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, groups: GroupPattern, use: Use | None, x: Tensor
    ) -> Tensor:
        ctx.groups, ctx.use, ctx.inputs = groups, use, x.shape[0]
        ctx.save_for_backward(values, x if ctx.needs_input_grad[0] else None)
        y = torch.bmm(values, gathered(x, groups.idx))
        return y if bias is None else y.add_(bias.view(values.shape[0], values.shape[1], 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, x = ctx.saved_tensors
        groups, needs = ctx.groups, ctx.needs_input_grad
        # torch turns a matrix in half the time that it takes for three dimensions
        dy = grad.flatten(0, 1).contiguous().view(grad.shape)
        if ctx.use is not None and needs[0]:
            ctx.use.take([(x, dy.flatten(0, 1))])
        # x is gathered again: to keep it gathered would cost more memory than the values
        d_values = torch.bmm(dy, gathered(x, groups.idx).transpose(1, 2)) if needs[0] else None
        d_bias = dy.sum(2).view(-1) if needs[1] else None
        d_x = TurnedGroups.apply(values, groups, of_gradient(ctx.use), ctx.inputs, dy) if needs[4] else None
        return d_values, d_bias, None, None, d_x


class TurnedGroups(torch.autograd.Function):
    """``W' dY`` for ``dY [blocks, group, batch]``, W in groups of rows that read the same inputs: ``[inputs, batch]``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, groups: GroupPattern, use: Use | None, inputs: int, dy: Tensor) -> Tensor:
        ctx.groups, ctx.use = groups, use
        ctx.save_for_backward(values, dy)
        parts = torch.bmm(values.transpose(1, 2), dy).flatten(0, 1)
        if parts.dtype is torch.float32 and parts.device.type == "cpu" and parts.numel():
            return functional.embedding_bag(groups.places, parts, groups.offsets, mode="sum", include_last_offset=True)
        return parts.new_zeros(inputs, parts.shape[1]).index_add_(0, groups.idx.view(-1), parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, dy = ctx.saved_tensors
        if ctx.use is not None:
            ctx.use.take([(dy.flatten(0, 1), grad)])
        read = gathered(grad, ctx.groups.idx)
        return torch.bmm(dy, read.transpose(1, 2)), None, None, None, torch.bmm(values, read)


def gathered(x: Tensor, idx: Tensor) -> Tensor:
    """The inputs that each group reads: ``[blocks, k, batch]``."""
    return x.index_select(0, idx.view(-1)).view(idx.shape[0], idx.shape[1], x.shape[1])


def linear_by_groups(
    values: Tensor, bias: Tensor | None, groups: GroupPattern, x: Tensor, use: Use | None = None
) -> Tensor:
    """``x W' + b``, W in groups of rows that read the same inputs.

    Args:
        values: Live values ``[blocks, group, k]``.
        bias: The bias ``[outputs]``.
        groups: The pattern.
        x: The batch ``[batch, inputs]``. It is not copied where it is a transposed view.
        use: Where backward records x and dY; None where it does not.

    Returns:
        ``[batch, outputs]``, a transposed view.
    """
    y: Tensor = GroupsProduct.apply(values, bias, groups, use, x.t().contiguous())
    return y.flatten(0, 1).t()
