"""Operations that treat each entry by itself, and those that make tensors."""

from sparse_callbacks.channels.axes import Run
from sparse_callbacks.channels.operations.table import Axes, fresh, outputs, rule
from sparse_callbacks.channels.recorded_call import Call


@rule(
    *("abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "square"),
    *("sin", "cos", "tan", "tanh", "asin", "acos", "atan", "sinh", "cosh", "erf", "erfc", "sigmoid", "sgn", "sign"),
    *(
        "floor",
        "ceil",
        "round",
        "trunc",
        "frac",
        "relu",
        "relu6",
        "gelu",
        "silu",
        "mish",
        "elu",
        "celu",
        "selu",
        "hardtanh",
    ),
    *(
        "hardswish",
        "hardsigmoid",
        "leaky_relu",
        "softplus",
        "softshrink",
        "hardshrink",
        "threshold",
        "log_sigmoid_forward",
    ),
    *(
        "clamp",
        "clamp_min",
        "clamp_max",
        "nan_to_num",
        "logical_not",
        "bitwise_not",
        "isnan",
        "isinf",
        "isfinite",
        "signbit",
    ),
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "pow",
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "fmod",
        "remainder",
        "floor_divide",
    ),
    *("atan2", "logaddexp", "xlogy", "eq", "ne", "lt", "gt", "le", "ge", "logical_and", "logical_or", "logical_xor"),
    *(
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "where",
        "masked_fill",
        "lerp",
        "addcmul",
        "addcdiv",
        "_prelu_kernel",
    ),
    *("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy", "copy", "fill", "zero"),
    *("native_dropout", "bernoulli", "view_as_real", "resolve_conj", "real", "imag", "conj"),
)
def entry_by_entry(call: Call) -> list[Axes]:
    tensors = call.tensors()
    made = [call.broadcast(tensors, t.shape[: max(x.ndim for x in tensors)]) for t in outputs(call)]
    # a number of its own behind the axes: the two parts of complex numbers
    return [[*axes, *(Run(s) for s in t.shape[len(axes) :])] for axes, t in zip(made, outputs(call), strict=True)]


@rule(
    *("empty", "empty_strided", "empty_permuted", "zeros", "ones", "full", "rand", "randn", "randint", "scalar_tensor"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
)
def _made(call: Call) -> list[Axes]:
    return fresh(call)


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
