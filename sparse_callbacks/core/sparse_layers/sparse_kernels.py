"""Products with matrices in compressed rows, without gradients.

Activations are feature-major, ``[features, batch]``, so that a live weight reads and writes whole rows.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional

from sparse_callbacks.core.sparse_layers.place_units import RowPattern

MULTIPLIED = 2**20  # that the sampled product without MKL makes at a time


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
    step = max(1, MULTIPLIED // x.shape[1])
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


def sampled(rows: RowPattern, x: Tensor, dy: Tensor) -> Tensor:
    """The entries of ``dy x'`` at the live places, ``[1, live]``."""
    if torch.compiler.is_compiling():
        entries: Tensor = sampled_in_graph(rows.crow, rows.col, dy, x)
        return entries.view(1, -1)
    into = dy.new_zeros(1, rows.col.numel())
    add_sampled(rows.crow, rows.col, dy, x, into.view(-1))
    return into
