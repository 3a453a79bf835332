"""Norms."""

from collections.abc import Sequence

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, Run
from sparse_callbacks.channels.operations.table import Axes, fresh, outputs, rule
from sparse_callbacks.channels.recorded_call import Call


@rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm"),
)
def _batch_normed(call: Call) -> list[Axes]:
    x = call.named["input"]
    axes = call.axes_of(x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(tensor := call.named.get(name), Tensor):
            call.join(axes[1], call.axes_of(tensor)[0])
    return [list(axes), *_of_channels(outputs(call)[1:], axes[1])]


def _of_channels(tensors: Sequence[Tensor], channels: AnyAxis) -> list[Axes]:
    """The axes of tensors that have an entry for each channel, or none."""
    return [[channels] if t.shape == (channels.size,) else [Run(s) for s in t.shape] for t in tensors]


def _mixes_in_module(call: Call) -> str:
    name, kind = call.module
    return f"runs into {name or call.name} ({kind}), of which no single channels can be removed"


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_normed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    over = axes[len(axes) - len(call.named["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if isinstance(tensor := call.named.get(name), Tensor):
            for axis, other in zip(over, call.axes_of(tensor), strict=True):
                call.join(axis, other)
    call.block(over, _mixes_in_module(call))
    return [list(axes), *(fresh(call)[1:])]


@rule("native_group_norm", "group_norm")
def _group_normed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    for name in ("weight", "bias"):
        if isinstance(tensor := call.named.get(name), Tensor):
            call.join(axes[1], call.axes_of(tensor)[0])
    call.block(axes[1:2], _mixes_in_module(call))
    return [list(axes), *(fresh(call)[1:])]
