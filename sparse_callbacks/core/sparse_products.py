"""Products of truly sparse matrices with batches, and their gradients, without a dense matrix.

Activations are feature-major inside, ``[features, batch]``, so that a live weight reads and writes whole rows.
"""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 128  # columns of a piece of the batch: its rows of 512 bytes stay in the nearest cache
ENTRIES = 2**20  # that the sampled product without MKL makes at a time


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
    return F.embedding_bag(col, x, crow, mode="sum", per_sample_weights=values, include_last_offset=True)


def sampled_product(crow: Tensor, col: Tensor, dy: Tensor, x: Tensor, into: Tensor) -> None:
    """Add the entries of ``dy x'`` at the live places to ``into [live]``.

    Args:
        crow: Where each row begins in ``col``.
        col: Columns of the live places.
        dy: ``[outputs, batch]``.
        x: ``[inputs, batch]``.
        into: The live entries so far.
    """
    if not into.numel() or not x.numel():
        return
    if into.dtype in (torch.float32, torch.float64) and has_sampled_product():
        size = (dy.shape[0], x.shape[0])
        pattern = torch.sparse_csr_tensor(crow, col, into, size, check_invariants=False)
        torch.sparse.sampled_addmm(pattern, dy, x.t(), beta=1.0, out=pattern)
        return
    for start in range(0, col.numel(), step := max(1, ENTRIES // x.shape[1])):
        some = col[start : start + step]
        places = torch.arange(start, start + some.numel(), dtype=torch.int32, device=col.device)
        rows = torch.searchsorted(crow, places, right=True).sub_(1)
        into[start : start + step] += (dy[rows] * x[some]).sum(1)


class RowsProduct(torch.autograd.Function):
    """``W x + b`` for pieces of a batch, W in compressed rows."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, pattern: tuple[Tensor, ...], records: Any, *pieces: Tensor
    ) -> Any:
        ctx.pattern, ctx.records, ctx.has_bias = pattern, records, bias is not None
        ctx.save_for_backward(values, *pieces)
        outputs = []
        for piece in pieces:
            output = rows_product(pattern[0], pattern[1], values[0], piece)
            outputs.append(output if bias is None else output.add_(bias[:, None]))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, *pieces = ctx.saved_tensors
        dys = [dy.contiguous() for dy in grads]
        crow, col, crow_t, col_t, perm = ctx.pattern
        if ctx.records is not None:
            ctx.records.extend((x.detach(), dy.detach()) for x, dy in zip(pieces, dys, strict=True))
        d_values = d_bias = None
        d_pieces: Any = [None] * len(pieces)
        if ctx.needs_input_grad[0]:
            d_values = SampledProduct.apply(ctx.pattern, len(pieces), *pieces, *dys)
        if ctx.has_bias and ctx.needs_input_grad[1]:
            d_bias = functools.reduce(torch.add, (dy.sum(1) for dy in dys))
        if any(ctx.needs_input_grad[4:]):
            transposed = (crow_t, col_t, crow, col, inverse(perm) if torch.is_grad_enabled() else perm)
            d_pieces = RowsProduct.apply(values[:, perm], None, transposed, None, *dys)
        return d_values, d_bias, None, None, *d_pieces


class SampledProduct(torch.autograd.Function):
    """Entries of ``dY x'`` at the live places, summed over pieces of a batch: ``[1, live]``."""

    @staticmethod
    def forward(ctx: Any, pattern: tuple[Tensor, ...], count: int, *pieces: Tensor) -> Tensor:
        ctx.pattern, ctx.count = pattern, count
        ctx.save_for_backward(*pieces)
        into = torch.zeros(pattern[1].numel(), dtype=pieces[0].dtype, device=pieces[0].device)
        for x, dy in zip(pieces[:count], pieces[count:], strict=True):
            sampled_product(pattern[0], pattern[1], dy, x, into)
        return into.view(1, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        xs, dys = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        crow, col, crow_t, col_t, perm = ctx.pattern
        d_xs: Any = [None] * ctx.count
        d_dys: Any = [None] * ctx.count
        if any(ctx.needs_input_grad[2 : 2 + ctx.count]):
            d_xs = RowsProduct.apply(grad[:, perm], None, (crow_t, col_t, crow, col, inverse(perm)), None, *dys)
        if any(ctx.needs_input_grad[2 + ctx.count :]):
            d_dys = RowsProduct.apply(grad, None, ctx.pattern, None, *xs)
        return None, None, *d_xs, *d_dys


def inverse(perm: Tensor) -> Tensor:
    """The permutation that undoes this one."""
    places = torch.arange(perm.numel(), dtype=perm.dtype, device=perm.device)
    return torch.empty_like(perm).scatter_(0, perm.long(), places)


def linear_by_rows(values: Tensor, bias: Tensor | None, pattern: tuple[Tensor, ...], x: Tensor, records: Any) -> Tensor:
    """``x W' + b`` for ``x [batch, inputs]``, W in compressed rows.

    Args:
        values: Live values ``[1, live]``.
        bias: The bias ``[outputs]``.
        pattern: crow, col, crow_t, col_t and perm of the matrix.
        x: The batch. Nothing is copied where it is a transposed view and has at most `WIDTH` rows.
        records: A list to which backward appends pieces of x and dy, feature-major.

    Returns:
        ``[batch, outputs]``: a transposed view up to `WIDTH` rows.
    """
    if x.shape[0] <= WIDTH or torch.compiler.is_compiling():
        (y,) = RowsProduct.apply(values, bias, pattern, records, x.t().contiguous())
        return y.t()
    ys = RowsProduct.apply(values, bias, pattern, records, *(piece.t().contiguous() for piece in x.split(WIDTH)))
    return torch.cat([y.t() for y in ys])


class GroupsProduct(torch.autograd.Function):
    """``W x + b``, W in groups of rows that read the same inputs."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, pattern: tuple[Tensor, ...], records: Any, x: Tensor
    ) -> Tensor:
        ctx.pattern, ctx.records, ctx.has_bias = pattern, records, bias is not None
        ctx.save_for_backward(values, x)
        y = groups_product(values, pattern[0], x)
        return y if bias is None else y.add_(bias[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, x = ctx.saved_tensors
        idx, places, offsets = ctx.pattern
        blocks, group, k = values.shape
        if ctx.records is not None:
            ctx.records.append((x.detach(), grad.detach().contiguous()))
        dy = grad.reshape(blocks, group, grad.shape[1])
        d_values = d_bias = d_x = None
        if ctx.needs_input_grad[0]:
            d_values = torch.bmm(dy, gathered(x, idx).transpose(1, 2))
        if ctx.has_bias and ctx.needs_input_grad[1]:
            d_bias = grad.sum(1)
        if ctx.needs_input_grad[4]:
            h = torch.bmm(values.transpose(1, 2), dy).flatten(0, 1)
            d_x = summed_by_input(h, idx, places, offsets, x.shape[0])
        return d_values, d_bias, None, None, d_x


def gathered(x: Tensor, idx: Tensor) -> Tensor:
    """The inputs that each group reads: ``[blocks, k, batch]``."""
    return x.index_select(0, idx.flatten()).view(*idx.shape, x.shape[1])


def groups_product(values: Tensor, idx: Tensor, x: Tensor) -> Tensor:
    """The product of a matrix in groups with ``x [inputs, batch]``: ``[outputs, batch]``."""
    return torch.bmm(values, gathered(x, idx)).flatten(0, 1)


def summed_by_input(h: Tensor, idx: Tensor, places: Tensor, offsets: Tensor, inputs: int) -> Tensor:
    """Rows of ``h [blocks k, batch]`` summed by the input that each belongs to: ``[inputs, batch]``."""
    if h.dtype is torch.float32 and h.device.type == "cpu" and h.numel() and not torch.is_grad_enabled():
        return F.embedding_bag(places, h, offsets, mode="sum", include_last_offset=True)
    return h.new_zeros(inputs, h.shape[1]).index_add(0, idx.flatten(), h)


def linear_by_groups(
    values: Tensor, bias: Tensor | None, pattern: tuple[Tensor, ...], x: Tensor, records: Any
) -> Tensor:
    """``x W' + b`` for ``x [batch, inputs]``, W in groups of rows that read the same inputs.

    Args:
        values: Live values ``[blocks, group, k]``.
        bias: The bias ``[outputs]``.
        pattern: idx, places and offsets of the matrix.
        x: The batch. Nothing is copied where it is a transposed view.
        records: A list to which backward appends x and dy, feature-major.

    Returns:
        ``[batch, outputs]``: a transposed view.
    """
    return GroupsProduct.apply(values, bias, pattern, records, x.t().contiguous()).t()
