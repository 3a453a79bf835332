"""Sample calls for the probe of the table of operations: entrywise operations, and those along axes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.operation_probe import Sample

aten = torch.ops.aten
SHAPE = (3, 4, 5)
FLAGS = torch.tensor([True, False, True, True, False])
POSITIVE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
NUMBERS = torch.arange(60).view(SHAPE) % 7
BROADCASTS = [(4, 5), (4, 1), (1, 4, 1), (3, 1, 5), (1,), (), (3, 4, 5)]
"""Shapes of a second argument, with and without each of the dimensions."""

_SAME_BITS = "bitwise_and bitwise_or bitwise_xor"
_FLAGGED = "logical_and logical_or logical_xor"
_ONE = ["abs", "neg", "exp", "exp2", "expm1", "sin", "cos", "tan", "tanh", "atan", "sinh", "cosh", "erf", "erfc", "sigmoid", "sgn", "sign", "floor", "ceil", "round", "trunc", "frac", "relu", "relu6", "gelu", "silu", "mish", "elu", "celu", "selu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "softplus", "softshrink", "hardshrink", "square", "log_sigmoid_forward", "nan_to_num", "logical_not", "isnan", "isinf", "isfinite", "signbit", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "zero", "resolve_conj"]
_POSITIVE = ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "asin", "acos"]
_TWO = ["add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "fmax", "fmin", "fmod", "remainder", "floor_divide", "atan2", "logaddexp", "xlogy", "eq", "ne", "lt", "gt", "le", "ge"]
_WRITING = ["add", "sub", "mul", "div", "copy", "fill", "zero", "relu", "clamp", "masked_fill", "lerp", "addcmul", "sigmoid", "hardtanh"]


def _op(name: str) -> Callable[..., Any]:
    return getattr(aten, name) if hasattr(aten, name) else getattr(aten, f"{name}_")


def _one(name: str) -> Sample:
    function = _op(name)
    return Sample(
        f"aten.{name}",
        lambda x, _: function(x.clone()),
        [POSITIVE if name in _POSITIVE else SHAPE],
    )


def _two(name: str) -> list[Sample]:
    function = _op(name)
    swapped = [Sample(f"aten.{name}", lambda y, x, _: function(y, x), [s, SHAPE]) for s in BROADCASTS[:5]]
    return [*swapped, *(Sample(f"aten.{name}", lambda x, y, _: function(x, y), [SHAPE, s]) for s in BROADCASTS)]


def _flags(function: Callable[..., Any], name: str) -> list[Sample]:
    flags = torch.arange(60).view(SHAPE) % 3 == 0
    return [Sample(name, lambda x, y, _: function(x, y), [flags, y]) for y in (flags, FLAGS, FLAGS[:4, None], FLAGS[0])]


def entrywise() -> list[Sample]:
    """Of operations that treat each entry by itself."""
    found = [_one(n) for n in [*_ONE, *_POSITIVE] if n != "resolve_conj"]
    found += [s for n in _TWO for s in _two(n)]
    found += [s for n in f"{_SAME_BITS} {_FLAGGED}".split() for s in _flags(_op(n), f"aten.{n}")]
    found += [
        Sample(f"aten.{n}", lambda x, y, _, n=n: getattr(aten, f"{n}_")(x.clone(), y), [SHAPE, s])
        for n in ("add", "mul", "copy")
        for s in BROADCASTS
    ]
    flags = torch.arange(60).view(SHAPE) % 3 == 0
    for mask in (flags, FLAGS, FLAGS[:4, None], FLAGS[0]):
        found += [
            Sample("aten.where", lambda x, m, _: torch.where(m, x, 0.0), [SHAPE, mask]),
            Sample("aten.where", lambda m, _: torch.where(m, 1.0, 2.0), [mask]),
            Sample("aten.where", lambda x, y, m, _: torch.where(m, x, y), [SHAPE, (4, 1), mask]),
            Sample("aten.masked_fill", lambda x, m, _: x.masked_fill(m, 2.0), [SHAPE, mask]),
            Sample("aten.masked_fill", lambda x, m, v, _: x.masked_fill(m, v), [SHAPE, mask, ()]),
            Sample("aten.masked_fill", lambda x, m, _: x.clone().masked_fill_(m, 2.0), [SHAPE, mask]),
        ]
    for other in BROADCASTS:
        found += [
            Sample("aten.lerp", lambda x, y, _: torch.lerp(x, y, 0.3), [SHAPE, other]),
            Sample("aten.lerp", lambda x, w, y, _: torch.lerp(x, y, w), [SHAPE, other, (4, 5)]),
            Sample("aten.addcmul", lambda x, y, z, _: torch.addcmul(x, y, z), [SHAPE, other, (4, 1)]),
            Sample("aten.addcmul", lambda z, y, x, _: torch.addcmul(z, y, x), [(5,), other, SHAPE]),
            Sample("aten.addcdiv", lambda x, y, z, _: torch.addcdiv(x, y, z), [SHAPE, other, POSITIVE[0]]),
            Sample("aten.clamp", lambda x, y, _: torch.clamp(x, min=y), [SHAPE, other]),
            Sample("aten.clamp_min", lambda x, y, _: aten.clamp_min(x, y), [SHAPE, other]),
            Sample("aten.clamp_max", lambda x, y, _: aten.clamp_max(x, y), [SHAPE, other]),
        ]
    found += [
        Sample("aten.threshold", lambda x, _: aten.threshold(x, 0.1, 2.0), [SHAPE]),
        Sample("aten.clamp", lambda x, _: x.clamp(-0.5, 0.5), [SHAPE]),
        Sample("aten.bitwise_not", lambda x, _: ~x, [NUMBERS]),
        *(Sample("aten._prelu_kernel", lambda x, w, _: torch.prelu(x, w), [(3, 4, 5), s]) for s in ((4,), (1,))),
        Sample("aten._prelu_kernel", lambda x, w, _: torch.prelu(x, w), [(3, 4), (4,)]),
        Sample("aten.contiguous", lambda x, _: aten.contiguous(x.transpose(0, 1)), [SHAPE]),
        Sample("aten._to_copy", lambda x, _: x.to(torch.float32), [SHAPE]),
        Sample("aten._to_copy", lambda x, _: x.bool(), [SHAPE]),
        Sample("aten.copy", lambda x, y, _: aten.copy(x, y), [SHAPE, (4, 1)]),
        # a branch that is written into a part of a tensor, as in ghostnet
        Sample("aten.copy", _written, [SHAPE, (3, 2, 5)]),
        Sample("aten.fill", lambda x, y, _: aten.fill(x, y), [SHAPE, ()]),
        Sample("aten.native_dropout", lambda x, _: aten.native_dropout(x, 0.5, False), [SHAPE]),
        Sample("aten.native_dropout", lambda x, _: aten.native_dropout(x, 0.5, True), [SHAPE], random=True),
        Sample("aten.bernoulli", lambda x, _: torch.bernoulli(x), [POSITIVE], random=True),
        Sample("aten.view_as_real", lambda x, _: torch.view_as_real(x), [torch.complex(POSITIVE, POSITIVE)]),
        *(
            Sample(f"aten.{n}", lambda x, _, n=n: getattr(aten, n)(x), [torch.complex(POSITIVE, POSITIVE)])
            for n in ("real", "imag", "conj", "resolve_conj")
        ),
    ]
    return found


def _written(x: Tensor, y: Tensor, sizes: Any) -> Tensor:
    x = x.clone()
    x[:, sizes.at(1, 1) : sizes.at(1, 3)] = y
    return x


def makers() -> list[Sample]:
    """Of operations that make tensors."""
    long = {"dtype": torch.int64, "device": "cpu"}
    calls: dict[str, Callable[..., Any]] = {
        "empty": lambda s: torch.empty(s.shape), "empty_strided": lambda s: torch.empty_strided((2, 3), (3, 1)),
        "empty_permuted": lambda s: torch.empty_permuted((2, 3), (0, 1)), "zeros": lambda s: aten.zeros([2, 3]),
        "ones": lambda s: aten.ones([2, 3]), "full": lambda s: aten.full([2, 3], 1.0), "arange": lambda s: torch.arange(5),
        "rand": lambda s: aten.rand([2, 3]), "randn": lambda s: aten.randn([2, 3]),
        "randint": lambda s: aten.randint(5, [2, 3]), "eye": lambda s: aten.eye(4),
        "scalar_tensor": lambda s: aten.scalar_tensor(1.0), "linspace": lambda s: aten.linspace(0, 1, 5),
        "randperm": lambda s: aten.randperm(5), "tril_indices": lambda s: aten.tril_indices(3, 3, **long),
        "triu_indices": lambda s: aten.triu_indices(3, 3, **long),
    }  # fmt: skip
    found = [Sample(f"aten.{n}", lambda s, f=f: f(s), [], (2, 3), random=True) for n, f in calls.items()]
    found += [
        Sample("aten.new_empty", lambda x, s: x.new_empty(s.shape), [SHAPE], SHAPE, random=True),
        Sample(
            "aten.new_empty_strided", lambda x, s: x.new_empty_strided(s.shape, (20, 5, 1)), [()], SHAPE, random=True
        ),
        Sample("aten.new_zeros", lambda x, s: x.new_zeros(s.shape), [()], SHAPE),
        Sample("aten.new_ones", lambda x, s: x.new_ones(s.shape), [()], SHAPE),
        Sample("aten.new_full", lambda x, s: x.new_full(s.shape, 2.0), [()], SHAPE),
        Sample("aten.uniform", lambda x, _: x.clone().uniform_(), [SHAPE], random=True),
        Sample("aten.normal", lambda x, _: x.clone().normal_(), [SHAPE], random=True),
        Sample("aten.normal", lambda m, d, _: torch.normal(m, d), [SHAPE, POSITIVE], random=True),
    ]
    for name in ("empty_like", "rand_like", "randn_like"):
        found.append(Sample(f"aten.{name}", lambda x, _, n=name: getattr(torch, n)(x), [SHAPE], random=True))
    for name in ("zeros_like", "ones_like"):
        found.append(Sample(f"aten.{name}", lambda x, _, n=name: getattr(torch, n)(x), [SHAPE]))
    return [*found, Sample("aten.full_like", lambda x, _: torch.full_like(x, 3), [SHAPE])]


def readers() -> list[Sample]:
    """Of operations that give numbers to the program."""
    return [
        Sample("aten._local_scalar_dense", lambda x, _: x.sum().item(), [SHAPE]),
        Sample("aten.item", lambda x, _: x.item(), [(1,)]),
        Sample("aten.is_nonzero", lambda x, _: aten.is_nonzero(x), [(1,)]),
        Sample("aten.equal", lambda x, y, _: torch.equal(x, y), [SHAPE, SHAPE]),
        Sample("aten.nonzero", lambda x, _: x.nonzero(), [SHAPE]),
    ]


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
        found.append(Sample(f"aten.{name}", lambda x, _, n=name: getattr(torch, n)(x), [SHAPE]))
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
            found.append(
                Sample(
                    f"aten.{name}",
                    lambda x, _, n=name, d=dim: getattr(aten, n)(x, d),
                    [SHAPE],
                )
            )
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
