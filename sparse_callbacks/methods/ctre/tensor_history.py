"""History of a tensor: what has happened to a layer's output on its way there."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.methods.ctre.similarity import feature_dimension

# what happened to a layer's output, from least to most: copied or reshaped, scaled and shifted, anything else
UNCHANGED, AFFINE, ACTIVATED = 0, 1, 2

# names of aten operations without a trailing underscore; what is in none of the sets counts as an activation function
_RESHAPES = {
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "squeeze",
    "unsqueeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unbind",
    "cat",
    "stack",
    "as_strided",
}
_COPIES = {"alias", "detach", "clone", "_to_copy", "copy", "lift_fresh", "native_dropout"}
_TRANSPOSES = {"t", "transpose", "permute"}
_AFFINE = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "neg",
    "mean",
    "sum",
    "lerp",
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
}
# operations that mix neurons, by the beginning of their name, and by a part of it
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mv",
    "addmv",
    "dot",
    "linear",
    "_trilinear",
    "_scaled_dot_product",
    "_transformer",
)
_RECURRENT = ("rnn", "lstm", "gru", "convolution")

VersionedTensor = tuple[Tensor, int]
"""A tensor with its version counter, which shows whether somebody has written into the tensor since."""


# eq=False: calls are keys of dictionaries, and two calls of one layer are two keys
@dataclass(eq=False)
class LayerCall:
    """One call of a sparse layer in a forward pass.

    ``inputs`` are taken as they entered the layer; ``activations`` are those after the layer's activation function, in
    the ``shape`` of the layer's output.
    """

    name: str
    module: nn.Module
    inputs: VersionedTensor
    shape: torch.Size
    activations: VersionedTensor | None = None
    unactivated: VersionedTensor | None = None
    """The layer's output, where the next layer takes it without an activation function between."""
    mixed_by: str = ""
    """The operation, or the layer, after which the neurons cannot be told apart."""


@dataclass(frozen=True)
class TensorHistory:
    """How a tensor was made of the output of one :class:`LayerCall`."""

    level: int
    """The most that happened on the way: UNCHANGED, AFFINE or ACTIVATED."""
    order: tuple[int, ...] | None
    """Which dimension of the layer's output each dimension is; () after a reshape, None where that is lost."""
    mixed_by: str = ""
    """The operation that mixed the neurons; empty where none has."""
    aligned: Tensor | None = None
    """The latest tensor on the way that had the shape of the layer's output; None where this tensor has it."""
    aligned_level: int = UNCHANGED
    """The most that happened up to ``aligned``."""


@dataclass(frozen=True)
class Operation:
    """What an operation does to any tensor that it takes."""

    name: str
    level: int
    mixes: bool
    permutation: tuple[int, ...] = ()
    """For a transposition, the dimension of the input that each dimension of the output is."""

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...]) -> "Operation":
        """The operation that aten calls ``name``, with its positional arguments."""
        plain = name.rstrip("_")  # in place or not makes no difference here
        mixes = plain.startswith(_PRODUCTS) or any(part in plain for part in _RECURRENT)
        if plain in _TRANSPOSES:
            return cls(plain, UNCHANGED, False, _permutation(plain, args))
        if plain in _RESHAPES or plain in _COPIES:
            return cls(plain, UNCHANGED, mixes)
        # an average is a sum with fixed factors; a maximum is not one, and counts as an activation function
        is_affine = plain in _AFFINE or "avg_pool" in plain or plain.startswith("upsample")
        return cls(plain, AFFINE if is_affine else ACTIVATED, mixes)


def _permutation(name: str, args: tuple[Any, ...]) -> tuple[int, ...]:
    """The dimension of the input that each dimension of a transposition's output is."""
    count = args[0].dim()
    if name == "permute":
        return tuple(int(d) % count for d in args[1])
    order = list(range(count))
    one, other = (0, count - 1) if name == "t" else (args[1] % count, args[2] % count)
    order[one], order[other] = order[other], order[one]
    return tuple(order)


def histories_after(
    sources: list[tuple[Tensor, dict[LayerCall, TensorHistory]]], operation: Operation, out: Tensor
) -> dict[LayerCall, TensorHistory]:
    """Histories of the output of an operation, by the calls that it was made of.

    Where one call's output arrives on several ways (a residual connection), the way on which most happened counts.
    """
    found: dict[LayerCall, TensorHistory] = {}
    for source, histories in sources:
        for call, history in histories.items():
            passed = _history_after(call, history, operation, source, out)
            if call in found and passed.level <= found[call].level:
                continue
            # neurons that an earlier way has mixed stay mixed, though this way counts for everything else
            mixed_earlier = found[call].mixed_by if call in found else ""
            found[call] = replace(passed, mixed_by=passed.mixed_by or mixed_earlier)
    return found


def _history_after(
    call: LayerCall, history: TensorHistory, operation: Operation, source: Tensor, out: Tensor
) -> TensorHistory:
    """The history of ``out``, which an operation made of ``source``, which has ``history``."""
    unpermuted = tuple(range(len(call.shape)))
    order = history.order
    if operation.permutation:
        order = tuple(order[d] for d in operation.permutation) if order else None
    elif out.shape != source.shape and (operation.name in _RESHAPES or out.dim() != source.dim()):
        # a reshape keeps the order in memory, which is that of the layer's output unless dimensions were permuted
        in_memory_order = operation.name in _RESHAPES and order in ((), unpermuted)
        order = () if in_memory_order else None
    mixed_by = history.mixed_by or (operation.name if operation.mixes else "")
    level = max(history.level, operation.level)
    if order == unpermuted and out.shape == call.shape:
        # ``out`` itself has the shape: no older tensor is needed, and none is kept in memory
        return TensorHistory(level, order, mixed_by)
    if history.order == unpermuted and source.shape == call.shape:
        return TensorHistory(level, order, mixed_by, source, history.level)
    return TensorHistory(level, order, mixed_by, history.aligned, history.aligned_level)


def in_output_shape(call: LayerCall, history: TensorHistory, x: Tensor) -> tuple[Tensor | None, int]:
    """``x`` in the shape of the layer's output, or the latest tensor that had it, and the most that happened up to it.

    Args:
        call: the call that ``x`` was made of.
        history: how ``x`` was made of the output of ``call``.
        x: what the next layer takes, or the network returns.
    """
    order, size = history.order, tuple(call.shape)
    if order and len(order) == len(size):
        permuted = x.permute(sorted(range(len(order)), key=order.__getitem__))
        if permuted.shape == call.shape:
            return permuted, history.level
        batched = isinstance(call.module, _ConvNd) and feature_dimension(call.module, permuted) == 1
        same_channels = permuted.shape[:2] == call.shape[:2]
        # pooled before the activation function: each position gets the value of the cell that it was pooled into
        if batched and history.aligned_level < history.level and same_channels:
            return functional.interpolate(permuted, size=size[2:], mode="nearest"), history.level
    elif order == () and x.numel() == call.shape.numel() and history.level > history.aligned_level:
        # an activation function behind a flattening: the same numbers in the same order, only reshaped
        return x.reshape(call.shape), history.level
    return history.aligned, history.aligned_level
