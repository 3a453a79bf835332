"""Transposable masks: each row and column of every M x M tile has at most N active weights.

Such a mask is N:M along the inputs and along the outputs, so the products of the forward and of the backward pass both run on
hardware for N:M (Hubara et al., 2021). A convolution is tiled at each position of its kernel.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from sparse_callbacks.core.inspection import extra

METHODS = ("auto", "exact", "greedy")
_TRIED = 4  # largest M of which all masks of a tile are tried: 186 for 2:4, thousands for M = 5
# Tiles, tiles of one linear programme, and weights that are computed at a time: memory stays bounded, and the sums of a piece
# stay in a core's cache.
_TILES, _TILES_OF_A_PROGRAMME, _WEIGHTS = 2**11, 2**7, 2**21


def transposable_mask(scores: Tensor, n: int, m: int, axis: int = 1, method: str = "auto") -> Tensor:
    """Bool mask that keeps the most of ``scores`` with at most N active weights in each row and column of each M x M tile.

    No mask that is returned has room for one more weight. A tile may have fewer than N * M active weights: with exactly N in
    each row and column the sum can be smaller.

    Args:
        scores: numbers that are not negative, of the shape of the weight: (outputs, inputs, *kernel); NaN counts as zero.
        n: active weights of each row and column of a tile, at most ``m``.
        m: rows and columns of a tile; it divides the inputs and the outputs.
        axis: the axis of the inputs: 0 of a transposed convolution.
        method: ``"exact"``: the largest sum of each tile. Up to M = 4 all tiles are tried, and of equal sums the tile that
            takes the earlier place wins, row by row (rows are outputs); above, a linear programme finds it
            (scipy, ``pip install 'sparse-callbacks[patterns]'``), in half a minute for a million weights. ``"greedy"``: the
            weights of a tile one by one, the largest first and of equal ones the earlier place, each if its row and its
            column have room: at least half of the largest sum. ``"auto"``: exact up to M = 4, greedy above.

    Raises:
        ValueError: the arguments do not fit each other or the shape, or the method is not known.
        ImportError: scipy is needed and cannot be imported.

    >>> import torch
    >>> tile = torch.tensor([[8.0, 9, 16, 2], [14, 12, 15, 4], [11, 6, 10, 1], [3, 7, 13, 5]])
    >>> transposable_mask(tile, 2, 4).int()
    tensor([[0, 1, 1, 0],
            [1, 1, 0, 0],
            [1, 0, 0, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    _refuse(scores, n, m, method)
    tiles = in_tiles(scores.detach(), m, axis)
    if n == m or not n:
        masks = torch.full_like(tiles, bool(n), dtype=torch.bool)
    elif method == "greedy" or (method == "auto" and m > _TRIED):
        masks = _in_pieces(tiles, max(1, _WEIGHTS // (m * m)), lambda t: _filled_up(t, n, None))
    elif m > _TRIED:
        masks = _in_pieces(tiles, _TILES_OF_A_PROGRAMME, lambda t: _filled_up(t, n, _programme(t, n)))
    else:
        masks = _in_pieces(tiles, _TILES, lambda t: _best_of_all(t, n))
    return out_of_tiles(masks, scores.shape, axis)


def in_tiles(weight: Tensor, m: int, axis: int = 1) -> Tensor:
    """A weight's numbers as [tiles, M, M], rows of a tile are outputs: tile by tile along the inputs, then the outputs, then
    the positions of the kernel."""
    outputs, inputs = weight.shape[1 - axis], weight.shape[axis]
    blocks = weight.movedim(axis, 1).reshape(outputs // m, m, inputs // m, m, -1)
    return blocks.permute(4, 0, 2, 1, 3).reshape(-1, m, m)


def out_of_tiles(tiles: Tensor, shape: torch.Size, axis: int = 1) -> Tensor:
    """The inverse of :func:`in_tiles`, for a weight of ``shape``."""
    m = tiles.shape[-1]
    outputs, inputs, kernel = shape[1 - axis], shape[axis], shape[2:]
    blocks = tiles.view(-1, outputs // m, inputs // m, m, m).permute(1, 3, 2, 4, 0)
    return blocks.reshape(outputs, inputs, *kernel).movedim(1, axis)


@cache
def maximal_tiles(n: int, m: int) -> Tensor:
    """All masks of a tile with at most ``n`` active in each row and column and room for no more: bool [masks, M * M], row by
    row, those that take earlier places first.

    >>> len(maximal_tiles(2, 4)), len(maximal_tiles(1, 4))
    (186, 24)
    """
    numbers = torch.arange(2 ** (m * m) - 1, -1, -1)
    masks = ((numbers[:, None] >> torch.arange(m * m - 1, -1, -1)) & 1).bool().view(-1, m, m)
    rows, columns = masks.sum(2), masks.sum(1)
    fits = (rows.amax(1) <= n) & (columns.amax(1) <= n)
    room = (rows < n)[:, :, None] & (columns < n)[:, None, :] & ~masks
    return masks[fits & ~room.flatten(1).any(1)].flatten(1)


def _refuse(scores: Tensor, n: int, m: int, method: str) -> None:
    if method not in METHODS:
        raise ValueError(
            f"method={method!r} is not a way to choose a transposable mask. Give 'auto', 'exact' or 'greedy'."
        )
    if not 0 <= n <= m or m < 1:
        raise ValueError(
            f"n={n} of m={m} weights cannot be active in a row of a tile. Give numbers with 0 <= n <= m, such as n=2, m=4."
        )
    if scores.dim() < 2 or scores.shape[0] % m or scores.shape[1] % m:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} do not divide into tiles of {m} x {m}. Give a weight whose inputs and "
            "outputs are multiples of m."
        )


def _in_pieces(tiles: Tensor, size: int, masks_of: Callable[[Tensor], Tensor]) -> Tensor:
    """``masks_of`` the tiles, asked for ``size`` tiles at a time."""
    masks = torch.empty_like(tiles, dtype=torch.bool)
    for start in range(0, len(tiles), size):
        # finite: infinity times a zero of a mask is NaN
        piece = tiles[start : start + size].nan_to_num(0.0)
        masks[start : start + size] = masks_of(piece)
    return masks


def _best_of_all(tiles: Tensor, n: int) -> Tensor:
    """The masks with the largest sums of scores, of all that a tile can have."""
    known = maximal_tiles(n, tiles.shape[-1]).to(tiles.device)
    # double precision adds a few numbers of float32 without rounding, so that equal sums are equal
    sums = tiles.flatten(1).double() @ known.double().T
    return known[sums.argmax(1)].view(tiles.shape)


def _filled_up(tiles: Tensor, n: int, taken: Tensor | None) -> Tensor:
    """``taken`` and, the largest first, whatever its row and its column have room for.

    All tiles are filled at once: each goes through its places in its own order.
    """
    m, count = tiles.shape[-1], len(tiles)
    order = tiles.flatten(1).sort(dim=1, descending=True, stable=True).indices.T.contiguous()
    masks = torch.zeros_like(tiles, dtype=torch.bool) if taken is None else taken.clone()
    in_rows, in_columns = masks.sum(2, dtype=torch.uint8).flatten(), masks.sum(1, dtype=torch.uint8).flatten()
    flat, first = masks.flatten(), torch.arange(count, device=tiles.device) * m
    for place in order:
        row, column, at = first + place // m, first + place % m, first * m + place
        new = (in_rows[row] < n) & (in_columns[column] < n) & ~flat[at]
        in_rows[row] += new
        in_columns[column] += new
        flat[at] |= new
    return flat.view(tiles.shape)


def _programme(tiles: Tensor, n: int) -> Tensor:
    """The masks with the largest sums of scores, by one linear programme over all tiles.

    Its corners are whole numbers, as the matrix of the limits on rows and columns is totally unimodular.
    """
    optimize, sparse = extra("scipy.optimize", "patterns"), extra("scipy.sparse", "patterns")
    m, count = tiles.shape[-1], len(tiles)
    # each tile with a largest score of one: the solver's tolerances are absolute
    gains = tiles.double() / tiles.double().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    every = sparse.identity(count)
    rows = sparse.kron(sparse.identity(m), [[1.0] * m])
    columns = sparse.kron([[1.0] * m], sparse.identity(m))
    limits = sparse.vstack([sparse.kron(every, rows), sparse.kron(every, columns)], format="csr")
    found = optimize.linprog(
        -gains.flatten().cpu().numpy(), limits, [n] * limits.shape[0], bounds=(0, 1), method="highs-ds"
    )
    if not found.success:
        raise RuntimeError(f"scipy found no transposable {n}:{m} mask ({found.message}). Give method='greedy' instead.")
    return torch.from_numpy(found.x > 0.5).to(tiles.device).view(tiles.shape)
