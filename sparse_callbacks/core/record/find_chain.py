"""Whether sparse layers are a chain, in which each reads the outputs of the one before alone."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparse_callbacks.core.selection import Entry

PASSED = (
    *("Relu", "LeakyRelu", "PreluKernel", "Elu", "Celu", "Selu", "Gelu", "Silu", "Mish", "Tanh", "Sigmoid", "Hardtanh"),
    *("Hardswish", "Hardsigmoid", "Softplus", "LogSigmoid", "Threshold", "Clamp", "Abs", "Sqrt", "Pow", "Exp", "Neg"),
    *("Relu6", "Softshrink", "Hardshrink", "Rrelu", "RreluWithNoise", "Sin", "Cos", "Softsign"),
    *("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeLayerNorm", "FusedRmsNorm", "NativeGroupNorm"),
    *("NativeDropout", "FusedDropout", "MaxPool", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D"),
    *("AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Mean"),
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Add", "Sub", "Mul", "Div"),
    *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBicubic2D"),
    *("MkldnnMaxPool2D", "NativeBatchNormLegit", "BatchNormImpl", "Alias", "Contiguous"),
)
"""Operations of torch whose outputs belong to the same units as their inputs, in the same order."""


class LayerCall(NamedTuple):
    """One call of a sparse layer in a forward pass, as a forward hook sees it.

    Attributes:
        name: the name of its weight.
        read: the node of autograd's graph that made its input; None for data.
        made: the node that made its output.
        inputs, outputs: shapes of the two.
    """

    name: str
    read: Any
    made: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, name: str, x: Tensor, y: Tensor) -> "LayerCall":
        """The call of a layer that took ``x`` and gave ``y``. Call it in the hook: what is written into ``y`` in place later
        has nodes of its own."""
        return cls(name, x.grad_fn, y.grad_fn, tuple(x.shape), tuple(y.shape))


class Chain(NamedTuple):
    """The sparse layers of a network from input to output, or why they are not such a chain.

    Attributes:
        names: names of their weights; empty where there is no chain.
        reason: why not; empty where there is one.
    """

    names: tuple[str, ...]
    reason: str = ""


def find_chain(calls: Sequence[LayerCall], entries: Sequence[Entry]) -> Chain:
    """Whether each sparse layer reads the outputs of the one before, through operations on single units alone.

    The graph of autograd is followed from the input of each layer back to the output of the one before: elementwise
    functions, norms, poolings, dropout and flattening may lie between, and nothing that has another activation for an input.

    Args:
        calls: the calls of the sparse layers in one forward pass that recorded a graph, in order; ask while it lives.
        entries: the sparse parameters.
    """
    # biases and gains that gates close connect nothing: they close with the channel of their layer
    kinds = {e.name: e for e in entries if len(e.shape) > 1}
    calls = [call for call in calls if call.name in kinds]
    names = [call.name for call in calls]
    if odd := [n for n, e in kinds.items() if e.parts > 1]:
        return Chain((), f"{odd[0]} is not the weight of a linear layer or a convolution")
    if idle := [n for n in kinds if n not in names]:
        return Chain((), f"{idle[0]} was not called in the forward pass")
    if twice := [n for n in names if names.count(n) > 1]:
        return Chain((), f"{twice[0]} is used more than once in a forward pass")
    if len(names) < 2:
        return Chain((), "there is one sparse layer alone" if names else "there is no sparse layer")
    for before, after in pairwise(calls):
        if reason := _why_not_next(before, after) or _why_shapes_differ(before, after, kinds):
            return Chain((), reason)
    return Chain(tuple(names))


def _why_not_next(before: LayerCall, after: LayerCall) -> str:
    """What else than the outputs of the layer before a layer reads, as a sentence; empty where it reads them alone."""
    where, node = f"between {before.name} and {after.name} lies", after.read
    if before.made is None or node is None:
        return f"the graph of autograd does not lead from {before.name} to {after.name}"
    while node is not before.made:
        kind = type(node).__name__.partition("Backward")[0]
        if kind not in PASSED:
            return f"{where} {kind}, which is a layer of its own or mixes units"
        parents = _activations(node)
        if len(parents) != 1:
            return f"{where} {kind} of {len(parents)} activations, as in a residual connection"
        node = parents[0]
    return ""


def _activations(node: Any) -> list[Any]:
    """The nodes of a graph that a node passes gradients on to, without those of parameters and views of them."""
    return [parent for parent, _ in node.next_functions if parent is not None and not _is_parameter(parent)]


def _is_parameter(node: Any) -> bool:
    while not hasattr(node, "variable"):
        if len(node.next_functions) != 1 or node.next_functions[0][0] is None:
            return False
        node = node.next_functions[0][0]
    return isinstance(node.variable, nn.Parameter)


def _why_shapes_differ(before: LayerCall, after: LayerCall, entries: Mapping[str, Entry]) -> str:
    """Why the inputs of a layer cannot be the outputs of the one before, as a sentence; empty where they are."""
    made, read = (len(entries[call.name].shape) - 2 for call in (before, after))  # dimensions of the kernels
    units, inputs = before.outputs[-1 - made], after.inputs[-1 - read]
    # a flattened image has one block of inputs for each channel; rows that are flattened have them in another order
    flattened = made > read == 0 and len(after.inputs) == 2 and inputs % units == 0
    if (made != read and not flattened) or (made == read and units != inputs):
        return f"{before.name} has outputs {list(before.outputs)}, and {after.name} reads {list(after.inputs)}"
    return ""
