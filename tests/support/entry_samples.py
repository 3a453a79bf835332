"""Sample calls for the probe of the table of operations: entry by entry, and what makes and reads tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.operation_probe import Sample, words

aten = torch.ops.aten
SHAPE = (3, 4, 5)
FLAGS = torch.tensor([True, False, True, True, False])
POSITIVE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
NUMBERS = torch.arange(60).view(SHAPE) % 7
BROADCASTS = [(4, 5), (4, 1), (1, 4, 1), (3, 1, 5), (1,), (), (3, 4, 5)]
"""Shapes of a second argument, with and without each of the dimensions."""

_FLAGGED = words("bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor")
_ONE = words("""abs neg exp exp2 expm1 sin cos tan tanh atan sinh cosh erf erfc sigmoid sgn sign floor ceil round
trunc frac relu relu6 gelu silu mish elu celu selu hardtanh hardswish hardsigmoid leaky_relu
softplus softshrink hardshrink square log_sigmoid_forward nan_to_num logical_not isnan isinf
isfinite isposinf isneginf signbit asinh sinc deg2rad rad2deg angle frexp i0 special_i0e special_i1 special_i1e
special_erfcx special_log_ndtr special_bessel_j0 special_bessel_j1 clone alias detach lift_fresh lift_fresh_copy zero resolve_conj""")
_POSITIVE = words("""log log2 log10 log1p sqrt rsqrt reciprocal asin acos atanh erfinv logit lgamma digamma special_ndtri
special_entr special_bessel_y0 special_bessel_y1""")
_TWO = words("""add sub rsub mul div pow maximum minimum fmax fmin fmod remainder floor_divide atan2 logaddexp logaddexp2 xlogy
eq ne lt gt le ge float_power hypot copysign nextafter heaviside special_xlog1py""")


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
    found += [s for n in _FLAGGED for s in _flags(_op(n), f"aten.{n}")]
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
    larger = [(POSITIVE + 1.0)[:, :1], POSITIVE + 1.5]
    found += [
        *(
            Sample(f"aten.{n}", lambda x, y, _, n=n: _op(n)(x, y), larger)
            for n in ("special_zeta", "igamma", "igammac")
        ),
        Sample("aten.acosh", lambda x, _: torch.acosh(x), [POSITIVE + 1.0]),
        Sample("aten.polygamma", lambda x, _: torch.polygamma(1, x), [POSITIVE]),
        Sample("aten.mvlgamma", lambda x, _: aten.mvlgamma(x, 2), [POSITIVE + 1.0]),
        Sample("aten.logit", lambda x, _: torch.logit(x, 1e-3), [SHAPE]),
        Sample("aten.ldexp", lambda x, y, _: aten.ldexp(x, y), [SHAPE, NUMBERS[0]]),
        Sample("aten.rrelu_with_noise", lambda x, _: torch.rrelu(x), [SHAPE]),
        Sample("aten.rrelu_with_noise", lambda x, _: torch.rrelu(x, training=True), [SHAPE], random=True),
        *(Sample(f"aten.{n}", lambda x, y, _, n=n: _op(n)(x, y), [SHAPE, (3, 4, 5)]) for n in ("complex", "polar")),
        Sample("aten.view_as_complex", lambda x, _: torch.view_as_complex(x), [(3, 4, 2)]),
        Sample(
            "aten.fake_quantize_per_tensor_affine_cachemask",
            lambda x, _: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
            [SHAPE],
            dtype=torch.float32,
        ),
        *(
            Sample(
                "aten.fake_quantize_per_channel_affine_cachemask",
                lambda x, s, z, _, d=dim: torch.fake_quantize_per_channel_affine(x, s, z, d, -128, 127),
                [SHAPE, torch.arange(1, SHAPE[dim] + 1) / 10, torch.arange(SHAPE[dim], dtype=torch.int32)],
                dtype=torch.float32,
            )
            for dim in (0, 1, 2)
        ),
    ]
    for name in ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy"):
        for reduction in (0, 1, 2):
            found.append(
                Sample(
                    f"aten.{name}", lambda x, y, _, n=name, r=reduction: _loss(n, x, y, r), [POSITIVE, POSITIVE.flip(0)]
                )
            )
    found += [
        Sample(
            "aten.binary_cross_entropy_with_logits",
            lambda x, y, w, _: aten.binary_cross_entropy_with_logits(x, y, None, w, 0),
            [SHAPE, SHAPE, POSITIVE[0, 0]],
        ),
        Sample("aten.binary_cross_entropy_with_logits", lambda x, y, _: _loss(_LOGITS, x, y), [SHAPE, POSITIVE]),
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


_LOGITS = "binary_cross_entropy_with_logits"


def _loss(name: str, x: Tensor, y: Tensor, reduction: int = 1) -> Any:
    more = {"binary_cross_entropy": [None], _LOGITS: [None, None]}.get(name, [])
    if name == "binary_cross_entropy":  # takes probabilities
        x, y = x.sigmoid(), y.sigmoid()
    return getattr(aten, name)(x, y, *more, reduction)


def _written(x: Tensor, y: Tensor, sizes: Any) -> Tensor:
    x = x.clone()
    x[:, sizes.at(1, 1) : sizes.at(1, 3)] = y
    return x


def makers() -> list[Sample]:
    """Of operations that make tensors."""
    long = {"dtype": torch.int64, "device": "cpu"}
    calls: dict[str, Callable[..., Any]] = {
        "empty": lambda s: torch.empty(s.shape),
        "empty_strided": lambda s: torch.empty_strided((2, 3), (3, 1)),
        "empty_permuted": lambda s: torch.empty_permuted((2, 3), (0, 1)),
        "zeros": lambda s: aten.zeros([2, 3]),
        "ones": lambda s: aten.ones([2, 3]),
        "full": lambda s: aten.full([2, 3], 1.0),
        "arange": lambda s: torch.arange(5),
        "rand": lambda s: aten.rand([2, 3]),
        "randn": lambda s: aten.randn([2, 3]),
        "randint": lambda s: aten.randint(5, [2, 3]),
        "eye": lambda s: aten.eye(4),
        "scalar_tensor": lambda s: aten.scalar_tensor(1.0),
        "linspace": lambda s: aten.linspace(0, 1, 5),
        "randperm": lambda s: aten.randperm(5),
        "tril_indices": lambda s: aten.tril_indices(3, 3, **long),
        "triu_indices": lambda s: aten.triu_indices(3, 3, **long),
    }
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
