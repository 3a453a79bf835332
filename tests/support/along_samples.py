"""Sample calls for the probe of the table of operations: along axes, and choices of entries."""

from typing import Any

import torch
from torch import Tensor

from support.entry_samples import BROADCASTS, FLAGS, NUMBERS, SHAPE
from support.operation_probe import Sample

aten = torch.ops.aten
_DIMS = [((1,), False), ((-1,), True), ((0, 2), False), ((-2, -1), True)]


def along() -> list[Sample]:
    """Of operations along axes."""
    found = []
    for name in ("mean", "sum", "amax", "amin", "logsumexp", "var", "std", "var_mean", "std_mean", "nansum", "nanmean"):
        for dims, keep in _DIMS:
            found.append(
                Sample(
                    f"aten.{name}",
                    lambda x, _, n=name, d=dims, k=keep: getattr(torch, n)(x, d, keepdim=k),
                    [SHAPE],
                )
            )
    for name in (
        "mean",
        "sum",
        "var",
        "std",
        "max",
        "min",
        "argmax",
        "argmin",
        "prod",
        "any",
        "all",
        "median",
        "nansum",
    ):
        found += [Sample(f"aten.{name}", lambda x, _, n=name: getattr(torch, n)(x), [SHAPE])]
    for name in ("max", "min", "argmax", "argmin", "prod", "any", "all", "median", "aminmax"):
        for dim, keep in ((1, False), (-1, True), (0, False)):
            found.append(
                Sample(
                    f"aten.{name}", lambda x, _, n=name, d=dim, k=keep: getattr(torch, n)(x, dim=d, keepdim=k), [SHAPE]
                )
            )
    for name in ("sum", "amax", "_softmax", "cumsum", "argmax", "sort", "flip"):
        more: dict[str, Any] = {"_softmax": {"half_to_float": False}}.get(name, {})
        for dim in (0, -1):
            given = [dim] if name in ("amax", "sum", "flip") else dim
            found.append(
                Sample(f"aten.{name}", lambda x, _, n=name, g=given, m=more: getattr(aten, n)(x, g, *m.values()), [()])
            )
    for dim in (0, 1, -1):
        found += [
            *(Sample(f"aten.{n}", lambda x, _, n=n, d=dim: getattr(x, n)(d), [SHAPE]) for n in ("mode", "nanmedian")),
            *(
                Sample(f"aten.{n}", lambda x, _, n=n, d=dim: getattr(x, n)(d, True), [SHAPE])
                for n in ("mode", "nanmedian")
            ),
            Sample("aten.count_nonzero", lambda x, _, d=dim: (x > 0).count_nonzero(d), [SHAPE]),
            Sample("aten._fft_r2c", lambda x, _, d=dim: torch.fft.fft(x, dim=d), [SHAPE]),
            Sample("aten._fft_r2c", lambda x, _, d=dim: torch.fft.rfft(x, dim=d), [SHAPE]),
            Sample("aten._fft_c2c", lambda x, _, d=dim: torch.fft.ifft(torch.complex(x, x), dim=d), [SHAPE]),
            Sample("aten._fft_c2r", lambda x, _, d=dim: torch.fft.irfft(torch.complex(x, x), n=6, dim=d), [SHAPE]),
        ]
    found += [
        Sample("aten.nanmedian", lambda x, _: x.nanmedian(), [SHAPE]),
        Sample("aten.count_nonzero", lambda x, _: x.count_nonzero(), [SHAPE]),
    ]
    for other in BROADCASTS:  # the larger one of two tensors
        found.append(Sample("aten.maximum", lambda x, y, _: torch.max(x, y), [SHAPE, other]))
        found.append(Sample("aten.max", lambda x, y, _: aten.max(x, y), [SHAPE, other]))
        found.append(Sample("aten.min", lambda x, y, _: aten.min(x, y), [SHAPE, other]))
    for dims, keep in [*_DIMS, (None, False)]:
        found.append(
            Sample(
                "aten.linalg_vector_norm", lambda x, _, d=dims, k=keep: torch.linalg.vector_norm(x, 2, d, k), [SHAPE]
            )
        )
        if dims:
            found.append(Sample("aten.norm", lambda x, _, d=dims, k=keep: aten.norm.ScalarOpt_dim(x, 2, d, k), [SHAPE]))
    for name in ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort"):
        for dim in (0, 1, -1):
            found += [Sample(f"aten.{name}", lambda x, _, n=name, d=dim: getattr(aten, n)(x, d), [SHAPE])]
    for dim in (1, -1):
        found += [
            Sample("aten._softmax", lambda x, _, d=dim: x.softmax(d), [SHAPE]),
            Sample("aten._log_softmax", lambda x, _, d=dim: x.log_softmax(d), [SHAPE]),
            Sample("aten._safe_softmax", lambda x, _, d=dim: aten._safe_softmax(x, d), [SHAPE]),
            Sample("aten.flip", lambda x, _, d=dim: x.flip(d), [SHAPE]),
            Sample("aten.roll", lambda x, _, d=dim: x.roll(1, d), [SHAPE]),
            Sample("aten.topk", lambda x, _, d=dim: x.topk(2, d), [SHAPE]),
            Sample("aten.kthvalue", lambda x, _, d=dim: x.kthvalue(2, d), [SHAPE]),
            Sample("aten.kthvalue", lambda x, _, d=dim: x.kthvalue(2, d, True), [SHAPE]),
            Sample("aten.glu", lambda x, _, d=dim: aten.glu(x, d), [(3, 6, 8)]),
        ]
    found += [
        Sample("aten.roll", lambda x, _: x.roll(2), [SHAPE]),
        Sample("aten.roll", lambda x, _: x.roll((1, 2), (0, -1)), [SHAPE]),
        Sample("aten.rot90", lambda x, _: x.rot90(1, (1, 2)), [SHAPE]),
        Sample("aten.rot90", lambda x, _: x.rot90(1, (0, -1)), [SHAPE]),
        Sample("aten.glu", lambda x, _: aten.glu(x, 1), [(3, 2)]),
    ]
    return found


