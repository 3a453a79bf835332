"""Operations that treat each entry by itself, and those that make tensors."""

from sparse_callbacks.channels.axes import Run
from sparse_callbacks.channels.operations.table import Axes, fresh, outputs, rule
from sparse_callbacks.channels.recorded_call import Call

_OF_ONE = """
abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square floor ceil round trunc frac sgn sign signbit
sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sinc deg2rad rad2deg angle frexp nan_to_num
erf erfc erfinv sigmoid logit lgamma digamma polygamma i0 mvlgamma
special_i0e special_i1 special_i1e special_erfcx special_ndtri special_log_ndtr special_entr
special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
relu relu6 gelu silu mish elu celu selu hardtanh hardswish hardsigmoid leaky_relu rrelu_with_noise softplus softshrink
hardshrink threshold log_sigmoid_forward clamp clamp_min clamp_max
logical_not bitwise_not isnan isinf isfinite isposinf isneginf
"""
_OF_SEVERAL = """
add sub rsub mul div pow float_power maximum minimum fmax fmin fmod remainder floor_divide
atan2 hypot copysign nextafter heaviside ldexp logaddexp logaddexp2 xlogy special_xlog1py special_zeta igamma igammac
eq ne lt gt le ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
where masked_fill lerp addcmul addcdiv _prelu_kernel
"""
_OF_VALUES = """
clone alias detach lift_fresh lift_fresh_copy contiguous _to_copy copy fill zero native_dropout bernoulli
view_as_real resolve_conj real imag conj complex polar fake_quantize_per_tensor_affine_cachemask
"""
"""Operations that hand values on, change their type or take them apart."""


@rule(_OF_ONE, _OF_SEVERAL, _OF_VALUES)
def entry_by_entry(call: Call) -> list[Axes]:
    tensors = call.tensors()
    made = [call.broadcast(tensors, t.shape[: max(x.ndim for x in tensors)]) for t in outputs(call)]
    # a number of its own behind the axes: the two parts of complex numbers
    return [[*axes, *(Run(s) for s in t.shape[len(axes) :])] for axes, t in zip(made, outputs(call), strict=True)]


_MAKERS = """
empty empty_strided empty_permuted zeros ones full rand randn randint scalar_tensor
new_empty new_zeros new_ones new_full new_empty_strided
"""


@rule(_MAKERS)
def _made(call: Call) -> list[Axes]:
    return fresh(call)


@rule("mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits")
def _lost(call: Call) -> list[Axes]:
    if call.named["reduction"] == 0:  # one for each entry
        return entry_by_entry(call)
    for tensor in call.tensors():
        call.block(call.axes_of(tensor))
    return fresh(call)


@rule("view_as_complex")
def _paired(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    call.block(axes[-1:])
    return [axes[:-1]]


@rule("fake_quantize_per_channel_affine_cachemask")
def _quantized(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    for name in ("scale", "zero_point"):
        call.join(axes[call.axis(call.named["axis"])], call.axes_of(call.named[name])[0])
    return [list(axes) for _ in outputs(call)]


@rule("arange", "linspace", "eye", "randperm", "tril_indices", "triu_indices")
def _numbered(call: Call) -> list[Axes]:
    """Entries that go by their places: with fewer of them, other channels would get their values."""
    made = fresh(call)
    for axes in made:
        call.block(axes, f"meets the result of {call.name.removeprefix('aten.')}, whose entries are counted")
    return made


@rule("uniform", "normal")
def _drawn(call: Call) -> list[Axes]:
    """Random numbers, in place of others or with a mean and deviation for each entry."""
    return entry_by_entry(call) if call.tensors() else fresh(call)


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
def _like(call: Call) -> list[Axes]:
    return [call.axes_of(call.named["self"])]


@rule("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")
def _read(call: Call) -> list[Axes]:
    """Values that decide what the program does next."""
    for tensor in call.tensors():
        call.block(call.axes_of(tensor))
    return fresh(call)
