"""Operations along whole axes: sums, softmax, choices by numbers."""

from collections.abc import Sequence

from torch import Tensor

from sparse_callbacks.channels.axes import MisfitError, Run, parted
from sparse_callbacks.channels.operations.entrywise import entry_by_entry
from sparse_callbacks.channels.operations.table import Axes, outputs, rule
from sparse_callbacks.channels.recorded_call import Call


def _dims(call: Call, given: int | Sequence[int] | None) -> list[int]:
    """The dimensions that an operation goes along, counted from the front; all of them where none are given."""
    count = call.named["self"].ndim
    if not count:  # a number has none, though -1 may be given
        return []
    return [call.axis(d) for d in ([given] if isinstance(given, int) else given or range(count))]


_REDUCTIONS = """
mean sum amax amin logsumexp var std var_mean std_mean max min argmax argmin prod any all linalg_vector_norm norm median
nansum nanmean aminmax mode nanmedian count_nonzero
"""


@rule(_REDUCTIONS)
def _reduced(call: Call) -> list[Axes]:
    if isinstance(call.named.get("other"), Tensor):  # the maximum of two tensors
        return entry_by_entry(call)
    x = call.named["self"]
    axes, dims = call.axes_of(x), call.named.get("dim")
    over = _dims(call, dims)
    call.block([axes[d] for d in over])
    keep = bool(call.named.get("keepdim"))
    left: Axes = [Run(1) if d in over else a for d, a in enumerate(axes) if keep or d not in over]
    return [list(left) for _ in outputs(call)]


_MIXED = """
_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp flip roll sort argsort rot90
_fft_r2c _fft_c2c _fft_c2r
"""


@rule(_MIXED)
def _mixed_along(call: Call) -> list[Axes]:
    over = _dims(call, call.named.get("dim", call.named.get("dims")))
    axes = call.axes_of(call.named["self"])
    call.block([axes[d] for d in over])
    sizes = outputs(call)[0].shape  # a turned image has others
    left: Axes = [Run(sizes[d]) if d in over else a for d, a in enumerate(axes)]
    return [list(left) for _ in outputs(call)]


@rule("topk", "kthvalue")
def _chosen_along(call: Call) -> list[Axes]:
    dim = call.axis(call.named["dim"])
    axes = [*call.axes_of(call.named["self"])]
    call.block([axes[dim]])
    out = outputs(call)[0]
    if out.ndim < len(axes):
        del axes[dim]
    else:
        axes[dim] = Run(out.shape[dim])
    return [list(axes) for _ in outputs(call)]


@rule("gather", "index_select", "scatter", "scatter_add", "index_add", "index_fill", "index_copy", "scatter_reduce")
def _picked_along(call: Call) -> list[Axes]:
    dim = call.axis(call.named["dim"])
    axes = [*call.axes_of(call.named["self"])]
    call.block([axes[dim]])
    out = outputs(call)[0]
    index = call.named["index"]
    if index.ndim == out.ndim > 1:
        # the same place in the other dimensions, as far as the index reaches there
        others = call.axes_of(index)
        for d in range(out.ndim):
            if d != dim and index.shape[d] == call.named["self"].shape[d]:
                call.join(axes[d], others[d])
            elif d != dim:
                call.block([axes[d], others[d]])
                axes[d] = Run(out.shape[d])
        call.block([others[dim]])
    else:
        call.block(call.axes_of(index))
    axes[dim] = Run(out.shape[dim])
    source = call.named.get("src", call.named.get("source"))
    if isinstance(source, Tensor) and source.ndim == out.ndim:
        for d, axis in enumerate(call.axes_of(source)):
            reached = index.ndim == 1 or index.shape[d] == out.shape[d]
            if d != dim and reached and source.shape[d] == out.shape[d]:
                call.join(axes[d], axis)
            else:
                call.block([axis])
    return [axes]


@rule("glu")
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