def picking() -> list[Sample]:
    """Of operations that choose entries by their numbers."""
    index = torch.tensor([2, 0, 1, 1])
    found = []
    for dim in (0, 1, -1):
        size = SHAPE[dim]
        whole = NUMBERS % size
        short = whole.narrow(dim, 0, 2)
        small = whole[:2, :3, :4]
        for where in (whole, short, small):
            found += [
                Sample("aten.gather", lambda x, i, _, d=dim: x.gather(d, i), [SHAPE, where]),
                Sample("aten.scatter", lambda x, i, y, _, d=dim: x.scatter(d, i % 1, y), [SHAPE, where, SHAPE]),
                Sample("aten.scatter", lambda x, i, _, d=dim: x.scatter(d, i, 2.0), [SHAPE, where]),
                Sample("aten.scatter_add", lambda x, i, y, _, d=dim: x.scatter_add(d, i, y), [SHAPE, where, SHAPE]),
                Sample(
                    "aten.scatter_add", lambda x, i, y, _, d=dim: x.clone().scatter_add_(d, i, y), [SHAPE, where, SHAPE]
                ),
            ]
            found.append(
                Sample(
                    "aten.scatter_reduce",
                    lambda x, i, y, _, d=dim: x.scatter_reduce(d, i % 1, y, "amax"),
                    [SHAPE, where, SHAPE],
                )
            )
        found += [
            Sample("aten.select_scatter", lambda x, y, _, d=dim: x.select_scatter(y, d, 1), [SHAPE, _without(dim)]),
            Sample("aten.slice_scatter", lambda x, y, _, d=dim: x.slice_scatter(y, d, 1, 3), [SHAPE, _with_two(dim)]),
        ]
        source = [*SHAPE]
        source[dim] = 4
        found += [
            Sample("aten.index_select", lambda x, i, _, d=dim: x.index_select(d, i), [SHAPE, index]),
            Sample("aten.index_add", lambda x, i, y, _, d=dim: x.index_add(d, i, y), [SHAPE, index, source]),
            Sample("aten.index_fill", lambda x, i, _, d=dim: x.index_fill(d, i, 1.0), [SHAPE, index]),
            Sample("aten.index_fill", lambda x, i, v, _, d=dim: x.index_fill(d, i, v), [SHAPE, index, ()]),
            Sample("aten.index_copy", lambda x, i, y, _, d=dim: x.index_copy(d, i % 1, y), [SHAPE, index, source]),
        ]
    found += [
        Sample("aten.gather", lambda x, i, _: x.gather(0, i), [(5,), index]),
        Sample("aten.index_select", lambda x, i, _: x.index_select(0, i), [(5,), index]),
    ]
    mask = torch.arange(12).view(3, 4) % 2 == 0
    indices: list[tuple[Any, tuple[Tensor, ...]]] = [
        (lambda x, i, _: x[i], (index % 3,)),
        (lambda x, i, _: x[:, i], (index,)),
        (lambda x, i, _: x[..., i], (index,)),
        (lambda x, i, j, _: x[i, j], (index % 3, index)),
        (lambda x, i, j, _: x[i, :, j], (index % 3, index)),
        (lambda x, i, j, _: x[:, i, j], (index[:, None], index)),
        (lambda x, i, _: x[:, i], (index.view(2, 2),)),
        (lambda x, m, _: x[m], (mask,)),
        (lambda x, m, _: x[:, m], (torch.arange(20).view(4, 5) % 3 == 0,)),
        (lambda x, m, _: x[:, m], (FLAGS[:4],)),
        (lambda x, m, i, _: x[m, i], (mask, torch.tensor([0, 1, 2, 3, 4, 0]))),
        (lambda x, m, _: x[m], (torch.arange(60).view(SHAPE) % 3 == 0,)),
    ]
    found += [Sample("aten.index", f, [SHAPE, *more]) for f, more in indices]
    found += _putting(index, mask)
    found += _looking_up()
    four = (3, 4, 5, 6)
    found += [
        Sample("aten.index", lambda x, m, i, _: x[m, :, i], [four, mask, torch.tensor([0, 1, 2, 3, 4, 0])]),
        Sample("aten.index", lambda x, i, j, _: x[:, i, :, j], [four, index, index]),
        Sample("aten.embedding", lambda i, w, _: torch.nn.functional.embedding(i, w), [NUMBERS, (7, 8)]),
        Sample("aten.embedding", lambda i, w, _: torch.nn.functional.embedding(i, w, 0), [NUMBERS[0], (7, 8)]),
    ]
    return found


