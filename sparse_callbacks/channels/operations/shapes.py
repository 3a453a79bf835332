"""Operations that give tensors other shapes, join them and take them apart."""

from collections.abc import Sequence

from sparse_callbacks.channels.axes import (
    AnyAxis,
    Concatenation,
    MisfitError,
    Product,
    Run,
    factored,
    parted,
    product,
    resolved,
)
from sparse_callbacks.channels.operations.table import Axes, outputs, rule, unknown
from sparse_callbacks.channels.recorded_call import Call

PADDED = "meets a padding of channels, whose width the model fixes"
CROPPED = "runs into a crop of channels"


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "flatten", "unflatten")
def _viewed(call: Call) -> list[Axes]:
    if call.named.get("dtype") is not None:  # other numbers out of the same bytes
        return unknown(call)
    return [call.in_shape(call.named["self"], call.output.shape)]


@rule("unsqueeze", "squeeze")
def _one_more_or_less(call: Call) -> list[Axes]:
    return [call.in_shape(call.named["self"], call.output.shape)]


@rule("permute", "transpose", "t", "numpy_T")
def _permuted(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    if "dims" in call.named:
        return [[axes[call.axis(d)] for d in call.named["dims"]]]
    if "dim0" in call.named:
        one, other = call.axis(call.named["dim0"]), call.axis(call.named["dim1"])
        order = [other if d == one else one if d == other else d for d in range(len(axes))]
        return [[axes[d] for d in order]]
    return [axes[::-1]]


@rule("expand")
def _expanded(call: Call) -> list[Axes]:
    x, shape = call.named["self"], call.output.shape
    front = len(shape) - x.ndim
    axes = call.axes_of(x)
    return [
        [
            axes[d - front] if d >= front and x.shape[d - front] == s else Run(s, copies=True)
            for d, s in enumerate(shape)
        ]
    ]


@rule("repeat")
def _repeated(call: Call) -> list[Axes]:
    times: Sequence[int] = call.named["repeats"]
    axes = call.axes_of(call.named["self"])
    padded: Axes = [*(Run(1) for _ in range(len(times) - len(axes))), *axes]
    found: Axes = []
    for count, axis in zip(times, padded, strict=True):
        copies = Run(count)
        call.block([copies], f"runs into {call.name.removeprefix('aten.')}, whose copies the model counts")
        found.append(axis if count == 1 else Product([copies, axis]))
    return [found]


@rule("cat")
def _joined_up(call: Call) -> list[Axes]:
    # an empty vector may stand among tensors of any shape
    tensors = [t for t in call.named["tensors"] if t.shape != (0,)]
    dim = call.named["dim"] % call.output.ndim
    every = [call.axes_of(t) for t in tensors]
    made: Axes = [call.join(*(a[d] for a in every)) for d in range(call.output.ndim) if d != dim]
    return [[*made[:dim], Concatenation([a[dim] for a in every]), *made[dim:]]]


@rule("stack")
def _stacked(call: Call) -> list[Axes]:
    every = [call.axes_of(t) for t in call.named["tensors"]]
    made: Axes = [call.join(*axes) for axes in zip(*every, strict=True)]
    dim = call.named["dim"] % call.output.ndim
    added = Run(len(every))
    call.block([added], f"runs into {call.name.removeprefix('aten.')}, whose tensors the model counts")
    return [[*made[:dim], added, *made[dim:]]]


@rule("select")
def _selected(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    dim = call.axis(call.named["dim"])
    call.block([axes[dim]], f"{call.mixes.partition(',')[0]}, which picks one by its number")
    del axes[dim]
    return [axes]


@rule("slice")
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
            raise MisfitError(f"every {step}th entry of {size} is no run of entries")
        _, rest = parted(axes[dim], start)
        axes[dim], _ = parted(rest, max(end - start, 0))
    except MisfitError:
        call.block([axes[dim]])
        axes[dim] = Run(call.output.shape[dim])
    return [axes]


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
def _split(call: Call) -> list[Axes]:
    x = call.named["self"]
    dim = call.axis(call.named["dim"])
    axes = call.axes_of(x)
    sizes = [t.shape[dim] for t in outputs(call)]
    parts: Axes = []
    rest = axes[dim]
    try:
        for size in sizes:
            part, rest = parted(rest, size)
            parts.append(part)
    except MisfitError:
        call.block([axes[dim]])
        parts = [Run(size) for size in sizes]
    # chunk() makes equal parts of what is left, so they must lose the same channels; a smaller last part cannot stay one
    if "sizes" not in call.name:
        if len(set(sizes)) == 1:
            call.join(*parts)
        else:
            call.block(parts, f"{call.mixes.partition(',')[0]}, which makes parts of different sizes")
    return [[part if d == dim else a for d, a in enumerate(axes)] for part in parts]


@rule("unbind")
def _unbound(call: Call) -> list[Axes]:
    dim = call.axis(call.named["dim"])
    axes = call.axes_of(call.named["self"])
    call.block([axes[dim]], f"{call.mixes.partition(',')[0]}, which picks one by its number")
    return [[a for d, a in enumerate(axes) if d != dim] for _ in outputs(call)]


_PADDINGS = """
constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d
"""


@rule(_PADDINGS)
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


@rule("pixel_shuffle")
def _shuffled(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    channels = call.output.shape[-3]
    try:
        axes[-3], inner = factored(axes[-3], channels)
        call.block([inner])
    except MisfitError:
        call.block([axes[-3]])
        axes[-3] = Run(channels)
    call.block(axes[-2:])
    return [[*axes[:-2], *(Run(s) for s in call.output.shape[-2:])]]


@rule("pixel_unshuffle")
def _unshuffled(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    inner = Run(call.named["downscale_factor"] ** 2)
    call.block([inner, *axes[-2:]])
    return [[*axes[:-3], Product([axes[-3], inner]), *(Run(s) for s in call.output.shape[-2:])]]


@rule("im2col")
def _unfolded(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    height, width = call.named["kernel_size"]
    inner = Run(height * width)
    call.block([inner, *axes[-2:]])
    return [[*axes[:-3], Product([axes[-3], inner]), Run(call.output.shape[-1])]]


@rule("col2im")
def _folded(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    places = Run(call.output.shape[-2]), Run(call.output.shape[-1])
    made: AnyAxis
    try:
        made, inner = factored(axes[-2], call.output.shape[-3])
        call.block([inner, axes[-1]])
    except MisfitError:
        call.block(axes[-2:])
        made = Run(call.output.shape[-3])
    return [[*axes[:-2], made, *places]]


@rule("channel_shuffle", "native_channel_shuffle")
def _channels_shuffled(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    try:
        outer, inner = factored(axes[1], call.named["groups"])
        call.block([outer], f"{call.mixes.partition(',')[0]}, whose groups must stay as many as they are")
        axes[1] = product([resolved(inner), resolved(outer)])
    except MisfitError:
        call.block([axes[1]])
        axes[1] = Run(call.output.shape[1])
    return [axes]


@rule("unfold")
def _windows(call: Call) -> list[Axes]:
    axes = [*call.axes_of(call.named["self"])]
    dim = call.axis(call.named["dimension"])
    call.block([axes[dim]])
    axes[dim] = Run(call.output.shape[dim])
    return [[*axes, Run(call.named["size"])]]


@rule("diagonal")
def _diagonal(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    over = {call.axis(call.named["dim1"]), call.axis(call.named["dim2"])}
    call.block([axes[d] for d in over])
    return [[*(a for d, a in enumerate(axes) if d not in over), Run(call.output.shape[-1])]]


@rule("tril", "triu")
def _triangle(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["self"])
    call.block(axes[-2:])
    return [list(axes)]
