"""Recurrent layers that run as one operation, and packed sequences."""

from collections.abc import Sequence

from torch import Tensor

from sparse_callbacks.channels.axes import Run
from sparse_callbacks.channels.operations.table import Axes, fresh, outputs, rule
from sparse_callbacks.channels.recorded_call import Call

STATES = "are states of a recurrent layer, which makes and reads them"


def _recurrent(call: Call, first: Sequence[Tensor]) -> list[Axes]:
    """A recurrent layer whose weights ``first`` [gates * states, inputs] read the input."""
    inputs = call.axes_of(call.named["input"])
    call.block(inputs[:-1])
    for tensor in call.tensors():
        if not any(tensor is weight for weight in first) and tensor is not call.named["input"]:
            call.block(call.axes_of(tensor), STATES)
    for weight in first:
        made, read = call.axes_of(weight)
        call.join(inputs[-1], read)
        call.block([made], STATES)
        call.note_product(weight, [read], [made])
    return fresh(call)


@rule("mkldnn_rnn_layer")
def _of_mkldnn(call: Call) -> list[Axes]:
    return _recurrent(call, [call.named["weight0"]])


@rule("_cudnn_rnn")
def _of_cudnn(call: Call) -> list[Axes]:
    weights, stride = call.named["weight"], call.named["weight_stride0"]
    return _recurrent(call, [weights[0], weights[stride]] if call.named["bidirectional"] else [weights[0]])


@rule("_pack_padded_sequence")
def _packed(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["input"])
    call.block([*axes[:2], *call.axes_of(call.named["lengths"])])
    data, numbers = outputs(call)
    return [[Run(data.shape[0]), *axes[2:]], [Run(s) for s in numbers.shape]]


@rule("_pad_packed_sequence")
def _padded(call: Call) -> list[Axes]:
    axes = call.axes_of(call.named["data"])
    call.block([axes[0], *call.axes_of(call.named["batch_sizes"])])
    data, lengths = outputs(call)
    return [[*(Run(s) for s in data.shape[:2]), *axes[1:]], [Run(s) for s in lengths.shape]]