def _without(dim: int) -> list[int]:
    return [s for d, s in enumerate(SHAPE) if d != dim % 3]


def _with_two(dim: int) -> list[int]:
    return [2 if d == dim % 3 else s for d, s in enumerate(SHAPE)]


def _putting(index: Tensor, mask: Tensor) -> list[Sample]:
    """Of writing to entries that are chosen by their numbers, or by a mask."""
    whole = torch.arange(60).view(SHAPE) % 3 == 0
    rows = torch.tensor([2, 0])
    calls: list[tuple[Any, list[Any]]] = [
        (lambda x, m, _: x.index_put((m,), x.new_tensor(2.0)), [SHAPE, whole]),
        (lambda x, m, _: x.index_put((m,), x.new_tensor([2.0])), [SHAPE, mask]),
        (lambda x, m, v, _: x.index_put((m,), v), [SHAPE, mask, (6, 5)]),
        (lambda x, m, v, _: x.index_put((m,), v), [SHAPE, mask, (5,)]),
        (lambda x, m, v, _: x.index_put((m,), v), [SHAPE, whole, (20,)]),
        (lambda x, i, v, _: x.index_put((i,), v), [SHAPE, rows, (2, 4, 5)]),
        (lambda x, i, v, _: x.index_put((i,), v), [SHAPE, rows, (4, 1)]),
        (lambda x, i, v, _: x.index_put((i,), v, accumulate=True), [SHAPE, index % 3, (4, 4, 5)]),
        (lambda x, i, v, _: _put(x, v, i), [SHAPE, index[:2], (3, 2, 5)]),
        (lambda x, i, j, v, _: x.index_put((i, j), v), [SHAPE, rows, rows, (2, 5)]),
        (lambda x, i, v, _: x.index_put((i,), v), [SHAPE, rows.view(2, 1), (2, 1, 4, 5)]),
    ]
    found = [Sample("aten.index_put", f, shapes) for f, shapes in calls]
    return [
        *found,
        Sample("aten._index_put_impl", lambda x, i, v, _: aten._index_put_impl(x, [i], v), [SHAPE, rows, (5,)]),
    ]


def _put(x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    x = x.clone()
    x[:, index] = values
    return x


def _looking_up() -> list[Sample]:
    """Of entries that are looked up in a table."""
    table = torch.linspace(-1, 1, 5, dtype=torch.float64)
    bag, starts = NUMBERS.flatten()[:8], torch.tensor([0, 3, 5])
    found = [
        Sample("aten.bucketize", lambda x, t, _: torch.bucketize(x, t), [SHAPE, table]),
        Sample("aten.searchsorted", lambda x, t, _: torch.searchsorted(t, x), [SHAPE, table]),
        Sample(
            "aten.searchsorted", lambda x, t, _: torch.searchsorted(t.expand(3, 4, 5).contiguous(), x), [SHAPE, table]
        ),
        Sample("aten.isin", lambda x, t, _: torch.isin(x, t), [NUMBERS, torch.tensor([1, 4])]),
        Sample("aten.isin", lambda x, _: torch.isin(x, 4), [NUMBERS]),
        Sample("aten.isin", lambda t, _: torch.isin(4, t), [NUMBERS]),
    ]
    for mode in (0, 1, 2):
        found += [
            Sample(
                f"aten.{name}",
                lambda w, i, s, _, n=name, m=mode: getattr(aten, n)(w, i, s, False, m)[0],
                [(7, 6), bag, starts],
            )
            for name in ("_embedding_bag", "_embedding_bag_forward_only")
        ]
    return found
