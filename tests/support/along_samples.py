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
    four = (3, 4, 5, 6)
    found += [
        Sample("aten.index", lambda x, m, i, _: x[m, :, i], [four, mask, torch.tensor([0, 1, 2, 3, 4, 0])]),
        Sample("aten.index", lambda x, i, j, _: x[:, i, :, j], [four, index, index]),
        Sample("aten.embedding", lambda i, w, _: torch.nn.functional.embedding(i, w), [NUMBERS, (7, 8)]),
        Sample("aten.embedding", lambda i, w, _: torch.nn.functional.embedding(i, w, 0), [NUMBERS[0], (7, 8)]),
    ]
    return found
