"""Norms."""

from collections.abc import Sequence

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, Run
from sparse_callbacks.channels.operations.table import Axes, outputs, rule
from sparse_callbacks.channels.recorded_call import Call

_BATCH_NORMS = """
native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
_batch_norm_with_update _batch_norm_no_update miopen_batch_norm
"""


@rule(_BATCH_NORMS)
def _batch_normed(call: Call) -> list[Axes]:
    x = call.named["input"]
    axes = call.axes_of(x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(tensor := call.named.get(name), Tensor):
            call.join(axes[1], call.axes_of(tensor)[0])
    if _takes_statistics(call):  # of all entries that a channel has
        call.block([axes[0], *axes[2:]])
    return [list(axes), *_of_channels(outputs(call)[1:], axes[1])]


def _takes_statistics(call: Call) -> bool:
    """Whether a batch norm computes mean and variance, as it does in train mode."""
    training = call.named.get("training", call.named.get("train"))
    return bool(training) if training is not None else call.name == "aten._batch_norm_with_update"


def _of_channels(tensors: Sequence[Tensor], channels: AnyAxis) -> list[Axes]:
    """The axes of tensors that have an entry for each channel, or none."""
    return [[channels] if t.shape == (channels.size,) else [Run(s) for s in t.shape] for t in tensors]


def _mixes_in_module(call: Call) -> str:
    name, kind = call.module
    return f"runs into {name or call.name} ({kind}), of which no single channels can be removed"


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_normed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    shape = call.named.get("normalized_shape")
    # torch 2.8 gives the fused RMSNorm their number in place of their sizes
    over = axes[len(axes) - (call.named["normalized_shape_ndim"] if shape is None else len(shape)) :]
    for name in ("weight", "bias"):
        if isinstance(tensor := call.named.get(name), Tensor):
            for axis, other in zip(over, call.axes_of(tensor), strict=True):
                call.join(axis, other)
    call.block(over, _mixes_in_module(call))
    # mean and deviation have axes of one entry in place of those that they were taken over
    others = axes[: len(axes) - len(over)]
    return [list(axes), *([*others, *(Run(1) for _ in over)] for _ in outputs(call)[1:])]


@rule("native_group_norm", "group_norm")
def _group_normed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    for name in ("weight", "bias"):
        if isinstance(tensor := call.named.get(name), Tensor):
            call.join(axes[1], call.axes_of(tensor)[0])
    call.block(axes[1:], _mixes_in_module(call))
    # mean and deviation of each group
    return [list(axes), *([axes[0], Run(t.shape[1])] for t in outputs(call)[1:])]
