"""Operations along whole axes: sums, softmax, choices by numbers."""

from torch import Tensor

from sparse_callbacks.channels.axes import MisfitError, Run, parted
from sparse_callbacks.channels.operations.entrywise import entry_by_entry
from sparse_callbacks.channels.operations.table import Axes, outputs, rule
from sparse_callbacks.channels.recorded_call import Call


@rule(
    *(
        "mean",
        "sum",
        "amax",
        "amin",
        "logsumexp",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "max",
        "min",
        "argmax",
        "argmin",
    ),
    *("prod", "any", "all", "linalg_vector_norm", "norm", "median", "nansum", "nanmean", "aminmax"),
)
def _reduced(call: Call) -> list[Axes]:
    if isinstance(call.named.get("other"), Tensor):  # the maximum of two tensors
        return entry_by_entry(call)
    x = call.named["self"]
    axes, dims = call.axes_of(x), call.named.get("dim")
    over = [call.axis(d) for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))]
    call.block([axes[d] for d in over])
    keep = bool(call.named.get("keepdim"))
    left: Axes = [Run(1) if d in over else a for d, a in enumerate(axes) if keep or d not in over]
    return [list(left) for _ in outputs(call)]


@rule(
    *(
        "_softmax",
        "_log_softmax",
        "_safe_softmax",
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "logcumsumexp",
        "flip",
        "roll",
    ),
    *("sort", "argsort", "rot90"),
)
def _mixed_along(call: Call) -> list[Axes]:
    x = call.named["self"]
    dims = call.named.get("dim", call.named.get("dims"))
    over = [call.axis(d) for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))]
    axes = call.axes_of(x)
    call.block([axes[d] for d in over])
    left: Axes = [Run(x.shape[d]) if d in over else a for d, a in enumerate(axes)]
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


@rule("gather", "index_select", "scatter", "scatter_add", "index_add", "index_fill", "index_copy", "take_along_dim")
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
