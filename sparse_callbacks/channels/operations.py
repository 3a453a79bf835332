"""What each aten operation does with the axes of its tensors.

A table by name: an operation that is not in it keeps nothing apart, and what runs into it stays. Each entry gives the axes of
the outputs, out of those of the inputs: an axis that is handed on keeps its channels apart (removing some from the input
removes these from the output, and changes no other); channels that are mixed are blocked.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, Concatenation, MisfitError, Product, Run, factored, parted
from sparse_callbacks.channels.recorded_call import Call

Axes = list[AnyAxis]
Rule = Callable[[Call], list[Axes]]
"""Gives the axes of every tensor that an operation returns."""

RULES: dict[str, Rule] = {}
"""The rule of each operation by its name without overload and trailing underscore."""

PADDED = "meets a padding of channels, whose width the model fixes"
CROPPED = "runs into a crop of channels"


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def known(rule: Rule) -> Rule:
        RULES.update({f"aten.{name}" if "." not in name else name: rule for name in names})
        return rule

    return known


def _outputs(call: Call) -> list[Tensor]:
    made = call.output if isinstance(call.output, tuple | list) else [call.output]
    return [t for t in made if isinstance(t, Tensor)]


def _fresh(call: Call) -> list[Axes]:
    return [[Run(s) for s in t.shape] for t in _outputs(call)]


def unknown(call: Call) -> list[Axes]:
    """Nothing is known of an operation: whatever arrives stays."""
    name, kind = call.module
    where = f" ({name}, {kind})" if name else ""
    reason = f"runs into {call.name.removeprefix('aten.')}{where}, which is not known to keep channels apart"
    for tensor in call.tensors():
        call.block(call.axes_of(tensor), reason)
    return _fresh(call)


# ---------------------------------------------------------------------- entry by entry


@_rule(
    *("abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "square"),
    *("sin", "cos", "tan", "tanh", "asin", "acos", "atan", "sinh", "cosh", "erf", "erfc", "sigmoid", "sgn", "sign"),
    *("floor", "ceil", "round", "trunc", "frac", "relu", "relu6", "gelu", "silu", "mish", "elu", "celu", "selu", "hardtanh"),
    *("hardswish", "hardsigmoid", "leaky_relu", "softplus", "softshrink", "hardshrink", "threshold", "log_sigmoid_forward"),
    *("clamp", "clamp_min", "clamp_max", "nan_to_num", "logical_not", "bitwise_not", "isnan", "isinf", "isfinite", "signbit"),
    *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "fmax", "fmin", "fmod", "remainder", "floor_divide"),
    *("atan2", "logaddexp", "xlogy", "eq", "ne", "lt", "gt", "le", "ge", "logical_and", "logical_or", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "where", "masked_fill", "lerp", "addcmul", "addcdiv", "_prelu_kernel"),
    *("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy", "copy", "fill", "zero"),
    *("native_dropout", "bernoulli", "view_as_real", "resolve_conj", "real", "imag", "conj"),
)
def _entry_by_entry(call: Call) -> list[Axes]:
    tensors = call.tensors()
    made = [call.broadcast(tensors, t.shape[: max(x.ndim for x in tensors)]) for t in _outputs(call)]
    # a number of its own behind the axes: the two parts of complex numbers
    return [[*axes, *(Run(s) for s in t.shape[len(axes) :])] for axes, t in zip(made, _outputs(call), strict=True)]


@_rule(
    *("empty", "empty_strided", "empty_permuted", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "eye"),
    *("scalar_tensor", "linspace", "randperm", "tril_indices", "triu_indices", "new_empty", "new_zeros", "new_ones"),
    *("new_full", "new_empty_strided", "uniform", "normal"),
)
def _made(call: Call) -> list[Axes]:
    return _fresh(call)


@_rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
def _like(call: Call) -> list[Axes]:
    return [call.axes_of(call.named["self"])]


@_rule("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")
def _read(call: Call) -> list[Axes]:
    """Values that decide what the program does next."""
    for tensor in call.tensors():
        call.block(call.axes_of(tensor))
    return _fresh(call)


# ---------------------------------------------------------------------- over whole axes


@_rule(
    *("mean", "sum", "amax", "amin", "logsumexp", "var", "std", "var_mean", "std_mean", "max", "min", "argmax", "argmin"),
    *("prod", "any", "all", "linalg_vector_norm", "norm", "median", "nansum", "nanmean", "aminmax"),
)
def _reduced(call: Call) -> list[Axes]:
    if isinstance(call.named.get("other"), Tensor):  # the maximum of two tensors
        return _entry_by_entry(call)
    x = call.named["self"]
    axes, dims = call.axes_of(x), call.named.get("dim")
    if dims is None or dims == []:
        over = [*range(x.ndim)]
    else:
        over = [call.axis(d) for d in ([dims] if isinstance(dims, int) else dims)]
    call.block([axes[d] for d in over])
    keep = bool(call.named.get("keepdim"))
    left: Axes = [Run(1) if d in over else a for d, a in enumerate(axes) if keep or d not in over]
    return [list(left) for _ in _outputs(call)]


@_rule(
    *("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll"),
    *("sort", "argsort", "rot90"),
)
def _mixed_along(call: Call) -> list[Axes]:
    x = call.named["self"]
    dims = call.named.get("dim", call.named.get("dims"))
    over = [call.axis(d) for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))]
    axes = call.axes_of(x)
    call.block([axes[d] for d in over])
    left: Axes = [Run(x.shape[d]) if d in over else a for d, a in enumerate(axes)]
    return [list(left) for _ in _outputs(call)]


@_rule("topk", "kthvalue")
def _chosen_along(call: Call) -> list[Axes]:
    dim = call.axis(call.named["dim"])
    axes = [*call.axes_of(call.named["self"])]
    call.block([axes[dim]])
    out = _outputs(call)[0]
    if out.ndim < len(axes):
        del axes[dim]
    else:
        axes[dim] = Run(out.shape[dim])
    return [list(axes) for _ in _outputs(call)]


@_rule("gather", "index_select", "scatter", "scatter_add", "index_add", "index_fill", "index_copy", "take_along_dim")
def _picked_along(call: Call) -> list[Axes]:
    dim = call.axis(call.named["dim"])
    axes = [*call.axes_of(call.named["self"])]
    call.block([axes[dim]])
    out = _outputs(call)[0]
    index = call.named["index"]
    if index.ndim == out.ndim > 1:
        # the same place in the other dimensions, as far as the index reaches there
        others = call.axes_of(index)
        for d in range(out.ndim):
            if d != dim and index.shape[d] == call.named["self"].shape[d]:
                call.join(axes[d], others[d])
            elif d != dim:
                call.block([axes[d]])
                axes[d] = Run(out.shape[d])
    axes[dim] = Run(out.shape[dim])
    source = call.named.get("src", call.named.get("source"))
    if isinstance(source, Tensor) and source.ndim == out.ndim:
        for d, axis in enumerate(call.axes_of(source)):
            if d != dim and source.shape[d] == out.shape[d]:
                call.join(axes[d], axis)
            else:
                call.block([axis])
    return [axes]


@_rule("glu")
def _glu(call: Call) -> list[Axes]:
    dim = call.axis(call.named["dim"])
    axes = [*call.axes_of(call.named["self"])]
    try:
        first, second = parted(axes[dim], call.named["self"].shape[dim] // 2)
        axes[dim] = call.join(first, second)
    except MisfitError:
        call.block([axes[dim]])
        axes[dim] = Run(call.named["self"].shape[dim] // 2)
    return [axes]


# ---------------------------------------------------------------------- other shapes


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "flatten", "unflatten")
def _viewed(call: Call) -> list[Axes]:
    if call.named.get("dtype") is not None:  # other numbers out of the same bytes
        return unknown(call)
    return [call.in_shape(call.named["self"], call.output.shape)]


@_rule("unsqueeze", "squeeze")
def _one_more_or_less(call: Call) -> list[Axes]:
    return [call.in_shape(call.named["self"], call.output.shape)]


@_rule("permute", "transpose", "t", "movedim", "swapaxes", "numpy_T", "mT")
def _permuted(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    if "dims" in call.named:
        return [[axes[call.axis(d)] for d in call.named["dims"]]]
    if "dim0" in call.named:
        one, other = call.axis(call.named["dim0"]), call.axis(call.named["dim1"])
        order = [other if d == one else one if d == other else d for d in range(len(axes))]
        return [[axes[d] for d in order]]
    return [axes[::-1]]


@_rule("expand")
def _expanded(call: Call) -> list[Axes]:
    x, shape = call.named["self"], call.output.shape
    front = len(shape) - x.ndim
    axes = call.axes_of(x)
    return [[axes[d - front] if d >= front and x.shape[d - front] == s else Run(s) for d, s in enumerate(shape)]]


@_rule("repeat", "tile")
def _repeated(call: Call) -> list[Axes]:
    times: Sequence[int] = call.named["repeats"]
    axes = call.axes_of(call.named["self"])
    padded: Axes = [*(Run(1) for _ in range(len(times) - len(axes))), *axes]
    return [[a if n == 1 else Product([Run(n), a]) for n, a in zip(times, padded, strict=True)]]


@_rule("cat")
def _joined_up(call: Call) -> list[Axes]:
    # an empty vector may stand among tensors of any shape
    tensors = [t for t in call.named["tensors"] if t.shape != (0,)]
    dim = call.named["dim"] % call.output.ndim
    every = [call.axes_of(t) for t in tensors]
    made: Axes = [call.join(*(a[d] for a in every)) for d in range(call.output.ndim) if d != dim]
    return [[*made[:dim], Concatenation([a[dim] for a in every]), *made[dim:]]]


@_rule("stack")
def _stacked(call: Call) -> list[Axes]:
    every = [call.axes_of(t) for t in call.named["tensors"]]
    made: Axes = [call.join(*axes) for axes in zip(*every, strict=True)]
    dim = call.named["dim"] % call.output.ndim
    added = Run(len(every))
    call.block([added], f"runs into {call.name.removeprefix('aten.')}, whose tensors the model counts")
    return [[*made[:dim], added, *made[dim:]]]


@_rule("select")
def _selected(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    dim = call.axis(call.named["dim"])
    call.block([axes[dim]], f"{call.mixes.partition(',')[0]}, which picks one by its number")
    del axes[dim]
    return [axes]


@_rule("slice", "narrow")
def _sliced(call: Call) -> list[Axes]:
    x = call.named["self"]
    dim = call.axis(call.named["dim"])
    size, axes = x.shape[dim], [*call.axes_of(x)]
    start, end, step = call.named["start"] or 0, call.named["end"], call.named["step"]
    end = size if end is None else end
    start, end = (min(max(n + size if n < 0 else n, 0), size) for n in (start, end))
    if step == 1 and (start, end) == (0, size):
        return [axes]
    try:
        if step != 1:
            raise MisfitError(f"every {step}th entry")
        _, rest = parted(axes[dim], start)
        axes[dim], _ = parted(rest, max(end - start, 0))
    except MisfitError:
        call.block([axes[dim]])
        axes[dim] = Run(call.output.shape[dim])
    return [axes]


@_rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
def _split(call: Call) -> list[Axes]:
    x = call.named["self"]
    dim = call.axis(call.named["dim"])
    axes = call.axes_of(x)
    sizes = [t.shape[dim] for t in _outputs(call)]
    parts: Axes = []
    rest = axes[dim]
    try:
        for size in sizes:
            part, rest = parted(rest, size)
            parts.append(part)
    except MisfitError:
        call.block([axes[dim]])
        parts = [Run(size) for size in sizes]
    # chunk() makes equal parts of what is left, so they must lose the same channels
    if "sizes" not in call.name and len(set(sizes)) == 1:
        call.join(*parts)
    return [[part if d == dim else a for d, a in enumerate(axes)] for part in parts]


@_rule("unbind")
def _unbound(call: Call) -> list[Axes]:
    dim = call.axis(call.named["dim"])
    axes = call.axes_of(call.named["self"])
    call.block([axes[dim]], f"{call.mixes.partition(',')[0]}, which picks one by its number")
    return [[a for d, a in enumerate(axes) if d != dim] for _ in _outputs(call)]


@_rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d")
def _padded(call: Call) -> list[Axes]:
    x, widths = call.named["self"], call.named.get("pad", call.named.get("padding"))
    axes = [*call.axes_of(x)]
    for number in range(len(widths) // 2):
        before, after = widths[2 * number], widths[2 * number + 1]
        dim = x.ndim - 1 - number
        if before == after == 0:
            continue
        if min(before, after) < 0 or call.name != "aten.constant_pad_nd":
            call.block([axes[dim]], CROPPED)
            axes[dim] = Run(call.output.shape[dim])
            continue
        ends: list[AnyAxis] = [Run(before), Run(after)]
        call.block([e for e in ends if e.size], PADDED)
        axes[dim] = Concatenation([ends[0], axes[dim], ends[1]])
    return [axes]


@_rule("pixel_shuffle")
def _shuffled(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    channels = call.output.shape[-3]
    try:
        axes[-3], inner = factored(axes[-3], channels)
        call.block([inner])
    except MisfitError:
        call.block([axes[-3]])
        axes[-3] = Run(channels)
    return [[*axes[:-2], *(Run(s) for s in call.output.shape[-2:])]]


@_rule("pixel_unshuffle")
def _unshuffled(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    inner = Run(call.named["downscale_factor"] ** 2)
    call.block([inner])
    return [[*axes[:-3], Product([axes[-3], inner]), *(Run(s) for s in call.output.shape[-2:])]]


@_rule("im2col")
def _unfolded(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    height, width = call.named["kernel_size"]
    inner = Run(height * width)
    call.block([inner])
    return [[*axes[:-3], Product([axes[-3], inner]), Run(call.output.shape[-1])]]


@_rule("unfold")
def _windows(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    dim = call.axis(call.named["dimension"])
    call.block([axes[dim]])
    axes[dim] = Run(call.output.shape[dim])
    return [[*axes, Run(call.named["size"])]]


@_rule("diagonal")
def _diagonal(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    over = {call.axis(call.named["dim1"]), call.axis(call.named["dim2"])}
    call.block([axes[d] for d in over])
    return [[*(a for d, a in enumerate(axes) if d not in over), Run(call.output.shape[-1])]]


@_rule("tril", "triu")
def _triangle(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    call.block(axes[-2:])
    return [list(axes)]


@_rule("index")
def _indexed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    indices = call.named["indices"]
    with_index = [d for d, index in enumerate(indices) if index is not None]
    call.block([axes[d] for d in with_index], f"{call.mixes.partition(',')[0]}, which picks them by numbers")
    for index in (i for i in indices if i is not None):
        call.block(call.axes_of(index))
    adjoining = with_index == [*range(with_index[0], with_index[-1] + 1)]
    before = with_index[0] if adjoining else 0
    rest = [a for d, a in enumerate(axes) if d not in with_index]
    count = call.output.ndim - len(rest)
    made: Axes = [Run(s) for s in call.output.shape[before : before + count]]
    return [[*rest[:before], *made, *rest[before:]]]


@_rule("embedding")
def _embedded(call: Call) -> list[Axes]:
    weight = call.axes_of(call.named["weight"])
    call.block(weight[:1])
    call.note_product(call.named["weight"], [], weight[1:])
    return [[*call.axes_of(call.named["indices"]), *weight[1:]]]


# ---------------------------------------------------------------------- images


def _of_image(call: Call, name: str = "self") -> int:
    """How many dimensions at the end are places in an image."""
    digits = [c for c in call.name.replace("im2col", "") if c in "123"]
    return int(digits[0]) if digits else call.named[name].ndim - 2


@_rule(
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("mkldnn_adaptive_avg_pool2d", "mkldnn_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
    *("_upsample_bicubic2d_aa", "max_unpool2d", "max_unpool3d"),
)
def _place_by_place(call: Call) -> list[Axes]:
    places = _of_image(call)
    axes = call.axes_of(call.named["self"])
    if isinstance(indices := call.named.get("indices"), Tensor):
        for axis, other in zip(axes[:-places], call.axes_of(indices)[:-places], strict=True):
            call.join(axis, other)
    return [[*axes[:-places], *(Run(s) for s in t.shape[-places:])] for t in _outputs(call)]


@_rule("grid_sampler_2d", "grid_sampler_3d")
def _sampled(call: Call) -> list[Axes]:
    axes, grid = call.axes_of(call.named["input"]), call.axes_of(call.named["grid"])
    call.block(grid[1:])
    return [[call.join(axes[0], grid[0]), axes[1], *(Run(s) for s in call.output.shape[2:])]]


@_rule("torchvision.roi_align", "torchvision.roi_pool")
def _regions(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    call.block([axes[0], *call.axes_of(call.named["rois"])])
    return [[Run(t.shape[0]), axes[1], *(Run(s) for s in t.shape[2:])] for t in _outputs(call)]


@_rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv2d", "conv1d", "conv3d")
def _convolved(call: Call) -> list[Axes]:
    x, weight, bias, groups = (call.named[n] for n in ("input", "weight", "bias", "groups"))
    transposed = call.named.get("transposed", False)
    places = weight.ndim - 2
    axes, of_weight = call.axes_of(x), call.axes_of(weight)
    given = len(axes) - places - 1  # an image may come without a batch
    reads, makes = (of_weight[0], of_weight[1]) if transposed else (of_weight[1], of_weight[0])
    channels = axes[given]
    made: AnyAxis
    if groups == 1:
        channels = call.join(channels, reads)
        made = makes
        call.note_product(weight, [reads], [makes])
    elif groups == x.shape[given] == call.output.shape[given]:
        made = call.join(channels, of_weight[0])  # each channel by itself: the weight has an entry for each
    else:
        try:
            made = _in_groups(call, channels, of_weight, groups, transposed)
        except MisfitError:
            call.block([channels, *of_weight[:2]])
            made = Run(call.output.shape[given])
        call.note_product(weight, [reads], [makes])
    if bias is not None:
        call.join(made, call.axes_of(bias)[0])
    return [[*axes[:given], made, *(Run(s) for s in call.output.shape[given + 1 :])]]


def _in_groups(call: Call, channels: AnyAxis, weight: Sequence[AnyAxis], groups: int, transposed: bool) -> AnyAxis:
    """The outputs of a grouped convolution, whose groups all have the same places: what goes in one goes in all."""
    outer, inner = factored(channels, groups)
    held, place = factored(weight[0], groups)
    call.join(outer, held)
    call.block([outer], f"{call.module[0] or 'a convolution'}: its groups must stay as many as they are")
    call.join(inner, place if transposed else weight[1])
    return Product([outer, weight[1] if transposed else place])


# ---------------------------------------------------------------------- products of matrices


def _product(call: Call, left: Tensor, right: Tensor, added: Tensor | None = None) -> list[Axes]:
    """A product of matrices, or of batches of them."""
    a, b = call.axes_of(left), call.axes_of(right)
    # a vector has no rows, or no columns
    columns = b[-1:] if right.ndim > 1 else []
    rows = a[-2:-1] if left.ndim > 1 else []
    over = call.join(a[-1], b[-2] if right.ndim > 1 else b[-1])
    batch = [call.join(*axes) for axes in zip(a[:-2], b[:-2], strict=True)]
    by_weight = call.is_weight(right), call.is_weight(left)
    if by_weight[0] and not by_weight[1]:
        call.note_product(right, [over], columns)
    elif by_weight[1] and not by_weight[0]:
        call.note_product(left, [over], rows)
    elif not any(by_weight):
        call.block([over, *rows, *columns], "what is multiplied with other activations is never cut singly (attention)")
    made = [*batch, *rows, *columns]
    if added is not None:
        for axis, other in zip(made[::-1], call.axes_of(added)[::-1], strict=False):
            if axis.size == other.size != 1:
                call.join(axis, other)
    return [made]


@_rule("mm", "bmm", "mv", "dot", "matmul")
def _multiplied(call: Call) -> list[Axes]:
    left, right = call.tensors()[:2]
    if call.name == "aten.matmul" and left.ndim != right.ndim:
        return unknown(call)
    return _product(call, left, right)


@_rule("addmm", "addmv", "baddbmm", "addbmm", "_addmm_activation")
def _multiplied_and_added(call: Call) -> list[Axes]:
    added, left, right = call.tensors()[:3]
    if call.name == "aten.addbmm":
        return unknown(call)
    return _product(call, left, right, added)


@_rule(
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math", "scaled_dot_product_attention"),
)
def _attended(call: Call) -> list[Axes]:
    query, key, value = (call.axes_of(call.named[n]) for n in ("query", "key", "value"))
    reason = "what is multiplied with other activations is never cut singly (attention)"
    call.block([*query[-2:], *key[-2:], *value[-2:]], reason)
    batch = [call.join(*axes) for axes in zip(query[:-2], key[:-2], value[:-2], strict=True)]
    mask = call.named.get("attn_mask", call.named.get("attn_bias"))
    if isinstance(mask, Tensor):
        for axis, other in zip(batch[::-1], call.axes_of(mask)[-3::-1], strict=False):
            if axis.size == other.size != 1:
                call.join(axis, other)
    made = [*batch, query[-2], value[-1]]
    return [made if t.shape == _outputs(call)[0].shape else [Run(s) for s in t.shape] for t in _outputs(call)]


# ---------------------------------------------------------------------- norms


@_rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm"),
)
def _batch_normed(call: Call) -> list[Axes]:
    x = call.named["input"]
    axes = call.axes_of(x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(tensor := call.named.get(name), Tensor):
            call.join(axes[1], call.axes_of(tensor)[0])
    first, *others = _outputs(call)
    return [list(axes), *([axes[1]] if t.shape == x.shape[1:2] else [Run(s) for s in t.shape] for t in others)]


def _mixes_in_module(call: Call) -> str:
    name, kind = call.module
    return f"runs into {name or call.name} ({kind}), of which no single channels can be removed"


@_rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_normed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    over = axes[len(axes) - len(call.named["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if isinstance(tensor := call.named.get(name), Tensor):
            for axis, other in zip(over, call.axes_of(tensor), strict=True):
                call.join(axis, other)
    call.block(over, _mixes_in_module(call))
    return [list(axes), *([Run(s) for s in t.shape] for t in _outputs(call)[1:])]


@_rule("native_group_norm", "group_norm")
def _group_normed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    for name in ("weight", "bias"):
        if isinstance(tensor := call.named.get(name), Tensor):
            call.join(axes[1], call.axes_of(tensor)[0])
    call.block(axes[1:2], _mixes_in_module(call))
    return [list(axes), *([Run(s) for s in t.shape] for t in _outputs(call)[1:])]


def rule_of(name: str, tensors: Sequence[Any]) -> Rule:
    """The rule of an operation; of one that no tensor goes into, fresh axes."""
    return RULES.get(name, unknown if tensors else _made)
